"""Exact ROUGE-L F of a text against a growing pool, about 1,300 times faster than rouge_score, with the same floats.

Each distinct token becomes one character, so a text is a string and rapidfuzz's bit-parallel kernel finds the longest
common subsequence of two texts in one call. The oracle is ``rouge_score`` (tests/oracles.py).

Scores need every pair. Whether any text of the pool scores above a threshold can be decided from a few of them:
``RougePool.admit`` uses an inverted index of rare tokens.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain, count, islice, pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist, cpdist

from alpaca import UserError

CHARACTERS = 0x110000  # code points, including surrogates: rapidfuzz compares numbers and encodes nothing
PAIRS_AT_ONCE = 2_000_000  # in a block: 8 MB of lengths, and enough rows to share the work on the columns
MARGIN = 1e-9  # keeps rounding from pruning a pair at the threshold; F itself is off by 1e-15 at most
TEXTS_AT_ONCE = 32  # looked up in the index, and compared each with each: with more, long texts take longer
POSTINGS_AT_ONCE = 1 << 16  # read: 0.8 MB, which fit into a core's cache
SLACK = 63  # the most that fits beside a text's number
SHIFT, MASK = 40, (1 << 40) - 1  # two numbers in an int64: the second has 40 bits


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


def unseen_warning(unseen: int, what: str) -> str:
    """Return a warning that so many of what was compared, "12 instructions", are mostly unseen."""
    which = f"{unseen:,} of {what} {'is' if unseen == 1 else 'are'} mostly non-ASCII"
    return f"warning: {which}, so near-duplicates may be missed: use tokenizer=unicode"


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
        self._numbers: dict[str, int] = defaultdict(count(1).__next__)  # of a token
        self._pool: list[str | array] = []
        self._lengths = array("q")  # in tokens
        self._ranks: dict[int, int] = defaultdict(count().__next__)
        self._index: _Index | None = None
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._pool)

    def add(self, text: str) -> None:
        self._append(self._encode(text))

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

    def admit(
        self,
        texts: list[str],
        threshold: float,
        is_new: Callable[[int, int | None], bool] = lambda i, nearest: nearest is None,
    ) -> list[int | None]:
        """Add the new ones of some texts, one after the other.

        Return for each, in its turn, the number of the nearest text if its score is > threshold, else None. That is
        ``scores(text).argmax()``, decided by the same floats, but most pairs are skipped. Many texts at once take half
        the time of the same one by one, or less. The first call builds the index, which then grows with the pool; one
        with another threshold rebuilds it.

        Args:
            threshold: at least 0.
            is_new: of text i and the number of the nearest text, or None.
        """
        verdicts: list[int | None] = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            looks, near = self._near(list(map(self._encode, texts[first : first + TEXTS_AT_ONCE])), threshold)
            start, added = len(self), {}  # number in ``near`` → number in the pool
            for row, found in enumerate(near):
                found = [(f, added.get(n, n)) for f, n in found if n < start or n in added]
                verdicts.append(max(found, key=itemgetter(0))[1] if found else None)  # the first of equals
                if is_new(first + row, verdicts[-1]):
                    added[start + row] = len(self)
                    self._append(looks.texts[row])
            self._index.add(looks, [number - start for number in added])
        return verdicts

    def learn(self, texts: Iterable[str]) -> None:
        """Count the tokens of texts to come. This makes ``admit`` faster, with the same decisions.

        Without it, later tokens are assumed to be rarer.
        """
        counts, encoded = Counter(), map(self._encode, texts)
        while block := list(islice(encoded, TEXTS_AT_ONCE)):
            counts.update(_bags(block)[1].tolist())
        for key, _ in counts.most_common():
            self._ranks[key]  # noqa: B018 - a missing key gets the next rank

    def _append(self, encoded: str | array) -> None:
        self._pool.append(encoded)
        self._lengths.append(len(encoded))

    def _encode(self, text: str) -> str | array:
        encoded = list(map(self._numbers.__getitem__, self._tokenize(text)))
        if len(self._numbers) < CHARACTERS or max(encoded, default=0) < CHARACTERS:
            return "".join(map(chr, encoded))
        return array("Q", encoded)  # four times slower; rapidfuzz compares it with strings like a string

    def _near(self, block: list[str | array], threshold: float) -> tuple[_Looks, list[list[tuple[float, int]]]]:
        """Return what the index sees of a block, and for each text F > threshold and number of others, ascending.

        The others are the pool and, numbered after it, the texts that come before in the block.
        """
        if self._index is None or self._index.threshold != threshold:
            self._index = _Index(threshold, self._ranks)
        index, start = self._index, len(self)
        while len(index) < start:
            missing = index.look_at(self._pool[len(index) : len(index) + TEXTS_AT_ONCE])
            index.add(missing, range(len(missing.texts)))
        looks = index.look_at(block)
        rows, numbers = (found.tolist() for found in index.candidates(looks))
        others = [self._pool[n] if n < start else block[n - start] for n in numbers]
        near: list[list[tuple[float, int]]] = [[] for _ in block]
        lcs = cpdist([block[row] for row in rows], others, scorer=LCSseq.similarity, dtype=np.int32)
        f = _f_measure(lcs, looks.lengths[rows].astype(np.float64), np.array(list(map(len, others)), np.float64))
        for i in (f > threshold).nonzero()[0]:
            near[rows[i]].append((float(f[i]), numbers[i]))
        return looks, near


def _lcs(rows: list, columns: list) -> np.ndarray:
    """Return the lengths of the longest common subsequences: int32, shape (len(rows), len(columns))."""
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


def _bags(block: list[str | array]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of texts as sets: int64, the row of each token; its number, with another for each repeat.

    So the second "the" of a text matches only the second "the" of another, and the size of the intersection of two such
    sets is the number of tokens that the texts share.
    """
    rows = np.repeat(np.arange(len(block)), list(map(len, block)))
    numbers = chain.from_iterable(map(ord, text) if isinstance(text, str) else text for text in block)
    keys = np.sort(rows << SHIFT | np.fromiter(numbers, np.int64, len(rows)))
    places = np.arange(len(rows))
    firsts = np.where(np.diff(keys, prepend=-1) > 0, places, 0)
    repeats = places - np.maximum.accumulate(firsts)
    return rows, (keys & MASK) | repeats << SHIFT


class _Looks(NamedTuple):
    """What the index sees of a block of texts."""

    texts: list[str | array]
    lengths: np.ndarray  # int64, in tokens
    bits: np.ndarray  # uint64
    slack: np.ndarray  # uint8, (1 - t)·length, rounded up; up to SLACK
    rows: np.ndarray  # int64, of each of their rarest tokens
    ranks: np.ndarray  # int64, theirs


def pruning(threshold: float) -> tuple[float, float]:
    """Return what _Index calls t and r, a little lower."""
    cut = min(max(0.0, threshold - MARGIN), 1.0)
    return cut, cut / (2 - cut)


class _Index:
    """Finds the few texts that may have F > t with a query, and never misses one.

    F > t means 2·lcs > t·(m + n) for texts of m and n tokens, and they share s ≥ lcs tokens. Hence

    - lengths: m·r < n < m/r with r = t/(2 - t), since lcs ≤ min(m, n);
    - rare tokens: s > m·r, so at least one of the m - floor(m·r) rarest tokens of one text is among the n - floor(n·r)
      rarest of the other. Only texts that meet in such a token are candidates. Any fixed order will do for "rarest":
      here a token's rank, assigned once, higher for rarer tokens;
    - bits: m + n - 2s < (1 - t)·(m + n) tokens are in one text only. A text's 64 bits are the exclusive or of one bit
      per token, so two texts differ in at most that many bits. Few short texts are that near. Bits and (1 - t)·n are
      kept with each token: to look them up by text took most of the time from 100,000 texts on;
    - meetings: common tokens that are not a meeting of rarest with rarest are all among the other floor(m·r) of one
      text or floor(n·r) of the other. So there are at least s - floor(max(m, n)·r) meetings. This helps with long
      texts, whose bits are all used up.
    """

    def __init__(self, threshold: float, ranks: dict[int, int]):
        self.threshold = threshold
        self._cut, self._ratio = pruning(threshold)
        self._ranks = ranks
        # rank → bits, and numbers with slacks, of the texts that have it among their rarest
        self._holders: dict[int, tuple[array, array]] = defaultdict(lambda: (array("Q"), array("I")))
        self._lengths = array("q")

    def __len__(self) -> int:
        return len(self._lengths)

    def look_at(self, block: list[str | array]) -> _Looks:
        rows, names = _bags(block)
        lengths = np.array(list(map(len, block)), np.int64)
        starts = lengths.cumsum() - lengths
        ranks = np.fromiter(map(self._ranks.__getitem__, names.tolist()), np.int64, len(names))
        ranks = (rows << SHIFT) - np.sort((rows << SHIFT) - ranks)  # the rarest first
        bit = np.append(np.uint64(1) << (ranks & 63).astype(np.uint64), np.uint64(0))
        bits = np.bitwise_xor.reduceat(bit, starts)  # of a text without tokens nonsense, and never used
        places = np.arange(len(rows)) - starts[rows]
        rarest = places < (lengths - (lengths * self._ratio).astype(np.int64))[rows]
        slack = np.minimum(np.ceil((1 - self._cut) * lengths), SLACK).astype(np.uint8)
        return _Looks(block, lengths, bits, slack, rows[rarest], ranks[rarest])

    def add(self, looks: _Looks, rows: Iterable[int]) -> None:
        """Add some texts of a block, in order."""
        bits, slack = looks.bits.tolist(), looks.slack.tolist()
        labels = {row: number << 6 | slack[row] for number, row in enumerate(rows, len(self))}
        for row, rank in zip(looks.rows.tolist(), looks.ranks.tolist(), strict=True):
            if row in labels:
                held = self._holders[rank]
                held[0].append(bits[row])
                held[1].append(labels[row])
        self._lengths.extend(looks.lengths[list(labels)].tolist())

    def candidates(self, looks: _Looks) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs that include all with F > threshold: rows of the block, and numbers, ascending.

        Rows of the block count as numbers after those of the index; each is paired with those before it.
        """
        rows, nobody, found = looks.rows, (array("Q"), array("I")), []
        lists = [self._holders.get(rank, nobody) for rank in looks.ranks.tolist()]
        counts = np.array([len(held[1]) for held in lists], np.int64)
        (ends,) = np.diff(counts.cumsum() // POSTINGS_AT_ONCE).nonzero()
        for start, stop in pairwise([0, *(ends + 1).tolist(), len(lists)]):
            part, row, count = lists[start:stop], rows[start:stop], counts[start:stop]
            bits = np.frombuffer(b"".join([held[0] for held in part]), np.uint64)
            labels = np.frombuffer(b"".join([held[1] for held in part]), np.uint32)
            differing = np.bitwise_count(bits ^ looks.bits[row].repeat(count))
            most = looks.slack[row].repeat(count) + (labels & SLACK).astype(np.uint8)
            (few,) = (differing <= most).nonzero()
            row = row[count.cumsum().searchsorted(few, "right")]
            found.append((row << 32 | labels[few] >> 6) << 7 | differing[few])
        pairs, meetings = np.unique(np.concatenate(found), return_counts=True)
        rows, numbers, differing = pairs >> 39, pairs >> 7 & 0xFFFFFFFF, pairs & 127
        most, least = self._bounds(looks.lengths[rows], np.frombuffer(self._lengths, np.int64)[numbers])
        (chosen,) = ((differing <= most) & (meetings >= least)).nonzero()
        # Within the block each is compared with each.
        most, _ = self._bounds(looks.lengths[:, None], looks.lengths)
        here, there = np.tril(np.bitwise_count(looks.bits[:, None] ^ looks.bits) <= most, -1).nonzero()
        return np.concatenate([rows[chosen], here]), np.concatenate([numbers[chosen], len(self) + there])

    def _bounds(self, m: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return two bounds for texts of m and n tokens: most differing bits, fewest meetings in rare tokens.

        The first is -1 where the lengths rule out F > t.
        """
        shorter, longer = np.minimum(m, n), np.maximum(m, n)
        shared = (self._cut * (m + n) / 2).astype(np.int64) + 1
        least = shared - (longer * self._ratio).astype(np.int64)
        return np.where(shared <= shorter, m + n - 2 * shared, -1), least
