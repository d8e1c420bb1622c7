"""How near answers come to reference answers, without a judge: ROUGE-L, and a model's loss on the references."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from rapidfuzz.distance import LCSseq

from alpaca.data.instruction_sets import Answers, Item
from alpaca.data.rouge import tokenize
from alpaca.judging.statistics import bootstrap_interval, weighted_mean_of_rows


def rouge_l(pairs: Iterable[tuple[str, str]]) -> list[float]:
    """ROUGE-L F in [0, 1] of each (answer, reference), with Porter's stemmer.

    That is how Tk-Instruct's compute_metrics.py scores English, by which Self-Instruct (Wang et al., 2022, table 3)
    reports its models: rouge_score's ROUGE-L with use_stemmer, the text lower-cased and cut into runs of a-z and 0-9,
    words of more than 3 letters stemmed, no other normalisation. (They report it on Super-NaturalInstructions, times
    100 and averaged over instances; the 252 user-oriented instructions they had judged by people.) Text in other
    scripts has no token there, and scores 0.

    Raises:
        ImportError: nltk, whose stemmer rouge_score uses, is not installed.
    """
    from nltk.stem.porter import PorterStemmer

    stem = lru_cache(100_000)(PorterStemmer().stem)

    def tokens(text: str) -> list[str]:
        stemmed = (stem(word) if len(word) > 3 else word for word in tokenize(text))
        return [word for word in stemmed if word]

    scores = []
    for answer, reference in pairs:
        numbers: dict[str, int] = {}
        a, b = ([numbers.setdefault(word, len(numbers)) for word in tokens(text)] for text in (answer, reference))
        lcs = LCSseq.similarity(a, b)
        precision, recall = lcs / max(len(a), 1), lcs / max(len(b), 1)
        scores.append(2 * precision * recall / (precision + recall) if lcs else 0.0)
    return scores


def reference_losses(rows: Mapping[str, dict]) -> dict[str, tuple[float, int]]:
    """Item id → mean loss in nats per token of the reference answer, and its tokens, where the rows have them.

    NaN and infinity, which a model in float16 can come to, are no figures to take a mean of.
    """
    found = {}
    for id, row in rows.items():
        loss, tokens = row.get("reference_loss"), row.get("reference_tokens")
        if isinstance(loss, int | float) and isinstance(tokens, int) and tokens > 0 and math.isfinite(loss):
            found[id] = (float(loss), tokens)
    return found


def summary(items: Sequence[Item], answerers: Sequence[Answers], seed: int = 0) -> tuple[list[dict], list[dict] | None]:
    """The reference metrics of each answerer, the first of which the others are compared with.

    An item without a reference is left out, and so is one that the answerer left unanswered (an empty answer counts 0).
    Differences are paired: of the items that both have.

    Returns:
        For each answerer a dict: name; answered, unanswered and empty counts; cut: how many answers their rows say to
        have been cut off ("finish_reason": "length"), None where no row tells how it ended; characters of an answer
        on average; rouge_l and its difference from the first one's, both in [0, 1], and loss with perplexity, and its
        difference, each {"mean", "interval", "items"} or None; losses of different tokenizers (told by their numbers
        of tokens) have no difference; loss_not_finite: how many losses were left out as no finite number. Then for
        each answerer item id → ROUGE-L; None without nltk.
    """
    references = {item.id: item.reference for item in items if item.reference}
    try:
        scores = [_scores(answers, references) for answers in answerers]
    except ImportError:
        scores = None
    losses = [reference_losses(answers.rows) for answers in answerers]
    found = []
    for place, answers in enumerate(answerers):
        lengths = [len(text) for text in answers.outputs.values()]
        entry: dict = {
            "name": answers.generator,
            "answered": len(lengths),
            "unanswered": len(answers.unanswered),
            "empty": lengths.count(0),
            "cut": _cut(answers),
            "characters": sum(lengths) / len(lengths),
            "rouge_l": None,
            "rouge_l_difference": None,
            "loss": None,
            "loss_difference": None,
            "loss_not_finite": sum(_not_finite(row.get("reference_loss")) for row in answers.rows.values()),
        }
        if scores and scores[place]:
            entry["rouge_l"] = _mean(list(scores[place].values()), seed=seed)
            common = [id for id in scores[0] if id in scores[place]]
            if place and common:
                entry["rouge_l_difference"] = _mean([scores[place][id] - scores[0][id] for id in common], seed=seed)
        if losses[place]:
            values, tokens = zip(*losses[place].values(), strict=True)
            entry["loss"] = _mean(values, tokens, seed=seed)
            entry["loss"]["perplexity"] = float(np.exp(entry["loss"]["mean"]))
            common = [id for id in losses[0] if id in losses[place]]
            if place and common and all(losses[0][id][1] == losses[place][id][1] for id in common):
                differences = [losses[place][id][0] - losses[0][id][0] for id in common]
                entry["loss_difference"] = _mean(differences, [losses[0][id][1] for id in common], seed=seed)
        found.append(entry)
    return found, scores


def _cut(answers: Answers) -> int | None:
    ends = [row.get("finish_reason") for id, row in answers.rows.items() if id in answers.outputs]
    return ends.count("length") if any(ends) else None


def _not_finite(loss) -> bool:
    return isinstance(loss, float) and not math.isfinite(loss)


def _scores(answers: Answers, references: Mapping[str, str]) -> dict[str, float]:
    ids = [id for id in references if id in answers.outputs]
    return dict(zip(ids, rouge_l((answers.outputs[id], references[id]) for id in ids), strict=True))


def _mean(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> dict:
    weights = [1.0] * len(values) if weights is None else weights
    mean = weighted_mean_of_rows(np.array([values]), np.array([weights]))[0]
    return {
        "mean": float(mean),
        "interval": bootstrap_interval(weighted_mean_of_rows, values, weights, seed=seed),
        "items": len(values),
    }
