"""How close answers are to reference answers, without a judge: ROUGE-L, and a model's loss on the references."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rapidfuzz.distance import LCSseq
from rouge_score.tokenizers import DefaultTokenizer

from alpaca.data.instruction_sets import Answers, Item
from alpaca.judging.statistics import bootstrap_interval, weighted_mean


def rouge_l(pairs: Iterable[tuple[str, str]]) -> list[float]:
    """Return ROUGE-L F in [0, 1] of each (answer, reference), with Porter's stemmer.

    The words are rouge_score's with use_stemmer, as in Tk-Instruct's compute_metrics.py, which Self-Instruct (Wang et
    al., 2022, table 3) uses for its models on Super-NaturalInstructions, times 100 and averaged over instances. Text in
    other scripts than a-z and 0-9 has no words there, and scores 0.

    rapidfuzz finds the common subsequence: the floats equal RougeScorer's, which takes 60 s in Python for 805 pairs of
    400 words; this takes 11 s, nearly all of it for the stemmer.
    """
    tokenize = DefaultTokenizer(use_stemmer=True).tokenize
    scores = []
    for a, b in ((tokenize(answer), tokenize(reference)) for answer, reference in pairs):
        lcs = LCSseq.similarity(a, b)
        precision, recall = lcs / max(len(a), 1), lcs / max(len(b), 1)
        scores.append(2 * precision * recall / (precision + recall) if lcs else 0.0)
    return scores


def reference_losses(rows: Mapping[str, dict]) -> dict[str, tuple[float, int]]:
    """Return item id → mean loss of the reference in nats per token, and its number of tokens, for rows that have both.

    NaN and infinity, which float16 can produce, are left out.
    """
    found = {}
    for id, row in rows.items():
        loss, tokens = row.get("reference_loss"), row.get("reference_tokens")
        if isinstance(loss, int | float) and isinstance(tokens, int) and tokens > 0 and math.isfinite(loss):
            found[id] = (float(loss), tokens)
    return found


def summary(items: Sequence[Item], answerers: Sequence[Answers], seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Return the reference metrics of each answerer, compared with those of the first.

    Items without a reference or an answer are left out (an empty answer scores 0). Differences are paired: over the
    items that both have.

    Returns:
        For each answerer a dict: name; answered, unanswered and empty counts; cut, how many answers were cut off
        ("finish_reason": "length"), None where no row says how it ended; characters of an answer on average; rouge_l
        and its difference from the first one's, both in [0, 1], and loss with perplexity, and its difference, each
        {"mean", "interval", "items"} or None; loss_not_finite, how many losses were left out as NaN or infinite.
        Losses of different tokenizers, which their numbers of tokens give away, have no difference. Then for each
        answerer item id → ROUGE-L.
    """
    references = {item.id: item.reference for item in items if item.reference}
    scores = []
    for answers in answerers:
        ids = [id for id in references if id in answers.outputs]
        scores.append(dict(zip(ids, rouge_l((answers.outputs[id], references[id]) for id in ids), strict=True)))
    losses = [reference_losses(answers.rows) for answers in answerers]
    found = []
    for place, answers in enumerate(answerers):
        lengths = [len(text) for text in answers.outputs.values()]
        ends = [row.get("finish_reason") for id, row in answers.rows.items() if id in answers.outputs]
        stored = [row.get("reference_loss") for row in answers.rows.values()]
        score, (loss, loss_difference) = scores[place], _losses(losses[place], losses[0], seed)
        both = [score[id] - scores[0][id] for id in scores[0] if id in score]
        found.append(
            {
                "name": answers.generator,
                "answered": len(lengths),
                "unanswered": len(answers.unanswered),
                "empty": lengths.count(0),
                "cut": ends.count("length") if any(ends) else None,
                "characters": sum(lengths) / len(lengths),
                "rouge_l": _mean(list(score.values()), seed=seed),
                "rouge_l_difference": _mean(both, seed=seed) if place else None,
                "loss": loss,
                "loss_difference": loss_difference if place else None,
                "loss_not_finite": sum(isinstance(each, float) and not math.isfinite(each) for each in stored),
            }
        )
    return found, scores


def _losses(own: dict, first: dict, seed: int) -> tuple[dict | None, dict | None]:
    """Return the mean loss with its perplexity, and the mean difference from the first answerer's losses."""
    loss = _mean([value for value, _ in own.values()], [tokens for _, tokens in own.values()], seed)
    if loss:
        loss["perplexity"] = float(np.exp(loss["mean"]))
    common = [id for id in first if id in own]
    if any(first[id][1] != own[id][1] for id in common):
        return loss, None
    return loss, _mean([own[id][0] - first[id][0] for id in common], [first[id][1] for id in common], seed)


def _mean(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> dict | None:
    if not values:
        return None
    weights = [1.0] * len(values) if weights is None else weights
    return {
        "mean": float(np.average(values, weights=weights)),
        "interval": bootstrap_interval(weighted_mean, values, weights, seed=seed),
        "items": len(values),
    }
