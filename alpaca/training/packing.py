"""Batches without padding: examples in one row, attention within each example, logits only where there is a label.

A step has the same examples and the same loss as with padding, without the work on pad tokens and on the logits of
prompts. Filling bins of fixed length (``fill_bins``) is different: it changes which examples make a step.
"""

from __future__ import annotations

import bisect
import inspect

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from alpaca.common.text import counted
from alpaca.training.examples import IGNORE_INDEX

# The signature differs between releases of torch: `window_size` replaced `is_causal`, `enable_gqa` was added (by 2.13).
VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)

SEGMENTS = "alpaca_segments"  # the attention's name in a model's config; never saved with it


# ---------------------------------------------------------------------------------------------------------------------
# Examples → a batch.


def pad(examples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest of the batch: int64 tensors of shape (batch, longest).

    The attention mask comes from the lengths: if pad and EOS are one token, comparing ids would hide EOS.
    """
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    longest = int(lengths.max())

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([example[key] + [value] * (longest - len(example[key])) for example in examples])

    return {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORE_INDEX),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }


def flatten(items: list[dict] | list[list[dict]]) -> dict:
    """Put examples, or bins of examples, one after the other in a single row.

    Two examples [a b c] and [d e], where c, d and e have labels:

        input_ids        [[a, b, c, d, e]]       position_ids  [[0, 1, 2, 0, 1]]
        cu_seq_lens_q/k  [0, 3, 5] (int32)       max_length_q/k  3
        logits_to_keep   [1, 3]: the positions that predict c and e. Nothing predicts d, the first of its example.
        labels = shift_labels  [[c, e]]

    Trainer divides the summed loss by the number of labels in a global batch. It counts those of shift_labels, so the
    number is that of the padded batch.
    """
    examples = [example for item in items for example in (item if isinstance(item, list) else [item])]
    lengths = [len(example["input_ids"]) for example in examples]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    targets = torch.tensor([label for example in examples for label in [*example["labels"][1:], IGNORE_INDEX]])
    keep = (targets != IGNORE_INDEX).nonzero().flatten()
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example["input_ids"]]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": targets[keep][None],
        "shift_labels": targets[keep][None],
        "logits_to_keep": keep,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,  # with one, some models would build a mask over the whole row
    }


# ---------------------------------------------------------------------------------------------------------------------
# Attention within each example of a row.


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each segment of a row; transformers' AttentionInterface calls this.

    Args:
        module: the attention layer; not used.
        query: (1, heads, total, dim).
        key, value: (1, key/value heads, total, dim); each head serves the same number of query heads.
        attention_mask: None, because no mask is registered under this attention's name.
        scaling: of the scores; 1/√dim by default.
        dropout: probability for a score to be dropped.
        sliding_window: how many tokens each token sees, itself included; all before it by default.
        cu_seq_lens_q: (segments + 1,) int32, where each segment starts, and the total.
        max_length_q: of the longest segment.
        kwargs: other arguments from the model.

    Returns:
        (1, total, heads, dim) and None for the weights.

    Raises:
        NotImplementedError: the batch is not a row of segments, or the model's attention needs another feature.
    """
    beyond = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if beyond or cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise NotImplementedError(
            f"padding-free attention has no {beyond[0]}" if beyond else "padding-free attention needs a flattened batch"
        )
    if sliding_window is not None and max_length_q <= sliding_window:
        sliding_window = None
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings may have made query and key float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if _has_varlen_kernel(query, value, dropout, sliding_window):
        output = _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        lengths = cu_seq_lens_q.diff().tolist()
        output = segment_by_segment(query, key, value, lengths, scaling, dropout, sliding_window)
    return output, None


AttentionInterface.register(SEGMENTS, segment_attention)


def _has_varlen_kernel(query: torch.Tensor, value: torch.Tensor, dropout: float, sliding_window: int | None) -> bool:
    """Whether FlashAttention-2 can be used: half precision, Ampere or newer, dimensions a multiple of 8 up to 256."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device)[0] >= 8
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and dropout == 0
        and (sliding_window is None or "window_size" in VARLEN_PARAMETERS)
    )


def _varlen(query, key, value, ends, longest, scaling, sliding_window) -> torch.Tensor:
    """Attend in all segments with one kernel of torch."""
    options = {"scale": scaling}
    if "window_size" in VARLEN_PARAMETERS:
        options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    else:
        options["is_causal"] = True
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in VARLEN_PARAMETERS:
            options["enable_gqa"] = True
        else:
            key, value = _for_each_query_head(query, key, value)
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (total, heads, dim)
    return varlen_attn(*flat, ends, ends, longest, longest, **options)[None]


def segment_by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Run scaled_dot_product_attention on one segment after the other; shapes as in segment_attention."""
    key, value = _for_each_query_head(query, key, value)
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            age = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(q.shape[2], device=q.device)
            mask = (age >= 0) & (age < sliding_window)
        outputs.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _for_each_query_head(query, key, value) -> tuple[torch.Tensor, torch.Tensor]:
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing it.


def set_attention(model, name: str) -> bool:
    """Give the model the attention of that name. Return False if its code does not support the choice."""
    try:
        model.set_attn_implementation(name)
    except (ValueError, KeyError, AttributeError):
        return False
    return model.config._attn_implementation == name  # private: an unsupported name is otherwise ignored (5.23)


def use_segments(model) -> str:
    """Give the model the attention of flattened batches. Return "", or why that is not possible."""
    if getattr(model, "_is_stateful", False):  # private: transformers has no other mark of a recurrent model (5.23)
        return f"{type(model).__name__} is recurrent and would carry its state from one example to the next"
    return "" if set_attention(model, SEGMENTS) else f"the attention of {type(model).__name__} cannot be chosen"


def library_attention(model) -> str:
    """Return the name of the attention of padded batches: torch's, or else the model's own code."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"  # private, what the library asks (5.23)


def weigh_router_loss(model) -> None:
    """Count a mixture's load-balancing loss (config's output_router_logits) once per step, however the step is split.

    A model adds all of it to the loss of each batch, which is already divided by the labels of all batches and ranks:
    in 12 batches it would count 12 times. So its weight becomes the batch's share of these labels.
    """
    coefficient = getattr(model, "router_aux_loss_coef", None)

    def weigh(module, args, kwargs) -> None:
        labels, count = kwargs.get("shift_labels", kwargs.get("labels")), kwargs.get("num_items_in_batch")
        share = 1.0 if labels is None or count is None else (labels != IGNORE_INDEX).sum() / count
        module.router_aux_loss_coef = coefficient * share

    if coefficient:
        model.register_forward_pre_hook(weigh, with_kwargs=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bins of fixed length.


def fill_bins(lengths: list[int], capacity: int) -> list[list[int]]:
    """Fill bins by best-fit decreasing: the longest example first, each into the fullest bin that has room for it.

    It needs at most 11/9 of the fewest possible bins, and one more (D. S. Johnson, 1973; Alpaca's are 99% full).

    Args:
        lengths: tokens of each example, each at most ``capacity``.
        capacity: tokens of a bin.

    Returns:
        The examples' numbers (from 0) bin by bin, each exactly once.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, number of the bin) of each bin that is not full, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(rooms, (lengths[i], 0))
        if place == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(place)
        bins[number].append(i)
        if room > lengths[i]:
            bisect.insort(rooms, (room - lengths[i], number))
    return bins


class PackedDataset:
    """Bins of examples: an item is a list of those in one bin."""

    def __init__(self, dataset, capacity: int):
        self.dataset = dataset
        self.bins = fill_bins(list(dataset.lengths), capacity)
        self.summary = (
            f"packing: {counted(len(dataset), 'example')} in {counted(len(self), 'bin')} of {capacity} tokens, "
            f"{sum(dataset.lengths) / (len(self) * capacity):.1%} full; the batch size counts bins of "
            f"{len(dataset) / len(self):.1f} examples on average"
        )

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, i: int) -> list[dict]:
        return [self.dataset[j] for j in self.bins[i]]
