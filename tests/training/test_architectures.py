"""Each family of models: trained through train.py, saved, read back and asked; docs/architectures.md says the same."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from conftest import ROOT, make_records
from made_models import FAMILIES, family, load_tensors
from made_trainer import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from alpaca.inference.generate import Settings, answer_batch
from alpaca.inference.load import load
from alpaca.prompts import prompt_ids
from alpaca.training import lora, packing, receipt

DOCUMENT = ROOT / "docs" / "architectures.md"
rows: dict[str, dict[str, str]] = {}  # of the document's table, by family


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No plot of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receipt, "loss_plot", lambda *_: None)
        yield


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


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_is_saved_reads_back_and_answers(name, adapted, bases, data, tmp_path, monkeypatch, capsys):
    base, in_memory, finish = bases(name), [], train.finish

    def remember(trainer, *args):
        packing.set_attention(trainer.model, packing.library_attention(trainer.model))
        in_memory.append(logits(trainer.model, trainer.processing_class))
        trainer.model.train()
        return finish(trainer, *args)

    monkeypatch.setattr(train, "finish", remember)
    run(base, data, tmp_path, *(("--lora_r", 4) if adapted else ()))
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
    if adapted:
        adapter = load_tensors(tmp_path / "adapter")
        assert adapter and all(tensor.any() for tensor in adapter.values())
        assert images <= same < b.keys()
    else:
        assert same == images

    model, tokenizer = load(tmp_path)
    (answer,) = answer_batch(model, tokenizer, prompt_ids(tokenizer, ["Count."]), Settings(5, temperature=0))
    assert answer.tokens

    row = rows.setdefault(name, {"family": name, "class": type(saved).__name__})
    row["lora" if adapted else "full"] = "yes"
    row["packed"] = "" if "examples are padded" in printed else "yes"
    row["left"] = found(r"LoRA leaves [\d.]+% of the parameters .*?: (.*)", printed) if adapted else row.get("left", "")
    row["frozen"] = "the part for images" if "images or sound are not trained" in printed else ""
    row["dropped"] = found(r"of the checkpoint's values: (\S+) \([\d.]+%\)", printed)


def numel(tensors: dict, *words: str) -> int:
    return sum(tensor.numel() for key, tensor in tensors.items() if any(word in key for word in words))


def test_the_shares_that_are_reported_are_right(bases, data, tmp_path, capsys):
    arguments = train.parse_args(["--output_dir", str(tmp_path), "--lora_r", "4"])[2]

    base = bases("Qwen3.5, text and images")
    tensors, dropped = load_tensors(base), []
    train.load_model(base, torch.float32, dropped)
    share = numel(tensors, "visual") / numel(tensors, "")
    assert 0.1 < share < 0.5
    assert dropped == [f"not in the result, of the checkpoint's values: model.visual ({share:.1%})"]

    base = bases("Gemma 3, text and images")
    model = train.load_model(base, torch.float32, dropped := [])
    assert dropped == []
    tensors = load_tensors(base)
    share = numel(tensors, "vision", "multi_modal") / numel(tensors, "")
    assert lora.freeze_other_senses(model) == pytest.approx(share)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in model.named_parameters() if "vision" not in key and "multi_modal" not in key}

    base = bases("Mamba")
    tensors, model = load_tensors(base), train.load_model(base, torch.float32)
    left = ("out_proj.weight", "x_proj.weight", "A_log", "conv1d.weight", "dt_proj.weight")
    (finding,) = lora.check_coverage(model, arguments)
    share = numel(tensors, *left) / numel(tensors, "")
    assert finding.what.startswith(f"LoRA leaves {share:.1%} of the parameters unchanged")

    findings = lora.check_coverage(train.load_model(bases("OLMoE"), torch.float32), arguments)
    assert "lora_dropout is 0 here" in findings[1].what


def test_lora_adapts_the_dense_layers_of_a_mixture_too(tokenizer, data, tmp_path):
    """peft takes a layer named down_proj for an expert's and loses it: it is adapted as a parameter."""
    base = family(tmp_path / "base", "Qwen3-MoE", tokenizer, mlp_only_layers=[0])
    run(base, data, tmp_path / "out", "--lora_r", 4)
    adapter = load_tensors(tmp_path / "out" / "adapter")
    matrices = {re.sub(r"(\.base_layer)*\.lora_[AB]\.weight", "", key.split("layers.")[1]) for key in adapter}
    dense = {f"0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    attention = {f"{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"}
    assert matrices == dense | attention | {"1.mlp.experts"}
    assert all(tensor.any() for tensor in adapter.values())
    adapted, tokenizer = load(tmp_path / "out" / "adapter")
    merged, _ = load(tmp_path / "out")
    assert (logits(adapted, tokenizer) - logits(merged, tokenizer)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_a_router_learns_the_same_however_a_step_is_split(name, tokenizer, tmp_path, monkeypatch):
    """The load-balancing loss counted once a batch: 3 and 12 times in a step of 3 and 12 batches."""
    base = family(tmp_path / "base", name, tokenizer, output_router_logits=True, router_aux_loss_coef=1.0)
    steps = {}

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            routers = [p.grad.flatten() for key, p in model.named_parameters() if key.endswith("mlp.gate.weight")]
            self.seen = torch.cat(routers).clone()

    for batch, batches in ((12, 1), (4, 3), (1, 12)):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": batches, "max_steps": 1}
        trainer = make_trainer(base, tmp_path / "out", records=12, save_strategy="no", max_grad_norm=0, **split)
        packing.weigh_router_loss(trainer.model)
        trainer.add_callback(gradients := Gradients())
        steps[batch] = trainer.train().training_loss, gradients.seen
    whole, router = steps[12]
    assert 6.5 < whole < 8.5  # 5.7 of the text and about 2 of 2 experts in use
    for loss, gradient in (steps[4], steps[1]):
        assert abs(loss - whole) < 0.01 * whole
        assert (gradient - router).norm() < 0.1 * router.norm()


def test_noise_on_embeddings_is_as_strong_as_with_padding(bases, data, tmp_path, capsys):
    """NEFTune divides by the root of a row's length: in one row of all examples it would be too weak."""
    noises = {}
    for padding in ("longest", "free"):
        run(bases("Llama 3"), data, tmp_path / padding, "--neftune_noise_alpha", 10, "--padding", padding)
        noises[padding] = load_tensors(tmp_path / padding)["model.norm.weight"]
    assert "padded, as with --padding longest: --neftune_noise_alpha depends on row length" in capsys.readouterr().out
    assert torch.equal(noises["longest"], noises["free"])


def test_a_llama_conversion_of_the_first_days_has_its_special_tokens(
    sentencepiece_folder, tokenizer, data, tmp_path, capsys
):
    """Its special tokens are all "", its class has an old name, and it has a tokenizer.model only."""
    base = family(tmp_path / "base", "Llama 3", tokenizer, vocab_size=700)
    (base / "tokenizer.json").unlink()
    shutil.copy(sentencepiece_folder / "tokenizer.model", base)
    empty = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(empty))
    run(base, data, tmp_path / "out")
    assert "\n<s>" in capsys.readouterr().out  # the example that is shown begins with BOS
    for folder, pad in ((base, None), (tmp_path / "out", "[PAD]")):
        _, tokenizer = load(folder)  # as chat.py does
        tokens = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token
        assert tokens == ("<s>", "</s>", "<unk>", pad)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
        first, second, *_ = tokenizer.convert_ids_to_tokens(tokenizer("hello")["input_ids"])
        assert first == "<s>" and second.startswith("▁")


HEAD = """# Architectures

Each family was trained on a tiny random model: two steps through train.py, saved, read back (the same logits) and
asked. `tests/training/test_architectures.py` does so, with all weights and with LoRA, and writes this table.

- **No padding**: the examples of a batch share a row. Other families are padded, and train.py says why.
- **LoRA leaves**: matrices that have no adapter, beside embeddings. train.py reports their share of the parameters.
- **Frozen**, **dropped**: what stays as it was, and what of the checkpoint is not in the result. Both are reported.

chat.py, judge.py and the page answer with each of them.

| Family | Loaded as | All weights | LoRA | No padding | LoRA leaves | Frozen | Dropped |
|---|---|---|---|---|---|---|---|
"""


def test_the_document_has_this_table():
    columns = ("family", "class", "full", "lora", "packed", "left", "frozen", "dropped")
    if set(rows) != set(FAMILIES) or any(len(row) < len(columns) for row in rows.values()):
        pytest.skip("needs all families, in this process")
    text = HEAD + "".join(f"| {' | '.join(rows[name][key] for key in columns)} |\n" for name in FAMILIES)
    if not DOCUMENT.exists() or DOCUMENT.read_text() != text:
        DOCUMENT.write_text(text)
        pytest.fail("docs/architectures.md was out of date and is now rewritten: read it and commit it")
