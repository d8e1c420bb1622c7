"""Slow and plain: what each fast path must equal. An oracle shares no code with what it judges."""

from __future__ import annotations

from rouge_score import rouge_scorer


def rouge_l(text: str, pool: list[str]) -> list[float]:
    """ROUGE-L F of ``text`` against each text of ``pool``, the way the original's generate_instruction.py did it."""
    tokenize = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)._tokenizer.tokenize
    tokens = tokenize(text)
    return [rouge_scorer._score_lcs(tokens, tokenize(other)).fmeasure for other in pool]
