"""The original's approach to weight diffs, on today's libraries, for bench_weight_diff.py to run in its own process.

    python benchmarks/original_weight_diff.py make_diff RAW TUNED DIFF
    python benchmarks/original_weight_diff.py recover RAW DIFF TUNED

Both models are loaded whole in float32, raw gets its [PAD] row, one is added to the other in place, and the result is
saved. Left out is what costs time and changes no tensor: the sum of all values and the smoke test.
"""

from __future__ import annotations

import sys

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def main(task: str, path_raw: str, path_other: str, path_out: str) -> None:
    """Writes other - raw (make_diff) or other + raw (recover)."""
    other = AutoModelForCausalLM.from_pretrained(path_other, dtype=torch.float32)
    raw = AutoModelForCausalLM.from_pretrained(path_raw, dtype=torch.float32)
    tokenizer_other = AutoTokenizer.from_pretrained(path_other)
    tokenizer_raw = AutoTokenizer.from_pretrained(path_raw)
    if tokenizer_raw.pad_token is None:
        added = tokenizer_raw.add_special_tokens({"pad_token": "[PAD]"})
        raw.resize_token_embeddings(len(tokenizer_raw), mean_resizing=False)
        for embeddings in (raw.get_input_embeddings(), raw.get_output_embeddings()):
            rows = embeddings.weight.data
            rows[-added:] = rows[:-added].mean(dim=0, keepdim=True)
    values, raw_values = other.state_dict(), raw.state_dict()
    for name in tqdm(values):
        values[name].add_(-raw_values[name] if task == "make_diff" else raw_values[name])
    other.save_pretrained(path_out)
    tokenizer_other.save_pretrained(path_out)


if __name__ == "__main__":
    main(*sys.argv[1:])
