"""sharding.py: rank 0 alone reads a model, and each rank then has its part of it, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import make_records, torchrun
from made_models import family

import train
from alpaca.training import lora

CASES = {
    "tied": ("OPT", {}),
    "renamed": ("GPT-NeoX", {}),
    "composite": ("Gemma 3, text and images", {}),
    "experts": ("Qwen3-MoE", {}),
    "lora-tied": ("Llama 3", {"tie_word_embeddings": True}),
    "lora-experts": ("Mixtral", {}),
}


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    """Folders, by case, with what two ranks have after loading; rank 1 was told of a model without weights."""
    root = tmp_path_factory.mktemp("loaded")
    (root / "data.json").write_text(json.dumps(make_records(8)))
    for case, (name, config) in CASES.items():
        family(root / case / "base-0", name, tokenizer, **config)
        shutil.copytree(root / case / "base-0", root / case / "base-1")
        (root / case / "base-1" / "model.safetensors").write_bytes(b"not opened")
    shutil.copytree(root / "tied", root / "broken")
    (root / "broken" / "base-0" / "model.safetensors").write_bytes(b"broken")
    folders = [root / case for case in ("broken", *CASES)]
    result = torchrun(2, "tests/load_on_two_ranks.py", root / "data.json", *folders)
    assert result.returncode == 0, result.stderr
    return root


@pytest.mark.parametrize("case", CASES)
def test_each_rank_has_what_rank_0_has_read_bit_for_bit(case, loaded):
    base = loaded / case / "base-0"
    model = train.load_model(base, torch.float32)
    lora.freeze_other_senses(model)
    train.add_special_tokens(train.load_tokenizer(base), model)
    if case.startswith("lora"):
        arguments = ["--output_dir", str(loaded / case / "one"), "--lora_r", "4"]
        model = lora.add_adapter(model, train.parse_args(arguments)[2])
    ranks = [torch.load(loaded / case / f"loaded-{rank}.pt") for rank in (0, 1)]
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert any("inv_freq" in name for name in expected) or case == "tied"  # not in a checkpoint
    for found in ranks:
        assert found["sharded"] and found["trained"] == sum(x.requires_grad for x in model.parameters())
        assert found["whole"].keys() == expected.keys()  # of a tied pair once
        assert not [name for name, x in found["whole"].items() if not torch.equal(x, expected[name])]


def test_what_rank_0_cannot_read_ends_every_rank_with_the_same_line(loaded):
    lines = {(loaded / "broken" / f"error-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(lines) == 1 and "the model cannot be loaded" in lines.pop()
