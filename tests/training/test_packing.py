"""Padding-free is padded: the same losses, gradients and weights, for each family; and what mixes examples is found."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import make_records
from hypothesis import given, settings
from hypothesis import strategies as st
from made_examples import Examples, make_examples, tiny
from oracles_train import attention_by_mask, fewest_bins
from transformers import AttentionInterface

import train
from alpaca import UserError
from alpaca.training import packing
from alpaca.training.preflight import packing as packing_check

FAMILIES = ["llama", "llama, grouped, tied", "mistral", "qwen2", "gpt_neox", "opt"]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="the same on a GPU")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])


def run(model, tmp_path, examples, padding="free", packing=False, device="cpu", **arguments):
    """Trains a copy of the model as train.py would; gives the copy, on the CPU, and the Trainer."""
    model = copy.deepcopy(model)
    data_args = train.DataArguments(padding=padding, packing=packing)
    training_args = train.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=device == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        remove_unused_columns=False,
        model_max_length=64,
        **{"max_steps": 6, "learning_rate": 1e-3, "lr_scheduler_type": "constant"} | arguments,
    )
    rows, collator, self_check = train.make_batches(model, Examples(examples), 0, data_args, training_args)
    trainer = train.Trainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[self_check] if self_check else None,
    )
    trainer.train()
    return model.cpu(), trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(a, b, base) -> None:
    """The losses of each step, and the weights after them, of two ``(model, trainer)``."""
    assert losses(a[1]) == pytest.approx(losses(b[1]), abs=1e-5)
    pairs = [
        (x.detach(), y.detach(), z.detach())
        for x, y, z in zip(a[0].parameters(), b[0].parameters(), base.parameters(), strict=True)
    ]
    difference = torch.cat([(x - y).abs().flatten() for x, y, _ in pairs])
    moved = torch.cat([(x - z).abs().flatten() for x, _, z in pairs])
    assert moved.max() > 4e-3  # six steps of Adam at 1e-3: the bounds below are not met by standing still
    # Where a gradient is near zero, Adam divides its rounding by its size: a few weights, by a tenth of a step.
    assert difference.max() < 5e-4 and difference.mean() < 1e-7, (difference.max(), difference.mean())


# ---------------------------------------------------------------------------------------------------------------------
# A batch.


def test_a_flattened_batch():
    """[5 6 7] and [8 9]; 6, 7, 8 and 9 have labels. Nothing predicts 8, the first token of its example."""
    batch = packing.flatten(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}],
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert batch["logits_to_keep"].tolist() == [0, 1, 3]
    assert batch["labels"].tolist() == batch["shift_labels"].tolist() == [[6, 7, 9]]


def test_bins_are_flattened_as_their_examples_are():
    a, b, c = make_examples(3)
    one, other = packing.flatten([[a, b], [c]]), packing.flatten([a, b, c])
    assert one.keys() == other.keys()
    assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


# ---------------------------------------------------------------------------------------------------------------------
# Attention.


def qkv(lengths, heads=4, kv_heads=4, dim=8, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    total = sum(lengths)
    return [
        # as a model makes them: (1, total, heads, dim) with two dimensions swapped
        torch.randn(1, total, n, dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def attend(tensors, lengths, **options):
    ends = torch.tensor([0, *lengths], device=tensors[0].device).cumsum(0, dtype=torch.int32)
    module = torch.nn.Module()
    output, _ = packing.segment_attention(
        module, *tensors, None, scaling=0.3, cu_seq_lens_q=ends, max_length_q=max(lengths), **options
    )
    return output


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("sliding_window", [None, 3, 7])
def test_attention_by_segments_equals_a_mask_over_the_whole_row(kv_heads, sliding_window):
    lengths = [5, 1, 9, 7]
    fast, slow = qkv(lengths, kv_heads=kv_heads), qkv(lengths, kv_heads=kv_heads)
    got = attend(fast, lengths, sliding_window=sliding_window)
    expected = attention_by_mask(*slow, lengths, 0.3, sliding_window)
    assert got.shape == (1, 22, 4, 8)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def fake_kernel(signature: str):
    """torch's varlen_attn with one of its signatures over time, computed by the slow way."""

    def compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window, heads_may_differ):
        assert cu_seq_q is cu_seq_k and max_q == max_k == int(cu_seq_q.diff().max())
        assert heads_may_differ or query.shape[1] == key.shape[1]
        swapped = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        return attention_by_mask(*swapped, cu_seq_q.diff().tolist(), scale, window)[0]

    def is_causal(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
        assert is_causal
        return compute(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, None, False)

    def window(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert window_size[1] == 0
        left = None if window_size[0] == -1 else window_size[0] + 1
        return compute(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, left, False)

    def grouped(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert window_size[1] == 0
        left = None if window_size[0] == -1 else window_size[0] + 1
        return compute(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, left, enable_gqa)

    return {"is_causal": is_causal, "window_size": window, "window_size, enable_gqa": grouped}[signature]


@pytest.mark.parametrize("signature", ["is_causal", "window_size", "window_size, enable_gqa"])
def test_the_kernel_is_called_by_the_signature_that_it_has(signature, monkeypatch):
    import inspect

    kernel = fake_kernel(signature)
    monkeypatch.setattr(packing, "varlen_attn", kernel)
    monkeypatch.setattr(packing, "VARLEN_PARAMETERS", frozenset(inspect.signature(kernel).parameters))
    lengths = [5, 1, 9]
    ends = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    for window in (None,) if signature == "is_causal" else (None, 4):
        tensors = qkv(lengths, kv_heads=2)
        got = packing._varlen(*tensors, ends, 9, 0.3, window)
        torch.testing.assert_close(got, attention_by_mask(*tensors, lengths, 0.3, window), atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's varlen_attn runs on CUDA alone")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("sliding_window", [None, 7])
def test_on_cuda_the_kernel_equals_attention_segment_by_segment(kv_heads, sliding_window):
    lengths = [5, 1, 90, 70]
    fast, slow = (qkv(lengths, 4, kv_heads, 64, "cuda", torch.bfloat16) for _ in range(2))
    assert packing._has_varlen_kernel(fast[0], fast[2], 0.0, sliding_window)
    got = attend(fast, lengths, sliding_window=sliding_window)
    expected = packing.segment_by_segment(*slow, lengths, 0.3, 0.0, sliding_window)
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
    got.float().square().sum().backward()
    expected.float().square().sum().backward()
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=5e-2, rtol=5e-2)


def test_a_padded_batch_under_the_attention_by_segments_is_refused():
    """Its mask would be lost: no answer is better than a wrong one."""
    model = tiny("llama")
    assert packing.set_attention(model, packing.SEGMENTS)
    with pytest.raises(NotImplementedError, match="flattened"):
        model(**packing.pad(make_examples(2), 0))


# ---------------------------------------------------------------------------------------------------------------------
# Padded ≡ padding-free.


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_and_padding_free_have_the_same_loss_and_gradients(family):
    examples = make_examples(4)
    padded, free = tiny(family), tiny(family)
    assert packing.set_attention(free, packing.SEGMENTS)
    batch = packing.pad(examples, 0)
    items = batch["labels"][:, 1:].ne(-100).sum()
    a, b = padded(**batch), free(**packing.flatten(examples), num_items_in_batch=items)
    assert b.logits.shape == (1, items, 300)
    assert b.loss.item() == pytest.approx(a.loss.item(), abs=1e-6)
    a.loss.backward()
    b.loss.backward()
    for (name, x), y in zip(padded.named_parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(y.grad, x.grad, atol=1e-6, rtol=1e-4, msg=name)


@on_each_device
@pytest.mark.parametrize("family", ["llama, grouped, tied", "opt"])
def test_steps_with_padding_equal_steps_without(family, device, tmp_path):
    model, examples = tiny(family), make_examples(24)
    padded = run(model, tmp_path, examples, "longest", device=device, per_device_train_batch_size=4)
    free = run(model, tmp_path, examples, "free", device=device, per_device_train_batch_size=4)
    assert "position_ids" in free[1].data_collator(examples[:2])
    assert "position_ids" not in padded[1].data_collator(examples[:2])
    assert_same_training(padded, free, model)


@needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_torchs_kernel_trains_like_padding(family, tmp_path):
    """Six steps of losses, within bf16's 8 bits of mantissa: 0.4% of a loss near 6."""
    model, examples = tiny(family), make_examples(24)
    padded = run(model, tmp_path, examples, "longest", device="cuda", bf16=True, per_device_train_batch_size=4)
    free = run(model, tmp_path, examples, "free", device="cuda", bf16=True, per_device_train_batch_size=4)
    assert free[1].data_collator.padding_free
    assert losses(free[1]) == pytest.approx(losses(padded[1]), abs=0.03)


@on_each_device
def test_a_batch_of_eight_equals_eight_accumulated(device, tmp_path):
    model, examples = tiny("llama"), make_examples(24)
    whole = run(model, tmp_path, examples, device=device, per_device_train_batch_size=8)
    ones = run(model, tmp_path, examples, device=device, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert_same_training(whole, ones, model)


@on_each_device
def test_activation_checkpointing_changes_nothing(device, tmp_path):
    model, examples = tiny("llama"), make_examples(24)
    names = {"activation_checkpointing", "gradient_checkpointing"}  # the second is the older name
    name = sorted(names & set(train.TrainingArguments.__dataclass_fields__))[0]
    off = run(model, tmp_path, examples, device=device)
    on = run(model, tmp_path, examples, device=device, **{name: True})
    flags = [[getattr(module, "gradient_checkpointing", False) for module in m.modules()] for m, _ in (on, off)]
    assert any(flags[0]) and not any(flags[1])
    assert_same_training(off, on, model)


def test_a_saved_model_does_not_name_the_attention(tmp_path):
    model = tiny("llama")
    packing.set_attention(model, packing.SEGMENTS)
    model.save_pretrained(tmp_path)
    assert packing.SEGMENTS not in (tmp_path / "config.json").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# The self-check.


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_in_one_row_equal_the_same_alone(family):
    model = tiny(family).train()
    packing.set_attention(model, packing.SEGMENTS)
    assert max(packing_check.measure(model, make_examples(3))) < 1e-5
    assert model.training and model.config._attn_implementation == packing.SEGMENTS


def test_opt_under_the_librarys_attention_mixes_examples_and_is_found():
    """It has no mask for a row of examples, and says nothing."""
    assert packing_check.measure(tiny("opt"), make_examples(3))[0] > 4 * packing_check.MAX_DEVIATION_HALF
    assert packing_check.measure(tiny("llama"), make_examples(3))[0] < 1e-5


def test_an_example_that_another_one_moves_is_found_however_little():
    """A state that fades, as of a recurrent layer: well within what half precision may deviate."""

    def leaking(module, query, key, value, mask, **kwargs):
        output, _ = packing.segment_attention(module, query, key, value, mask, **kwargs)
        return output + 0.02 * value.mean(dim=2, keepdim=True).transpose(1, 2), None

    model, examples = tiny("llama"), make_examples(3)
    packing.set_attention(model, packing.SEGMENTS)
    assert packing_check.measure(model, examples)[1] == 0
    AttentionInterface.register("leaking", leaking)
    packing.set_attention(model, "leaking")
    deviation, dependence = packing_check.measure(model, examples)
    assert deviation < packing_check.MAX_DEVIATION_HALF and dependence > packing_check.MAX_DEPENDENCE


def test_a_recurrent_model_is_padded(tmp_path, capsys):
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8)
    _, trainer = run(transformers.AutoModelForCausalLM.from_config(config), tmp_path, make_examples(8), max_steps=1)
    assert "MambaForCausalLM is recurrent" in capsys.readouterr().out
    assert not trainer.data_collator.padding_free


def see_all_before(module, query, key, value, mask, scaling=None, **kwargs):
    """Attention as for one long example."""
    return packing.segment_by_segment(query, key, value, [query.shape[2]], scaling), None


def not_a_number(module, query, key, value, mask, **kwargs):
    return torch.full_like(query, float("nan")).transpose(1, 2), None


def unknown(module, query, key, value, mask, **kwargs):
    raise NotImplementedError("no such kernel")


@pytest.mark.parametrize("attention", [see_all_before, not_a_number, unknown])
def test_an_attention_that_is_wrong_is_found_and_training_pads(attention, monkeypatch, tmp_path, capsys):
    model, examples = tiny("llama"), make_examples(24)
    padded = run(model, tmp_path, examples, "longest")
    capsys.readouterr()
    monkeypatch.setitem(AttentionInterface._global_mapping, packing.SEGMENTS, attention)
    fallen = run(model, tmp_path, examples, "free")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "as with padding=longest" in warnings[0]
    assert losses(fallen[1]) == losses(padded[1])
    assert fallen[0].config._attn_implementation == "sdpa"


def test_with_packing_asked_for_a_wrong_attention_ends_the_run(monkeypatch, tmp_path):
    monkeypatch.setitem(AttentionInterface._global_mapping, packing.SEGMENTS, see_all_before)
    with pytest.raises(UserError, match="--packing is not possible here .*: drop it"):
        run(tiny("llama"), tmp_path, make_examples(24), packing=True)


def test_label_smoothing_falls_back_to_padding(tmp_path, capsys):
    _, trainer = run(tiny("llama"), tmp_path, make_examples(8), label_smoothing_factor=0.1, max_steps=1)
    assert "warning: examples are padded" in capsys.readouterr().out
    assert not trainer.data_collator.padding_free


def test_a_model_whose_attention_cannot_be_chosen_is_padded(tmp_path, capsys):
    config = transformers.BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4)
    run(transformers.AutoModelForCausalLM.from_config(config), tmp_path, make_examples(8), max_steps=1)
    assert "the attention of BloomForCausalLM cannot be chosen" in capsys.readouterr().out


def test_the_check_takes_short_examples_and_one_twice_if_there_is_no_other():
    examples = make_examples(5)
    chosen = packing_check.examples_to_check(Examples(examples))
    assert [len(e["input_ids"]) for e in chosen] == sorted(len(e["input_ids"]) for e in examples)[:3]
    assert packing_check.examples_to_check(Examples(examples[:1])) == [examples[0]] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Bins.


def test_bins_by_hand():
    """Longest first: 6 | 5 | 4 goes to 6, the fullest with room | 3 to 5 | 2 to 5."""
    assert packing.fill_bins([2, 3, 4, 5, 6], capacity=10) == [[4, 2], [3, 1, 0]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), max_size=300), st.integers(64, 100))
def test_each_example_is_in_one_bin_and_no_bin_overflows(lengths, capacity):
    bins = packing.fill_bins(lengths, capacity)
    assert sorted(i for bin in bins for i in bin) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in bin) <= capacity for bin in bins)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 20), max_size=8), st.integers(20, 30))
def test_bins_are_at_most_eleven_ninths_of_the_fewest_and_one(lengths, capacity):
    assert len(packing.fill_bins(lengths, capacity)) <= fewest_bins(lengths, capacity) * 11 / 9 + 1


def test_packed_bins_equal_the_same_examples_alone():
    """Two bins in one row: the summed loss is the sum of what each example has alone."""
    examples = make_examples(6, longest=30)
    bins = packing.PackedDataset(Examples(examples), 64)
    assert len(bins) < 6
    packed, solo = tiny("llama"), tiny("llama")
    packing.set_attention(packed, packing.SEGMENTS)
    one = torch.tensor(1)
    together = packed(**packing.flatten([bins[i] for i in range(len(bins))]), num_items_in_batch=one).loss
    alone = sum(solo(**packing.pad([example], 0), num_items_in_batch=one).loss for example in examples)
    assert together.item() == pytest.approx(alone.item(), rel=1e-6)
    together.backward()
    alone.backward()
    for (name, x), y in zip(solo.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(y.grad, x.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_packing_says_how_it_changes_a_step(tmp_path, capsys):
    examples = make_examples(24, longest=30)
    _, trainer = run(tiny("llama"), tmp_path, examples, packing=True, per_device_train_batch_size=2, max_steps=1)
    bins = trainer.train_dataset
    out = capsys.readouterr().out
    assert f"packing: 24 examples in {len(bins)} bins of 64 tokens" in out
    assert f"the batch size counts bins of {24 / len(bins):.1f} examples on average" in out
    assert len(trainer.get_train_dataloader()) == -(-len(bins) // 2)


def test_packing_with_padding_longest_is_refused(tmp_path):
    argv = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match="drop one of them"):
        train.check_arguments(*train.parse_args([*argv, "--padding", "longest", "--packing", "True"]))


def test_the_flags_parse():
    _, data_args, _ = train.parse_args(["--output_dir", "o", "--padding", "longest", "--packing", "True"])
    assert (data_args.padding, data_args.packing) == ("longest", True)
    assert train.parse_args(["--output_dir", "o"])[1].padding == "free"
    with pytest.raises(UserError, match="--padding"):
        train.parse_args(["--output_dir", "o", "--padding", "none"])


def test_records_that_train_py_tokenises_go_through_both_collators(tokenizer):
    dataset = train.SupervisedDataset(make_records(6), tokenizer, 512, "training")
    examples = [dataset[i] for i in range(6)]
    free = train.DataCollatorForSupervisedDataset(0, padding_free=True)(examples)
    padded = train.DataCollatorForSupervisedDataset(0)(examples)
    assert free["input_ids"].shape == (1, sum(dataset.lengths))
    assert padded["input_ids"].shape == (6, max(dataset.lengths))
    assert padded["labels"][:, 1:].ne(-100).sum() == free["shift_labels"].numel()
