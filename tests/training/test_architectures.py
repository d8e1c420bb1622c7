"""Each family of models: trained through train.py, saved, read back and asked; docs/architectures.md says the same."""

from __future__ import annotations

import gc
import json
import re

import pytest
import torch
from conftest import ROOT, make_records
from made_models import FAMILIES, family, load_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from alpaca import UserError
from alpaca.inference.generate import Settings, answer_batch
from alpaca.inference.load import load
from alpaca.prompts import prompt_ids
from alpaca.training import packing, receipt

DOCUMENT = ROOT / "docs" / "architectures.md"
CANNOT_BE_ASKED = ("Mamba",)
rows: dict[str, dict[str, str]] = {}  # of the document's table, by family


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No plot of two steps; and what pytest has loaded is not searched for garbage after each run (0.5 s)."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receipt, "loss_plot", lambda *_: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(make_records(6)))
    return path


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("families"), {}

    def base(name):
        made[name] = made.get(name) or family(folder / name.replace(" ", "-"), name, tokenizer)
        return made[name]

    return base


def run(base, data, out, *extra):
    argv = [
        *("--model_name_or_path", base, "--data_path", data, "--output_dir", out, "--max_steps", 2, "--logging_steps"),
        *(1, "--per_device_train_batch_size", 3, "--learning_rate", 1e-2, "--save_strategy", "no", "--report_to"),
        *("none", "--disable_tqdm", "True", "--skip_save_rehearsal", "True", *extra),
    ]
    train.train(*train.parse_args([str(word) for word in argv]))


@torch.inference_mode()
def logits(model, tokenizer) -> torch.Tensor:
    """(tokens, vocabulary) for one text."""
    ids = tokenizer("### Instruction:\nCount from 1 to 4 in words.", return_tensors="pt").input_ids
    return model.eval()(input_ids=ids, use_cache=False).logits[0].float()


def found(pattern: str, printed: str) -> str:
    match = re.search(pattern, printed)
    return match[1] if match else ""


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_is_saved_reads_back_and_answers(name, lora, bases, data, tmp_path, monkeypatch, capsys):
    base, in_memory, finish = bases(name), [], train.finish

    def remember(trainer, *args):
        packing.set_attention(trainer.model, packing.library_attention(trainer.model))
        in_memory.append(logits(trainer.model, trainer.processing_class))
        trainer.model.train()
        return finish(trainer, *args)

    monkeypatch.setattr(train, "finish", remember)
    run(base, data, tmp_path, *(("--lora_r", 4) if lora else ()))
    printed = capsys.readouterr().out

    # What was in memory is in the folder, and differs from the base.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (logits(saved, tokenizer) - in_memory[0]).abs().max() < 1e-4
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (in_memory[0][:, :300] - logits(before, tokenizer)[:, :300]).abs().max() > 1e-2

    # Full: each tensor of text was trained, each other one is as it was. LoRA: each matrix of the adapter has learned.
    a, b = load_tensors(base), load_tensors(tmp_path)
    same = {key for key in b if key in a and torch.equal(b[key][: len(a[key])], a[key])}
    images = {key for key in b if "vision" in key or "multi_modal" in key}
    if lora:
        adapter = load_tensors(tmp_path / "adapter")
        assert adapter and all(tensor.any() for tensor in adapter.values())
        assert images <= same < b.keys()
    else:
        assert same == images

    if name in CANNOT_BE_ASKED:
        with pytest.raises(UserError, match="has no key/value cache: choose one that has it"):
            load(tmp_path)
    else:
        model, tokenizer = load(tmp_path)
        (answer,) = answer_batch(model, tokenizer, prompt_ids(tokenizer, ["Count."]), Settings(5, temperature=0))
        assert answer[1] > 0

    row = rows.setdefault(name, {"family": name, "class": type(saved).__name__})
    row["lora" if lora else "full"] = "yes"
    row["packed"] = "" if "examples are padded" in printed else "yes"
    row["asked"] = "" if name in CANNOT_BE_ASKED else "yes"
    row["left"] = found(r"LoRA leaves .*?: (.*)", printed) if lora else row.get("left", "")
    row["not trained"] = "the part for images" if "images or sound stays" in printed else ""
    row["not saved"] = found(r"of the checkpoint's values: (\S+)", printed)
    shares = [float(share) for share in re.findall(r"([\d.]+)%\)? ?(?:of the parameters|\n)", printed)]
    assert all(0 < share < 100 for share in shares)


HEAD = """# Architectures

Each family was trained on a tiny random model: two steps through train.py, saved, read back (the same logits) and
asked. `tests/training/test_architectures.py` does so, with all weights and with LoRA, and writes this table.

- **No padding**: the examples of a batch share a row. Other families are padded, and train.py says why.
- **LoRA leaves**: matrices that have no adapter, beside embeddings. train.py reports their share of the parameters.
- **Frozen**, **dropped**: what stays as it was, and what of the checkpoint is not in the result. Both are reported.
- **Chat**: chat.py, judge.py and the page answer with it. A model without a key/value cache is refused in one line.

| Family | Loaded as | All weights | LoRA | No padding | LoRA leaves | Frozen | Dropped | Chat |
|---|---|---|---|---|---|---|---|---|
"""


def test_the_document_has_this_table():
    columns = ("family", "class", "full", "lora", "packed", "left", "not trained", "not saved", "asked")
    if set(rows) != set(FAMILIES) or any(len(row) < len(columns) for row in rows.values()):
        pytest.skip("needs all families, in this process")
    text = HEAD + "".join(f"| {' | '.join(rows[name][key] for key in columns)} |\n" for name in FAMILIES)
    if not DOCUMENT.exists() or DOCUMENT.read_text() != text:
        DOCUMENT.write_text(text)
        pytest.fail("docs/architectures.md was out of date and is now rewritten: read it and commit it")
