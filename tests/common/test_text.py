"""alpaca/common/text.py: what goes into a message is short, in one line, and does nothing to a terminal."""

from __future__ import annotations

import pytest

from alpaca import UserError
from alpaca.common.text import check_utf8, first_line, printable, shorten


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


def test_control_characters_are_spelled_out_and_tab_and_line_feed_are_left():
    assert printable("a\tb\n\x1b[31mred\x9b\x7f é") == "a\tb\n\\x1b[31mred\\x9b\\x7f é"


def test_half_of_a_surrogate_pair_is_named_with_its_place():
    check_utf8("héllo 🙂", "the prompt")
    with pytest.raises(UserError, match=r"record 3 contains '\\ud83d', half of a surrogate pair, which is not text"):
        check_utf8("x\ud83dy", "record 3")
