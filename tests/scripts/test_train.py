"""train.py: the label rule, special tokens, the original's flags, and equal losses however it is distributed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from conftest import assert_one_line_error, losses, make_records, run_script, torchrun

import train
import utils
from alpaca import UserError


def write_data(path, count=24):
    path.write_text(json.dumps(make_records(count)))
    return path


def arguments(model, data, out, *extra):
    """One optimizer step on 8 examples a batch, in float32, no shuffling left to chance."""
    return [
        *("train.py", "--model_name_or_path", model, "--data_path", data, "--output_dir", out),
        *("--max_steps", 1, "--learning_rate", 1e-2, "--lr_scheduler_type", "constant", "--logging_steps", 1),
        *("--save_strategy", "no", "--disable_tqdm", "True"),
        *("--skip_save_rehearsal", "True", *extra),  # tests/training/test_preflight.py
    ]


def run(*argv) -> None:
    """Train in this process: another takes seconds to import torch."""
    train.train(*train.parse_args([str(word) for word in argv[1:]]))


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Records → tokens → batches.


def test_the_prompt_is_masked_and_eos_is_supervised(tokenizer):
    """ids:    <s> prompt… 'Y' 'es' </s>      labels: -100 …… 'Y' 'es' </s>"""
    [example] = train.preprocess([{"instruction": "Say yes.", "input": "", "output": "Yes"}], tokenizer, 512)
    prompt = utils.format_prompt("Say yes.")
    supervised = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(supervised) == "Yes</s>"
    assert tokenizer.decode(example["input_ids"]) == f"<s>{prompt}Yes</s>"
    assert len(example["labels"]) == len(example["input_ids"])


def test_a_special_token_written_in_the_data_stays_text(tokenizer):
    [example] = train.preprocess([{"instruction": "Echo.", "input": "", "output": "a</s>b"}], tokenizer, 512)
    assert example["input_ids"].count(tokenizer.eos_token_id) == 1
    assert example["input_ids"][-1] == tokenizer.eos_token_id


def test_cutting_to_the_maximum_drops_the_end_and_its_eos(tokenizer):
    record = {"instruction": "Count.", "input": "", "output": "one two three " * 100}
    [example] = train.preprocess([record], tokenizer, 200)
    assert len(example["input_ids"]) == len(example["labels"]) == 200
    assert tokenizer.eos_token_id not in example["input_ids"]


def test_an_example_whose_prompt_fills_the_maximum_is_left_out(tokenizer):
    records = [
        {"instruction": "word " * 400, "input": "", "output": "x"},
        {"instruction": "Say x.", "input": "", "output": "x"},
    ]
    dataset = train.SupervisedDataset(records, tokenizer, 256, "training")
    assert len(dataset) == 1
    assert "1 left out" in dataset.summary
    with pytest.raises(UserError, match="raise model_max_length"):
        train.SupervisedDataset(records[:1], tokenizer, 256, "training")


def test_padding_is_on_the_right_and_does_not_hide_an_eos_that_is_also_pad():
    """
    input_ids  [[5, 6, 2], [7, 2, 2]]     pad = eos = 2
    mask       [[1, 1, 1], [1, 1, 0]]
    labels     [[-100, 6, 2], [7, 2, -100]]
    """
    collate = train.DataCollatorForSupervisedDataset(pad_token_id=2)
    batch = collate([{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7, 2], "labels": [7, 2]}])
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [7, 2, -100]]


def test_the_held_out_split_is_disjoint_and_depends_on_the_seed(tmp_path):
    data = train.DataArguments(data_path=str(write_data(tmp_path / "data.json", 20)), eval_fraction=0.25)
    kept, held_out = train.load_data(data, seed=1)
    assert (len(kept), len(held_out)) == (15, 5)
    assert {r["instruction"] for r in kept}.isdisjoint(r["instruction"] for r in held_out)
    assert train.load_data(data, seed=1)[1] == held_out
    assert train.load_data(data, seed=2)[1] != held_out


@pytest.mark.parametrize("fraction", [1.0, 0.99, -0.1, 0.001])
def test_a_split_that_leaves_nothing_is_refused(tmp_path, fraction):
    data = train.DataArguments(data_path=str(write_data(tmp_path / "data.json", 20)), eval_fraction=fraction)
    with pytest.raises(UserError, match="--eval_fraction"):
        train.load_data(data, seed=1)


def test_held_out_records_that_are_trained_on_are_reported_in_one_line(tmp_path, capsys):
    """The task counts, not its answer, its case or its white space."""
    asked = {"instruction": " count from 4 to 7\nIN words.", "input": "", "output": "another answer"}
    held_out = [{"instruction": f"Add {i}.", "input": "", "output": "x"} for i in range(8)]
    held_out[2:2], held_out[7:7] = [asked], [make_records(7)[6]]
    held_out.append(make_records(4)[3] | {"input": "Start at 9."})  # the same instruction about something else
    paths = [str(write_data(tmp_path / "data.json", 20)), str(tmp_path / "held-out.json")]
    (tmp_path / "held-out.json").write_text(json.dumps(held_out))
    arguments_ = train.DataArguments(paths[0], eval_data_path=paths[1])
    assert [len(part) for part in train.load_data(arguments_, 0)] == [20, 11]
    assert capsys.readouterr().out.splitlines() == [
        "warning: 2 of 11 held-out records are in the training data too (the first: record 3): the eval loss will "
        "be too low; remove them from --eval_data_path"
    ]
    (tmp_path / "held-out.json").write_text(json.dumps(held_out[:7]))
    train.load_data(arguments_, 0)
    assert "warning: 1 of 7 held-out records is in the training data" in capsys.readouterr().out
    (tmp_path / "held-out.json").write_text(json.dumps(held_out[:2]))
    train.load_data(arguments_, 0)
    assert capsys.readouterr().out == ""


def test_data_that_is_one_record_many_times_cannot_be_split(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(make_records(1) * 10))
    data = train.DataArguments(str(tmp_path / "data.json"), eval_fraction=0.5)
    with pytest.raises(UserError, match="leaves one side empty"):
        train.load_data(data, seed=1)


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens.


def load(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)


def test_a_missing_pad_token_becomes_a_mean_row_in_input_and_output_embeddings(tiny_llama):
    tokenizer, model = load(tiny_llama)
    before_in, before_out = (model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone())
    assert train.add_special_tokens(tokenizer, model) == 1
    assert (tokenizer.pad_token, tokenizer.pad_token_id, model.config.pad_token_id) == ("[PAD]", 300, 300)
    for before, after in (
        (before_in, model.get_input_embeddings().weight),
        (before_out, model.get_output_embeddings().weight),
    ):
        assert after.shape == (301, 64)
        assert torch.equal(after[:300], before)
        assert torch.equal(after[300], before.mean(dim=0))
    assert not torch.equal(model.get_input_embeddings().weight[300], model.get_output_embeddings().weight[300])


def test_tied_embeddings_stay_tied_and_get_one_mean_row(tiny_opt):
    tokenizer, model = load(tiny_opt)
    before = model.get_input_embeddings().weight.clone()
    train.add_special_tokens(tokenizer, model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[300], before.mean(dim=0))


@pytest.mark.parametrize("nothing", [None, ""])
def test_an_eos_that_is_empty_counts_as_missing(tiny_llama, nothing):
    """Some conversions of LLaMA have '' there: `is None` misses it, and EOS is never trained."""
    tokenizer, model = load(tiny_llama)
    tokenizer.eos_token = nothing
    train.add_special_tokens(tokenizer, model)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, model.config.eos_token_id) == ("</s>", 2, 2)


def test_a_tokenizer_that_has_all_tokens_is_left_alone(tiny_llama):
    tokenizer, model = load(tiny_llama)
    tokenizer.pad_token = tokenizer.eos_token
    assert train.add_special_tokens(tokenizer, model) == 0
    assert model.get_input_embeddings().weight.shape[0] == 300


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def documented_commands():
    text = train.__doc__.replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if re.match(r"\s+(python|torchrun) ", line)]


def test_every_documented_command_parses(monkeypatch, tmp_path):
    assert len(documented_commands()) == 3
    for command in documented_commands():
        words = shlex.split(command.replace("MODEL", "m").replace(" OUT", f" {tmp_path}"))
        argv = words[words.index("train.py") + 1 :]
        # what needs hardware that is not here: bf16 and tf32 on an Ampere GPU, a process group
        for flag in ("--bf16", "--tf32"):
            if flag in argv:
                del argv[argv.index(flag) : argv.index(flag) + 2]
        monkeypatch.setattr(train.distributed, "_set_up_fsdp", lambda args, gpu: setattr(args, "fsdp", None))
        _, data_args, training_args = train.parse_args(argv)
        assert data_args.data_path == "./alpaca_data.json"
        assert training_args.model_max_length == 512


def test_the_originals_flags_are_translated_and_reported(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train.distributed, "_set_up_fsdp", lambda args, gpu: setattr(args, "fsdp", None))
    command = (
        f"--model_name_or_path m --data_path ./alpaca_data.json --output_dir {tmp_path} --num_train_epochs 3 "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8 "
        '--evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 --save_total_limit 1 '
        "--learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 "
        '--fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer'
    )
    _, _, args = train.parse_args(shlex.split(command))
    out = capsys.readouterr().out
    assert args.warmup_steps == 0.03 and args.get_warmup_steps(1000) == 30
    assert args.eval_strategy == "no" and args.gradient_accumulation_steps == 8
    assert "--evaluation_strategy is now --eval_strategy" in out
    assert "--warmup_ratio is now --warmup_steps" in out
    assert "--fsdp_transformer_layer_cls_to_wrap is ignored" in out


def test_bad_input_is_one_line(tiny_llama, tmp_path, monkeypatch):
    """In this process; test_a_folder_with_a_trained_model_is_not_overwritten starts one of its own."""
    data = write_data(tmp_path / "data.json")
    for argv, words in (
        (["train.py", "--learning_rat", "1"], ["--learning_rat", "did you mean --learning_rate"]),
        (["train.py", "--learning_rate", "fast"], ["--learning_rate"]),
        (arguments(tmp_path / "none", data, tmp_path / "o"), ["does not exist"]),
        (arguments(tiny_llama, data, tmp_path / "o", "--fsdp"), ["torchrun"]),
    ):
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        with pytest.raises(SystemExit) as exit:
            train.main()
        message = exit.value.code  # which Python prints to stderr, and exits with 1
        assert message.startswith("error: ") and "\n" not in message
        assert all(word in message for word in words), message
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--learning_rate", "-1"), "Invalid learning rate"),
        (("--use_liger_kernel", "True"), "--use_liger_kernel needs the package"),
        (("--report_to", "comet_ml"), "requires comet-ml"),
        (("--optim", "adamw_torch_8bit", "--optim_args", "x"), "x"),
        (("--eval_fraction", "7"), "of 24 records leaves one side empty"),
        (("--eval_fraction", "0.1", "--eval_data_path", "d.json"), "drop one of them"),
        (
            ("--packing", "True", "--train_sampling_strategy", "group_by_length"),
            "makes all rows equally long",
        ),
        (("--packing", "True", "--padding", "longest"), "drop one of them"),
        (("--max_steps", "-1", "--num_train_epochs", "0"), "--num_train_epochs must be above 0"),
        (("--max_steps", "0"), "--max_steps or"),  # to the library 0 steps are as many as the epochs have
        (("--lr_scheduler_type", "cosine_with_min_lr"), "min_lr"),
        (("--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}'), "min_lr"),
        (("--metric_for_best_model", "accuracy"), "accuracy is not available: use loss"),
        (("--save_strategy", "best", "--metric_for_best_model", "loss"), "--save_strategy best needs"),
        (("--dataloader_drop_last", "True", "--per_device_train_batch_size", "25"), "24 examples of 25 in a batch"),
        (("--push_to_hub", "True"), "--push_to_hub cannot log in to the hub"),  # conftest.py: offline
    ],
)
def test_flags_that_cannot_be_had_are_refused_in_one_line(flags, words, tiny_llama, tmp_path, monkeypatch):
    """Before the model is loaded."""
    monkeypatch.delattr(train, "load_model")
    data = write_data(tmp_path / "data.json")
    argv = [*map(str, arguments(tiny_llama, data, tmp_path / "o")[1:]), *flags]
    with pytest.raises(UserError, match=re.escape(words)) as error:
        train.train(*train.parse_args(argv))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_quantized_model_is_refused_by_its_method(method, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.delattr(train, "load_model")
    shutil.copytree(tiny_llama, tmp_path / "quantized")
    config = json.loads((tiny_llama / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    argv = [*map(str, arguments(tmp_path / "quantized", write_data(tmp_path / "data.json"), tmp_path / "o")[1:])]
    with pytest.raises(UserError, match=rf"is quantized \({method}\): use the unquantized model"):
        train.train(*train.parse_args(argv))


def test_a_flag_of_the_library_that_does_nothing_here_is_reported(tiny_llama, tmp_path, capsys):
    argv = arguments(tiny_llama, write_data(tmp_path / "data.json"), tmp_path / "o", "--do_train", "--do_predict")[1:]
    train.check_arguments(*train.parse_args([*map(str, argv)]))
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert sorted(warned) == [f"warning: --{name} has no effect here" for name in ("do_predict", "do_train")]


def test_a_broken_record_is_named_by_its_number(tiny_llama, tmp_path):
    records = make_records(3)
    del records[1]["output"]
    (tmp_path / "data.json").write_text(json.dumps(records))
    arguments_ = train.DataArguments(data_path=str(tmp_path / "data.json"))
    with pytest.raises(UserError, match='record 2: no text "output"'):
        train.load_data(arguments_, 0)


def test_a_folder_with_a_trained_model_is_not_overwritten(tiny_llama, tmp_path):
    data = write_data(tmp_path / "data.json")
    before = (tiny_llama / "model.safetensors").read_bytes()
    result = run_script(*arguments(tiny_llama, data, tiny_llama))
    assert_one_line_error(result, "has a trained model", "choose another folder")
    assert (tiny_llama / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Training: equivalences.


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_opt"])
def test_two_processes_with_fsdp_equal_one_process(family, request, tmp_path, capsys):
    """8 examples a step, padded, on one process; 4 + 4, padding-free, on two with FSDP: the same loss and weights."""
    model = request.getfixturevalue(family)
    data, held_out = write_data(tmp_path / "data.json"), write_data(tmp_path / "held_out.json", 7)
    held_out = ("--eval_data_path", held_out, "--per_device_eval_batch_size", 2)  # the last batch lacks an example
    whole = ("--per_device_train_batch_size", 8, "--padding", "longest")
    run(*arguments(model, data, tmp_path / "one", *whole, *held_out))
    one = capsys.readouterr().out
    fsdp = ("--fsdp", "--fsdp_config", "configs/fsdp.json", "--per_device_train_batch_size", 4, *held_out)
    two = torchrun(2, *arguments(model, data, tmp_path / "two", *fsdp))
    assert two.returncode == 0, two.stderr
    assert "examples are padded" not in two.stdout  # the self-check passed on the mesh

    assert len(losses(one)) == 1 and losses(one) == losses(two.stdout)
    receipts = [json.loads((tmp_path / run / "training_receipt.json").read_text()) for run in ("one", "two")]
    assert all(receipts[0]["tokens"][key] == receipts[1]["tokens"][key] > 0 for key in ("real", "supervised"))
    assert [sample["answers"][0] for sample in receipts[0]["samples"]] == [
        sample["answers"][0] for sample in receipts[1]["samples"]
    ]
    assert [len(sample["answers"]) for sample in receipts[1]["samples"]] == [2, 2, 2]
    before, after = (
        [entry["loss"] for entry in receipt["eval_losses"]][:: len(receipt["eval_losses"]) - 1] for receipt in receipts
    )
    assert before == pytest.approx(after, abs=1e-4) and before[0] - before[1] > 1e-2
    a, b, base = weights(tmp_path / "one"), weights(tmp_path / "two"), weights(model)
    assert a.keys() == b.keys()
    difference = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    moved = max((a[name][:300] - base[name][:300]).abs().max().item() for name in a)
    assert moved > 5e-3  # Adam's first step is the learning rate, 1e-2: the bound below is not met by standing still
    # A gradient near zero is mostly rounding, and Adam's first step divides by its size: a twentieth of a step at most.
    assert difference.max() < 5e-4 and difference.mean() < 1e-7, (difference.max(), difference.mean())


def test_training_lowers_the_held_out_loss_and_the_result_loads(tiny_llama, tmp_path, capsys):
    data = write_data(tmp_path / "data.json", 40)
    run(*arguments(tiny_llama, data, tmp_path / "out", "--eval_fraction", 0.2, "--max_steps", 8))
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"eval loss .*: ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before
    tokenizer, model = load(tmp_path / "out")
    assert len(tokenizer) == model.config.vocab_size == 301
    assert model.dtype == torch.float32
    assert tokenizer.pad_token == "[PAD]"


def test_a_bf16_checkpoint_is_trained_in_float32(tiny_llama, tmp_path):
    """Updates of 2e-5 vanish in bf16's 8 bits of mantissa; from_pretrained alone would keep the checkpoint's type."""
    tokenizer, model = load(tiny_llama)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    data = write_data(tmp_path / "data.json")
    run(*arguments(tmp_path / "bf16", data, tmp_path / "out", "--learning_rate", 2e-5))
    before, after = weights(tmp_path / "bf16"), weights(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert after[name].dtype == torch.float32
    changed = (after[name] != before[name].float()).float().mean().item()
    assert changed > 0.99
