"""The names of a model's tensors: which are one tied matrix, which differ only by a prefix, and why others differ."""

from __future__ import annotations

import copy
from collections.abc import Collection

from alpaca import UserError

OUTPUT = {"lm_head.weight": "embed_tokens.weight"}  # their usual names, for a class that does not give them
COMPARED = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")  # of two configs, for a cause
PARTS = {  # of a name, and what has tensors of such names
    "v_head.": "a value head, which PPO adds: save the model without it",
    "lora_": "a LoRA adapter: merge it into its base model first",
    "rotary_emb.": "a cache that the model computes: save it with today's transformers",
}


def some(names: Collection[str], most: int = 3) -> str:
    """Return the first few of some names, in one line."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def vocab_size(config: dict) -> int | None:
    """Return the rows of the embeddings: from config.json, its ``text_config`` or its class's default."""
    if "vocab_size" in config:
        return config["vocab_size"]
    known = _as_its_class_reads(config)
    return getattr(known and known.get_text_config(), "vocab_size", None)


def tied_names(config: dict) -> dict[str, str]:
    """Return output embedding → input embedding if a model with that config.json has one matrix for both; else {}.

    The names are those of today's class; a checkpoint's may have one prefix more or less (``same_but_for_a_prefix``).
    """
    nested = isinstance(config.get("text_config"), dict)  # then the outer flag and the inner one may differ
    if config.get("tie_word_embeddings") is False and not nested:
        return {}
    known = _as_its_class_reads(config)
    tied = getattr(known, "tie_word_embeddings", None)
    if tied is None:  # a class without the flag, or no class
        inner = config["text_config"] if nested else {}
        tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False))
    if not tied:
        return {}
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(known)] if type(known) in MODEL_FOR_CAUSAL_LM_MAPPING else None
    names = getattr(cls, "_tied_weights_keys", None)
    return dict(names) if names and isinstance(names, dict) else OUTPUT


def same_but_for_a_prefix(a: str, b: str) -> bool:
    """Return whether one name is the other's end: "model.norm.weight" and "norm.weight", not "pre_norm.weight"."""
    return f".{a}".endswith(f".{b}") or f".{b}".endswith(f".{a}")


def match_names(own: Collection[str], what: str, wanted: Collection[str], wanted_what: str, *configs: dict):
    """Return old name → new name by which a checkpoint has the wanted names; {} if it has them already.

    They may differ by one prefix, as a base model may be saved without the class around it: "decoder.layers…" for
    "model.decoder.layers…"; from_pretrained takes both. Such a match is reported on stdout. For other differences,
    UserError has the cause, as far as names and both ``configs`` state it.
    """
    extra, missing = set(own) - set(wanted), set(wanted) - set(own)
    longest = max(extra, key=len, default="")  # "weight" alone may end with anything
    near = next((name for name in sorted(missing) if longest and same_but_for_a_prefix(name, longest)), None)
    if near:
        lacks = len(near) > len(longest)
        prefix = near.removesuffix(longest) if lacks else longest.removesuffix(near)
        renamed = {name: prefix + name if lacks else name.removeprefix(prefix) for name in extra}
        left = extra.union(missing).difference(renamed, renamed.values()) | (set(renamed.values()) - missing)
        without, with_it = (what, wanted_what) if lacks else (wanted_what, what)
        said = f"the names in {without} lack the prefix {prefix!r} of those in {with_it}"
        if not left:
            print(f"note: {said}; they are treated as the same")
            return renamed
        raise UserError(f"{said}, which does not explain {some(left)}: {cause(left, *configs)}")
    for model, other, names in ((what, wanted_what, missing), (wanted_what, what, extra)):
        if names:
            why = cause(extra | missing, *configs)
            raise UserError(f"{model} lacks tensors that {other} has: {some(names)}; {why}")
    return {}


def fit_names(reader, what: str, wanted: Collection[str], wanted_what: str, config: dict) -> None:
    """Give a CheckpointReader's tensors the wanted names, those of a model with that config.json; see match_names().

    The one matrix of tied embeddings, under whichever name it is stored, gets the name that is wanted, or both.
    """
    for pair in tied_names(reader.config).items():
        for end, other_end in (pair, pair[::-1]):
            here = [name for name in reader.names() if same_but_for_a_prefix(name, other_end)]
            new = [name for name in wanted if same_but_for_a_prefix(name, end)]
            if here and new and not any(same_but_for_a_prefix(name, end) for name in reader.names()):
                reader.rename({here[0]: new[0]}, keep=any(same_but_for_a_prefix(name, here[0]) for name in wanted))
    reader.rename(match_names(reader.names(), what, wanted, wanted_what, reader.config, config))


def cause(names: Collection[str], *configs: dict) -> str:
    """Return why two models differ in these names, or in the shapes of these tensors: what names and configs state."""
    for part, meaning in PARTS.items():
        if odd := [name for name in names if part in name]:
            return f"{some(odd, 1)} belongs to {meaning}"
    flat = [(inner if isinstance(inner := config.get("text_config"), dict) else {}) | config for config in configs]
    for key in COMPARED:
        one, other = (config.get(key) for config in flat)
        if one != other:
            return f"their config.json differ in {key}: {one} and {other}"
    if all(same_but_for_a_prefix(name, output) for name in names for output in OUTPUT):
        if len(ties := {bool(tied_names(config)) for config in configs}) == 2:
            return "one config.json ties the output embedding to the input embedding, the other does not"
        return "one has an output embedding with values of its own" if True in ties else "saved without its head?"
    same = ", ".join(key for key in COMPARED if flat[0].get(key) is not None)
    return f"another base model? Their config.json {f'agree in {same}' if same else 'do not say'}"


def _as_its_class_reads(config: dict):
    """Return config.json as transformers reads it, with defaults; None if it does not know the class or the values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    except Exception:  # an unknown class, or values that it refuses; loading the model will say why
        return None
