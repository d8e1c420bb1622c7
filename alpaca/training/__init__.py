"""Fine-tuning: from records to a trained folder."""
