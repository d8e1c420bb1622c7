"""The estimate of memory against what is measured on small models, advice that is enough, disk."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from made_trainer import levels, make_trainer, whats

import train
from alpaca.common import memory as host_memory
from alpaca.common.memory import GIB
from alpaca.training import packing
from alpaca.training.preflight import memory
from alpaca.training.preflight import run as preflight
from alpaca.training.preflight.memory import Plan, Shape

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


def test_without_padding_logits_are_counted_where_there_is_a_label(tiny_llama, tmp_path):
    """The model is run on a flattened batch; the loss keeps the float32 log-softmax, a third of the estimate."""
    trainer = make_trainer(tiny_llama, tmp_path, records=4)
    examples = trainer.train_dataset
    assert preflight._plan(trainer, examples).logit_tokens is None
    trainer.data_collator.padding_free = True
    plan = preflight._plan(trainer, examples)
    assert plan.logit_tokens == max(sum(label != -100 for label in example["labels"]) for example in examples)
    trainer.train_dataset = packing.PackedDataset(examples, 512)  # all of them in one bin or two
    supervised = [sum(sum(label != -100 for label in e["labels"]) for e in bin_) for bin_ in trainer.train_dataset]
    packed = preflight._plan(trainer, examples)
    assert (packed.length, packed.logit_tokens) == (512, max(supervised))

    model = tiny("llama", vocab_size=3000)
    packing.set_attention(model, packing.SEGMENTS)
    lengths, answer = (60, 40), 10
    ids = [torch.randint(3, 300, (length,)).tolist() for length in lengths]
    batch = packing.flatten([{"input_ids": i, "labels": [-100] * (len(i) - answer) + i[-answer:]} for i in ids])
    with_loss = kept_for_backward(model, batch)
    inner = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels", "logits_to_keep")}
    measured = with_loss - kept_for_backward(model.base_model, inner)
    estimated = memory.estimate(Shape.of(model), Plan(batch=2, length=60, logit_tokens=answer))["logits"]
    assert estimated == 2 * answer * 3000 * 12
    assert 0.9 < measured / (estimated / 3) < 1.1


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


def test_parameters_that_zero_3_has_partitioned_count_whole():
    """DeepSpeed leaves an empty tensor, and says in ds_numel and ds_shape what it was."""
    model = tiny("gqa")
    whole = Shape.of(model)
    for parameter in model.parameters():
        parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
        parameter.data = torch.empty(0)
    assert sum(p.numel() for p in model.parameters()) == 0
    assert Shape.of(model) == whole


def test_weights_in_4_bits_count_whole_and_take_what_they_take(tiny_llama):
    """nf4, twice quantised: half a byte a weight, a byte for 64 of them, 4 bytes for 256 of those."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = train.load_model(tiny_llama, torch.float32, quantization_config=nf4, device_map={"": "cpu"})
    linear = [p for p in model.parameters() if hasattr(p, "quant_state")]
    whole, quantised = Shape.of(train.load_model(tiny_llama, torch.float32)), Shape.of(model)
    assert linear and quantised.parameters == whole.parameters
    in_4_bits = sum(p.quant_state.shape.numel() for p in linear)
    scales = sum(-(-p.quant_state.absmax.numel() // 256) * 4 for p in linear)
    expected = 4 * (whole.parameters - in_4_bits) + in_4_bits // 2 + in_4_bits // 64 + scales
    assert quantised.parameter_bytes == expected


def test_lora_counts_the_matrices_that_peft_adds():
    peft = pytest.importorskip("peft")
    model = tiny("gqa")
    expected = Shape.of(model).lora(8)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == expected


def check(shape, plan, available):
    return preflight.check_memory(shape, plan, available, memory.advise(shape, plan, available))


def test_gradients_that_fsdp_accumulates_are_whole_on_each_device_and_ddp_has_them_twice():
    """27 GB at 7B, as torch keeps them in unsharded_accumulated_grad until the last batch of a step."""
    once = Plan(batch=1, length=512, ranks=8, sharded=True, bf16=True)
    whole, share = 4 * LLAMA_7B.trainable, 4 * LLAMA_7B.trainable // 8
    several = replace(once, accumulation=4)
    assert memory.estimate(LLAMA_7B, once)["gradients"] == share
    assert memory.estimate(LLAMA_7B, several)["gradients"] == whole
    assert memory.estimate(LLAMA_7B, replace(several, sync_each_batch=True))["gradients"] == share
    totals = [memory.estimate(LLAMA_7B, plan)["total"] for plan in (once, several)]
    assert totals[1] - totals[0] == whole - share
    offloaded = [memory.estimate(LLAMA_7B, replace(plan, offloaded=True))["total"] for plan in (once, several)]
    assert offloaded[1] - offloaded[0] == whole
    one, two = (memory.estimate(LLAMA_7B, Plan(batch=1, length=512, ranks=ranks)) for ranks in (1, 2))
    assert two["total"] - one["total"] == whole == two["gradient buckets"]


def test_a_smaller_batch_is_advised_with_the_gradients_that_it_makes_fsdp_accumulate():
    plan = Plan(batch=128, length=512, ranks=64, sharded=True, bf16=True, checkpointing=True)
    shape = replace(LLAMA_7B, trainable=LLAMA_7B.trainable - 1)  # so that no adapter is advised
    smaller = "per_device_train_batch_size=1 gradient_accumulation_steps=128"
    alone = memory.estimate(shape, replace(plan, batch=1, accumulation=128))["total"]
    assert memory.advise(shape, plan, alone)[0].startswith(f"{smaller} (")
    synced = f"""{smaller} accelerator_config='{{"gradient_accumulation_kwargs": {{"sync_each_batch": true}}}}' ("""
    assert memory.advise(shape, plan, alone - 1)[0].startswith(synced)
    assert memory.estimate(shape, replace(plan, batch=1, accumulation=128, sync_each_batch=True))["total"] < alone
    assert not any("sync" in text for text in memory.advise(LLAMA_7B, replace(plan, sharded=False), 90 * GIB))


def test_the_published_recipe_fits_four_80_gb_gpus_and_not_one_of_24_gb():
    recipe = Plan(batch=4, length=512, ranks=4, accumulation=8, sharded=True, bf16=True)
    assert levels(check(LLAMA_7B, recipe, 79 * GIB)) == ["note"]
    [finding] = check(LLAMA_7B, replace(recipe, ranks=1, sharded=False), 24 * GIB)
    assert finding.level == "error" and "exact, not estimated" in finding.why
    assert "fsdp over 16 devices" in finding.cure and "load_in_4bit=True" in finding.cure
    assert "lora_r=8 (" not in finding.cure  # the base alone, in float32, is more than 24 GiB


def test_activations_that_do_not_fit_are_a_warning_with_flags_that_are_enough():
    plan = Plan(batch=64, length=512, ranks=8, sharded=True, bf16=True)
    assert levels(check(LLAMA_7B, plan, 300 * GIB)) == ["note"]
    [finding] = check(LLAMA_7B, replace(plan, accumulation=2), 79 * GIB)
    assert finding.level == "warning"
    assert f"{memory.CHECKPOINTING}=True (" in finding.cure
    assert "per_device_train_batch_size=1 gradient_accumulation_steps=128" in finding.cure
    assert memory.estimate(LLAMA_7B, replace(plan, checkpointing=True, accumulation=2))["total"] <= 79 * GIB
    assert memory.estimate(LLAMA_7B, replace(plan, batch=1, accumulation=128))["total"] <= 79 * GIB


def test_no_flag_is_advised_that_is_set_already_and_no_set_that_is_too_small():
    plan = Plan(batch=1, length=512, bf16=True, checkpointing=True, optimizer_bytes=2)
    flags = memory.advise(LLAMA_7B, plan, 40 * GIB)
    assert flags and not any(flag in " ".join(flags) for flag in ("checkpointing", "batch_size", "optim="))
    assert memory.advise(LLAMA_7B, plan, 1 * GIB) == []


def test_an_8_bit_optimizer_is_never_advised_with_fsdp():
    """bitsandbytes has no sharding strategy: FSDP2 ends in its first step."""
    alone = Plan(batch=1, length=512, bf16=True, checkpointing=True)
    assert any("optim=adamw_8bit" in text for text in memory.advise(LLAMA_7B, alone, 90 * GIB))
    for size in range(4, 120, 4):
        assert not any("8bit" in text and "fsdp" in text for text in memory.advise(LLAMA_7B, alone, size * GIB))
        sharded = replace(alone, ranks=2, sharded=True)
        assert not any("8bit" in text for text in memory.advise(LLAMA_7B, sharded, size * GIB))


def test_a_model_without_attention_heads_gets_no_estimate_and_its_disk_is_checked():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1))
    shape, plan = Shape.of(model), Plan(batch=1, length=8)
    assert memory.advise(shape, plan, 0) == []
    assert whats(check(shape, plan, 0), "note").startswith("memory was not estimated")
    count = sum(p.numel() for p in model.parameters())
    assert memory.checkpoint_bytes(shape, plan) == (12 * count, 4 * count)


def test_there_is_memory_here():
    here = host_memory.available_bytes(torch.device("cpu"))
    assert 0.05 * GIB < here < 2**50


def test_a_control_group_leaves_the_least_of_itself_and_those_above_and_cached_files_are_free(tmp_path):
    """v2: the job may use 1000, of which 700 are taken, 500 of them by cached files; above it 2000 - 1900 are left."""

    def group(folder, limit, used, cached, names=("memory.max", "memory.current"), prefix=""):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip((*names, "memory.stat"), (limit, used, None), strict=True):
            stat = f"{prefix}active_file {cached}\n{prefix}inactive_file 0\nanon 7\n"
            (folder / name).write_text(stat if value is None else f"{value}\n")

    groups = tmp_path / "groups"
    groups.write_text("4:cpu,memory:/job\n3:cpu:/other\n0::/slurm/job\n")
    group(tmp_path, "max", 1, 0)
    group(tmp_path / "slurm", 2000, 1900, 0)
    group(tmp_path / "slurm" / "job", 1000, 700, 500)
    group(tmp_path / "memory" / "job", 600, 100, 50, ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_")
    assert sorted(host_memory._control_groups_free(groups, tmp_path)) == [100, 550, 800]
    assert host_memory._control_groups_free(tmp_path / "none", tmp_path) == []


def test_a_machine_that_cannot_hold_the_model_once_a_process_is_an_error(tiny_llama, monkeypatch):
    """float32 whatever the file holds; the kernel would end a rank without a word."""
    weights = sum(p.numel() for p in train.load_model(tiny_llama, torch.float32).parameters())
    assert memory.weights_bytes(tiny_llama, torch.float32) == 4 * weights
    assert memory.weights_bytes(tiny_llama, torch.bfloat16) == 2 * weights
    assert memory.weights_bytes(tiny_llama / "none", torch.float32) == 0
    assert preflight.check_loading(tiny_llama, torch.float32) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(host_memory, "host_free", lambda swap=False: 4 * weights * 3 + 1)
    [finding] = preflight.check_loading(tiny_llama, torch.float32)
    assert finding.level == "error" and "8 processes each load the whole model" in finding.what
    assert finding.cure.startswith("torchrun --nproc_per_node=3, or")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert preflight.check_loading(tiny_llama, torch.float32) == []


def test_a_disk_that_is_too_small_is_an_error_with_the_limit_that_fits(tmp_path):
    check = preflight.check_disk
    assert levels(check(tmp_path, 30, 10, checkpoints=3, free=100)) == ["note"]
    [finding] = check(tmp_path, 30, 10, checkpoints=4, free=100)
    assert finding.level == "error" and finding.cure.startswith("save_total_limit=2, or free some")
    [finding] = check(tmp_path, 30, 10, checkpoints=1, free=39)
    assert finding.cure.startswith("save_strategy=no")
    assert memory.checkpoint_bytes(LLAMA_7B, Plan(4, 512)) == (12 * 6738415616, 4 * 6738415616)


def test_what_an_interrupted_save_left_is_removed_before_the_free_space_is_asked_for(tiny_llama, tmp_path, monkeypatch):
    trainer, seen = make_trainer(tiny_llama, tmp_path, records=4, save_strategy="no"), []
    monkeypatch.setattr(preflight, "check_disk", lambda *values: seen.append(values) or [])
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: seen.append(sorted(p.name for p in tmp_path.iterdir())) or disk
    )
    for i, name in enumerate(("checkpoint-3", ".saving", ".save-rehearsal")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x" * 10**i)
    preflight._disk(trainer, Shape.of(trainer.model), Plan(batch=1, length=8))
    [there, (_, _, final, checkpoints, free)] = seen
    assert there == ["checkpoint-3"] and free == disk.free + 1
    assert checkpoints == 0 and final == 4 * Shape.of(trainer.model).trainable  # --save_strategy no: the model alone
