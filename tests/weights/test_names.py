"""alpaca/weights/names.py: tied embeddings and prefixes, as transformers' own classes have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from made_models import (
    assert_same_bits,
    edit_json,
    fine_tuned,
    folder_with,
    left_in,
    load_tensors,
    refused,
    rewrite,
    write_model,
)
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import weight_diff
from alpaca import UserError
from alpaca.weights.checkpoint import CheckpointReader
from alpaca.weights.names import same_but_for_a_prefix, tied_names, vocab_size
from weight_diff import compare, make_diff, verify

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
LLAMA_LIKE = SMALL | {"intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
MODELS = {
    "gemma": LLAMA_LIKE,
    "gpt2": GPT2,
    "bloom": SMALL | {"n_layer": 2, "n_head": 2},
    "opt": SMALL | {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "falcon": SMALL,
    "gpt_neo": SMALL | {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 2},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 40},
    "gpt_neox": SMALL | {"intermediate_size": 16},
    "llama": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE | {"layer_types": ["full_attention"] * 2},
    "gemma3": {"text_config": LLAMA_LIKE | {"layer_types": ["full_attention"] * 2}},
}


def recover(*args, **kwargs) -> None:
    weight_diff.recover(*args, test_inference=False, **kwargs)


def config_of(kind: str, **more) -> dict:
    """config.json that says as little as may be, as older versions of transformers wrote it."""
    return {"model_type": kind} | MODELS[kind] | more


# ---------------------------------------------------------------------------------------------------------------------
# Tied embeddings.


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("said", [None, True, False])
def test_what_is_tied_is_what_the_class_ties_whether_config_json_says_it_or_not(kind, said):
    config = config_of(kind) | ({} if said is None else {"tie_word_embeddings": said})
    if kind == "gemma3":  # its vision tower is not asked for
        config["vision_config"] = SMALL | {"intermediate_size": 16, "image_size": 28, "patch_size": 14}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert tied_names(config) == model.all_tied_weights_keys
    if said is None:
        assert bool(tied_names(config)) == (kind not in ("llama", "gpt_neox"))


def test_a_class_that_is_not_known_is_tied_where_it_says_so():
    for config in (
        {},
        {"model_type": "of my own"},
        {"model_type": ["llama"]},
        {"model_type": "llama", "vocab_size": []},
    ):
        assert tied_names(config) == {}
        assert tied_names(config | {"tie_word_embeddings": True}) == {"lm_head.weight": "embed_tokens.weight"}
        assert tied_names(config | {"text_config": {"tie_word_embeddings": True}}) != {}


def test_the_vocabulary_is_read_through_a_nested_config_and_the_default_of_its_class():
    assert vocab_size({"vocab_size": 5, "model_type": "of my own"}) == 5
    assert vocab_size(config_of("gemma3")) == 40
    assert vocab_size({"model_type": "gemma3", "text_config": {}}) == 262208
    assert vocab_size({"model_type": "gpt2"}) == 50257
    assert vocab_size({}) is None
    assert vocab_size({"model_type": "of my own"}) is None


def test_a_tied_output_embedding_of_any_name_is_left_out_in_any_layout(tmp_path):
    words = torch.randn(4, 2)
    for number, (kind, output, input) in enumerate(
        [
            ("gpt2", "lm_head.weight", "transformer.wte.weight"),
            ("gpt2", "lm_head.weight", "wte.weight"),
            ("opt", "lm_head.weight", "decoder.embed_tokens.weight"),
            ("gemma3", "language_model.lm_head.weight", "model.language_model.embed_tokens.weight"),
            ("gpt_neox_japanese", "embed_out.weight", "gpt_neox_japanese.embed_in.weight"),
            ("biogpt", "output_projection.weight", "biogpt.embed_tokens.weight"),
        ]
    ):
        for layout, head in (("bin", words), ("safetensors", words.clone())):
            folder = tmp_path / f"{number} {layout}"
            write_model(folder, {output: head, input: words}, layout, model_type=kind)
            assert CheckpointReader(folder).names() == [input]


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_an_output_embedding_with_values_of_its_own_is_kept_as_from_pretrained_keeps_it(tmp_path, layout):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of("gpt2")))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    write_model(tmp_path / "raw", tensors, layout, **config_of("gpt2"))
    assert "lm_head.weight" in CheckpointReader(tmp_path / "raw").names()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "raw").state_dict()
    assert torch.equal(loaded["lm_head.weight"], tensors["lm_head.weight"])
    # and an output without its input is kept
    write_model(tmp_path / "alone", {"lm_head.weight": torch.ones(2, 2)}, layout, model_type="gpt2")
    assert CheckpointReader(tmp_path / "alone").names() == ["lm_head.weight"]


def test_an_output_embedding_that_the_index_leaves_out_is_passed_over_only_when_it_is_tied(tmp_path):
    index = {"weight_map": {"wte.weight": "x.safetensors"}}
    words = torch.randn(4, 2)
    for name, head in (("tied", words.clone()), ("untied", words + 1)):
        files = {"x__safetensors": {"wte.weight": words, "lm_head.weight": head}}
        folder_with(tmp_path / name, {"model_type": "gpt2"}, model__safetensors__index__json=index, **files)
    assert CheckpointReader(tmp_path / "tied").names() == ["wte.weight"]
    with pytest.raises(UserError, match="x.safetensors holds lm_head.weight, which .* does not list"):
        CheckpointReader(tmp_path / "untied")


# ---------------------------------------------------------------------------------------------------------------------
# Prefixes.


def test_a_prefix_ends_at_a_dot():
    assert same_but_for_a_prefix("a.weight", "weight") and same_but_for_a_prefix("weight", "a.weight")
    assert same_but_for_a_prefix("a.b", "a.b")
    assert not same_but_for_a_prefix("pre_a.weight", "a.weight")


def saved(path: Path, kind: str, cls, like: Path) -> dict[str, torch.Tensor]:
    """A folder as ``save_pretrained`` of that class makes it, with a config.json that says as little as may be."""
    torch.manual_seed(0)
    cls.from_config(AutoConfig.for_model(**config_of(kind))).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config_of(kind)))
    shutil.copy(like / "tokenizer.json", path)
    return load_tensors(path)


@pytest.mark.parametrize(("kind", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("bloom", "transformer.")])
@pytest.mark.parametrize("method", ["subtract", "exact"])
def test_a_base_saved_without_the_models_prefix_gives_the_diff_of_one_saved_with_it(
    tiny_llama, tmp_path, capsys, kind, prefix, method
):
    base = saved(tmp_path / "base", kind, AutoModel, tiny_llama)  # as gpt2 and opt were published
    full = saved(tmp_path / "full", kind, AutoModelForCausalLM, tiny_llama)
    assert_same_bits(full, {prefix + name: tensor for name, tensor in base.items()})
    if kind == "gpt2":  # published with its masks
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4).tril() for i in range(2)}
        save_file(base | masks, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    write_model(tmp_path / "tuned", fine_tuned(full), like=tmp_path / "full")

    make_diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "diff", method)
    said = f"note: the names in --path_raw lack the prefix '{prefix}' of those in --path_tuned; they are taken for"
    assert said in capsys.readouterr().out
    make_diff(tmp_path / "full", tmp_path / "tuned", tmp_path / "wanted", method)
    assert "prefix" not in capsys.readouterr().out
    assert_same_bits(load_tensors(tmp_path / "diff"), load_tensors(tmp_path / "wanted"))
    manifests = [(tmp_path / name / "weight_diff.json").read_text() for name in ("diff", "wanted")]
    assert manifests[0] == manifests[1]

    for number, raw in enumerate(("base", "full")):  # whichever of them it was made from
        recover(tmp_path / raw, tmp_path / "diff", tmp_path / f"recovered {number}")
    assert_same_bits(*(load_tensors(tmp_path / f"recovered {number}") for number in (0, 1)))
    verify(tmp_path / "recovered 0", tmp_path / "diff")
    verify(tmp_path / "base", tmp_path / "diff")
    assert f"base is the base model: all {len(base)} tensors are right" in capsys.readouterr().out
    compare(tmp_path / "base", tmp_path / "full")
    compare(tmp_path / "full", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered 0")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).logits, tuned(ids).logits)


def in_columns(folder: Path, **rename: str) -> None:
    """Makes the folder's safetensors a .bin of transposed matrices, which are no one piece there; names change too."""
    tensors = load_tensors(folder)
    (folder / "model.safetensors").unlink()
    columns = {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in tensors.items()}
    torch.save({n.replace(*rename.values()): t for n, t in columns.items()}, folder / "pytorch_model.bin")


def test_a_tuned_model_without_the_bases_prefix_is_written_under_its_own_names(folders):
    """Also where tensors are read from the shard as a whole, the renamed ones among them."""
    shutil.copytree(folders / "raw", folders / "other raw")
    in_columns(folders / "tuned", old="model.", new="")
    in_columns(folders / "other raw", old="", new="")
    make_diff(folders / "other raw", folders / "tuned", folders / "new")
    wanted = {name.removeprefix("model."): tensor for name, tensor in load_tensors(folders / "diff").items()}
    assert_same_bits(load_tensors(folders / "new"), wanted)
    for raw in ("raw", "other raw"):
        recover(folders / raw, folders / "new", folders / f"recovered from {raw}")
    compare(folders / "recovered from raw", folders / "recovered from other raw")
    verify(folders / "tuned", folders / "diff")  # whose names have the prefix


def test_a_prefix_that_does_not_explain_all_names_is_named_in_the_refusal(folders):
    tensors = load_tensors(folders / "raw")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(bare, folders / "raw" / "model.safetensors")  # as LlamaModel saves itself: its output layer is not there
    for task, other, flag in ((make_diff, "tuned", "--path_tuned"), (recover, "diff", "--path_diff")):
        assert refused(folders, task, folders / "raw", folders / other, folders / "new") == (
            f"the names in --path_raw lack the prefix 'model.' of those in {flag}, which does not explain "
            "lm_head.weight: another base model, or one saved without its head?"
        )
    assert "does not explain lm_head.weight" in refused(folders, verify, folders / "raw", folders / "diff")
    assert "lack the prefix 'model.' of those in --path_b" in refused(
        folders, compare, folders / "raw", folders / "tuned"
    )


def test_two_names_that_end_alike_by_chance_are_no_prefix(folders):
    rewrite(folders / "raw", model__norm__weight=None, x__norm__weight=torch.ones(8))
    message = refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new")
    assert "lacks tensors that --path_tuned has: model.norm.weight; another base model?" in message


def test_new_rows_are_found_by_the_vocabulary_of_a_nested_config(folders):
    for name, rows in (("raw", 4), ("tuned", 5)):
        path = folders / name / "config.json"
        path.write_text(json.dumps({"model_type": "gemma3", "text_config": {"vocab_size": rows}}))
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    assert_same_bits(load_tensors(folders / "new"), load_tensors(folders / "diff"))
    edit_json(folders / "raw" / "config.json", text_config={"vocab_size": 6})
    shutil.rmtree(folders / "new")
    before = left_in(folders)
    assert "another base model, or" in refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new")
    assert left_in(folders) == before


@pytest.mark.parametrize("method", ["subtract", "exact"])
def test_an_output_bias_grows_with_the_vocabulary(tmp_path, tiny_llama, method):
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi", **SMALL, intermediate_size=16, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "raw")
    model.resize_token_embeddings(41, mean_resizing=False)
    expected = model.lm_head.bias[-1].item()
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "tuned")
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "tuned")
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", method)
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "recovered")
    tuned, recovered = (load_tensors(tmp_path / name) for name in ("tuned", "recovered"))
    assert (expected, recovered["lm_head.bias"].shape) == (0, (41,))
    if method == "exact":
        assert_same_bits(recovered, tuned)
    else:
        assert max((recovered[name] - tuned[name]).abs().max() for name in tuned) < 1e-6
        assert load_tensors(tmp_path / "diff")["lm_head.bias"][-1] == tuned["lm_head.bias"][-1]


# ---------------------------------------------------------------------------------------------------------------------
# LoRA.


def test_a_merged_adapter_is_a_model_like_any_other(tiny_llama, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / file, tmp_path / "merged")
    make_diff(tiny_llama, tmp_path / "merged", tmp_path / "diff", "exact")
    recover(tiny_llama, tmp_path / "diff", tmp_path / "recovered")
    compare(tmp_path / "merged", tmp_path / "recovered")
    for folder in (tmp_path / "merged", tmp_path / "recovered"):
        verify(folder, tmp_path / "diff")
        assert f"{folder} is the tuned model: all" in capsys.readouterr().out
    changed = {name for name, tensor in load_tensors(tmp_path / "diff").items() if tensor.any()}
    assert len(changed) == 4 and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    message = refused(tmp_path, make_diff, tiny_llama, tmp_path / "adapter", tmp_path / "new")
    assert "is a LoRA adapter, not a model: merge it into its base model first" in message
