"""load.py and adapters.py: a model that would answer with garbage is refused in one line, or warned of."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import assert_user_error
from made_models import chain
from transformers import LlamaForCausalLM

from alpaca import UserError
from alpaca.inference import load as load_module
from alpaca.inference.chat import Conversation
from alpaca.inference.generate import Settings
from alpaca.inference.load import load


@pytest.fixture(scope="module")
def paris(tmp_path_factory) -> Path:
    """Says " Paris is." after a line break, as models that were trained on "### Response:\\n" do."""
    return chain(tmp_path_factory.mktemp("models") / "paris", "\n", " Paris", " is", ".")


def test_on_a_cpu_weights_are_float32_whatever_they_were_saved_in(tiny_llama, tmp_path):
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "bf16")
    shutil.copy(tiny_llama / "tokenizer_config.json", tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    model, tokenizer = load(tmp_path / "bf16", "cpu")
    assert (model.dtype, model.training, len(tokenizer)) == (torch.float32, False, 300)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def with_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(folder.parent / "marker")}, folder / "pytorch_model.bin")


def one_more_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


DAMAGED = {
    "missing": (shutil.rmtree, ["does not exist"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["has no tokenizer", "copy tokenizer.json"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["has no weights"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "a diff": (lambda f: (f / "weight_diff.json").write_text("{}"), ["is a weight diff: recover it first"]),
    "malformed tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ["the tokenizer cannot be loaded"]),
    "malformed config": (lambda f: (f / "config.json").write_text("{"), ["cannot be loaded", "config.json"]),
    "unknown kind": (lambda f: (f / "config.json").write_text('{"model_type": "x"}'), ["cannot be loaded", "`x`"]),
    "weights cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        ["the model cannot be loaded"],
    ),
    "a layer missing": (one_more_layer, ["lacks 9 of the model's tensors (model.layers.2.input_layernorm.weight"]),
    "code in a pickle": (with_pickle, ["asks to run code"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_model_is_refused_in_one_line(tiny_llama, tmp_path, damage):
    breakage, words = DAMAGED[damage]
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    breakage(folder)
    with pytest.raises(UserError) as error:
        load(folder, "cpu")
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_does_not_run_whatever_is_on_stdin(tiny_llama, tmp_path, monkeypatch, file):
    """transformers asks on stdin whether it may, and a piped instruction may well begin with a "y"."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Own: pass\n")
    names = {"auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}, "model_type": "own"}
    names |= {"tokenizer_class": "Own"} if file == "tokenizer_config.json" else {}
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | names))
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "y")
    with pytest.raises(UserError, match=r"^[^\n]*custom code[^\n]*$"):
        load(folder, "cpu")
    assert (asked, (tmp_path / "marker").exists()) == ([], False)


def test_a_tied_output_embedding_is_not_missing(tiny_opt):
    model, _ = load(tiny_opt, "cpu")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("device", ["hip:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(tiny_llama, device):
    with pytest.raises(UserError, match=f"device {device} is not available"):
        load(tiny_llama, device)


def test_a_build_of_torch_for_gpus_takes_the_cpu_where_there_is_none(tiny_llama, monkeypatch):
    def named(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    assert load(tiny_llama)[0].device == torch.device("cpu")


def test_a_dtype_can_be_asked_for_and_is_named_when_it_is_none(tiny_llama):
    assert load(tiny_llama, "cpu", "bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype int4 is unknown: choose from float32, bfloat16, float16"):
        load(tiny_llama, "cpu", "int4")


def test_a_16_bit_model_stays_so_on_a_cpu_that_has_no_memory_for_32(tiny_llama, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(load_module, "available_bytes", lambda device: 2 * size)
    assert load(folder, "cpu")[0].dtype == torch.float32
    monkeypatch.setattr(load_module, "available_bytes", lambda device: 2 * size - 1)
    assert load(folder, "cpu")[0].dtype == torch.float16
    assert "loaded as it was saved" in capsys.readouterr().err


def test_a_diff_without_its_manifest_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "diff")
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1e-4 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="near 0 .*as in a weight diff: recover the model first") as error:
        load(folder, "cpu")
    assert "\n" not in str(error.value)


def test_another_models_tokenizer_is_refused(tiny_llama, paris, tmp_path):
    folder = shutil.copytree(paris, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, folder)
    with pytest.raises(UserError, match="the tokenizer has 300 tokens, .* and the model has 7 rows: copy"):
        load(folder, "cpu")


ODD = {
    "none": ({"eos_token": None}, {}, ["the tokenizer's EOS is None, none: "]),
    "empty": ({"eos_token": ""}, {}, ["the tokenizer's EOS is '', none: "]),
    "without a row": ({"eos_token": "<new>"}, {}, ["EOS is '<new>', token 300, and the model has 300 rows: "]),
    "the pad token": ({"pad_token": "</s>"}, {}, []),  # labels made from lengths, as train.py's, have EOS all the same
    "another than generation's": ({}, {"eos_token_id": [5, 6]}, []),  # each of them ends an answer
    "right": ({}, {}, []),
}


@pytest.mark.parametrize("odd", ODD)
def test_answers_that_will_not_end_are_told_in_a_line(tiny_llama, tmp_path, capsys, odd):
    tokens, generation, expected = ODD[odd]
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    for name, changes in (("tokenizer_config.json", tokens), ("generation_config.json", generation)):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))
    load(folder, "cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True)), lines


def test_a_bos_without_a_row_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<new>"}))
    with pytest.raises(UserError, match=r"BOS is token 300 \('<new>'\), and the model has 300 rows: copy"):
        load(folder, "cpu")


def test_a_model_that_does_not_fit_the_device_is_told(tiny_llama, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    with pytest.raises(UserError, match="does not fit the memory: use dtype bfloat16, device cpu, or"):
        load(tiny_llama, "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# A LoRA adapter over its base.


@pytest.fixture(params=["as it is", "vocabulary grown"])
def adapted(request, tiny_llama, tmp_path):
    """(adapter folder, logits of the model that it was saved from); its matrices are random, its base tiny_llama."""
    model, tokenizer = load(tiny_llama, "cpu")
    grown = request.param != "as it is"
    if grown:  # as other trainers do it: a token more, and the embeddings in the adapter
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=grown)
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(torch.tensor([[1, 40, 50]])).logits


def set_base(adapter: Path, base) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


def test_an_adapter_loads_over_its_base_and_says_what_it_said(adapted):
    adapter, logits = adapted
    model, tokenizer = load(adapter, "cpu")
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == logits.shape[-1]
    assert torch.allclose(model(torch.tensor([[1, 40, 50]])).logits, logits, atol=1e-5)
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("base", ["/nowhere/base", "./base", "some/relative/base", None, ""])
def test_an_adapter_without_its_base_is_told_and_base_path_gives_it(adapted, tiny_llama, base):
    adapter, logits = adapted
    set_base(adapter, base)
    with pytest.raises(UserError, match="is a LoRA adapter.*base_path"):
        load(adapter, "cpu")
    with pytest.raises(UserError, match="its base .base_path. /gone does not exist"):
        load(adapter, "cpu", base_path="/gone")
    model, _ = load(adapter, "cpu", base_path=tiny_llama)
    assert torch.allclose(model(torch.tensor([[1, 40, 50]])).logits, logits, atol=1e-5)


def test_a_hub_base_that_cannot_be_fetched_is_told_with_the_way_out(adapted):
    set_base(adapted[0], "nobody/nothing")
    said = "its base nobody/nothing: this folder does not exist, and from the hub the model cannot.*base_path"
    with pytest.raises(UserError, match=said):
        load(adapted[0], "cpu")


def test_an_adapter_of_another_model_is_refused(adapted, tiny_opt, paris):
    for base in (tiny_opt, paris):
        with pytest.raises(UserError, match="the adapter does not fit its base, is it another's, or damaged?") as error:
            load(adapted[0], "cpu", base_path=base)
        assert "\n" not in str(error.value)


def test_an_adapter_without_peft_says_how_to_get_it(adapted, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="is a LoRA adapter, which needs peft: pip install -e '.\\[lora\\]'"):
        load(adapted[0], "cpu")


def test_a_model_has_no_base(tiny_llama):
    with pytest.raises(UserError, match="base_path is for LoRA adapters, and .* is not one: leave it out"):
        load(tiny_llama, "cpu", base_path=tiny_llama)


def test_a_missing_folder_is_told_at_once_and_a_name_of_the_hub_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("typo", "./no/where", "/no/where", "out/sub/typo"):
        with monkeypatch.context() as patch:
            patch.setattr(load_module, "load_tokenizer", lambda *_: pytest.fail("the hub was asked"))
            assert_user_error(lambda name=name: load(name, "cpu"), f"model_path {Path(name)} does not exist")
    assert_user_error(lambda: load("out/typo", "cpu"), "out/typo: this folder does not exist, and from the hub the")
    (tmp_path / "out").mkdir()  # then the name can only be a folder's
    assert_user_error(lambda: load("out/typo", "cpu"), "model_path out/typo does not exist")


def test_a_template_ends_answers_at_a_token_that_no_config_names(tmp_path):
    """As Llama 3's, whose <|eot_id|> is not EOS. The model would go on for a thousand tokens."""
    folder = chain(tmp_path / "model", "Hi", "<eot>", "never", loop=True)
    template = "{% for m in messages %}{{ m['content'] + ('<eot>' if m['role'] == 'assistant' else '') }}{% endfor %}"
    model, tokenizer = load(folder, "cpu")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    assert "never" in Conversation(model, tokenizer, Settings(1000, 0)).ask("x")
    tokenizer.chat_template = template
    for way in ("chat", "alpaca"):
        assert Conversation(model, tokenizer, Settings(1000, 0), way).ask("x") == "Hi"
    tokenizer.chat_template = "{{ raise_exception('no') }}"  # one that fails ends nothing, where it is not asked
    assert "never" in Conversation(model, tokenizer, Settings(1000, 0)).ask("x")
