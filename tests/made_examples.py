"""Tiny models and random examples for tests of batches and losses."""

from __future__ import annotations

import random

import torch
import transformers


def tiny(family: str):
    """A random model of two layers: 300 tokens, hidden 64, 4 heads."""
    common = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    wide = {"intermediate_size": 128}
    config = {
        "llama": lambda: transformers.LlamaConfig(**common, **wide),
        "llama, grouped, tied": lambda: transformers.LlamaConfig(
            **common, **wide, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "mistral": lambda: transformers.MistralConfig(**common, **wide, num_key_value_heads=2, sliding_window=16),
        "qwen2": lambda: transformers.Qwen2Config(**common, **wide, num_key_value_heads=2),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**common, **wide),
        "opt": lambda: transformers.OPTConfig(**common, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0),
    }[family]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.06)  # three times the usual: attention that is not uniform
    return model


def make_examples(count: int, seed: int = 0, longest: int = 50) -> list[dict]:
    """Random tokens, the first half of each example without labels."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        ids = [rng.randrange(3, 300) for _ in range(rng.randint(4, longest))]
        examples.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return examples


class Examples(torch.utils.data.Dataset):
    def __init__(self, examples):
        self.examples, self.lengths = examples, [len(example["input_ids"]) for example in examples]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]
