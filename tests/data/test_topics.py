"""Topics in turn, what came of each, and how labels are spread."""

from __future__ import annotations

import pytest

from alpaca import UserError
from alpaca.data.topics import Topic, TopicCounts, in_turn, label_balance, read_topics


def test_a_line_is_a_name_a_weight_and_a_note_and_comments_are_left_out(tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("# mine\ncooking | 3 | for beginners | at home\n\n  tax law \nchess|2\n")
    assert read_topics(path) == [
        Topic("cooking", 3, "for beginners | at home"),
        Topic("tax law"),
        Topic("chess", 2),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n# nothing\n", "holds no topic: write one on each line"),
        ("x" * 5000, "line 1: a topic has 1 to 200 characters, not 5,000"),
        ("| 2", "line 1: a topic has 1 to 200 characters, not 0"),
        ("a\nb | many", "line 2: the weight must be a whole number from 1 to 1000"),
        ("a | 0", "line 1: the weight must be a whole number"),
        ("a | ²", "line 1: the weight must be a whole number"),
        ("Chess\nchess | 2", "line 2: a repeated topic: use a weight instead"),
    ],
)
def test_what_is_no_list_of_topics_is_named_with_its_line(tmp_path, text, words):
    (tmp_path / "topics.txt").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_topics(tmp_path / "topics.txt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_topics_take_turns_evenly_by_weight():
    a, b, c = Topic("a", 4), Topic("b", 2), Topic("c")
    assert "".join(topic.name for topic in in_turn([a, b, c])) == "abacaba"
    assert in_turn([]) == []


def test_a_topic_is_dry_after_ten_replies_in_a_row_without_a_new_record():
    a, b = Topic("a"), Topic("b")
    counts = TopicCounts([a, b, a])
    counts.add(a, kept=2, dropped=3, near_duplicates=1)
    for _ in range(9):
        counts.add(b, 0, 1, 1)
    counts.add(a, 1, 0, 0)
    assert counts.dry() == []
    counts.add(b, 0, 2, 0)
    assert counts.dry() == ["b"]
    assert counts.counts == {
        "a": {"replies": 2, "kept": 3, "dropped": 3, "near_duplicates": 1},
        "b": {"replies": 10, "kept": 0, "dropped": 11, "near_duplicates": 9},
    }
    counts.add(b, 1, 0, 0)
    assert counts.dry() == []


def test_labels_are_counted_without_case_and_punctuation():
    records = [{"output": text} for text in ("Spam", "spam.", "**Ham**", "SPAM")]
    assert label_balance(records) == {"records": 4, "labels": {"spam": 3, "ham": 1}, "most_common_share": 0.75}
    assert label_balance([]) == {"records": 0, "labels": {}, "most_common_share": 0.0}
