"""Exact ROUGE-L F of a text against a growing pool, about 1,300 times faster than rouge_score, with the same floats.

Each distinct token becomes one character, so a text is a string and rapidfuzz's bit-parallel kernel finds the longest
common subsequence of two texts in one call. The oracle is ``rouge_score`` (tests/oracles.py).

Scores need every pair. Whether any text of the pool scores above a threshold can be decided from a few of them:
``RougePool.exceeds`` uses an inverted index of rare tokens.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

from alpaca import UserError

CHARACTERS = 0x110000  # code points, including surrogates: rapidfuzz compares numbers and encodes nothing
PAIRS_AT_ONCE = 2_000_000  # in a block: 8 MB of lengths, and enough rows to share the work on the columns
MARGIN = 1e-9  # keeps rounding from pruning a pair at the threshold; F itself is off by 1e-15 at most
CACHED_LENGTH = 4096  # in tokens: longer texts are rare, and their tables large


# ---------------------------------------------------------------------------------------------------------------------
# Tokens.


def tokenize(text: str) -> list[str]:
    """Return rouge_score's tokens without a stemmer: runs of a-z and 0-9 in the lower-cased text."""
    return re.findall(r"[a-z0-9]+", text.lower())


@cache
def _unicode_words(unspaced_only: bool = False):
    # `regex` rather than `re`: it knows scripts and combining marks by name. \w of `re` has no marks, and so splits
    # Hindi at each vowel sign. Imported on first use (30 ms).
    import regex

    unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    others = "" if unspaced_only else rf"|[[\p{{L}}\p{{M}}\p{{N}}]--[{unspaced}]]+"
    return regex.compile(rf"(?V1)[[{unspaced}]&&[\p{{L}}\p{{N}}]]\p{{M}}*{others}")


def tokenize_unicode(text: str) -> list[str]:
    """Return the case-folded words (letters, marks and digits) of text in any script.

    In scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) each character is a token. NFKC
    makes equal what looks equal: full-width and plain letters, é as one code point or two. On ASCII text the tokens are
    those of ``tokenize``, which is four times faster.
    """
    if text.isascii():
        return tokenize(text)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _unicode_words().findall(folded)


def count_words(text: str) -> int:
    """Return the number of words between white space; in scripts without spaces each character counts as one."""
    pieces = text.split()
    return len(pieces) if text.isascii() else sum(len(_unicode_words(True).findall(piece)) or 1 for piece in pieces)


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"rouge": tokenize, "unicode": tokenize_unicode}


def tokenizer_named(name: str) -> Callable[[str], list[str]]:
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer must be {' or '.join(TOKENIZERS)}, not {name!r}")
    return TOKENIZERS[name]


def is_mostly_unseen(text: str) -> bool:
    """Return whether the tokenizer "rouge" drops more than half of a text's letters, as in any Chinese text."""
    if text.isascii():
        return False
    letters = [c for c in text.lower() if c.isalpha()]
    return 2 * sum(c.isascii() for c in letters) < len(letters)


# ---------------------------------------------------------------------------------------------------------------------
# The pool.


class RougePool:
    """Texts to compare with, numbered from 0 in the order of adding. Memory: about 100 bytes per text.

    Args:
        texts: the first ones.
        tokenizer: "rouge", as in rouge_score, which drops everything but ASCII; or "unicode".
    """

    def __init__(self, texts: Iterable[str] = (), tokenizer: str = "rouge"):
        self._tokenize = tokenizer_named(tokenizer)
        self._numbers: dict[str, int] = {}  # of a token, from 1
        self._pool: list[str | array] = []
        self._lengths = array("q")  # in tokens
        self._ranks: dict[int, int] = {}
        self._index: _Index | None = None
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._pool)

    def add(self, text: str) -> None:
        encoded = self._encode(text)
        self._pool.append(encoded)
        self._lengths.append(len(encoded))

    def scores(self, text: str) -> np.ndarray:
        """Return ROUGE-L F of ``text`` against each text of the pool: float64, shape (len(self),).

        0 where either text has no token.
        """
        return next(self.scores_of_each([text]))

    def scores_of_each(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Yield the ``scores`` of each text: for 8 or more several times faster than one by one, and on all cores.

        rapidfuzz puts 8 texts of up to 64 tokens each into one vector, and takes as long for 1 as for 8.
        """
        queries = [self._encode(text) for text in texts]
        rows = max(1, PAIRS_AT_ONCE // max(1, len(self)))
        lengths = np.array(self._lengths, np.float64)
        for start in range(0, len(queries), rows):
            block = queries[start : start + rows]
            for query, lcs in zip(block, _lcs(block, self._pool), strict=True):
                yield _f_measure(lcs, np.float64(len(query)), lengths)

    def nearest(self, update: Callable[[int], object] = lambda pairs: None) -> np.ndarray:
        """Return the highest score of each text against the others: float64, shape (len(self),); 0 for a single text.

        Each pair is scored once, since F is symmetric to the bit, in blocks that keep memory at about 200 MB:
        52,000 instructions are 1.35e9 pairs, a minute on 2 cores.

        Args:
            update: called after each block with its number of pairs (for a progress bar).
        """
        lengths, best = np.array(self._lengths, np.float64), np.zeros(len(self))
        start = 0
        while start < len(self):
            columns = len(self) - start
            stop = start + min(columns, max(1, PAIRS_AT_ONCE // columns))
            f = _f_measure(_lcs(self._pool[start:stop], self._pool[start:]), lengths[start:stop, None], lengths[start:])
            np.fill_diagonal(f, 0.0)  # a text against itself
            np.maximum(best[start:stop], f.max(axis=1), out=best[start:stop])
            np.maximum(best[start:], f.max(axis=0), out=best[start:])
            update(sum(columns - 1 - row for row in range(stop - start)))
            start = stop
        return best

    def exceeds(self, text: str, threshold: float) -> int | None:
        """Return the number of the nearest text if its score is > threshold, else None.

        That is ``scores(text).argmax()``, decided by the same floats, but most pairs are skipped. The first call builds
        an index, which then grows with the pool; a call with another threshold rebuilds it.
        """
        if threshold < 0:
            return int(self.scores(text).argmax()) if self._pool else None
        if self._index is None or self._index.threshold != threshold:
            self._index = _Index(threshold, self._ranks)
        index, query = self._index, self._encode(text)
        for number in range(len(index), len(self)):
            index.add(self._pool[number])
        found = index.candidates(query)
        if not len(found):
            return None
        lcs = _lcs([query], [self._pool[number] for number in found])[0]
        f = _f_measure(lcs, np.float64(len(query)), np.array([self._lengths[number] for number in found], np.float64))
        best = f.argmax()
        return int(found[best]) if f[best] > threshold else None

    def learn(self, texts: Iterable[str]) -> None:
        """Count the tokens of texts to come. This makes ``exceeds`` faster, with the same decisions.

        Without it, later tokens are assumed to be rarer.
        """
        counts = Counter(key for text in texts for key in _bag(self._encode(text)))
        for key, _ in counts.most_common():
            self._ranks.setdefault(key, len(self._ranks))

    def _encode(self, text: str) -> str | array:
        numbers = self._numbers
        encoded = [numbers.setdefault(token, len(numbers) + 1) for token in self._tokenize(text)]
        if len(numbers) < CHARACTERS or max(encoded, default=0) < CHARACTERS:
            return "".join(map(chr, encoded))
        return array("Q", encoded)  # four times slower; rapidfuzz compares it with strings like a string


def _lcs(rows: list, columns: list) -> np.ndarray:
    """Return the lengths of the longest common subsequences: int32, shape (len(rows), len(columns))."""
    if not rows or not columns:
        return np.zeros((len(rows), len(columns)), np.int32)
    return cdist(rows, columns, scorer=LCSseq.similarity, dtype=np.int32, workers=1 if len(rows) == 1 else -1)


def _f_measure(lcs: np.ndarray, query_lengths: np.ndarray, pool_lengths: np.ndarray) -> np.ndarray:
    """Return F from the lengths of longest common subsequences and of texts, broadcast; 0 if nothing is common.

    p = lcs/len(a), r = lcs/len(b), F = 2pr/(p+r), evaluated in this order so that the floats equal rouge_score's.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = lcs / pool_lengths, lcs / query_lengths
        f = 2 * precision * recall / (precision + recall)
    return np.where(lcs > 0, f, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Which texts could score above a threshold.


def _bag(encoded: str | array) -> list[int]:
    """Return a text as a set: its tokens' numbers, with another number for each repeat of a token.

    So the second "the" of a text matches only the second "the" of another, and the size of the intersection of two such
    sets is the number of tokens that the texts share.
    """
    numbers = list(map(ord, encoded)) if isinstance(encoded, str) else list(encoded)
    if len(set(numbers)) == len(numbers):
        return numbers
    seen: dict[int, int] = {}
    for i, number in enumerate(numbers):
        seen[number] = repeat = seen.get(number, -1) + 1
        numbers[i] += repeat << 32
    return numbers


class _Index:
    """Finds the few texts that may have F > t with a query, and never misses one.

    F > t means 2·lcs > t·(m + n) for texts of m and n tokens, and they share s ≥ lcs tokens. Hence

    - lengths: m·r < n < m/r with r = t/(2 - t), since lcs ≤ min(m, n);
    - rare tokens: s > m·r, so at least one of the m - floor(m·r) rarest tokens of one text is among the n - floor(n·r)
      rarest of the other. Only texts that meet in such a token are candidates. Any fixed order will do for "rarest":
      here a token's rank, assigned once, higher for rarer tokens;
    - bits: m + n - 2s tokens are in one text only. A text's 64 bits are the exclusive or of one bit per token, so two
      texts differ in at most that many bits. At t = 0.7 this leaves about one in a hundred short texts;
    - meetings: common tokens that are not a meeting of rarest with rarest are all among the other floor(m·r) of one
      text or floor(n·r) of the other. So there are at least s - floor(max(m, n)·r) meetings. This helps with long
      texts, whose bits are all used up.
    """

    def __init__(self, threshold: float, ranks: dict[int, int]):
        self.threshold = threshold
        self._cut = max(0.0, threshold - MARGIN)
        self._ratio = self._cut / (2 - self._cut)
        self._ranks = ranks
        # rank → numbers of the texts that have it among their rarest
        self._holders: dict[int, array] = defaultdict(lambda: array("q"))
        self._bits = array("Q")
        self._lengths = array("q")
        self._longest = 0
        self._bounds_of: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, encoded: str | array) -> None:
        rarest, bits = self._look_at(encoded)
        for rank in rarest:
            self._holders[rank].append(len(self))
        self._bits.append(bits)
        self._lengths.append(len(encoded))
        if len(encoded) > self._longest:
            self._longest = 2 * len(encoded)  # doubled, so that bounds are seldom recomputed
            self._bounds_of.clear()

    def candidates(self, encoded: str | array) -> np.ndarray:
        """Return numbers of texts in ascending order, including all with F > threshold."""
        rarest, bits = self._look_at(encoded)
        lists = [np.frombuffer(self._holders[rank], np.int64) for rank in rarest if rank in self._holders]
        if not lists or self.threshold >= 1:
            return np.zeros(0, np.int64)
        numbers = np.concatenate(lists)
        all_lengths, (limit, least) = np.frombuffer(self._lengths, np.int64), self._bounds(len(encoded))
        differing = np.bitwise_count(np.frombuffer(self._bits, np.uint64).take(numbers) ^ np.uint64(bits))
        (few,) = (differing.view(np.int8) <= limit.max()).nonzero()  # without the lengths first: half the reading
        numbers, differing = numbers[few], differing[few]
        numbers = numbers[differing.view(np.int8) <= limit.take(all_lengths.take(numbers), mode="clip")]
        if len(numbers) < len(self):
            numbers, meetings = np.unique(numbers, return_counts=True)
        else:
            meetings = np.bincount(numbers, minlength=len(self))
            numbers = meetings.nonzero()[0]
            meetings = meetings[numbers]
        return numbers[meetings >= least.take(all_lengths.take(numbers), mode="clip")]

    def _look_at(self, encoded: str | array) -> tuple[list[int], int]:
        """Return the ranks of a text's rarest tokens, and its 64 bits."""
        known = self._ranks
        ranks = [known.setdefault(key, len(known)) for key in _bag(encoded)]
        bits = 0
        for rank in ranks:
            bits ^= 1 << (rank & 63)
        ranks.sort(reverse=True)
        return ranks[: len(ranks) - int(len(ranks) * self._ratio)], bits

    def _bounds(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Return two bounds by n, for texts of m and n tokens: most differing bits, fewest meetings in rare tokens.

        The first is int8, and -1 where the lengths rule out F > t.
        """
        if m in self._bounds_of:
            return self._bounds_of[m]
        highest = self._longest if self._ratio == 0 else min(self._longest, int(m / self._ratio) + 1)
        n = np.arange(highest + 2)  # the last entry is for all n above
        shared = (self._cut * (m + n) / 2).astype(np.int64) + 1
        limit = np.where(shared <= np.minimum(m, n), np.minimum(m + n - 2 * shared, 64), -1).astype(np.int8)
        least = shared - (np.maximum(m, n) * self._ratio).astype(np.int64)
        if m <= CACHED_LENGTH:
            self._bounds_of[m] = limit, least
        return limit, least
