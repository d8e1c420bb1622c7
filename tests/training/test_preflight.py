"""Preflight: each finding with a tokenizer, dataset or model broken for it; a rehearsal leaves nothing behind."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_records, torchrun
from made_trainer import levels, make_run, make_trainer, rehearsed, save_whole, whats
from safetensors.torch import load_file, save_file

import train
from alpaca import RankError, UserError
from alpaca.common import memory as host_memory
from alpaca.training.checkpoints import REHEARSAL, set_aside_newer
from alpaca.training.preflight import checks as preflight
from alpaca.training.preflight import packing as packing_check
from alpaca.training.preflight import rehearsal
from alpaca.training.preflight.examples_and_tokenizer import check_examples, check_tokenizer, show_border, show_example
from alpaca.training.preflight.findings import Finding, format_report, raise_errors
from alpaca.training.preflight.merges import mend_merges
from alpaca.training.preflight.rehearsal import _compare as compare
from alpaca.training.preflight.rehearsal import fingerprint, rehearse

# ---------------------------------------------------------------------------------------------------------------------
# Findings and the report.


def test_errors_come_first_and_each_finding_has_what_why_and_cure():
    findings = [Finding("note", "n"), Finding("warning", "w", "y", "c"), Finding("error", "e", "bad", "mend it")]
    assert format_report(findings).splitlines() == [
        *("error    e", "           why:  bad", "           cure: mend it"),
        *("warning  w", "           why:  y", "           cure: c"),
        "note     n",
    ]
    with pytest.raises(UserError, match=r"^preflight: e: mend it; nothing was trained$"):
        raise_errors(findings)
    raise_errors(findings[:2])


def test_errors_before_the_report_bring_it_and_without_one_nothing_is_said(capsys):
    errors = [Finding("error", "first", "", "a"), Finding("error", "second", "", "b")]
    raise_errors([Finding("note", "n")])
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"^preflight: first: a \(and 1 more, above\); nothing was trained$"):
        raise_errors(errors)
    assert "error    second\n           cure: b" in capsys.readouterr().out


def use_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))


def test_there_is_colour_on_a_terminal_alone_and_none_with_no_color(monkeypatch):
    use_terminal(monkeypatch)
    assert format_report([Finding("error", "e")]) == "\033[31merror   \033[0m e"
    monkeypatch.setenv("NO_COLOR", "1")
    assert format_report([Finding("error", "e")]) == "error    e"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stdout", open(os.devnull))
    assert format_report([Finding("error", "e")]) == "error    e"


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer.


@pytest.fixture
def broken(tokenizer):
    """A copy to break: 300 tokens, <unk> <s> </s> with ids 0 1 2, BOS in front, no pad."""
    return copy.deepcopy(tokenizer)


def test_a_sound_tokenizer_gets_no_finding(broken):
    assert list(check_tokenizer(broken, rows=300)) == []


@pytest.mark.parametrize("role", ["bos", "eos", "pad", "unk"])
def test_an_empty_special_token_is_found(broken, role):
    setattr(broken, f"{role}_token", "")
    assert f"{role} token is empty" in whats(check_tokenizer(broken, 300), "warning")


def test_eos_as_pad_is_learned_all_the_same(broken):
    broken.pad_token = "</s>"
    assert list(check_tokenizer(broken, 300)) == []


def test_an_eos_that_is_not_one_id_is_an_error(broken):
    broken._special_tokens_map["eos_token"] = "<|end|>"  # named in a config, but not in the vocabulary
    assert "EOS token '<|end|>' is not one id" in whats(check_tokenizer(broken, 300), "error")


def test_a_bos_that_is_added_twice_is_found(broken):
    from tokenizers import processors

    twice = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
    broken.backend_tokenizer.post_processor = twice
    assert "BOS twice" in whats(check_tokenizer(broken, 300), "warning")


def test_a_tokenizer_of_another_model_is_an_error_and_an_added_token_without_a_row_a_warning(broken):
    assert "20 tokens beyond the model's 280 rows" in whats(check_tokenizer(broken, 280), "error")
    broken.add_special_tokens({"pad_token": "[PAD]"})
    findings = list(check_tokenizer(broken, 300))
    assert "1 added token without a row" in whats(findings, "warning") and "error" not in levels(findings)


def test_a_config_that_ends_text_with_another_id_is_found(broken, tiny_llama):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_llama)
    assert list(check_tokenizer(broken, 300, config)) == []
    config.eos_token_id = 1
    assert "id 1 in the model's config and 2 in the tokenizer" in whats(check_tokenizer(broken, 300, config), "warning")
    config.eos_token_id = [1, 2]
    assert list(check_tokenizer(broken, 300, config)) == []


def test_merges_that_differ_from_sentencepiece_are_mended_and_stay_so_when_saved(sentencepiece_folder, tmp_path):
    import sentencepiece
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sentencepiece_folder)
    spm = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    texts = [line for line in (ROOT / "train.py").read_text().splitlines() if line[:1].strip()]

    def different(tokenizer):
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [text for text, ours in zip(texts, ids, strict=True) if ours != spm.encode(text)]

    assert different(tokenizer)  # else there is nothing to mend
    [finding] = mend_merges(tokenizer, texts)
    assert finding.level == "note" and "merges reordered as in tokenizer.model" in finding.what
    assert not different(tokenizer)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # nothing else was touched
    assert mend_merges(tokenizer, texts) == []
    tokenizer.save_pretrained(tmp_path)
    assert not different(AutoTokenizer.from_pretrained(tmp_path))


def test_a_tokenizer_json_of_another_model_beside_a_tokenizer_model_is_an_error(sentencepiece_folder, broken, tmp_path):
    broken.name_or_path = str(sentencepiece_folder)
    assert "number their tokens differently" in whats(mend_merges(broken), "error")
    broken.name_or_path = str(tmp_path)  # without a tokenizer.model
    assert mend_merges(broken) == []


# ---------------------------------------------------------------------------------------------------------------------
# The examples. EOS is 2, the maximum is 6 tokens.

GOOD = {"input_ids": [1, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}
CUT = {"input_ids": [1, 5, 6, 7, 8, 9], "labels": [-100, -100, 6, 7, 8, 9]}
TWO = {"input_ids": [1, 6, 2, 5, 7, 2], "labels": [-100, 6, 2, -100, 7, 2]}  # of a conversation


def examined(*examples, numbers=None, cut=(), left_out=()):
    """What is found in examples of these records, as a SupervisedDataset has them."""
    numbers = numbers or list(range(1, len(examples) + 1))
    dataset = SimpleNamespace(examples=list(examples), numbers=numbers, cut=cut, left_out=left_out)
    return check_examples(dataset, eos_id=2, max_length=6)


def test_sound_examples_get_no_finding():
    assert examined(GOOD, GOOD, TWO) == []


@pytest.mark.parametrize(("ids", "labels"), [([1, 2, 5, 7, 2], [-100, 2, -100, 7, 2]), ([1, 5, 2], [-100, -100, 2])])
def test_an_empty_answer_among_sound_ones_is_named(ids, labels):
    findings = examined(GOOD, {"input_ids": ids, "labels": labels}, GOOD)
    assert levels(findings) == ["warning"] and whats(findings) == "1 of 3 records with an empty answer (record 2)"


def test_records_that_were_cut_or_left_out_are_named_by_their_numbers_and_at_most_ten():
    """Of records 1 to 5, 1 and 3 were left out."""
    findings = examined(GOOD, CUT, GOOD, numbers=[2, 4, 5], cut=[4], left_out=[1, 3])
    assert levels(findings) == ["warning", "warning"]
    assert "1 of 5 records cut to 6 tokens (record 4)" in whats(findings)
    assert "2 of 5 records left out, as the prompt alone fills 6 tokens (records 1, 3)" in whats(findings)
    many = examined(*[{"input_ids": [1, 2], "labels": [-100, 2]}] * 12)
    assert whats(many) == "12 of 12 records with an empty answer (records 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …)"


def test_a_record_with_several_defective_examples_is_listed_once():
    empty = {"input_ids": [1, 2], "labels": [-100, 2]}
    assert whats(examined(empty, empty, GOOD, numbers=[4, 4, 5])) == "1 of 2 records with an empty answer (record 4)"


def test_an_example_beyond_the_learnt_positions_is_an_error_and_beyond_rotary_ones_a_warning():
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

    common = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = common | {"max_position_embeddings": 128}
    opt = OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16)
    gpt2 = GPT2Config(**common, n_positions=128)
    rotary = LlamaConfig(**small, intermediate_size=16), GPTNeoXConfig(**small, intermediate_size=16)
    for level, config in [("error", opt), ("error", gpt2), *(("warning", config) for config in rotary)]:
        model = AutoModelForCausalLM.from_config(config)
        assert preflight.check_positions(model, 128) == []
        [finding] = preflight.check_positions(model, 129)
        assert finding.level == level and "129 tokens, but the model only 128 positions" in finding.what
        assert finding.cure == "model_max_length=128"
        if level == "error":
            with pytest.raises(IndexError):
                model(torch.ones(1, 129, dtype=torch.long))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
def test_the_difference_of_two_models_is_an_error_and_neither_of_them_is(family, tiny_llama, tiny_opt):
    from transformers import AutoModelForCausalLM, Gemma2Config

    common = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    if family == "gemma":  # its norms are 0 before training
        model = AutoModelForCausalLM.from_config(Gemma2Config(**common, num_key_value_heads=1, intermediate_size=16))
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama if family == "llama" else tiny_opt)
    tuned = copy.deepcopy(model)
    assert preflight.check_difference(model) == []
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 2e-5 * torch.randint(-20, 21, parameter.shape)  # 20 steps of AdamW each way
        assert preflight.check_difference(tuned) == []
        for parameter, raw in zip(tuned.parameters(), model.parameters(), strict=True):
            parameter -= raw
    assert "all weights are near 0" in whats(preflight.check_difference(tuned), "error")


def test_the_shipped_data_is_sound(tokenizer):
    records = json.loads((ROOT / "alpaca_data.json").read_text())[:300]
    dataset = train.SupervisedDataset(records, copy.deepcopy(tokenizer), 4096, "training")
    assert check_examples(dataset, 2, 4096) == []


def test_an_example_is_shown_with_its_mask(tokenizer):
    [example] = train.preprocess([{"instruction": "Say yes.", "input": "", "output": "Yes"}], tokenizer, 512)
    plain = show_example(example, tokenizer)
    assert plain.startswith("<s>Below is an instruction") and plain.endswith("### Response:«Yes</s>»")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" a", " b</s>", " c", " d</s>")]
    labels = [part if i % 2 else [-100] * len(part) for i, part in enumerate(ids)]
    two = {"input_ids": sum(ids, []), "labels": sum(labels, [])}
    assert show_example(two, tokenizer) == " a« b</s>» c« d</s>»"
    record = {"instruction": "Clear \x1b[2J", "input": "", "output": "\x1b]0;title\x07"}
    [example] = train.preprocess([record], tokenizer, 512)
    plain = show_example(example, tokenizer)
    assert "Clear \\x1b[2J" in plain and plain.endswith("«\\x1b]0;title\\x07</s>»")  # the terminal obeys neither


def test_on_a_terminal_an_example_is_shown_in_colour(tokenizer, monkeypatch):
    use_terminal(monkeypatch)
    [example] = train.preprocess([{"instruction": "Say yes.", "input": "", "output": "Yes"}], tokenizer, 512)
    shown = show_example(example, tokenizer)
    assert shown.startswith("\033[2m<s>Below") and shown.endswith("### Response:\033[0m\033[32mYes</s>\033[0m")


def test_the_tokens_at_the_border_are_shown_one_by_one(tokenizer, monkeypatch):
    """A token that spans prompt and answer would be shown as ':Y'."""
    [example] = train.preprocess([{"instruction": "Go.", "input": "", "output": "Q\x1b\n"}], tokenizer, 512)
    prompt, answer = show_border(example, tokenizer).split(" «")
    assert answer == r"'Q' '\x1b' '\n'»"
    texts = re.fullmatch("'(.+)' '(.+)'", prompt).groups()
    assert [tokenizer.decode([i]) for i in example["input_ids"] if i][-6:-4] == list(texts) and texts[1].endswith(":")
    use_terminal(monkeypatch)
    assert show_border(example, tokenizer) == f"\033[2m{prompt}\033[0m \033[32m{answer[:-1]}\033[0m"


# ---------------------------------------------------------------------------------------------------------------------
# Model, arguments, report.


def check(run, findings=()) -> None:
    """All checks but the rehearsal, on what make_run made."""
    make, args, rows = run
    trainer = make(args, rows)
    preflight.preflight(trainer.model, trainer.processing_class, rows, args, findings)


def test_errors_of_model_and_examples_stand_in_one_report(tiny_opt, tmp_path, capsys):
    make, args, rows = make_run(tiny_opt, tmp_path)
    trainer = make(args, rows)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter *= 1e-3
    trainer.model.config.max_position_embeddings = 16
    with pytest.raises(UserError, match=r"all weights are near 0.*\(and 1 more, above\)"):
        preflight.preflight(trainer.model, trainer.processing_class, rows, args)
    assert "tokens, but the model only 16 positions" in capsys.readouterr().out


def test_what_was_found_earlier_stops_too(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="preflight: no: this"):
        check(make_run(tiny_llama, tmp_path), [Finding("error", "no", "", "this")])


def test_an_optimizer_without_its_package_is_an_error(tiny_llama, tmp_path, monkeypatch):
    args = make_trainer(tiny_llama, tmp_path, optim="adamw_8bit").args
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match="need to install `bitsandbytes`"):  # the library's own words
        train.check_arguments(train.ModelArguments(str(tiny_llama)), train.DataArguments("data.json"), args)


@pytest.mark.parametrize("count", range(1, 20))
@pytest.mark.parametrize("batch, ranks", [(8, 2), (4, 2), (3, 3), (1, 4)])
def test_the_repeats_of_an_epoch_are_those_of_the_library(count, batch, ranks, tmp_path):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    batches = BatchSampler(range(count), batch, drop_last=False)
    trained = [i for rank in range(ranks) for part in BatchSamplerShard(batches, ranks, rank) for i in part]
    args = SimpleNamespace(
        train_batch_size=batch, world_size=ranks, gradient_accumulation_steps=1, max_steps=-1, num_train_epochs=1
    )
    args.accelerator_config, args.dataloader_drop_last = SimpleNamespace(split_batches=False, even_batches=True), False
    again = len(trained) - count
    found = whats(preflight.check_repeats(range(count), args), "note")
    assert (
        found.startswith(f"each epoch has {count + again} examples, {again} of them repeated") if again else not found
    )


@pytest.mark.parametrize(
    "device, can, bf16, suggested",
    [
        ("cpu", {"avx512_bf16": True, "amx_bf16": False}, False, True),
        ("cpu", {"amx_bf16": True}, False, True),
        ("cpu", {"avx512_f": True}, False, False),
        ("cpu", {"avx512_bf16": True}, True, False),
        ("cuda", {"avx512_bf16": True}, False, False),
    ],
)
def test_bf16_is_suggested_on_a_cpu_that_computes_in_it(device, can, bf16, suggested, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    args = SimpleNamespace(bf16=bf16, fp16=False, device=torch.device(device))
    assert ("bf16=True may train faster" in whats(preflight.check_bf16(args), "note")) == suggested


@pytest.mark.parametrize("deviation, fell_back", [(1e-6, False), (0.7, True), (float("nan"), True)])
def test_packing_that_mixes_examples_falls_back_to_padding(
    tiny_llama, tmp_path, monkeypatch, capsys, deviation, fell_back
):
    monkeypatch.setattr(packing_check, "measure", lambda model, examples: (deviation, 0.0))
    run(tiny_llama, tmp_path, "--preflight_only")
    out = capsys.readouterr().out
    assert ("packed examples equal single ones, to 1.0e-06" in out) != fell_back
    assert ("warning: examples are padded, as with padding=longest" in out) == fell_back


# ---------------------------------------------------------------------------------------------------------------------
# The rehearsal.


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_after_a_rehearsal_equals_training_without_it_bit_for_bit(tiny_opt, tmp_path, accumulation):
    """With dropout, so that a random state left behind would show; steps, losses, order and weights are the same."""
    options = {"dropout": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    make, args, rows = make_run(tiny_opt, tmp_path, **options)
    plain = make(args, rows)
    plain.train()
    models = []

    def counted(*made):
        trainer = make(*made)
        models.append(weakref.ref(trainer.model))
        return trainer

    [note] = rehearse(counted, args, rows, None, save_whole)
    assert note.level == "note" and "the next step equal bit for bit (loss" in note.what
    assert [model() for model in models] == [None, None]  # their memory is the run's again
    assert not (tmp_path / REHEARSAL).exists()

    rehearsed = make(args, rows)
    set_aside_newer(tmp_path, None)
    rehearsed.train()
    losses = [[entry.get("loss") for entry in trainer.state.log_history] for trainer in (plain, rehearsed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    pairs = zip(plain.model.parameters(), rehearsed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class LosesWeights(train.Trainer):
    def _load_from_checkpoint(self, *args, **kwargs):
        pass


class LosesOptimizer(train.Trainer):
    def _load_optimizer_and_scheduler(self, checkpoint):
        pass


class LosesRandomState(train.Trainer):
    def _load_rng_state(self, checkpoint):
        pass


class LosesSchedule(train.Trainer):
    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            self.optimizer.param_groups[0]["lr"] *= 0.9


def saves_no_weights(trainer, folder):
    trainer.model.config.save_pretrained(folder)


def saves_half(trainer, folder):
    trainer.save_model(str(folder))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".1." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def saves_rounded(trainer, folder):
    copy.deepcopy(trainer.model).to(torch.bfloat16).save_pretrained(folder)


def saves_other_values(trainer, folder):
    other = copy.deepcopy(trainer.model)
    other.model.decoder.layers[1].fc1.bias.data[3] += 1e-6
    other.save_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"trainer_class": LosesWeights}, "a checkpoint does not restore the weights"),
        ({"trainer_class": LosesOptimizer}, "does not restore the optimizer's states"),
        ({"trainer_class": LosesRandomState}, "the resumed step has loss"),
        ({"trainer_class": LosesSchedule}, "restore the optimizer's states .*: group 0 lr"),
        ({"save": saves_no_weights}, "the final save cannot be read"),
        ({"save": saves_half}, "the final save cannot be read: .*lacks"),
        ({"save": saves_rounded}, "has other values than were trained"),
        ({"save": saves_other_values}, "other values than were trained .1 value: model.decoder.layers.1.fc1.bias"),
        ({"save": saves_half, "save_strategy": "no"}, "the final save cannot be read: .*lacks"),
    ],
    ids=lambda value: (
        "-".join(getattr(one, "__name__", one) for one in value.values()) if isinstance(value, dict) else ""
    ),
)
def test_a_fault_in_saving_or_loading_is_found_before_step_one(tiny_opt, tmp_path, options, what):
    faults = rehearsed(tiny_opt, tmp_path, dropout=0.5, **options)
    assert any(re.search(what, fault.what) and fault.level == "error" for fault in faults), faults
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("deterministic, resumed_loss, faults", [(True, 1.0, 1), (False, 1.0, 0), (False, 1.001, 1)])
def test_where_a_device_adds_in_any_order_the_repeated_step_may_differ_by_rounding_alone(
    deterministic, resumed_loss, faults
):
    states = [{1: ({"w": 1}, {"lr": 0.1}), 2: ({"w": after}, {"lr": 0.1})} for after in (2, 3)]
    assert len(compare(*states, 1.0, resumed_loss, deterministic)) == faults


def recurrent(**sizes):
    from transformers import FalconH1Config, FalconH1ForCausalLM

    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    return FalconH1ForCausalLM(FalconH1Config(**sizes, **mamba))


def mixture(**sizes):
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2))


@pytest.mark.parametrize("family", [recurrent, mixture])
def test_recurrent_models_and_mixtures_which_are_saved_under_other_names_are_rehearsed(family, tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    family(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    [note] = rehearsed(tmp_path / "model", tmp_path / "out", per_device_train_batch_size=1)
    assert note.level == "note" and "bit for bit" in note.what
    checkpoint, model = map(float, re.search(r"checkpoint ([\d.]+) MiB; model ([\d.]+) MiB", note.what).groups())
    assert checkpoint > model > 0


def test_a_run_without_checkpoints_rehearses_none(tiny_llama, tmp_path, monkeypatch, capsys):
    """Its disk was counted without one: save_strategy=no is the cure for a small one."""
    saved, inner = [], train.Trainer._save_checkpoint
    monkeypatch.setattr(train.Trainer, "_save_checkpoint", lambda *args: saved.append(inner(*args)))
    run(tiny_llama, tmp_path, "--preflight_only")
    assert len(saved) == 1
    run(tiny_llama, tmp_path, "--preflight_only", "--save_strategy", "no")
    assert len(saved) == 1
    assert "two steps and the final save succeeded" in capsys.readouterr().out


@pytest.mark.parametrize("packing", [False, True])
def test_the_rehearsal_is_on_the_longest_examples(tiny_llama, tmp_path, packing):
    """So that the most memory that a step needs is seen before step 1; and on as few as make two steps."""
    seen = []

    class Seen(train.Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            padded = "attention_mask" in inputs
            seen.append(inputs["attention_mask"].sum(-1).tolist() if padded else [inputs["input_ids"].numel()])
            return super().training_step(model, inputs, *args, **kwargs)

    make, args, rows = make_run(tiny_llama, tmp_path, Seen)

    def packed(*made):
        trainer = make(*made)
        trainer.data_collator.padding_free = True
        train.packing.set_attention(trainer.model, train.packing.SEGMENTS)
        return trainer

    if packing:
        rows, args.per_device_train_batch_size = train.packing.PackedDataset(rows, 512), 1
    bins = [row if packing else [row] for row in rows]
    sizes = sorted((sum(len(example["input_ids"]) for example in row) for row in bins), reverse=True)
    assert levels(rehearse(packed if packing else make, args, rows, None, save_whole)) == ["note"]
    first, second, again = seen
    assert sorted(first + second, reverse=True) == sizes[: 2 if packing else 8] and second == again


def test_the_schedule_is_the_runs_own(tiny_llama, tmp_path):
    """Of 10 steps with 4 of warming up, the first two are taken at 0 and a quarter of the rate."""
    rates = []

    class Seen(train.Trainer):
        def log(self, logs, *args, **kwargs):
            rates.extend([logs["learning_rate"]] if "loss" in logs else [])
            super().log(logs, *args, **kwargs)

    found = rehearsed(tiny_llama, tmp_path, Seen, max_steps=10, warmup_steps=4, learning_rate=1e-2)
    assert levels(found) == ["note"] and rates == pytest.approx([0, 2.5e-3, 2.5e-3])


def test_a_loss_that_is_not_finite_is_found(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_llama, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.lm_head.weight.data[7, 7] = float("nan")
    model.save_pretrained(tmp_path / "model")
    assert "not finite" in whats(rehearsed(tmp_path / "model", tmp_path / "out"), "error")


def test_a_failing_write_is_one_line_and_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    save = torch.save

    def full(obj, file, *args, **kwargs):
        save(obj, "/dev/full", *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="could not be saved in .*: fix the cause|failed .*PytorchStream.*disk full"):
        run(tiny_llama, tmp_path)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("failure", [RuntimeError("shape mismatch"), AttributeError("no such layer")])
def test_an_exception_in_the_rehearsal_is_one_line_that_names_the_flag(tiny_llama, tmp_path, monkeypatch, failure):
    def fail(*args):
        raise failure

    monkeypatch.setattr(rehearsal, "rehearse", fail)
    with pytest.raises(RankError, match=rf"\({failure}\): see .* skip_save_rehearsal=True"):
        run(tiny_llama, tmp_path)


def test_a_rank_that_alone_runs_out_of_memory_says_so_itself(tiny_llama, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        "from alpaca.training.preflight import rehearsal\n"
        "def fail(*args):\n    raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "if os.environ['RANK'] == '1':\n    rehearsal.rehearse = fail\ntrain.main()\n"
    )
    (tmp_path / "data.json").write_text(json.dumps(make_records(8)))
    argv = ["--model_name_or_path", tiny_llama, "--data_path", tmp_path / "data.json", "--output_dir", tmp_path / "out"]
    result = torchrun(2, script, *argv, "--max_steps", 1, "--report_to", "none")
    assert result.returncode != 0
    assert "error: preflight: a step ran out of memory: use one of" in result.stderr
    assert "disk full" not in result.stderr


def test_a_fingerprint_changes_with_any_bit_and_any_order():
    """It is of the bits: -0.0 is not 0.0, and chunks in another order are another tensor."""
    tensor = torch.arange(10, dtype=torch.float32)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    for other in (tensor.flip(0), tensor.to(torch.float64), -tensor, tensor[:9]):
        assert fingerprint(other) != fingerprint(tensor)
    changed = tensor.clone()
    changed.view(torch.int32)[4] ^= 1
    assert fingerprint(changed) != fingerprint(tensor)
    assert fingerprint(torch.zeros(0)) == fingerprint(torch.zeros(())) == 0
    assert isinstance(fingerprint(torch.ones(3, dtype=torch.bfloat16)), int)


def test_under_fsdp_on_two_processes_the_run_after_a_rehearsal_is_the_run_without(tiny_llama, tmp_path):
    result = torchrun(2, "tests/rehearse_on_two_ranks.py", tiny_llama, tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    [[level, what]] = report["found"]
    assert level == "note" and "the next step equal bit for bit" in what
    assert report["losses"][0] == report["losses"][1] and len(report["losses"][0]) == 2
    assert report["equal"]
    assert not (tmp_path / REHEARSAL).exists()


def test_under_fsdp_a_model_that_cannot_do_without_padding_falls_back_and_trains(tokenizer, tmp_path):
    """The self-check breaks off in the middle of a forward pass, where FSDP's layers are half gathered.

    Two processes of 4 examples each train 2 of the 6 twice: what is said before is what is counted then.
    """
    from transformers import AutoModelForCausalLM, Gemma2Config

    common = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    config = Gemma2Config(**common, num_key_value_heads=2, intermediate_size=128, eos_token_id=2, bos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    (tmp_path / "data.json").write_text(json.dumps(make_records(6)))
    argv = ["--model_name_or_path", tmp_path / "gemma", "--data_path", tmp_path / "data.json", "--output_dir"]
    argv += [tmp_path / "out", "--max_steps", 1, "--per_device_train_batch_size", 4, "--logging_steps", 1]
    result = torchrun(2, "train.py", *argv, "--fsdp", "--fsdp_config", "configs/fsdp.json")
    assert result.returncode == 0, result.stderr
    assert "examples are padded, as with padding=longest: padding-free attention has no softcap" in result.stdout
    assert "saved, reloaded and resumed: weights and optimizer equal" in result.stdout
    assert "each epoch has 8 examples, 2 of them repeated" in result.stdout
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["meter_totals"]["attributes"]["examples"] == 8


# ---------------------------------------------------------------------------------------------------------------------
# train.py.


def run(tiny, tmp_path, *extra):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(make_records(24)))
    argv = ["--model_name_or_path", tiny, "--data_path", data, "--output_dir", tmp_path / "out", "--report_to", "none"]
    train.train(*train.parse_args([*map(str, argv), *extra]))


def test_preflight_only_trains_nothing_and_a_clean_run_gets_notes_alone(tiny_llama, tmp_path, capsys):
    run(tiny_llama, tmp_path, "--preflight_only")
    out = capsys.readouterr().out
    assert "saved, reloaded and resumed: weights and optimizer equal, the next step equal bit for bit" in out
    assert "«number 0 number 1</s>»" in out and "warning" not in out and "error" not in out
    assert not list(tmp_path.glob("out/*"))


def test_a_model_with_fewer_learnt_positions_than_tokens_stops_a_training(tiny_opt, tmp_path, tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_opt, max_position_embeddings=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="the model only 128 positions: model_max_length=128"):
        run(tmp_path / "model", tmp_path, "--max_steps", "1", "--skip_save_rehearsal")


def test_a_model_that_the_machine_cannot_hold_is_not_loaded(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "host_free", lambda swap=False: 1000)
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(UserError, match="the model is loaded into the machine's memory: 0.4 MiB needed, 0.0 MiB free"):
        run(tiny_llama, tmp_path)


def test_with_held_out_records_the_numbers_listed_are_those_of_the_file(tiny_llama, tmp_path, capsys):
    """Of 24 records, the longest answer is cut and the longest prompt left out; 6 others are held out."""
    records = make_records(24)
    records[17]["output"], records[21]["instruction"] = "many words " * 400, "many words " * 400
    (tmp_path / "data.json").write_text(json.dumps(records))
    argv = ["--model_name_or_path", tiny_llama, "--data_path", tmp_path / "data.json", "--output_dir", tmp_path / "out"]
    flags = ("--eval_fraction", "0.25", "--preflight_only", "--skip_save_rehearsal", "--report_to", "none")
    args = train.parse_args([*map(str, argv), *flags])
    kept, _ = train.load_data(args[1], args[2].seed)
    assert {18, 22} <= set(kept.numbers) and len(kept.numbers) == 18  # else another seed
    assert kept == [records[number - 1] for number in kept.numbers] and kept.numbers != list(range(1, 19))
    train.train(*args)
    out = capsys.readouterr().out
    assert "1 of 18 records cut to 512 tokens (record 18)" in out
    assert "left out, as the prompt alone fills 512 tokens (record 22)" in out


def test_a_broken_tokenizer_stops_a_training(tiny_llama, tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(280)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="preflight: the tokenizer has 20 tokens beyond the model's 280 rows"):
        run(tmp_path / "model", tmp_path, "--max_steps", "1", "--skip_save_rehearsal")
    assert not (tmp_path / "out" / "model.safetensors").exists()
