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
    assert CheckpointReader(tmp_path / "untied").names() == ["lm_head.weight", "wte.weight"]


def tied_pair(tmp_path: Path, like: Path, raw_stores: str, tuned_stores: str, tuned_ties: bool, rows: int):
    """raw ties its embeddings; tuned is trained from it. Each stores "embed", "head" or "both".

    Returns:
        The folders of both, the tensors that tuned stores, and the values that these had before the training.
    """
    base = {name: tensor.half() for name, tensor in load_tensors(like).items() if name != HEAD}
    config = {"tie_word_embeddings": True}
    stored = {} if raw_stores == "embed" else {HEAD: base[EMBED].clone()}
    raw = write_model(tmp_path / "raw", stored | base, like=like, **config)
    if raw_stores == "head":
        rewrite(raw, model__embed_tokens__weight=None)
    before = {name: tensor.float() for name, tensor in (base | {HEAD: base[EMBED]}).items()}
    tensors = fine_tuned(before, rows)
    if tuned_stores != "both":
        tensors.pop({"embed": HEAD, "head": EMBED}[tuned_stores])
    config = {"tie_word_embeddings": tuned_ties, "vocab_size": 300 + rows}
    return raw, write_model(tmp_path / "tuned", tensors, like=like, **config), tensors, before


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("method", ["subtract", "exact"])
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize(
    ("raw_stores", "tuned_stores", "tuned_ties"),
    [
        ("both", "both", True),  # config tied, but tuned's head differs
        ("embed", "both", True),
        ("embed", "both", False),  # tuned untied it
        ("both", "both", False),
        ("embed", "head", True),  # tuned stores its head alone
        ("both", "head", True),
        ("head", "embed", True),
        ("head", "both", False),
    ],
)
def test_the_head_of_a_tied_base_is_its_input_embedding(
    tiny_llama, tmp_path, capsys, method, rows, raw_stores, tuned_stores, tuned_ties
):
    raw, tuned, tensors, before = tied_pair(tmp_path, tiny_llama, raw_stores, tuned_stores, tuned_ties, rows)
    make_diff(raw, tuned, tmp_path / "diff", method)
    recover(raw, tmp_path / "diff", tmp_path / "recovered")
    recovered = load_tensors(tmp_path / "recovered")
    if method == "exact":
        assert_same_bits(recovered, tensors)
    else:
        grown = {}
        for name in tensors:
            more = rows if name in (HEAD, EMBED) else 0
            grown[name] = (
                torch.cat([before[name], before[name].mean(dim=0, keepdim=True).expand(more, -1)])
                if more
                else before[name]
            )
        wanted = {name: tensor - grown[name] for name, tensor in tensors.items()}
        assert_same_bits(load_tensors(tmp_path / "diff"), wanted)
        assert_same_bits(recovered, {name: tensor + grown[name] for name, tensor in wanted.items()})
    for folder, role in (
        (raw, "base"),
        (tuned, "tuned"),
        (tmp_path / "recovered", "tuned" if method == "exact" else "recovered"),
    ):
        capsys.readouterr()
        verify(folder, tmp_path / "diff")
        assert f"is the {role} model" in capsys.readouterr().out


def test_a_base_without_prefix_that_ties_gives_its_head_to_a_tuned_model_that_does_not(tiny_llama, tmp_path):
    base = saved(tmp_path / "base", "gpt2", AutoModel, tiny_llama)
    full = {f"transformer.{name}": tensor for name, tensor in base.items()} | {HEAD: base["wte.weight"].clone()}
    tuned = write_model(tmp_path / "tuned", fine_tuned(full), like=tmp_path / "base", tie_word_embeddings=False)
    make_diff(tmp_path / "base", tuned, tmp_path / "diff", "exact")
    recover(tmp_path / "base", tmp_path / "diff", tmp_path / "recovered")
    assert_same_bits(load_tensors(tmp_path / "recovered"), load_tensors(tuned))


def test_a_tuned_model_that_ties_what_the_base_does_not_is_told_so(folders):
    edit_json(folders / "raw" / "config.json", tie_word_embeddings=False)
    edit_json(folders / "tuned" / "config.json", tie_word_embeddings=True)
    rewrite(folders / "tuned", lm_head__weight=None)
    message = refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new")
    assert message == (
        "--path_tuned lacks tensors that --path_raw has: lm_head.weight; one config.json ties the output embedding to "
        "the input embedding, the other does not"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The cause, as names and config.json state it.


@pytest.mark.parametrize("which", ["raw", "tuned"])
@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({"v_head__summary__weight": torch.ones(1, 8)}, {}, "v_head.summary.weight belongs to a value head, which PPO"),
        ({"model__q__lora_A__weight": torch.ones(1, 8)}, {}, "belongs to a LoRA adapter: merge it"),
        ({"rotary_emb__other": torch.ones(1)}, {}, "belongs to a cache that the model computes"),
        ({"more": torch.ones(1)}, {"hidden_size": 16}, "their config.json differ in hidden_size: "),
        ({"more": torch.ones(1)}, {"model_type": "opt"}, "their config.json differ in model_type: "),
        ({"more": torch.ones(1)}, {}, "another base model? Their config.json agree in model_type"),
        (
            {"model__norm__weight": torch.ones(9)},
            {},
            "another base model? Their config.json agree in model_type; or are",
        ),
        ({"model__norm__weight": torch.ones(9)}, {"hidden_size": 16}, "their config.json differ in hidden_size: "),
    ],
)
def test_what_does_not_fit_is_told_with_the_cause_that_names_and_configs_state(folders, which, tensors, config, said):
    rewrite(folders / which, **tensors)
    edit_json(folders / which / "config.json", **config)
    message = refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new")
    assert said in message, message
    assert ("another base model" in message) == ("another base model" in said)


def test_caches_of_rotary_embeddings_are_left_out(folders):
    caches = {f"model__layers__0__rotary_emb__{part}": torch.ones(4, 2) for part in ("cos_cached", "sin_cached")}
    rewrite(folders / "tuned", **caches)
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    assert_same_bits(load_tensors(folders / "new"), load_tensors(folders / "diff"))


@pytest.mark.parametrize(
    ("raw_rows", "tuned_rows", "vocabularies", "said"),
    [
        (64, 33, (64, 33), "the larger vocabulary, perhaps padded, is that of --path_raw, resize_token_embeddings(33)"),
        (33, 32, (33, 32), "the larger vocabulary is that of --path_raw, resize_token_embeddings(32) makes it fit"),
        (32, 64, (32, 33), "the config.json of --path_tuned has vocab_size 33, its embeddings have 64 rows"),
        (64, 65, (33, 65), "the config.json of --path_raw has vocab_size 33, its embeddings have 64 rows"),
    ],
)
def test_vocabularies_that_do_not_fit_are_told_with_their_rows(tmp_path, raw_rows, tuned_rows, vocabularies, said):
    """As 32,064 rows against 32,001."""
    for name, rows, size in zip(("raw", "tuned"), (raw_rows, tuned_rows), vocabularies, strict=True):
        write_model(tmp_path / name, {EMBED: torch.ones(rows, 8)}, model_type="llama", vocab_size=size)
    message = refused(tmp_path, make_diff, tmp_path / "raw", tmp_path / "tuned", tmp_path / "new")
    assert f"{EMBED} is [{raw_rows}, 8] in --path_raw but [{tuned_rows}, 8] in --path_tuned: {said}" in message
    assert "base model" not in message


QUANTIZED = {
    "gptq": {"model__norm__qweight": torch.ones(2, 2, dtype=torch.int32), "model__norm__weight": None},
    "bitsandbytes": {"model__norm__weight": torch.ones(8, 1, dtype=torch.uint8)},
    "fp8": {"model__norm__weight": torch.ones(8).to(torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("which", ["raw", "tuned"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantized_model_is_named_by_its_method(folders, which, method):
    rewrite(folders / which, **QUANTIZED[method])
    edit_json(folders / which / "config.json", quantization_config={"quant_method": method})
    message = refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new")
    assert f"--path_{which} {folders / which} is quantized ({method}): model.norm." in message
    assert message.endswith("not floating point; give the unquantized model")
    if which == "raw":
        message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
        assert f"--path_raw {folders / 'raw'} is quantized ({method})" in message


def test_a_quantization_of_float_weights_is_left_out_of_what_is_written(folders, capsys):
    for which in ("raw", "tuned"):
        edit_json(folders / which / "config.json", quantization_config={"quant_method": "gptq"})
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    said = f"note: {folders / 'tuned' / 'config.json'} has a quantization_config, but its weights are not quantized"
    assert said in capsys.readouterr().out
    edit_json(folders / "new" / "config.json", quantization_config={"quant_method": "gptq"})
    recover(folders / "raw", folders / "new", folders / "recovered")
    assert "config.json has a quantization_config" in capsys.readouterr().out
    for name in ("new", "recovered"):
        config = json.loads((folders / name / "config.json").read_text())
        assert "quantization_config" not in config or name == "new"


def test_code_that_is_not_copied_is_told(folders, capsys):
    auto_map = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    edit_json(folders / "tuned" / "config.json", auto_map=auto_map)
    (folders / "tuned" / "modeling_x.py").write_text("raise SystemExit")
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    assert "config.json names Python code (auto_map), which is not copied: publish it too" in capsys.readouterr().out
    assert json.loads((folders / "new" / "config.json").read_text())["auto_map"] == auto_map
    assert "modeling_x.py" not in left_in(folders / "new")


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
    said = f"note: the names in --path_raw lack the prefix '{prefix}' of those in --path_tuned; they are treated as"
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
            "lm_head.weight: saved without its head?"
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
    message = refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new")
    assert "the config.json of --path_raw has vocab_size 6, its embeddings have 4 rows" in message
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
