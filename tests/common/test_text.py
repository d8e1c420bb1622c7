"""alpaca/common/text.py: what goes into a message is short, in one line, and does nothing to a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca import UserError
from alpaca.common.text import check_utf8, counted, first_line, printable, shorten, without_thoughts


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n one\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (KeyError("a"), "'a'"),
        (OSError(), "OSError"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error, line):
    assert first_line(error) == line


def test_a_text_is_shortened_to_its_limit_and_says_so():
    assert shorten("a  b\nc", 5) == "a b c"
    assert shorten("abcdef", 5) == "abcd…" and len(shorten("x" * 100)) == 60


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "item", "1 item"),
        (0, "item", "0 items"),
        (2000, "reply", "2,000 replies"),
        (1, "reply", "1 reply"),
        (2, "day", "2 days"),
    ],
)
def test_a_number_has_its_noun_in_the_right_form(number, noun, text):
    assert counted(number, noun) == text


def test_control_characters_are_spelled_out_and_tab_and_line_feed_are_left():
    assert printable("a\tb\n\x1b[31mred\x9b\x7f é") == "a\tb\n\\x1b[31mred\\x9b\\x7f é"
    assert printable("a\u202ecod.exe\u2066\u2069 \u200eשלום") == "a\\u202ecod.exe\\u2066\\u2069 \u200eשלום"


def test_half_of_a_surrogate_pair_is_named_with_its_place():
    check_utf8("héllo 🙂", "the prompt")
    with pytest.raises(UserError, match=r"record 3 contains '\\ud83d', half of a surrogate pair"):
        check_utf8("x\ud83dy", "record 3")


HARMONY = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>\nhm\n</think>\n\nAn answer.\n", "An answer.\n"),
        ("\n <THINK>hm</Think>An answer.", "An answer."),
        ("<thinking>a <think> b</thinking> c", "c"),
        ("<thought>hm\n</thought>\n<reasoning>hm</reasoning>\nx", "x"),
        ("[THINK]hm\nVerdict: B[/THINK]x", "x"),
        ("<think></think>", ""),
        ("<think>\nhm", None),
        ("<think>\nhm\n</thinking>x", None),
        ("<think>hm</think>\n<think>and then", None),
        ("hm\n</think>\n\nx", "x"),  # the prompt ended in <think>
        ("hm, so x.</think>\nx", "x"),
        ("</think>x", "x"),
        ("<think>They end in </think>.\nhm\n</think>\nx", "x"),
        (HARMONY + "x<|return|>", "x"),
        ("<|start|>assistant" + HARMONY + "x<|end|>", "x"),
        (HARMONY.replace("final", "commentary to=functions.f <|constrain|>json") + "{}" + HARMONY[34:] + "x", "x"),
        (HARMONY.replace("final", "final <|constrain|>json") + "{}", "{}"),
        ("hm" + HARMONY[32:] + "x", "x"),  # the prompt ended in the analysis channel
        ("<|channel|>final<|message|>x", "x"),
        (HARMONY, ""),
        (HARMONY[:34], None),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>fin", None),
        ("analysisWe need a river.assistantcommentaryhmassistantfinalThe Indus.", "The Indus."),
        ("analysis: a river assistantfinalThe Indus.", "The Indus."),
        ("analysisWe need a", None),
    ],
)
def test_thoughts_before_an_answer_are_dropped_and_thoughts_without_an_end_are_no_answer(reply, answer):
    assert without_thoughts(reply) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " An answer.\n",
        "Models write <think> and </think> tags.",
        "<think> and </think> enclose thoughts.",
        "Write\n<think>\nhm\n</think>\nfirst, and <think>\nthen\n</think>",
        "A closing tag, </think>, may stand alone.",
        "<thinker>x</thinker>\n</thoughts>",
        "[thought] [Reasoning]\n[/thinking]",
        "analysis of variance",
        "analysisResult = 3",
        "The assistantfinal word, <|channel|>final<|message|>, begins an answer.",
    ],
)
def test_a_text_without_thoughts_is_the_same_object(text):
    assert without_thoughts(text) is text


PIECES = [
    "<think>",
    "</think>",
    "</THINKING>",
    "[THINK]",
    "[/think]",
    "<thought>",
    "</thought>",
    " and ",
    "\n",
    " ",
    "x",
]
PIECES += [
    "<|end|>",
    "<|return|>",
    "<|start|>assistant",
    "<|channel|>",
    "final",
    "analysis",
    "<|message|>",
    "assistant",
]
PIECES += ["<reasoning>", "</reasoning>", "We ", "\r\n", "\t", "<|constrain|>json", "<", "</", "\x0b", "\u2028"]
MIXED = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@settings(max_examples=1000, deadline=None)
@given(MIXED)
def test_what_is_left_is_the_end_of_the_reply_and_has_no_thoughts_itself(reply):
    answer = without_thoughts(reply)
    if answer is not None:
        assert without_thoughts(answer) is answer and answer in reply


@given(MIXED.filter(lambda text: "</think>" not in text), st.text("abc <>/\n", max_size=20).map(str.strip))
def test_whatever_the_thoughts_are_the_answer_is_found(thoughts, answer):
    assert without_thoughts(f"<think>\n{thoughts}\n</think>\n\n{answer}") == answer
    assert without_thoughts(f"<think>\n{thoughts}\n") is None


@pytest.mark.parametrize(
    "piece", [*PIECES, "<think></think>", "x</think>\n", "x </think>", HARMONY, "analysisassistantfinal"]
)
@pytest.mark.parametrize("before", ["", "<think>", "x<think>", "<|channel|>final", "analysis"])
def test_a_hostile_reply_is_read_in_linear_time(before, piece):
    """A quadratic search would take minutes for each of the worst of these."""
    answer = without_thoughts(before + piece * (200_000 // len(piece)))
    assert answer is None or without_thoughts(answer) is answer
