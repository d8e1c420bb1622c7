"""alpaca/training/meter.py: tokens counted exactly, MFU as in the formula, one line a logging step."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from alpaca.common.records import load_records
from alpaca.training import meter
from alpaca.training.checkpoints import set_aside_newer
from alpaca.training.examples import IGNORE_INDEX
from alpaca.training.meter import count_tokens, log_line, model_flops, peak_flops
from alpaca.training.trainer import Trainer

PAD = 0
# 12 examples of 4 to 9 tokens; the first two of each are prompt
EXAMPLES = [
    {"input_ids": [5] * n, "labels": [-100, -100] + [5] * (n - 2)} for n in (4, 9, 5, 6, 7, 4, 8, 5, 9, 4, 6, 7)
]
TOKENS = sum(len(example["input_ids"]) for example in EXAMPLES)  # 74


def padded(examples):
    longest = max(len(example["input_ids"]) for example in examples)

    def rows(key, fill):
        return torch.tensor([example[key] + [fill] * (longest - len(example[key])) for example in examples])

    mask = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    return {
        "input_ids": rows("input_ids", PAD),
        "labels": rows("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def flat(examples):
    return {
        "input_ids": torch.tensor([[token for e in examples for token in e["input_ids"]]]),
        "labels": torch.tensor([[label for e in examples for label in e["labels"]]]),
        "position_ids": torch.tensor([[i for e in examples for i in range(len(e["input_ids"]))]]),
    }


def trainer(model, out, collate=padded, **kwargs):
    """12 examples, 2 a batch, 2 batches a step: 3 steps an epoch."""
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "remove_unused_columns": False,
    }
    args = transformers.TrainingArguments(output_dir=str(out), **settings | kwargs)
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES[:2],
        data_collator=collate,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Counting.


def test_a_padded_batch_counts_what_its_mask_shows():
    """
    ids   [[5, 5, 5, 5, 5], [5, 5, 0, 0, 0]]     mask [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    real  5 + 2, supervised 3 + 1, squares 25 + 4, 2 examples, 10 places
    """
    labels = [[-100, -100, 5, 5, 5], [-100, 5, -100, -100, -100]]
    batch = {"input_ids": torch.tensor([[5] * 5, [5, 5, 0, 0, 0]]), "labels": torch.tensor(labels)}
    batch["attention_mask"] = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    assert count_tokens(batch).tolist() == [7, 4, 29, 2, 10]


def test_a_padding_free_row_counts_the_same_as_its_padded_batch():
    for begin in range(0, 12, 3):
        examples = EXAMPLES[begin : begin + 3]
        assert count_tokens(flat(examples)).tolist()[:4] == count_tokens(padded(examples)).tolist()[:4]


def test_a_4d_mask_beside_positions_is_no_padding():
    batch = flat(EXAMPLES[:2]) | {"attention_mask": torch.ones(1, 1, 13, 13, dtype=torch.bool)}
    assert count_tokens(batch).tolist() == [13, 9, 16 + 81, 2, 13]


def test_shift_labels_count_as_labels_do():
    batch = flat(EXAMPLES[:2])
    batch["shift_labels"] = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    assert count_tokens(batch).tolist() == [13, 9, 97, 2, 13]


def test_labels_that_hold_supervised_tokens_alone_count_too():
    batch = flat(EXAMPLES[:2])
    batch["labels"] = batch["shift_labels"] = torch.full((1, 9), 5)
    assert count_tokens(batch).tolist() == [13, 9, 97, 2, 13]


@pytest.mark.parametrize("collate", [padded, flat])
def test_an_epoch_with_accumulation_counts_each_token_once(tiny_llama, tmp_path, collate):
    run = trainer(tiny_llama, tmp_path, collate)
    run.train()
    totals = run.meter.totals
    assert (totals.tokens, totals.supervised, totals.examples) == (TOKENS, TOKENS - 24, 12)
    assert (totals.padding > 0) == (collate is padded)
    squares = sum(len(example["input_ids"]) ** 2 for example in EXAMPLES)
    assert totals.flops == 557_568 * TOKENS + 1_536 * squares
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert logged[-1]["tokens"] == TOKENS
    assert all(entry["tokens_per_second"] > 0 and entry["peak_memory_gib"] > 0.1 for entry in logged)
    assert all((entry["padding_share"] > 0) == (collate is padded) for entry in logged)
    assert "mfu" not in logged[0]  # a CPU has no peak in the table
    assert logged[-1]["eta_seconds"] == 0 and run.meter.totals.wall_seconds >= totals.train_seconds > 0


def test_what_came_before_the_training_does_not_count(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path)
    run.meter.count(padded(EXAMPLES[:2]))
    run.train()
    assert run.meter.totals.tokens == TOKENS


def test_evaluation_does_not_count_as_training(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    run.train()
    run.evaluate()
    assert run.meter.totals.tokens == TOKENS


def test_the_counts_of_all_ranks_are_added_and_the_fullest_rank_is_shown(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path)
    run.meter.count(padded(EXAMPLES[:2]))  # 4 + 9 tokens in 2 rows of 9
    other = torch.tensor([[10, 3, 100, 1, 12, 2**50]])  # tokens, supervised, squares, examples, slots, bytes
    run.meter.gather(lambda mine: torch.cat([mine, other]), run.state)
    totals = run.meter.totals
    assert (totals.tokens, totals.supervised, totals.padding) == (13 + 10, 9 + 3, 5 + 2)
    assert totals.flops == 557_568 * 23 + 1_536 * (16 + 81 + 100)
    assert totals.peak_memory == 2**50
    run.meter.gather(lambda mine: mine, run.state)
    assert run.meter.totals.tokens == 23  # nothing is counted twice


def test_a_resumed_run_counts_on_from_the_checkpoints_own_step(tiny_llama, tmp_path):
    """Saved at step 2, logged at 3 only: what the log does not hold yet is in the checkpoint all the same."""
    settings = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    run = trainer(tiny_llama, tmp_path, **settings)
    run.train()
    resumed = trainer(tiny_llama, tmp_path, **settings)
    set_aside_newer(tmp_path, tmp_path / "checkpoint-2")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.meter.totals.tokens == run.meter.totals.tokens == TOKENS
    assert resumed.meter.totals.padding == run.meter.totals.padding
    assert resumed.meter.totals.flops == run.meter.totals.flops


def test_the_clock_stops_while_evaluating_and_saving(tiny_llama, tmp_path, monkeypatch):
    """Steps end at 10 and 25 s, evaluation at 15, a checkpoint at 31: 20 s of training, 31 in all."""
    now = 0.0
    monkeypatch.setattr(meter.time, "monotonic", lambda: now)
    run = trainer(tiny_llama, tmp_path)
    args, state, control, watch = run.args, run.state, run.control, run.meter
    watch.on_train_begin(args, state, control)
    for now, event in (10, "step_end"), (15, "evaluate"), (25, "step_end"), (31, "save"):  # noqa: B007
        getattr(watch, f"on_{event}")(args, state, control)
    watch.gather(lambda mine: mine, state)
    assert (watch.totals.train_seconds, watch.totals.wall_seconds) == (20, 31)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs.


def test_model_flops_by_hand(tiny_llama, tiny_opt):
    """
    LLaMA   2 layers of q 64·64, k and v 64·32 each, o 64·64, three of 64·128; head 64·300
    OPT     2 layers of four 64·64 and two 64·128; head 64·300, tied to the input embedding
    """
    llama = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 64 * 300
    opt = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 300
    for path, matrices in (tiny_llama, llama), (tiny_opt, opt):
        assert model_flops(AutoModelForCausalLM.from_pretrained(path)) == (6 * matrices, 12 * 2 * 4 * 16)


def test_a_token_passes_through_some_of_a_mixtures_experts():
    """2 layers of q and o 64·64, k and v 64·32, and 2 of 4 experts of three 64·128; head 64·300. Without routers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=300)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    matrices = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 128) + 64 * 300
    assert model_flops(model) == (6 * matrices, 12 * 2 * 4 * 16)


def test_a_frozen_matrix_has_no_weight_gradient(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.requires_grad_(False)
    assert model_flops(model)[0] == 4 * 92_928
    model.lm_head.weight.requires_grad_(True)
    assert model_flops(model)[0] == 4 * 92_928 + 2 * 64 * 300


def test_the_originals_7b_run_had_an_mfu_of_13_percent():
    """4 A100 for 4,744.9 s at 32.88 examples/s of 127 tokens (issue 168): 1,044 tokens/s each, 40 GFLOPs a token."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # 7B's shape is the default
    per_token, per_square = model_flops(model)
    assert per_token == 6 * 6_607_077_376
    assert per_square == 12 * 32 * 4096
    rate = 32.88 / 4
    assert rate * (per_token * 127 + per_square * 127**2) / peak_flops("NVIDIA A100-SXM4-80GB") == pytest.approx(
        0.133, abs=0.001
    )


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Some New Card", None),
    ],
)
def test_the_peak_is_known_by_the_words_of_the_name(name, peak):
    assert peak_flops(name) == peak


def test_mfu_is_flops_over_seconds_and_the_peak_of_all_gpus(tiny_llama, tmp_path):
    done = meter.Totals(flops=8 * 10**15, train_seconds=50)
    assert done.rates(400e12)["mfu"] == pytest.approx(0.4)
    assert "mfu" not in done.rates(None)


# ---------------------------------------------------------------------------------------------------------------------
# The screen.


def test_a_logging_step_is_one_line():
    logs = {"loss": 1.23456, "learning_rate": 1.98e-5, "grad_norm": 1.204, "epoch": 0.295, "tokens": 10_000}
    logs |= {"tokens_per_second": 10432.4, "supervised_tokens_per_second": 5120.2, "padding_share": 0.0}
    logs |= {"mfu": 0.4534, "peak_memory_gib": 118.24, "eta_seconds": 4291}
    assert log_line(logs, 120, 1218) == (
        "step  120/1218 | epoch 0.29 | loss 1.2346 | lr 1.98e-05 | grad 1.20 | 10,432 tokens/s (5,120 supervised) | "
        "padding 0.0% | MFU 45.3% | peak 118.2 GiB | ETA 1:11:31"
    )


def test_the_last_steps_are_logged_where_logging_steps_does_not_divide_them(tiny_llama, tmp_path, capsys):
    run = trainer(tiny_llama, tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=2)
    run.train()
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == [2, 3]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    kinds = [line.split(" | ")[0] + (" eval" if "| eval_loss " in line else "") for line in lines[:-1]]
    assert kinds == ["step 2/3", "step 2/3 eval", "step 3/3", "step 3/3 eval"]
    assert " | loss " in lines[0] and lines[-1].startswith("3 steps in ")


def test_the_benchmarks_lengths_have_the_released_datas_mean_and_percentile(monkeypatch):
    """52,002 records of 127 tokens on average, 98% of them of at most 256."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from released_mix import length_mix

    lengths = length_mix(52_002)
    assert sum(lengths) / 52_002 == pytest.approx(127, abs=0.5)
    assert sum(length <= 256 for length in lengths) / 52_002 == pytest.approx(0.98, abs=0.001)
    assert 20 < min(lengths) < 40 and max(lengths) == 512


def test_the_benchmarks_data_have_lengths_that_records_can_have(tokenizer, monkeypatch):
    """The mix goes below the shortest prompt: those lengths become that prompt, a token of an answer, and EOS."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from released_mix import MAX_LENGTH, encode, make_data

    examples = encode(make_data(load_records(ROOT / "alpaca_data.json"), tokenizer, 300), tokenizer)
    lengths = [len(example["input_ids"]) for example in examples]
    learned = [sum(label != IGNORE_INDEX for label in example["labels"]) for example in examples]
    assert len(examples) == 300 and min(learned) == 2 and max(lengths) <= MAX_LENGTH
    assert {learned[i] for i, length in enumerate(lengths) if length == min(lengths)} == {2}
