"""The names of a model's tensors: which of them are one matrix, and which differ by a prefix alone.

What config.json leaves out is asked of transformers' classes: no weights are loaded, no code of a checkpoint runs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from alpaca import UserError

if TYPE_CHECKING:
    from alpaca.weights.checkpoint import CheckpointReader

OUTPUT = {"lm_head.weight": "embed_tokens.weight"}  # where no class says it: what most are called
LOOKED_AT = 8  # names by which a prefix is found; it must then fit all of them


def vocab_size(config: dict) -> int | None:
    """Rows of the embeddings as config.json has it, also in its ``text_config``, or by its class's default."""
    if "vocab_size" in config:
        return config["vocab_size"]
    known = _as_its_class_reads(config)
    return getattr(known and known.get_text_config(), "vocab_size", None)


def tied_names(config: dict) -> dict[str, str]:
    """Output embedding → input embedding, where a model of that config.json has one matrix for both; else {}.

    The names are those of today's class; a checkpoint's may have a prefix more or less (``same_but_for_a_prefix``).
    """
    nested = isinstance(config.get("text_config"), dict)  # where the outer flag and the inner one may differ
    if config.get("tie_word_embeddings") is False and not nested:
        return {}
    known = _as_its_class_reads(config)
    tied = getattr(known, "tie_word_embeddings", None)
    if tied is None:  # a class without the flag, or none
        inner = config["text_config"] if nested else {}
        tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False))
    if not tied:
        return {}
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(known)] if type(known) in MODEL_FOR_CAUSAL_LM_MAPPING else None
    names = getattr(cls, "_tied_weights_keys", None)
    return dict(names) if names and isinstance(names, dict) else OUTPUT


def same_but_for_a_prefix(a: str, b: str) -> bool:
    """Whether one name is the other's end: "model.norm.weight" and "norm.weight", not "pre_norm.weight"."""
    return f".{a}".endswith(f".{b}") or f".{b}".endswith(f".{a}")


def match_prefix(reader: CheckpointReader, flag: str, wanted: Collection[str], wanted_flag: str) -> None:
    """Reads a checkpoint under the ``wanted`` names, where its own differ from them by one prefix; says so on stdout.

    A base model may be saved without the class around it: "decoder.layers…" for "model.decoder.layers…";
    from_pretrained takes both.

    Args:
        reader: whose tensors are renamed, all of them or none.
        flag: the command line's name for it, for messages.
        wanted: names.
        wanted_flag: of the model whose names they are.

    Raises:
        UserError: a prefix explains most of the names that differ, but not all.
    """
    own = set(reader.names())
    extra, missing = own - set(wanted), set(wanted) - own
    found: Counter[tuple[str, bool]] = Counter()
    for name in sorted(extra, key=len)[-LOOKED_AT:]:  # the longest: "weight" alone may end with anything
        for other in missing:
            if same_but_for_a_prefix(name, other):
                longer, shorter = sorted((name, other), key=len, reverse=True)
                found[longer.removesuffix(shorter), longer == other] += 1
    if not found:
        return
    (prefix, lacks), _ = found.most_common(1)[0]
    renamed = {name: prefix + name if lacks else name.removeprefix(prefix) for name in extra}
    renamed = {name: new for name, new in renamed.items() if new in missing}
    without, with_it = (flag, wanted_flag) if lacks else (wanted_flag, flag)
    what = f"the names in {without} lack the prefix {prefix!r} of those in {with_it}"
    left = (extra - renamed.keys()) | (missing - set(renamed.values()))
    if not left:
        reader.rename(renamed)
        print(f"note: {what}; they are taken for the same")
    elif 2 * len(renamed) > len(extra):
        first = ", ".join(sorted(left)[:3]) + (", …" if len(left) > 3 else "")
        raise UserError(f"{what}, which does not explain {first}: another base model, or one saved without its head?")


def _as_its_class_reads(config: dict):
    """config.json as transformers reads it, defaults filled in; None where it knows no such class or values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(config))
    except Exception:  # values that the class refuses; whoever loads the model hears why
        return None
