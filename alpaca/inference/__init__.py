"""A model and its tokenizer, loaded, checked and asked."""
