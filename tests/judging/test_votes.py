"""votes.py: who sees what on which side, and that a vote that was given is never lost, doubled or moved."""

from __future__ import annotations

import hashlib
import os
import threading

import pytest

import utils
from alpaca import UserError
from alpaca.common import journal
from alpaca.data.instruction_sets import Answers, Item
from alpaca.judging.votes import Ballots

ITEMS = [Item(f"t{number}", f"Do {number}.", "", None, "") for number in range(40)]


def answers(generator, items=ITEMS):
    return Answers(generator, {item.id: f"{generator} on {item.id}" for item in items}, [], {})


A, B = answers("ann-7b"), answers("bob-13b")


@pytest.fixture
def opened(tmp_path):
    """``opened(...)`` opens a ballot box as after a restart: the one before is closed."""
    boxes = []

    def open_box(items=ITEMS, a=A, b=B, seed=3, name="votes.jsonl") -> Ballots:
        for box in boxes:
            box.close()
        boxes.append(Ballots(items, a, b, tmp_path / name, seed))
        return boxes[-1]

    yield open_box
    for box in boxes:
        box.close()


def rows(tmp_path):
    return utils.jload(tmp_path / "votes.jsonl")


def test_a_vote_is_a_row_with_the_generators_in_the_order_they_were_shown_in(opened, tmp_path):
    box = opened(ITEMS[:1])
    seen = set()
    for annotator in ("eve", "max", "kim", "lea", "tom", "zoe"):
        place = box.next(annotator)
        instruction, input, first, second = box.pair(annotator, place)
        assert (instruction, input, {first, second}) == ("Do 0.", "", {"ann-7b on t0", "bob-13b on t0"})
        box.vote(annotator, place, "first")
        row = rows(tmp_path)[-1]
        assert 0 <= row.pop("seconds") < 10
        assert row == {
            "id": "t0",
            "first": first.split()[0],
            "second": second.split()[0],
            "preferred": "first",
            "judge": {"kind": "person", "name": annotator, "prompt_sha256": None, "settings": {"seed": 3}},
            "error": None,
            "reply": None,
            "answers_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in (first, second)],
        }
        seen.add(first)
    assert len(seen) == 2


def test_a_skip_prefers_nobody_and_is_no_tie(opened, tmp_path):
    box = opened()
    for choice in ("skip", "tie"):
        box.vote("eve", box.next("eve"), choice)
    assert [(row["preferred"], row["error"]) for row in rows(tmp_path)] == [(None, "skipped"), ("tie", None)]


def test_the_sides_are_drawn_for_each_annotator_and_pair_and_stay_as_they_were_drawn(opened):
    def sides(box):
        return {name: [box.pair(name, place)[2].startswith("ann") for place in range(40)] for name in ("eve", "max")}

    before = sides(opened())
    assert before["eve"] != before["max"]
    assert all(10 <= sum(left) <= 30 for left in before.values())
    assert sides(opened()) == before
    assert sides(opened(a=B, b=A)) == before  # named in the other order
    assert sides(opened(seed=4, name="other.jsonl")) != before


def test_all_see_one_shuffled_order_that_does_not_depend_on_the_files(opened):
    order = [item.id for item in opened().items]
    assert sorted(order) == sorted(item.id for item in ITEMS) and order != [item.id for item in ITEMS]
    assert [item.id for item in opened(ITEMS[::-1]).items] == order
    assert [item.id for item in opened(seed=4, name="other.jsonl").items] != order


def test_each_annotator_goes_through_all_pairs_once(opened):
    box = opened(ITEMS[:3])
    for place in range(3):
        assert (box.next("eve"), box.done("eve")) == (place, place)
        assert box.vote("eve", place, "tie")
    assert (box.next("eve"), box.done("eve")) == (None, 3)
    assert (box.next("max"), box.done("max")) == (0, 0)


def test_the_first_choice_of_two_stands(opened, tmp_path):
    box = opened()
    assert box.vote("eve", 0, "first") and not box.vote("eve", 0, "second")
    assert [row["preferred"] for row in rows(tmp_path)] == ["first"]


def test_undo_takes_back_the_annotators_own_last_votes_one_by_one(opened, tmp_path):
    box = opened()
    for name, choice in (("eve", "first"), ("eve", "tie"), ("max", "second")):
        box.vote(name, box.next(name), choice)
    assert not box.undo("eve", 0) and not box.undo("max", 1)  # not their last
    assert box.undo("eve", 1) and box.next("eve") == 1
    assert [(row["judge"]["name"], row["preferred"]) for row in rows(tmp_path)] == [("eve", "first"), ("max", "second")]
    assert box.undo("eve", 0) and not box.undo("eve", 0) and box.next("eve") == 0
    box.vote("eve", 0, "second")
    box = opened()
    assert (box.done("eve"), box.done("max")) == (1, 1)
    assert sorted((row["judge"]["name"], row["preferred"]) for row in rows(tmp_path)) == [
        ("eve", "second"),
        ("max", "second"),
    ]


def test_a_restart_goes_on_and_makes_the_output_anew(opened, tmp_path):
    box = opened(seed=None)
    for _ in range(3):
        box.vote("eve", box.next("eve"), "first")
    order, before = [item.id for item in box.items], rows(tmp_path)
    (tmp_path / "votes.jsonl").unlink()
    with open(tmp_path / "votes.jsonl.journal", "ab") as file:
        file.write(b'12345678 {"id": "torn')
    box = opened(seed=None)
    assert (box.done("eve"), rows(tmp_path), [item.id for item in box.items]) == (3, before, order)


def test_a_seed_that_nobody_gave_is_another_each_time(opened):
    assert opened(seed=None, name="a.jsonl").seed != opened(seed=None, name="b.jsonl").seed


def test_what_one_of_them_did_not_answer_is_left_out(opened):
    box = opened(a=answers("ann-7b", ITEMS[:5]), b=answers("bob-13b", ITEMS[2:]))
    assert sorted(item.id for item in box.items) == ["t2", "t3", "t4"]


def test_a_vote_that_is_not_on_disk_is_not_counted_and_none_is_written_behind_it(opened, tmp_path, monkeypatch):
    box = opened()
    box.vote("eve", 0, "first")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            box.vote("eve", 1, "first")
    assert box.done("eve") == 1
    with pytest.raises(OSError, match="No space left"):  # though there is some now
        box.vote("eve", 1, "second")
    assert [row["preferred"] for row in rows(tmp_path)] == ["first"]


def test_a_vote_counts_when_only_the_output_cannot_be_written(opened, tmp_path, monkeypatch, caplog):
    box = opened()
    with monkeypatch.context() as patch:
        patch.setattr("alpaca.judging.votes.json_text", lambda row: open(tmp_path / "no" / "folder", "w"))
        assert box.vote("eve", 0, "first")
    assert rows(tmp_path) == [] and "votes.jsonl" in caplog.text
    box.vote("eve", 1, "tie")
    assert [row["preferred"] for row in rows(tmp_path)] == ["first", "tie"]


def test_a_vote_is_appended_and_leaves_the_rows_before_it_alone(opened, tmp_path, monkeypatch):
    box = opened()
    before = os.stat(tmp_path / "votes.jsonl").st_ino
    with monkeypatch.context() as patch:
        patch.setattr("alpaca.judging.votes.write_records", lambda rows, path: pytest.fail("all rows are written"))
        for place in range(5):
            box.vote("eve", place, "tie")
    assert len(rows(tmp_path)) == 5 and os.stat(tmp_path / "votes.jsonl").st_ino == before
    box.undo("eve", 4)
    assert len(rows(tmp_path)) == 4
    box.vote("max", 0, "first")
    assert [row["judge"]["name"] for row in rows(tmp_path)] == ["eve"] * 4 + ["max"]


def test_many_at_once_lose_no_vote(opened, tmp_path):
    box = opened(ITEMS[:10])

    def work(name):
        while (place := box.next(name)) is not None:
            box.vote(name, place, "tie")

    threads = [threading.Thread(target=work, args=(f"n{number // 2}",)) for number in range(8)]  # two share a name
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = [(row["judge"]["name"], row["id"]) for row in rows(tmp_path)]
    assert len(votes) == len(set(votes)) == 40
    assert opened(ITEMS[:10]).done("n3") == 10


def test_a_name_is_one_person_however_it_is_spaced_or_spelled(opened):
    box = opened()
    assert box.annotator("  Ann  Lee ") == "Ann Lee" and box.annotator("ann lee") == "ann lee"
    box.vote("Ann Lee", 0, "tie")
    assert box.annotator("ann lee") == "Ann Lee"
    assert all(box.pair("ann lee", place) == box.pair("Ann Lee", place) for place in range(40))
    assert box.annotator("Zoë") == box.annotator("Zoe\u0308")
    for bad in ("", "  ", "x" * 61, "a\nb", "\x00", "half \ud83d", None, 5, ["a"]):
        with pytest.raises(UserError, match="Enter a name of 1 to 60 characters"):
            box.annotator(bad)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "from a run that differs in seed: use the same again, or choose another output path"),
        ({"a": answers("ann-7b", ITEMS[:5])}, "from a run that differs in pairs"),
        ({"b": answers("other")}, "from a run that differs in generators, pairs"),
        ({"b": Answers("none", {"t0": ""}, [], {}), "items": ITEMS[1:]}, "no instruction has answers by both"),
        ({"name": "no/votes.jsonl"}, "must be a file in an existing folder"),
        ({"name": "votes.json"}, "must end in .jsonl: votes are JSON Lines"),
        ({"name": "old.jsonl"}, "old.jsonl already exists: remove it, or choose another name"),
    ],
)
def test_votes_on_one_thing_do_not_go_on_with_another(opened, tmp_path, changed, message):
    opened().vote("eve", 0, "tie")
    (tmp_path / "old.jsonl").touch()
    with pytest.raises(UserError) as error:
        opened(**changed)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_servers_do_not_share_a_file(opened, tmp_path):
    opened()
    with pytest.raises(UserError, match="votes.jsonl.journal is in use by another process"):
        Ballots(ITEMS, A, B, tmp_path / "votes.jsonl")
