"""Memory that is known before anything is loaded, against what real models take; advice that is enough; disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from made_trainer import levels

import train
from alpaca.common import memory as host_memory
from alpaca.common.memory import GIB, as_text
from alpaca.training.preflight import checks as preflight
from alpaca.training.preflight import memory, rehearsal
from alpaca.training.preflight.memory import Plan, Sizes

LLAMA_7B = Sizes(
    parameters=6_738_415_616,
    trained=6_738_415_616,
    linear=32 * (4 * 4096 * 4096 + 3 * 4096 * 11008),
    rank_one=32 * (4 * (4096 + 4096) + 3 * (4096 + 11008)),
)


@pytest.fixture(params=["tiny_llama", "tiny_opt"])
def model(request):
    return train.load_model(request.getfixturevalue(request.param), torch.float32)


def test_sizes_are_known_without_weights(model, tmp_path):
    """Tied embeddings, as OPT's, count once; the output embedding is not a matrix of the layers."""
    model.config.save_pretrained(tmp_path)
    sizes = memory.sizes_of(str(tmp_path))
    assert sizes == Sizes.of(model) and sizes.parameters == sum(p.numel() for p in model.parameters())
    layers = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    assert sizes.linear == sum(layer.weight.numel() for layer in layers)


def test_a_model_whose_config_says_too_little_has_no_sizes(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": null}')
    assert memory.sizes_of(str(tmp_path)) is None
    assert memory.sizes_of(str(tmp_path / "none")) is None


def test_parameters_gradients_and_optimizer_are_exact(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = sum(p.numel() * 4 for p in model.parameters())
    moments = sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if k != "step")
    sizes = Sizes.of(model)
    assert memory.parts(sizes, Plan()) == {"parameters": size, "gradients": size, "optimizer": moments}
    sharded = {"parameters": size // 4, "gradients": size // 4, "optimizer": moments // 4}
    assert memory.parts(sizes, Plan(ranks=4, sharded=True)) == sharded


def test_lora_counts_the_matrices_that_peft_adds(model):
    peft = pytest.importorskip("peft")
    sizes = Sizes.of(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert Plan(lora_r=8).trainable(sizes) == trained
    found = memory.parts(sizes, Plan(lora_r=8, dtype_bytes=2))
    assert found == {
        "parameters": 2 * sizes.parameters + 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
    }
    assert memory.checkpoint_bytes(sizes, Plan(lora_r=8)) == (12 * trained, 4 * (trained + sizes.parameters))


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Mamba"])
def test_lora_beside_the_experts_of_a_mixture_counts_too(family, tmp_path):
    """Their matrices lie in one parameter, (experts, in, out); a Mamba block has layers that LoRA leaves alone."""
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    config = getattr(transformers, f"{family}Config")(**sizes, **({} if family == "Mamba" else heads))
    model = transformers.AutoModelForCausalLM.from_config(config)
    expected = Plan(lora_r=8).trainable(Sizes.of(model))
    adapted = train.lora.add_adapter(model, made_arguments(tmp_path, lora_r=8))
    assert expected == sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0


def test_weights_in_4_bits_take_what_bitsandbytes_makes_of_them(tiny_llama):
    """nf4, twice quantized: half a byte a weight, a byte for 64 of them, 4 bytes for 256 of those."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = train.load_model(tiny_llama, torch.float32, quantization_config=nf4, device_map={"": "cpu"})
    scales = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    measured = sum(p.nbytes for p in model.parameters())
    measured += sum(scale.absmax.nbytes + scale.state2.absmax.nbytes for scale in scales)
    sizes = memory.sizes_of(str(tiny_llama))
    plan = Plan(lora_r=1, four_bit=True)
    estimated = memory.parts(sizes, plan)["parameters"] - 4 * plan.trainable(sizes)
    assert scales and estimated == pytest.approx(measured, rel=0.005)  # a matrix here has less than 256 scales


def check(sizes, plan, available):
    return memory.check_memory(sizes, plan, available)


def total(sizes, plan) -> int:
    return sum(memory.parts(sizes, plan).values())


def test_gradients_that_fsdp_accumulates_are_whole_on_each_device_and_ddp_has_them_twice():
    """27 GB at 7B, as torch keeps them in unsharded_accumulated_grad until the last batch of a step."""
    once = Plan(ranks=8, sharded=True)
    whole, share = 4 * LLAMA_7B.parameters, 4 * LLAMA_7B.parameters // 8
    several = replace(once, accumulates=True)
    assert memory.parts(LLAMA_7B, once)["gradients"] == share
    assert memory.parts(LLAMA_7B, several)["gradients"] == whole
    assert memory.parts(LLAMA_7B, replace(several, accumulates=False))["gradients"] == share
    assert memory.parts(LLAMA_7B, replace(once, offloaded=True)) == {}
    assert memory.parts(LLAMA_7B, replace(several, offloaded=True)) == {"gradients": whole}
    assert total(LLAMA_7B, Plan(ranks=2)) - total(LLAMA_7B, Plan()) == whole


def test_the_published_recipe_fits_four_80_gb_gpus_and_not_one_of_24_gb():
    recipe = Plan(ranks=4, accumulates=True, sharded=True)
    assert levels(check(LLAMA_7B, recipe, 79 * GIB)) == ["note"]
    [finding] = check(LLAMA_7B, replace(recipe, ranks=1, sharded=False), 24 * GIB)
    assert finding.level == "error" and "exact" in finding.why
    assert "lora_r=16 load_in_4bit=True (4.7 GiB)" in finding.cure and "lora_r=16 bf16=True (13.1 GiB)" in finding.cure
    assert f"fsdp over 5 devices {memory.SYNC} (20.1 GiB)" in finding.cure


ADVISED = {
    "lora_r=16": {"lora_r": 16},
    "bf16=True": {"dtype_bytes": 2},
    "load_in_4bit=True": {"four_bit": True},
    "optim=adamw_8bit": {"optimizer_bytes": 2},
    "without fsdp": {"sharded": False},
    memory.SYNC: {"accumulates": False},
    **{f"fsdp over {n} devices": {"sharded": True, "ranks": n, "dtype_bytes": 4} for n in range(2, 200)},
}


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(accumulates=True),
        Plan(optimizer_bytes=2),
        Plan(lora_r=16),
        Plan(lora_r=8, dtype_bytes=2),
        Plan(lora_r=8, four_bit=True),
        Plan(ranks=8, sharded=True, accumulates=True),
        Plan(ranks=2, sharded=True, lora_r=16),
    ],
)
def test_every_set_of_arguments_that_is_advised_is_enough_and_none_is_set_already(plan):
    for size in range(1, 120, 3):
        for text in memory.advise(LLAMA_7B, plan, size * GIB):
            words, figure = text.removesuffix(")").rsplit(" (", 1)
            changes = [change for word, change in ADVISED.items() if word in words]
            assert "fsdp over" not in words or not ("8bit" in words or "4bit" in words or plan.four_bit)
            new = replace(plan, **{key: value for change in changes for key, value in change.items()})
            assert new != plan and all(replace(plan, **change) != plan for change in changes), text
            assert as_text(total(LLAMA_7B, new)) == figure and total(LLAMA_7B, new) <= size * GIB, text


def test_the_mildest_arguments_are_advised_first():
    sharded = Plan(ranks=8, sharded=True, accumulates=True)
    assert memory.advise(LLAMA_7B, sharded, 16 * GIB)[0].startswith(memory.SYNC)
    first = memory.advise(LLAMA_7B, Plan(), 70 * GIB)
    assert [text.split(" (")[0] for text in first] == ["optim=adamw_8bit", "fsdp over 2 devices", "lora_r=16 bf16=True"]
    assert memory.advise(LLAMA_7B, Plan(lora_r=8, four_bit=True), GIB) == []


def test_a_step_that_ran_out_of_memory_is_made_smaller_with_the_same_examples_a_step(tmp_path):
    advice = memory.smaller_step(made_arguments(tmp_path, gradient_accumulation_steps=8))
    assert f"{memory.CHECKPOINTING}=True; per_device_train_batch_size=1 gradient_accumulation_steps=32" in advice
    args = made_arguments(tmp_path, lora_r=8, **{memory.CHECKPOINTING: True})
    args.per_device_train_batch_size = 1
    assert memory.smaller_step(args) == "a smaller model_max_length"


def test_a_plan_is_read_from_the_arguments(tmp_path):
    args = made_arguments(tmp_path, bf16=True, lora_r=4, optim="sgd", gradient_accumulation_steps=3)
    plan = Plan.of(args, torch.bfloat16)
    assert plan == Plan(accumulates=True, dtype_bytes=2, lora_r=4, optimizer_bytes=4)


def made_arguments(out, **arguments):
    return train.TrainingArguments(output_dir=str(out), per_device_train_batch_size=4, use_cpu=True, **arguments)


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
    sizes, cpu = memory.sizes_of(str(tiny_llama)), torch.device("cpu")
    assert levels(memory.check_loading(sizes, Plan(), cpu)) == ["note"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(host_memory, "host_free", lambda swap=False: 4 * sizes.parameters * 3 + 1)
    [finding] = memory.check_loading(sizes, Plan(), cpu)
    assert finding.level == "error" and "8 processes each load the whole model" in finding.what
    assert finding.cure.startswith("torchrun --nproc_per_node=3, or")
    assert levels(memory.check_loading(sizes, Plan(ranks=8, sharded=True), cpu)) == ["note"]  # FSDP: rank 0 alone
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert levels(memory.check_loading(sizes, Plan(), cpu)) == ["note"]


def disk(free: int, out, monkeypatch, **arguments):
    """What is found for 9 steps with a checkpoint of 120 bytes after every third, and a model of 40 bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    args = made_arguments(out, **({"save_strategy": "steps", "save_steps": 3} | arguments))
    return preflight.disk(args, range(12), Sizes(10, 10, 0, 0), Plan())


def test_a_disk_that_is_too_small_is_an_error_with_the_limit_that_fits(tmp_path, monkeypatch):
    assert levels(disk(400, tmp_path, monkeypatch)) == ["note"]
    [finding] = disk(399, tmp_path, monkeypatch)
    assert finding.level == "error" and finding.cure.startswith("save_total_limit=1, a larger disk")
    assert levels(disk(399, tmp_path, monkeypatch, save_total_limit=1)) == ["note"]
    [finding] = disk(159, tmp_path, monkeypatch, save_steps=9)
    assert finding.cure.startswith("a larger disk") and "save_strategy=no" in finding.cure
    [finding] = disk(40, tmp_path, monkeypatch, save_strategy="no")  # the model alone
    assert finding.level == "note" and "0 checkpoints" in finding.what
    assert memory.checkpoint_bytes(LLAMA_7B, Plan()) == (12 * 6738415616, 4 * 6738415616)


def test_earlier_checkpoints_count_as_free_space(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "file").write_bytes(b"x" * 10)
    assert levels(disk(390, tmp_path, monkeypatch)) == ["note"]
    assert levels(disk(389, tmp_path, monkeypatch)) == ["error"]


@pytest.mark.parametrize(
    "length, arguments, steps", [(24, {}, (9, 3)), (25, {}, (12, 4)), (24, {"max_steps": 7}, (7, 3))]
)
def test_the_steps_that_are_planned_are_those_that_are_taken(length, arguments, steps, tmp_path):
    """Three epochs of 8 examples a step."""
    args = made_arguments(tmp_path, gradient_accumulation_steps=2, **arguments)
    assert rehearsal.planned_steps(args, range(length)) == steps
