"""lora.py: the adapter on its base equals the merged model, and an adapter that changes nothing is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import make_records, torchrun
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from alpaca import UserError
from alpaca.inference.adapters import ADAPTER, merge_adapter
from alpaca.training import lora


def arguments(model, data, out, *extra) -> list[str]:
    argv = [
        *("--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--max_steps", 4, "--lora_r", 4),
        *("--per_device_train_batch_size", 8, "--learning_rate", 1e-2, "--logging_steps", 1, "--disable_tqdm", "True"),
        *("--save_strategy", "steps", "--save_steps", 2, "--report_to", "none", *extra),
    ]
    return [str(word) for word in argv]


def run(*argv):
    train.train(*train.parse_args(arguments(*argv)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(make_records(24)))
    return path


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_opt"])
def trained(request, data, tmp_path_factory):
    """(base folder, output folder, logits of the trained model before it was saved); dropout as by default."""
    base, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("lora") / "out"
    seen, inner = {}, lora.save

    def save(trainer, output_dir, load_base):
        seen["logits"] = logits(trainer.model, trainer.processing_class)
        inner(trainer, output_dir, load_base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "save", save)
        run(base, data, out)
    return base, out, seen["logits"]


def logits(model, tokenizer) -> torch.Tensor:
    """(tokens, vocabulary) for one text."""
    inputs = tokenizer("### Instruction:\nCount from 1 to 4 in words.", return_tensors="pt")
    with torch.inference_mode():
        return model.eval()(**{key: inputs[key] for key in ("input_ids", "attention_mask")}).logits[0]


def load(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def test_every_linear_layer_but_the_output_embedding_is_adapted(trained):
    base, out, _ = trained
    model = load(base)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(linear) in (14, 12)  # two layers of LLaMA's 7 or OPT's 6
    assert saved.keys() == {f"base_model.model.{name}.lora_{matrix}.weight" for name in linear for matrix in "AB"}
    assert all(tensor.any() for tensor in saved.values())
    assert load_file(out / "checkpoint-2" / "adapter_model.safetensors").keys() == saved.keys()  # no embeddings
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_the_merged_model_reloads_equal_to_the_model_in_memory(trained):
    base, out, in_memory = trained
    merged = load(out)
    assert len(AutoTokenizer.from_pretrained(out)) == merged.config.vocab_size == 301
    assert not hasattr(merged, "peft_config")
    got = logits(merged, AutoTokenizer.from_pretrained(out))
    before = logits(load(base), AutoTokenizer.from_pretrained(base))
    assert (got - in_memory).abs().max() < 1e-5
    assert (got[:, :300] - before).abs().max() > 0.1  # the bound is not met by an adapter that does nothing


def test_the_adapter_on_the_base_as_it_is_equals_the_merged_model(trained):
    """The base has 300 rows, the merged model one more for [PAD]: the adapter needs none."""
    base, out, _ = trained
    adapted = peft.PeftModel.from_pretrained(load(base), out / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    assert tokenizer.pad_token == "[PAD]"
    assert (logits(adapted, tokenizer) - logits(load(out), tokenizer)[:, :300]).abs().max() < 1e-5


def test_only_lora_matrices_changed(trained):
    base, out, _ = trained
    a, b = load(base).state_dict(), load(out).state_dict()
    changed = {name for name in a if not torch.equal(a[name], b[name][: len(a[name])])}
    adapted = load_file(out / "adapter" / "adapter_model.safetensors")
    assert changed == {
        name.split("base_model.model.")[1].replace("lora_A.", "") for name in adapted if "lora_A" in name
    }


def test_the_same_seed_gives_the_same_adapter(trained, data, tmp_path):
    base, out, _ = trained
    torch.manual_seed(1)
    run(base, data, tmp_path)
    a, b = load_file(out / "adapter" / ADAPTER), load_file(tmp_path / "adapter" / ADAPTER)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_adapter_equals_an_uninterrupted_one(trained, data, tmp_path):
    base, out, _ = trained
    run(base, data, tmp_path, "--resume_from_checkpoint", out / "checkpoint-2")
    a, b = load_file(out / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_under_fsdp_two_ranks_train_beside_a_base_in_bf16_as_one_does(tiny_llama, data, tmp_path):
    bf16 = ("--bf16", "True", "--lora_dropout", 0)
    run(tiny_llama, data, tmp_path / "one", *bf16)
    fsdp = ("--fsdp", "--fsdp_config", "configs/fsdp.json", "--per_device_train_batch_size", 4)
    two = torchrun(2, "train.py", *arguments(tiny_llama, data, tmp_path / "two", *bf16, *fsdp))
    assert two.returncode == 0, two.stderr
    assert "saved, reloaded and resumed: weights and optimizer equal" in two.stdout
    for sharded in (None, True):
        args = SimpleNamespace(bf16=True, fp16=False, load_in_4bit=False, fsdp=sharded)
        assert lora.base_options(args) == {"dtype": torch.bfloat16}
    histories = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("one", "two")]
    one, two = ([entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in histories)
    assert len(one) == 4 and one[0] - one[-1] > 0.05
    assert two == pytest.approx(one, abs=5e-3)
    merged, adapter = load(tmp_path / "two"), load_file(tmp_path / "two" / "adapter" / ADAPTER)
    base, scale = dict(load(tiny_llama).named_parameters()), 32 / 4
    for name, weight in merged.named_parameters():
        if (a := f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight") in adapter:
            delta = scale * adapter[a.replace("lora_A", "lora_B")] @ adapter[a]
            assert delta.any() and torch.allclose(weight, base[name] + delta, atol=1e-6)


def test_a_checkpoint_with_another_kind_of_weights_is_refused(trained, data, tmp_path):
    base, out, _ = trained
    resume = ("--resume_from_checkpoint", out / "checkpoint-2")
    for rank in (0, 8):
        with pytest.raises(UserError, match=f"was trained with lora_r 4 .now {rank}., which cannot change midway"):
            run(base, data, tmp_path, *resume, "--lora_r", rank)


def test_a_damaged_adapter_is_refused(trained, tmp_path):
    base, out, _ = trained
    adapter = shutil.copytree(out / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / ADAPTER)
    first = next(name for name in tensors if ".lora_A." in name)
    for damaged, words in (
        ({}, "does not fit its base, .* damaged"),
        ({name: tensor for name, tensor in tensors.items() if name != first}, "does not fit its base, .* damaged"),
        ({name: tensor * (".lora_A." in name) for name, tensor in tensors.items()}, "changes nothing"),
    ):
        save_file(damaged, adapter / ADAPTER)
        with pytest.raises(UserError, match=words):
            merge_adapter(load(base), adapter, 1)


def test_an_adapter_that_learned_nothing_leaves_no_model(tiny_llama, data, tmp_path):
    with pytest.raises(UserError, match="changes nothing .*learning rate"):
        run(tiny_llama, data, tmp_path, "--learning_rate", 0, "--max_steps", 1, "--save_strategy", "no")
    assert not list(tmp_path.glob("model*"))


def test_flags_that_do_not_go_together_are_one_line(tiny_llama, data, tmp_path):
    with pytest.raises(UserError, match="add --lora_r 16"):
        run(tiny_llama, data, tmp_path, "--load_in_4bit", "True", "--lora_r", 0)


def test_a_base_without_an_eos_is_refused(tiny_llama, data, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(UserError, match="has no EOS"):
        run(base, data, tmp_path)


def test_qlora_trains_the_adapter_alone_and_merges_into_the_whole_base(tiny_llama, data, tmp_path, monkeypatch):
    seen, inner = {}, lora.save

    def save(trainer, output_dir, load_base):
        seen["types"] = {type(module).__name__ for module in trainer.model.modules()}
        seen["grads"] = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        seen["frozen"] = trainer.meter.parameters - trainer.meter.trainable
        inner(trainer, output_dir, load_base)

    monkeypatch.setattr(lora, "save", save)
    run(tiny_llama, data, tmp_path, "--load_in_4bit", "True")
    assert seen["frozen"] == load(tmp_path).num_parameters()  # not half of what is packed, two elements in a byte
    assert "Linear4bit" in seen["types"]
    assert seen["grads"] and all(".lora_" in name for name in seen["grads"])
    adapted = peft.PeftModel.from_pretrained(load(tiny_llama), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (logits(adapted, tokenizer) - logits(load(tmp_path), tokenizer)[:, :300]).abs().max() < 1e-5
