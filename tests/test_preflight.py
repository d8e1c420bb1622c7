"""Preflight: each finding with a tokenizer, dataset or model broken for it; a rehearsal leaves nothing behind."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, make_records, torchrun

import train
from alpaca import UserError, memory, packing_check, preflight
from alpaca.check_tokens import check_examples, check_tokenizer, mend_merges, show_example
from alpaca.findings import Finding, colour_wanted, format_report, raise_errors
from alpaca.fingerprint import fingerprint
from alpaca.memory import GIB, Advice, Plan, Shape
from alpaca.rehearsal import FOLDER, rehearse


def whats(findings, level=None):
    return " | ".join(finding.what for finding in findings if level in (None, finding.level))


def levels(findings):
    return [finding.level for finding in findings]


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


def test_there_is_colour_on_a_terminal_alone_and_none_with_no_color(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colour_wanted(Terminal()) and not colour_wanted(open(os.devnull))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour_wanted(Terminal())
    assert format_report([Finding("error", "e")], colour=True) == "\033[31merror   \033[0m e"


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer.


@pytest.fixture
def broken(tokenizer):
    """A copy to break: 300 tokens, <unk> <s> </s> with ids 0 1 2, BOS in front, no pad."""
    return copy.deepcopy(tokenizer)


def test_a_sound_tokenizer_gets_notes_alone(broken):
    findings = check_tokenizer(broken, rows=300)
    assert levels(findings) == ["note"] and "BOS ('<s>') is put in front" in whats(findings)


def test_an_empty_special_token_is_found(broken):
    broken.eos_token = ""
    assert "eos token is empty" in whats(check_tokenizer(broken, 300), "warning")


def test_eos_as_pad_is_a_note_and_eos_as_unk_a_warning(broken):
    broken.pad_token = "</s>"
    assert "eos and pad are the same token ('</s>', id 2)" in whats(check_tokenizer(broken, 300), "note")
    broken.unk_token = "</s>"
    assert "eos and unk are the same" in whats(check_tokenizer(broken, 300), "warning")


def test_an_eos_that_is_not_one_id_is_an_error(broken):
    broken._special_tokens_map["eos_token"] = "<|end|>"  # named in a config, but not in the vocabulary
    assert "eos token '<|end|>' is not one id" in whats(check_tokenizer(broken, 300), "error")


def test_a_bos_that_is_promised_and_not_added_is_found(broken):
    from tokenizers import processors

    broken.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert "no BOS: nothing is put in front" in whats(check_tokenizer(broken, 300), "note")
    broken._add_bos_token = True
    assert broken.add_bos_token
    assert "puts no BOS in front" in whats(check_tokenizer(broken, 300), "warning")


def test_a_bos_that_is_added_twice_is_found(broken):
    from tokenizers import processors

    twice = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
    broken.backend_tokenizer.post_processor = twice
    assert "BOS in front twice" in whats(check_tokenizer(broken, 300), "warning")


def test_a_tokenizer_of_another_model_is_an_error_and_an_added_token_without_a_row_a_warning(broken):
    assert "20 tokens beyond the model's 280 rows" in whats(check_tokenizer(broken, 280), "error")
    assert "300 tokens, the model 400 rows" in whats(check_tokenizer(broken, 400), "warning")
    broken.add_special_tokens({"pad_token": "[PAD]"})
    findings = check_tokenizer(broken, 300)
    assert "1 added tokens have no row" in whats(findings, "warning") and "error" not in levels(findings)


def test_a_config_that_ends_text_with_another_id_is_found(broken, tiny_llama):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_llama)
    assert levels(check_tokenizer(broken, 300, config)) == ["note"]
    config.eos_token_id = 1
    assert "ends text with id 1, the tokenizer with 2" in whats(check_tokenizer(broken, 300, config), "warning")
    config.eos_token_id = [1, 2]
    assert levels(check_tokenizer(broken, 300, config)) == ["note"]


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
    assert finding.level == "note" and "merges put in sentencepiece's order" in finding.what
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
# The examples. EOS is 2, there are 10 rows, the maximum is 6 tokens.

GOOD = {"input_ids": [1, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}
CUT = {"input_ids": [1, 5, 6, 7, 8, 9], "labels": [-100, -100, 6, 7, 8, 9]}


def examined(*examples, **options):
    return check_examples(list(examples), eos_id=2, rows=10, max_length=6, **options)


def test_sound_examples_get_no_finding():
    assert examined(GOOD, GOOD) == []


@pytest.mark.parametrize(
    ("ids", "labels", "level", "what"),
    [
        ([1, 5, 6, 7], [-100, -100, 6, 7], "error", "do not end with a supervised EOS"),
        ([1, 5, 6, 2], [-100, -100, 6, -100], "error", "do not end with a supervised EOS"),
        ([1, 5, 6, 2], [-100] * 4, "error", "have no label"),
        ([1, 5, 6, 2], [1, 5, 6, 2], "error", "are not masked at the start"),
        ([1, 5, 6, 2], [-100, 5, -100, 2], "error", "labels that are not their answer"),
        ([1, 5, 6, 2], [-100, -100, 7, 2], "error", "labels that are not their answer"),
        ([1, 5, 10, 2], [-100, -100, 10, 2], "error", "token ids outside the model's 10 rows"),
        ([1, 5, -1, 2], [-100, -100, -1, 2], "error", "token ids outside the model's 10 rows"),
        ([1, 5, 6, 2], [-100, 6, 2], "error", "another number of labels than tokens"),
        ([], [], "error", "less than two tokens"),
        ([1, 5, 2, 6, 2], [-100, -100, 2, 6, 2], "warning", "have EOS inside the answer"),
        ([1, 5, 2], [-100, -100, 2], "warning", "have an empty answer"),
        (CUT["input_ids"], CUT["labels"], "warning", "do not fit in 6 tokens and were cut"),
    ],
)
def test_a_broken_example_among_sound_ones_is_named(ids, labels, level, what):
    findings = examined(GOOD, {"input_ids": ids, "labels": labels}, GOOD)
    assert any(f.level == level and what in f.what and "1 of 3" in f.what and "(record 2)" in f.what for f in findings)


def test_record_numbers_count_those_that_were_left_out_and_at_most_ten_are_listed():
    """Records 1 and 3 were left out: the examples are of 2, 4, 5, …"""
    findings = examined(GOOD, CUT, left_out=[1, 3])
    assert "1 of 2 examples do not fit in 6 tokens and were cut (record 4)" in whats(findings, "warning")
    assert "2 records were left out" in whats(findings, "warning") and "(record 1, 3)" in whats(findings)
    assert whats(examined(*[CUT] * 12)).endswith("(record 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …)")
    assert "(record 9)" in whats(examined(GOOD, CUT, record_numbers=[7, 9]))


def test_no_example_at_all_is_an_error():
    assert "no example is left" in whats(examined(), "error")


def test_an_arrow_dataset_is_read_like_a_list():
    datasets = pytest.importorskip("datasets")
    rows = [GOOD, CUT, {"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}]
    arrow = datasets.Dataset.from_list([*rows, GOOD]).select([2, 0, 1])
    as_lists = check_examples([rows[2], rows[0], rows[1]], 2, 10, 6)
    assert len(as_lists) == 2 and check_examples(arrow, 2, 10, 6) == as_lists


def test_the_shipped_data_is_sound(tokenizer):
    records = json.loads((ROOT / "alpaca_data.json").read_text())[:300]
    broken = copy.deepcopy(tokenizer)
    examples = train.preprocess(records, broken, 4096)
    assert "error" not in levels(check_examples(examples, 2, 300, 4096))


def test_an_example_is_shown_with_its_mask(tokenizer):
    [example] = train.preprocess([{"instruction": "Say yes.", "input": "", "output": "Yes"}], tokenizer, 512)
    plain = show_example(example, tokenizer, colour=False)
    assert plain.startswith("<s>Below is an instruction") and plain.endswith("### Response:«Yes</s>»")
    coloured = show_example(example, tokenizer, colour=True)
    assert "\033[2m### Response:\033[0m\033[32mYes</s>\033[0m" in coloured


# ---------------------------------------------------------------------------------------------------------------------
# Memory and disk.

LLAMA_7B = Shape(6738415616, 6738415616, 4 * 6738415616, 32, 4096, 11008, 32, 32, 128, 32000, True, False)


def tiny(family, **changes):
    """Wider than it is deep in vocabulary, so that no one term hides the others."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    if family == "opt":
        sizes = {"ffn_dim": 256, "word_embed_proj_dim": 64, "dropout": 0.0, "max_position_embeddings": 512}
        model, config = OPTForCausalLM, OPTConfig
    else:
        sizes = {"intermediate_size": 176, "num_key_value_heads": 2 if family == "gqa" else 4}
        model, config = LlamaForCausalLM, LlamaConfig
    sizes |= {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return model(config(**(sizes | changes)))


def kept_for_backward(model, inputs) -> int:
    """Bytes of the distinct storages that autograd saves in a forward pass, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved, alive = {}, []

    def pack(tensor):
        alive.append(tensor)  # else the address could be used again
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(saved.values())


@pytest.mark.parametrize("family", ["llama", "gqa", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_is_within_a_factor_of_one_and_a_half(family, checkpointing):
    model = tiny(family).train()
    plan = Plan(batch=3, length=128, checkpointing=checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = {"input_ids": torch.randint(3, 300, (3, 128)), "attention_mask": torch.ones(3, 128, dtype=torch.long)}
    measured = kept_for_backward(model.base_model, inputs | {"use_cache": False})
    shape = Shape.of(model)
    estimated = memory.estimate(shape, plan)["activations"]
    if checkpointing:  # the one layer that is computed again is not kept in the forward pass
        estimated -= 3 * 128 * memory.activation_bytes(shape, plan)[0]
    assert 1 / 1.5 < estimated / measured < 1.5


def test_the_estimate_of_logits_counts_what_the_loss_keeps_and_its_gradient():
    """float32: logits, log-softmax and gradient, 12 bytes; of these the forward pass keeps the log-softmax alone."""
    model = tiny("llama", vocab_size=3000)
    ids = torch.randint(3, 300, (2, 64))
    with_loss = kept_for_backward(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    without = kept_for_backward(model.base_model, {"input_ids": ids, "use_cache": False})
    estimated = memory.estimate(Shape.of(model), Plan(batch=2, length=64))["logits"]
    assert estimated == 2 * 64 * 3000 * 12
    assert 0.95 < (with_loss - without) / (estimated / 3) < 1.05


@pytest.mark.parametrize("family", ["gqa", "opt"])
def test_parameters_gradients_and_optimizer_are_exact(family):
    model = tiny(family)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = sum(p.numel() * 4 for p in model.parameters())
    moments = sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if k != "step")
    parts = memory.estimate(Shape.of(model), Plan(batch=1, length=8))
    assert (parts["parameters"], parts["gradients"], parts["optimizer"]) == (size, size, moments)
    sharded = memory.estimate(Shape.of(model), Plan(batch=1, length=8, ranks=4, sharded=True))
    assert (sharded["parameters"], sharded["optimizer"]) == (size // 4, moments // 4)


def test_lora_counts_the_matrices_that_peft_adds():
    peft = pytest.importorskip("peft")
    model = tiny("gqa")
    expected = Shape.of(model).lora(8)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == expected


def test_the_published_recipe_fits_four_80_gb_gpus_and_not_one_of_24_gb():
    recipe = Plan(batch=4, length=512, ranks=4, sharded=True, bf16=True)
    advice = Advice(accumulation=8)
    assert levels(preflight.check_memory(LLAMA_7B, recipe, 79 * GIB, advice)) == ["note"]
    [finding] = preflight.check_memory(LLAMA_7B, replace(recipe, ranks=1, sharded=False), 24 * GIB, advice)
    assert finding.level == "error" and "no estimate" in finding.why
    assert "--fsdp over 16 devices" in finding.cure and "--load_in_4bit" in finding.cure
    assert "--lora_r 8 (" not in finding.cure  # the base alone, in float32, is more than 24 GiB


def test_activations_that_do_not_fit_are_a_warning_with_flags_that_are_enough():
    plan = Plan(batch=64, length=512, ranks=8, sharded=True, bf16=True)
    assert levels(preflight.check_memory(LLAMA_7B, plan, 300 * GIB, Advice())) == ["note"]
    [finding] = preflight.check_memory(LLAMA_7B, plan, 79 * GIB, Advice(accumulation=2))
    assert finding.level == "warning"
    assert "--gradient_checkpointing True (" in finding.cure
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 128" in finding.cure
    assert memory.estimate(LLAMA_7B, replace(plan, checkpointing=True))["total"] <= 79 * GIB
    assert memory.estimate(LLAMA_7B, replace(plan, batch=1))["total"] <= 79 * GIB


def test_no_flag_is_advised_that_is_set_already_and_no_set_that_is_too_small():
    plan = Plan(batch=1, length=512, bf16=True, checkpointing=True, optimizer_bytes=2)
    flags = memory.advise(LLAMA_7B, plan, 40 * GIB, Advice())
    assert flags and not any(flag in " ".join(flags) for flag in ("checkpointing", "batch_size", "--optim"))
    assert memory.advise(LLAMA_7B, plan, 1 * GIB, Advice()) == []


def test_there_is_memory_here():
    here = memory.available_bytes(torch.device("cpu"))
    assert 0.05 * GIB < here < 2**50


def test_a_disk_that_is_too_small_is_an_error_with_the_limit_that_fits(tmp_path):
    check = preflight.check_disk
    assert levels(check(tmp_path, 30, 10, checkpoints=3, free=100)) == ["note"]
    [finding] = check(tmp_path, 30, 10, checkpoints=4, free=100)
    assert finding.level == "error" and finding.cure.startswith("--save_total_limit 2, or free some")
    [finding] = check(tmp_path, 30, 10, checkpoints=1, free=39)
    assert finding.cure.startswith("--save_strategy no")
    assert memory.checkpoint_bytes(LLAMA_7B, Plan(4, 512)) == (12 * 6738415616, 4 * 6738415616)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer.


def make_trainer(folder, out, trainer_class=train.Trainer, records=24, dropout=0.0, **arguments):
    tokenizer = train.load_tokenizer(folder, model_max_length=512, padding_side="right")
    model = train.load_model(folder, torch.float32)
    model.config.dropout = dropout
    for module in model.modules():
        if dropout and isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout
    train.add_special_tokens(tokenizer, model)
    dataset = train.SupervisedDataset(make_records(records), tokenizer, 512, "training")
    defaults = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1}
    defaults |= {"save_strategy": "steps", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = train.TrainingArguments(output_dir=str(out), **(defaults | arguments))
    args.remove_unused_columns = False
    collator = train.DataCollatorForSupervisedDataset(tokenizer.pad_token_id)
    return trainer_class(
        model=model, args=args, train_dataset=dataset, data_collator=collator, processing_class=tokenizer
    )


def test_a_clean_run_gets_notes_alone_and_is_ready(tiny_llama, tmp_path, capsys):
    findings = preflight.preflight(make_trainer(tiny_llama, tmp_path))
    assert set(levels(findings)) == {"note"}
    out = capsys.readouterr().out
    assert "saved, reloaded and resumed: weights and optimizer equal" in out
    assert "«number 0 number 1</s>»" in out
    assert list(tmp_path.iterdir()) == []


def test_errors_stop_before_the_rehearsal_and_stand_in_the_report(tiny_llama, tmp_path, capsys):
    trainer = make_trainer(tiny_llama, tmp_path)
    trainer.model.model.norm.weight.data = trainer.model.model.norm.weight.data.bfloat16()
    trainer.train_dataset = [trainer.train_dataset[i] for i in range(24)]
    trainer.train_dataset[5] = {"input_ids": [1, 2], "labels": [-100, -100]}
    with pytest.raises(UserError, match=r"1 trained parameters are not float32.*\(and 1 more, above\)"):
        preflight.preflight(trainer)
    out = capsys.readouterr().out
    assert "model.norm.weight (bfloat16)" in out and "have no label (record 6)" in out and "resumed" not in out


def test_what_was_found_earlier_stops_too(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="preflight: no: this"):
        preflight.preflight(make_trainer(tiny_llama, tmp_path), [Finding("error", "no", "", "this")])


def test_fsdp_that_is_not_enabled_and_a_model_without_trained_parameters_are_errors(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, tmp_path)
    assert preflight.check_trainer(trainer) == []
    trainer.args.fsdp = True
    assert "--fsdp was asked for" in whats(preflight.check_trainer(trainer), "error")
    trainer.model.requires_grad_(False)
    assert "no parameter is trained" in whats(preflight.check_trainer(trainer), "error")


def test_bf16_on_a_gpu_that_only_emulates_it_is_an_error(monkeypatch):
    assert preflight.check_precision(True) == []  # no GPU: the library itself asks for --use_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert "V100 has no bf16" in whats(preflight.check_precision(True), "error")
    assert preflight.check_precision(False) == []


@pytest.mark.parametrize(
    ("deviation", "level", "fell_back"), [(1e-6, "note", 0), (0.7, "warning", 1), (float("nan"), "warning", 1)]
)
def test_packing_that_mixes_examples_falls_back_to_padding(
    tiny_llama, tmp_path, monkeypatch, deviation, level, fell_back
):
    calls = []
    monkeypatch.setattr(packing_check, "deviation_from_solo", lambda model, examples: deviation)
    monkeypatch.setattr(packing_check, "dependence", lambda model, examples: 0.0)
    self_check = packing_check.SelfCheck([], calls.append)
    findings = preflight.preflight(make_trainer(tiny_llama, tmp_path), self_check=self_check)
    assert [f.level for f in findings if "packed examples" in f.what or "are padded" in f.what] == [level]
    assert len(calls) == fell_back


# ---------------------------------------------------------------------------------------------------------------------
# The rehearsal.


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_after_a_rehearsal_equals_training_without_it_bit_for_bit(tiny_opt, tmp_path, accumulation):
    """With dropout, so that a random state left behind would show; steps, losses, order and weights are the same."""
    options = {"dropout": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    plain = make_trainer(tiny_opt, tmp_path / "plain", **options)
    plain.train()
    rehearsed = make_trainer(tiny_opt, tmp_path / "rehearsed", **options)
    before = dict(vars(rehearsed))
    weights = {name: parameter.clone() for name, parameter in rehearsed.model.named_parameters()}
    state = torch.get_rng_state()
    result = rehearse(rehearsed, tmp_path / "rehearsed")
    assert result.faults == [] and result.loss == result.resumed_loss
    assert vars(rehearsed) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], p) for name, p in rehearsed.model.named_parameters())
    assert all(p.grad is None for p in rehearsed.model.parameters())
    assert list((tmp_path / "rehearsed").iterdir()) == []

    rehearsed.train()
    losses = [[entry.get("loss") for entry in trainer.state.log_history] for trainer in (plain, rehearsed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    pairs = zip(plain.model.parameters(), rehearsed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    states = zip(plain.optimizer.state.values(), rehearsed.optimizer.state.values(), strict=True)
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in states)


class LosesWeights(train.Trainer):
    def _load_from_checkpoint(self, *args, **kwargs):
        pass


class LosesOptimizer(train.Trainer):
    def _load_optimizer_and_scheduler(self, checkpoint):
        pass


class LosesRandomState(train.Trainer):
    def _load_rng_state(self, checkpoint):
        pass


class SavesNoWeights(train.Trainer):
    def save_whole_model(self, output_dir):
        self.model.config.save_pretrained(output_dir)


class SavesHalf(train.Trainer):
    def save_whole_model(self, output_dir):
        self.save_model(str(output_dir))
        from safetensors.torch import load_file, save_file

        tensors = load_file(output_dir / "model.safetensors")
        save_file({n: t for n, t in tensors.items() if ".1." not in n}, output_dir / "model.safetensors")


class SavesRounded(train.Trainer):
    def save_whole_model(self, output_dir):
        copy.deepcopy(self.model).to(torch.bfloat16).save_pretrained(output_dir)


@pytest.mark.parametrize(
    ("trainer_class", "what"),
    [
        (LosesWeights, "the weights do not come back from a checkpoint"),
        (LosesOptimizer, "the optimizer's states do not come back"),
        (LosesRandomState, "the resumed step has loss"),
        (SavesNoWeights, "the final save wrote no weights"),
        (SavesHalf, "the final save lacks"),
        (SavesRounded, "from_pretrained gives other values than were trained"),
    ],
)
def test_a_fault_in_saving_or_loading_is_found_before_step_one(tiny_opt, tmp_path, trainer_class, what):
    result = rehearse(make_trainer(tiny_opt, tmp_path, trainer_class, dropout=0.1), tmp_path)
    assert any(what in fault[0] for fault in result.faults), result.faults
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_of_experts_is_saved_under_other_names_than_it_has_and_nothing_is_missed(tokenizer, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=1, num_local_experts=2, **sizes)
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert rehearse(make_trainer(tmp_path / "model", tmp_path / "out"), tmp_path / "out").faults == []

    class LosesAnExpert(train.Trainer):
        def save_whole_model(self, output_dir):
            from safetensors.torch import load_file, save_file

            self.save_model(str(output_dir))
            tensors = load_file(output_dir / "model.safetensors")
            kept = {name: t for name, t in tensors.items() if ".1.block_sparse_moe.experts.1." not in name}
            assert len(kept) < len(tensors)
            save_file(kept, output_dir / "model.safetensors", {"format": "pt"})

    faults = rehearse(make_trainer(tmp_path / "model", tmp_path / "out", LosesAnExpert), tmp_path / "out").faults
    assert "the final save lacks 3 tensors" in faults[0][0]


def test_a_run_without_checkpoints_rehearses_none(tiny_llama, tmp_path, monkeypatch, capsys):
    """Its disk was counted without one: --save_strategy no is the cure for a small one."""
    saved, inner = [], train.Trainer._save_checkpoint
    monkeypatch.setattr(train.Trainer, "_save_checkpoint", lambda *args: saved.append(inner(*args)))
    preflight.preflight(make_trainer(tiny_llama, tmp_path / "saves"))
    assert len(saved) == 1
    preflight.preflight(make_trainer(tiny_llama, tmp_path / "no", save_strategy="no"))
    assert len(saved) == 1
    assert "two steps and the final save are as they should be" in capsys.readouterr().out
    result = rehearse(make_trainer(tiny_llama, tmp_path / "half", SavesHalf, save_strategy="no"), tmp_path / "half")
    assert "the final save lacks" in result.faults[0][0]


@pytest.mark.parametrize("packing", [False, True])
def test_the_rehearsal_is_on_the_longest_examples_and_the_run_on_all(tiny_llama, tmp_path, packing):
    """So that the most memory that a step needs is seen before step 1."""
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=6, gradient_accumulation_steps=1)
    if packing:
        trainer.train_dataset = train.packing.PackedDataset(trainer.train_dataset, 512)
        trainer.data_collator.padding_free = True
        train.packing.set_attention(trainer.model, train.packing.SEGMENTS)
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    rows = [row if packing else [row] for row in trainer.train_dataset]
    sizes = sorted((sum(len(example["input_ids"]) for example in row) for row in rows), reverse=True)
    seen, inner = [], trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        padded = "attention_mask" in inputs
        seen.append(inputs["attention_mask"].sum(-1).tolist() if padded else [inputs["input_ids"].numel()])
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    assert rehearse(trainer, tmp_path).faults == []
    first, second, again = seen
    assert sorted(first + second, reverse=True) == sizes[: 2 if packing else 8] and second == again
    if not packing:
        seen.clear()
        trainer.train()
        assert sorted(sum(seen, []), reverse=True) == sizes


def test_a_loss_that_is_not_finite_is_found(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, tmp_path)
    trainer.model.lm_head.weight.data[7, 7] = float("nan")
    assert "not finite" in rehearse(trainer, tmp_path).faults[0][0]


def test_an_optimizer_that_moves_at_learning_rate_zero_is_found(tiny_llama, tmp_path):
    class Restless(train.Trainer):
        def create_optimizer(self, model=None):
            super().create_optimizer(model)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3
            return self.optimizer

        def create_scheduler(self, num_training_steps, optimizer=None):
            super().create_scheduler(num_training_steps, optimizer)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3
            return self.lr_scheduler

    assert (
        "moves weights at learning rate 0"
        in rehearse(make_trainer(tiny_llama, tmp_path, Restless), tmp_path).faults[0][0]
    )


def test_a_failing_write_is_one_line_and_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="saving and resuming failed: PytorchStreamWriter.*is the disk full"):
        preflight.preflight(make_trainer(tiny_llama, tmp_path))
    assert list(tmp_path.iterdir()) == []


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
    assert report["fsdp"] and report["faults"] == [] and report["sharded"]
    assert report["losses"][0] == report["losses"][1] and len(report["losses"][0]) == 2
    assert report["equal"]
    assert not (tmp_path / FOLDER).exists()


def test_under_fsdp_a_model_that_cannot_do_without_padding_falls_back_and_trains(tokenizer, tmp_path):
    """The self-check breaks off in the middle of a forward pass, where FSDP's layers are half gathered."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    common = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    config = Gemma2Config(**common, num_key_value_heads=2, intermediate_size=128, eos_token_id=2, bos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    (tmp_path / "data.json").write_text(json.dumps(make_records(8)))
    argv = ["--model_name_or_path", tmp_path / "gemma", "--data_path", tmp_path / "data.json", "--output_dir"]
    argv += [tmp_path / "out", "--max_steps", 1, "--per_device_train_batch_size", 4, "--logging_steps", 1]
    result = torchrun(2, "train.py", *argv, "--fsdp", "--fsdp_config", "configs/fsdp.json")
    assert result.returncode == 0, result.stderr
    assert "examples are padded, as with --padding longest: padding-free attention has no softcap" in result.stdout
    assert "saved, reloaded and resumed: weights and optimizer equal" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# train.py.


def run(tiny, tmp_path, *extra):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(make_records(24)))
    argv = ["--model_name_or_path", tiny, "--data_path", data, "--output_dir", tmp_path / "out", "--report_to", "none"]
    train.train(*train.parse_args([*map(str, argv), *extra]))


def test_preflight_only_trains_nothing(tiny_llama, tmp_path, capsys):
    run(tiny_llama, tmp_path, "--preflight_only")
    assert "saved, reloaded and resumed" in capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == []


def test_a_broken_tokenizer_stops_a_training(tiny_llama, tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(280)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="preflight: the tokenizer has 20 tokens beyond the model's 280 rows"):
        run(tmp_path / "model", tmp_path, "--max_steps", "1", "--skip_save_rehearsal")
    assert not (tmp_path / "out" / "model.safetensors").exists()
