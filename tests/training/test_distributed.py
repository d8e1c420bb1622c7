"""distributed, flags of 2023, configs/, runs/: the original's commands run, families train, bad input is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, make_records, torchrun

import train
from alpaca import UserError
from alpaca.training import distributed, flags

COMMON = (
    "--model_name_or_path {model} --data_path {data} --bf16 True --output_dir {out} --num_train_epochs 3 "
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8 "
    '--evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 --save_total_limit 1 --learning_rate 2e-5 '
    '--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 '
)
# The original's three commands, behind torchrun --nproc_per_node=4 --master_port=… train.py
LLAMA = COMMON + "--fsdp \"full_shard auto_wrap\" --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --tf32 True"
OPT = COMMON + "--fsdp \"full_shard auto_wrap\" --fsdp_transformer_layer_cls_to_wrap 'OPTDecoderLayer' --tf32 True"
DEEPSPEED = COMMON.replace("--warmup_ratio", "--deepspeed ./configs/default_offload_opt_param.json --warmup_ratio")
DEEPSPEED += "--tf32 True"


def write_data(path, count=24):
    path.write_text(json.dumps(make_records(count)))
    return path


def train_here(model, data, out, *extra) -> None:
    """One optimizer step in this process, as ``python train.py`` would take it."""
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--max_steps", 1]
    argv += ["--save_strategy", "no", "--logging_steps", 1, "--disable_tqdm", "True", "--report_to", "none"]
    train.train(*train.parse_args([str(word) for word in (*argv, *extra)]))


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture
def two_processes(monkeypatch):
    """What torchrun would say to the first of two processes, and no process group made."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(distributed, "_configure_cpu_state", lambda args, kind: setattr(args, "use_cpu", True))
    monkeypatch.setattr(train.TrainingArguments, "_setup_devices", torch.device("cpu"))
    monkeypatch.setattr(train.TrainingArguments, "distributed_state", None, raising=False)


# ---------------------------------------------------------------------------------------------------------------------
# 2023's flags.


@pytest.mark.parametrize("command", [LLAMA, OPT], ids=["llama", "opt"])
def test_the_originals_commands_parse_and_say_each_change_once(command, two_processes, tmp_path, capsys):
    model, data, args = train.parse_args(shlex.split(command.format(model="m", data="d.json", out=tmp_path)))
    said = capsys.readouterr().out.splitlines()
    assert (model.model_name_or_path, data.data_path) == ("m", "d.json")
    assert args.eval_strategy == "no" and args.gradient_accumulation_steps == 8 and args.model_max_length == 512
    assert args.warmup_steps == 0.03 and args.get_warmup_steps(1000) == 30
    assert args.lr_scheduler_type == "cosine" and args.weight_decay == 0 and args.learning_rate == 2e-5
    assert args.bf16 and args.fsdp is True
    changes = [
        "--evaluation_strategy is now --eval_strategy",
        "--warmup_ratio is now --warmup_steps 0.03",
        "--fsdp_transformer_layer_cls_to_wrap is ignored",
        '--fsdp "full_shard auto_wrap" is now --fsdp --fsdp_config configs/fsdp.json',
    ]
    if not torch.cuda.is_available():
        assert args.tf32 is None
        changes.append("tf32 is ignored: it needs an NVIDIA GPU")
    for change in changes:
        assert sum(change in line for line in said) == 1, change
    assert len(said) == len(changes)


@pytest.mark.parametrize(
    "old, new",
    [
        ("--evaluation_strategy=steps", ["--eval_strategy", "steps"]),
        ("--warmup_ratio 0", ["--warmup_steps", "0"]),
        ("--no_cuda", ["--use_cpu"]),
        ("--no_cuda True --seed 1", ["--use_cpu", "True", "--seed", "1"]),
        ("--group_by_length True", ["--train_sampling_strategy", "group_by_length"]),
        ("--group_by_length False", []),
        ("--group_by_length --seed 1", ["--train_sampling_strategy", "group_by_length", "--seed", "1"]),
        ("--overwrite_output_dir --save_safetensors False --seed 1", ["--seed", "1"]),
        ("--per_gpu_train_batch_size 4", ["--per_device_train_batch_size", "4"]),
        ("--adafactor True", ["--optim", "adafactor"]),
        ("--warmup_ratio 0.03 --warmup_steps 100", ["--warmup_steps", "100"]),
        ("--learning_rate -1 --unheard_of x", ["--learning_rate", "-1", "--unheard_of", "x"]),
    ],
)
def test_a_flag_of_2023_becomes_todays_with_one_warning(old, new, capsys):
    assert flags.translate_flags(shlex.split(old), set()) == new
    said = capsys.readouterr().out.splitlines()
    changed = [word for word in re.findall(r"--(\w+)", old) if word in flags.RENAMED | flags.SWITCHES | flags.REMOVED]
    assert len(said) == len(changed)
    for flag, line in zip(changed, said, strict=True):
        assert line.startswith(f"warning: --{flag} is ")


def test_a_flag_that_the_library_still_has_is_left_alone(capsys):
    assert flags.translate_flags(["--no_cuda", "True"], {"--no_cuda"}) == ["--no_cuda", "True"]
    assert capsys.readouterr().out == ""


def test_the_translated_flags_are_ones_that_the_library_refuses_and_their_successors_are_not():
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert not fields & (flags.RENAMED | flags.SWITCHES | flags.REMOVED).keys()
    successors = {
        *flags.RENAMED.values(),
        *flags.INSTEAD.values(),
        *(new for new, _ in flags.SWITCHES.values()),
    }
    assert successors <= fields


@pytest.mark.parametrize("ratio", ["3", "-0.1", "nan", "much"])
def test_a_warm_up_ratio_that_is_not_a_ratio_is_refused(ratio):
    with pytest.raises(UserError, match="--warmup_ratio .* use 0 to 0.99, or --warmup_steps"):
        flags.translate_flags(["--warmup_ratio", ratio], set())


# ---------------------------------------------------------------------------------------------------------------------
# Hardware, FSDP, DeepSpeed.


def parse(*words, out):
    argv = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", str(out), *words]
    return train.parse_args(argv)[2]


def test_fsdp_words_become_the_configuration(two_processes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = parse("--fsdp", "full_shard auto_wrap", out=tmp_path)
    assert args.fsdp is True
    assert args.fsdp_config["state_dict_type"] == "SHARDED_STATE_DICT"
    for words in (["--fsdp"], ["--fsdp", "True"]):
        args = parse(*words, "--fsdp_config", "configs/fsdp.json", out=tmp_path)
        assert args.fsdp is True and args.fsdp_config["reshard_after_forward"] is True
    assert not parse("--fsdp", "False", out=tmp_path).fsdp
    with pytest.raises(UserError, match="--fsdp hybrid_shard is unknown: use --fsdp with configs/fsdp.json"):
        parse("--fsdp", "hybrid_shard", out=tmp_path)


def test_offload_keeps_gradients_sharded_and_is_nothing_without_a_gpu(two_processes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for words in (["full_shard auto_wrap offload"], ["--fsdp_config", "configs/fsdp_offload.json"]):
        args = parse("--fsdp", *words, out=tmp_path)
        assert args.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
        assert "cpu_offload" not in args.fsdp_config


def test_fsdp_1_is_refused(two_processes, tmp_path):
    with pytest.raises(UserError, match="fsdp_config has version 1: remove it"):
        parse("--fsdp", "--fsdp_config", '{"version": 1}', out=tmp_path)


def test_one_process_trains_on_one_gpu_of_many_and_says_so(tmp_path, capsys):
    """With eight in one process the library would compute 8 times the examples a step that were asked for."""
    args = parse("--per_device_train_batch_size", "4", out=tmp_path)
    args._n_gpu = 8
    distributed.after_init(args)
    assert args.n_gpu == 1 and args.train_batch_size == 4
    assert "note: using one of 8 GPUs; to use all, run torchrun --nproc_per_node=8 train.py" in capsys.readouterr().out


def test_fsdp_computes_in_bf16_and_returns_float32(two_processes, tmp_path):
    policy = parse("--fsdp", "--bf16", "True", out=tmp_path).fsdp_plugin_args["mixed_precision_policy"]
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


def test_every_configuration_is_what_its_name_says():
    def read(name):
        return json.loads((ROOT / "configs" / name).read_text())

    assert read("default_offload_opt_param.json") == read("deepspeed_zero3_offload.json")
    assert read("fsdp_offload.json") == read("fsdp.json") | {"cpu_offload": True}
    deepspeed = read("deepspeed_zero3_offload.json")
    assert "scheduler" not in deepspeed  # it would take the place of the recipe's cosine
    assert deepspeed["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert deepspeed["zero_optimization"]["stage"] == 3
    assert {deepspeed["zero_optimization"][f"offload_{what}"]["device"] for what in ("param", "optimizer")} == {"cpu"}
    for key in ("gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu"):
        assert deepspeed[key] == "auto"
    assert set(deepspeed["optimizer"]["params"].values()) == {"auto"}


class Arguments:
    """The fields of TrainingArguments that distributed.py sees."""

    bf16 = bf16_full_eval = use_cpu = False
    tf32 = fsdp = fsdp_config = deepspeed = accelerator_config = None
    lr_scheduler_type = "cosine"

    def __init__(self, **fields):
        self.__dict__.update(fields)


@pytest.fixture
def deepspeed_is_there(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "deepspeed" or find(name))


def test_a_deepspeed_file_that_saves_no_weights_is_mended_and_its_scheduler_reported(
    two_processes, deepspeed_is_there, tmp_path, capsys
):
    """As the original's: WarmupDecayLR for cosine, and stage3_gather_16bit_weights_on_model_save false."""
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": zero, "scheduler": {"type": "WarmupDecayLR", "params": {}}})
    )
    args = Arguments(deepspeed=str(tmp_path / "ds.json"))
    distributed.before_init(args)
    said = capsys.readouterr().out.splitlines()
    assert args.deepspeed["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert len(said) == 1 and "overrides lr_scheduler_type" in said[0]
    args = Arguments(deepspeed=str(ROOT / "configs" / "default_offload_opt_param.json"))
    distributed.before_init(args)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "fields, environment, message",
    [
        ({"fsdp": "full_shard"}, {}, "fsdp shards over processes.*start more with torchrun, or drop"),
        ({"deepspeed": "x.json"}, {}, "DeepSpeed needs torchrun, even with one GPU"),
        ({"deepspeed": "none.json"}, {"LOCAL_RANK": "0"}, "none.json does not exist"),
        ({"fsdp": True, "deepspeed": "x.json"}, {"WORLD_SIZE": "2"}, "drop one of them"),
        ({"fsdp": True, "fsdp_config": "none.json"}, {"WORLD_SIZE": "2"}, "none.json does not exist"),
        ({"fsdp": True, "fsdp_config": "{oops"}, {"WORLD_SIZE": "2"}, "is malformed"),
    ],
)
def test_sharding_that_cannot_be_is_refused_in_one_line(fields, environment, message, deepspeed_is_there, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        distributed.before_init(Arguments(**fields))
    assert "\n" not in str(error.value)


def test_deepspeed_that_is_not_installed_is_refused_with_its_cure(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-build-isolation deepspeed.* or use FSDP"):
        distributed.before_init(Arguments(deepspeed="configs/deepspeed_zero3_offload.json"))


def test_bf16_on_a_gpu_that_only_emulates_it_is_refused_and_on_a_cpu_is_run_there(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="this GPU has no bf16 .emulation is many times slower.: use fp16"):
        distributed.before_init(Arguments(bf16=True))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = Arguments(bf16=True)
    distributed.before_init(args)
    assert args.use_cpu


def test_the_originals_fsdp_command_trains_with_fsdp_in_bf16_and_its_loss_is_not_rounded(tiny_llama, tmp_path):
    """Two processes against one, both in bf16: FSDP rounded the number of tokens to 8 bits, 0.4% of each loss."""
    data = write_data(tmp_path / "data.json")
    quick = ["--num_train_epochs 3", "--gradient_accumulation_steps 8"], ["--max_steps 2", "--disable_tqdm True"]
    command = LLAMA.format(model=tiny_llama, data=data, out=tmp_path / "two")
    for old, new in zip(*quick, strict=True):
        command = command.replace(old, new)
    two = torchrun(2, "train.py", *shlex.split(command))
    assert two.returncode == 0, two.stderr
    steps = ("--max_steps", 2, "--learning_rate", 2e-5, "--lr_scheduler_type", "cosine", "--warmup_steps", 0.03)
    train_here(tiny_llama, data, tmp_path / "one", "--bf16", "True", "--per_device_train_batch_size", 8, *steps)
    assert len(losses(tmp_path / "one")) == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-3)  # 0.02 with the rounded count
    assert (tmp_path / "two" / "model.safetensors").exists()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra")
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_opt"])
def test_the_originals_deepspeed_command_equals_one_process(family, request, tmp_path):
    from safetensors.torch import load_file

    model, data = request.getfixturevalue(family), write_data(tmp_path / "data.json")
    command = DEEPSPEED.format(model=model, data=data, out=tmp_path / "two").replace("--bf16 True ", "")
    command = command.replace("--gradient_accumulation_steps 8", "--max_steps 3").replace("2e-5", "1e-2")
    two = torchrun(2, "train.py", *shlex.split(command))
    assert two.returncode == 0, two.stderr
    steps = ("--max_steps", 3, "--learning_rate", 1e-2, "--lr_scheduler_type", "cosine", "--warmup_steps", 0.03)
    train_here(model, data, tmp_path / "one", "--per_device_train_batch_size", 8, *steps)
    assert len(losses(tmp_path / "one")) == 3
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Families.

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
FAMILIES = {
    "llama": ("LlamaConfig", {"intermediate_size": 64}, "LlamaDecoderLayer"),
    "llama, GQA and tied": (
        "LlamaConfig",
        {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "LlamaDecoderLayer",
    ),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": None}, "OPTDecoderLayer"),
    "mistral": ("MistralConfig", {"intermediate_size": 64, "num_key_value_heads": 2}, "MistralDecoderLayer"),
    "qwen2": ("Qwen2Config", {"intermediate_size": 64, "num_key_value_heads": 2}, "Qwen2DecoderLayer"),
    "gpt-neox": ("GPTNeoXConfig", {"intermediate_size": 64}, "GPTNeoXLayer"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_loads_again_and_is_wrapped_layer_by_layer(family, tokenizer, tmp_path):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    name, fields, layer = FAMILIES[family]
    config = getattr(transformers, name)(vocab_size=300, bos_token_id=1, eos_token_id=2, **SMALL, **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in model.named_parameters()}

    train_here(tmp_path / "base", write_data(tmp_path / "data.json", 8), tmp_path / "out", "--learning_rate", 1e-2)
    assert losses(tmp_path / "out") == pytest.approx([5.7], abs=0.3)
    tuned, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert tuned.get_input_embeddings().weight.shape == (301, 32)
    tied = tuned.get_output_embeddings().weight is tuned.get_input_embeddings().weight
    assert tied == (family in ("llama, GQA and tied", "opt"))
    moved = {key for key, value in tuned.named_parameters() if not torch.equal(value[:300], before[key][:300])}
    assert moved >= {key for key in before if "k_proj.bias" not in key}  # softmax does not see that one

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    policy = fsdp2_prepare_auto_wrap_policy(plugin, tuned)
    assert [type(module).__name__ for module in tuned.modules() if policy(module)] == [layer, layer]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, nothing written.


def spoil(folder, how, tmp_path):
    """A copy of a model folder with one thing wrong with it."""
    shutil.copytree(folder, tmp_path / "spoilt")
    spoilt = tmp_path / "spoilt"
    config = json.loads((spoilt / "config.json").read_text())
    if how == "no weights":
        (spoilt / "model.safetensors").unlink()
    elif how == "no tokenizer":
        (spoilt / "tokenizer.json").unlink()
    elif how == "diff":
        (spoilt / "weight_diff.json").write_text("{}")
    elif how == "adapter":
        (spoilt / "config.json").unlink()
        (spoilt / "adapter_config.json").write_text("{}")
        return spoilt
    elif how == "fewer layers":
        config["num_hidden_layers"] = 1
    elif how == "more layers":
        config["num_hidden_layers"] = 3
    elif how == "other shapes":
        config["intermediate_size"] = 256
    elif how == "other model":
        config |= {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    elif how == "masked":
        bert = transformers.BertConfig(vocab_size=300, intermediate_size=64, **SMALL)
        transformers.BertForMaskedLM(bert).save_pretrained(spoilt)
        return spoilt
    elif how == "truncated":
        (spoilt / "model.safetensors").write_bytes((spoilt / "model.safetensors").read_bytes()[:5000])
    elif how == "larger tokenizer":
        tokenizer = json.loads((spoilt / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] |= {f"<more{i}>": 300 + i for i in range(50)}
        (spoilt / "tokenizer.json").write_text(json.dumps(tokenizer))
    (spoilt / "config.json").write_text(json.dumps(config))
    return spoilt


@pytest.mark.parametrize(
    "how, message",
    [
        ("no weights", "has no weights: none of model.safetensors, "),
        ("no tokenizer", "has no tokenizer: copy tokenizer.json"),
        ("diff", "is a weight diff: recover it first"),
        ("adapter", "is a LoRA adapter, not a model: merge it"),
        ("fewer layers", r"has layers that config.json does not count \(model.layers.1.*copy both from one model"),
        ("more layers", r"lacks 9 of the model's tensors \(model.layers.2.*copy it again"),
        ("other shapes", r"mlp.*is \(.*128.*\), but config.json makes it \(.*256.*\): .* copy both from one"),
        ("other model", r"lacks \d+ of the model's tensors"),
        ("masked", "is a BertForMaskedLM, which reads the words to come: choose a causal model"),
        ("truncated", "the model cannot be loaded"),
        (
            "larger tokenizer",
            "has 50 tokens beyond the model's 300 rows .*: use the tokenizer files of the base model",
        ),
    ],
)
def test_a_broken_model_folder_is_refused_in_one_line_and_nothing_is_written(how, message, tiny_llama, tmp_path):
    data = write_data(tmp_path / "data.json")
    with pytest.raises(UserError, match=message) as error:
        train_here(spoil(tiny_llama, how, tmp_path), data, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tokens_that_were_added_to_the_vocabulary_get_their_rows(tiny_llama, tmp_path):
    """The other side of 'larger tokenizer': the model lacks rows for added tokens alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<a>", "<b>"]})
    shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    train_here(tmp_path / "base", write_data(tmp_path / "data.json", 8), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 303


@pytest.mark.parametrize(
    "records, extra, message",
    [
        ([{"instruction": "Say x.", "input": ""}], (), 'record 1: no text "output"'),
        ([], (), "data.json"),
        (make_records(4), ("--model_max_length", 32), "raise model_max_length"),
        (make_records(4), ("--model_max_length", 4), "--model_max_length must leave room"),
    ],
    ids=["no output", "no record", "0 examples left", "no room"],
)
def test_data_that_leaves_nothing_to_train_on_is_refused_in_one_line(records, extra, message, tiny_llama, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=message) as error:
        train_here(tiny_llama, tmp_path / "data.json", tmp_path / "out", *extra)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_a_finished_run_or_a_file_in_its_place_is_refused(tiny_llama, tmp_path):
    data = write_data(tmp_path / "data.json", 8)
    train_here(tiny_llama, data, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with pytest.raises(UserError, match="has a trained model"):
        train_here(tiny_llama, data, tmp_path / "out", "--overwrite_output_dir", "True")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
    with pytest.raises(UserError, match="--output_dir .* cannot be written"):
        train_here(tiny_llama, data, tmp_path / "data.json" / "out")


# ---------------------------------------------------------------------------------------------------------------------
# runs/


def dry_run(**variables):
    names = ("CUDA_VISIBLE_DEVICES", "NNODES", "NODE_RANK", "MASTER_ADDR", "GPUS")
    env = {name: value for name, value in os.environ.items() if name not in names and not name.startswith("SLURM_")}
    env |= {"MODEL": "m", "OUT": "o", "DRY_RUN": "1"} | {name: str(value) for name, value in variables.items()}
    return subprocess.run(["bash", "runs/alpaca_7b.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "variables",
    [
        {"GPUS": 1},
        {"GPUS": 2, "PER_DEVICE": 1},
        {"GPUS": 4, "MODEL_SIZE": "13b"},
        {"GPUS": 8, "PER_DEVICE": 16},
        {"GPUS": 4, "OFFLOAD": 1},
        {"GPUS": 1, "OFFLOAD": 1},
        {"GPUS": 8, "NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "first"},
        {"GPUS": 8, "NNODES": 4, "NODE_RANK": 3, "MASTER_ADDR": "first", "MODEL_SIZE": "13b"},
    ],
    ids=str,
)
def test_the_recipe_keeps_its_batch_of_128_on_any_number_of_gpus(variables, monkeypatch, tmp_path, two_processes):
    result = dry_run(**variables)
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    processes = variables["GPUS"] * variables.get("NNODES", 1)
    assert words[0] == ("torchrun" if processes > 1 or "OFFLOAD" in variables else "python")
    if "NNODES" in variables:
        assert words[words.index("--rdzv_endpoint") + 1] == "first:29500"
        is_host = "true" if variables["NODE_RANK"] == 0 else "false"
        assert words[words.index("--rdzv_conf") + 1] == f"is_host={is_host}"
    if words[0] == "torchrun":
        assert words[words.index("--nproc_per_node") + 1] == str(variables["GPUS"])

    # DeepSpeed itself is an extra: the flag alone is looked at.
    argv = words[words.index("train.py") + 1 :]
    file = argv.pop(argv.index("--deepspeed") + 1) if "--deepspeed" in argv else None
    args = train.parse_args([word for word in argv if word != "--deepspeed"])[2]
    assert args.per_device_train_batch_size * processes * args.gradient_accumulation_steps == 128
    epochs, rate = (5, 1e-5) if variables.get("MODEL_SIZE") == "13b" else (3, 2e-5)
    assert (args.num_train_epochs, args.learning_rate, args.model_max_length) == (epochs, rate, 512)
    assert (args.weight_decay, args.warmup_steps, args.lr_scheduler_type) == (0, 0.03, "cosine")
    assert args.bf16 and args.resume_from_checkpoint == "auto"
    assert bool(args.fsdp) == (processes > 1)
    offloaded = processes > 1 and "OFFLOAD" in variables
    assert file == (
        "configs/deepspeed_zero3_offload.json" if (processes, "OFFLOAD" in variables) == (1, True) else None
    )
    sharded_gradients = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", False)
    assert sharded_gradients == (offloaded or (processes > 1 and variables.get("MODEL_SIZE") == "13b"))


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"GPUS": 3}, ("4 x 3 x 1 = 12", "change PER_DEVICE or GPUS")),
        ({"GPUS": 8, "PER_DEVICE": 32}, ("= 256", "change PER_DEVICE")),
        ({"GPUS": "many"}, ("GPUS=many",)),
        ({"GPUS": 8, "NNODES": 2}, ("MASTER_ADDR",)),
        ({"GPUS": 8, "NNODES": 2, "MASTER_ADDR": "first"}, ("NODE_RANK",)),
        ({"GPUS": 8, "NNODES": 2, "MASTER_ADDR": "first", "NODE_RANK": 2}, ("NODE_RANK",)),
        ({"GPUS": 8, "MODEL_SIZE": "65b"}, ("use 7b or 13b",)),
        ({"GPUS": 8, "MODEL": ""}, ("set MODEL",)),
    ],
    ids=str,
)
def test_what_does_not_divide_or_is_not_said_is_refused(variables, words):
    result = dry_run(**variables)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)


@pytest.mark.parametrize("command", [lambda: dry_run(GPUS=2).stdout, (ROOT / "runs" / "demo.py").read_text])
def test_processes_meet_on_a_machine_that_does_not_know_its_own_name(command, tmp_path):
    flags = re.search(r"torchrun (--standalone .*?) train\.py", command())[1].split()
    meet = tmp_path / "meet.py"
    meet.write_text("from torch import distributed as d\nd.init_process_group('gloo')\nd.barrier()\nprint('met')")
    run = "import socket; socket.gethostname = lambda: 'nowhere.invalid'; from torch.distributed import run; run.main()"
    done = subprocess.run([sys.executable, "-c", run, *flags, meet], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("met") == 2, done.stderr


def fake(folder, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_slurms_variables_say_how_many_nodes_and_which_is_the_first(tmp_path):
    fake(tmp_path, "scontrol", "printf 'node-a\\nnode-b\\n'")
    result = dry_run(
        **{"SLURM_NNODES": 2, "SLURM_NODEID": 1, "SLURM_GPUS_ON_NODE": 8, "SLURM_JOB_NODELIST": "node-[a-b]"},
        **{"SLURM_JOB_ID": 77, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert result.returncode == 0, result.stderr
    assert "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint node-a:29500 --rdzv_id 77" in result.stdout
    assert "is_host=false --nproc_per_node 8 " in result.stdout


@pytest.mark.parametrize("sent, requeued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_slurm_job_near_its_end_lets_the_run_save_and_queues_itself_again(sent, requeued, tmp_path):
    """A step that takes 0.3 s to save after SIGTERM: the job waits for it, and keeps its exit code."""
    save = f"trap 'sleep 0.3; echo saved >>{tmp_path}/log; exit 75' TERM; echo started >>{tmp_path}/log"
    fake(tmp_path, "srun", f"{save}; while :; do sleep 0.05; done")
    fake(tmp_path, "scontrol", f'echo "$@" >>{tmp_path}/log')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    job = subprocess.Popen(["bash", "runs/slurm.sh"], cwd=ROOT, env=env)
    try:
        wait_for(lambda: (tmp_path / "log").exists())
        job.send_signal(sent)
        assert job.wait(timeout=30) == 75
    finally:
        job.kill()
    assert (tmp_path / "log").read_text().split("\n")[:-1] == ["started", "saved"] + ["requeue 77"] * requeued


def test_a_slurm_job_keeps_the_exit_code_of_a_step_that_ends_at_once(tmp_path):
    fake(tmp_path, "srun", "exit 3")
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    jobs = [subprocess.Popen(["bash", "runs/slurm.sh"], cwd=ROOT, env=env, stderr=subprocess.PIPE) for _ in range(30)]
    assert [(job.wait(timeout=30), job.communicate()[1]) for job in jobs] == [(3, b"")] * 30


def test_folders_are_meant_from_where_the_caller_stands(tmp_path):
    (tmp_path / "llama").mkdir()
    env = os.environ | {"MODEL": "llama", "OUT": "new/out", "GPUS": "1", "DRY_RUN": "1"}
    result = subprocess.run(
        ["bash", ROOT / "runs" / "alpaca_7b.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert f"--model_name_or_path {tmp_path}/llama " in result.stdout
    assert f"--output_dir {tmp_path}/new/out " in result.stdout
    assert "--data_path ./alpaca_data.json" in result.stdout  # the repository's own
    assert "--model_name_or_path org/llama " in dry_run(MODEL="org/llama", GPUS=1).stdout  # a name on a hub


def wait_for(condition, seconds=30):
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_scripts_are_sound_bash():
    for script in sorted((ROOT / "runs").glob("*.sh")):
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        assert os.access(script, os.X_OK)
