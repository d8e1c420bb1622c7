"""De-duplication keeps what comparing with everything kept before would keep, and writes what the generator writes."""

from __future__ import annotations

import json
import random

import numpy as np
import oracles
import pytest
from conftest import ROOT, assert_one_line_error, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from alpaca import UserError
from alpaca.data import dedup
from alpaca.data.dedup import distinct, similarity_fields

quick = settings(deadline=None, database=None, max_examples=60)
STATS = {"most_similar_instructions", "avg_similarity_score"}


def keep_slowly(texts: list[str], seeds: list[str], threshold: float) -> list[tuple[int, list[float], list[str]]]:
    """Of each kept text: its place, its scores, and the texts that they are scores to."""
    pool, kept = list(seeds), []
    for i, text in enumerate(texts):
        scores = oracles.rouge_l(text, pool)
        if max(scores, default=0.0) <= threshold:
            kept.append((i, scores, list(pool)))
            pool.append(text)
    return kept


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Half of them copies of an earlier one with some words changed."""
    rng, texts = random.Random(seed), [["write", "a", "poem"]]
    for _ in range(count - 1):
        text = list(rng.choice(texts))
        if rng.random() < 0.5:
            text = [f"w{int(rng.paretovariate(0.7)) % 500}" for _ in range(rng.randrange(12))]
        for _ in range(rng.randrange(1 + len(text) // 2)):
            text[rng.randrange(len(text))] = f"w{rng.randrange(500)}"
        texts.append(text)
    return [" ".join(text) for text in texts]


def write(path, records) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# The mechanism.


@quick
@given(
    st.lists(st.lists(st.sampled_from("aabcdef"), max_size=7).map(" ".join), max_size=14),
    st.lists(st.lists(st.sampled_from("aabcdef"), max_size=7).map(" ".join), max_size=3),
    st.sampled_from((0.0, 0.5, 2 / 3, 0.7, 1.0)),
    st.sampled_from((1, 3, 64)),
)
def test_kept_is_what_comparing_with_everything_keeps(texts, seeds, threshold, block):
    records = [{"instruction": text, "number": i} for i, text in enumerate(texts)]
    expected = keep_slowly(texts, seeds, threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "BLOCK", block)
        with_stats = list(distinct(records, seeds, threshold))
    assert list(distinct(records, iter(seeds), threshold, similarity_stats=False)) == [
        records[i] for i, _, _ in expected
    ]
    assert [record["number"] for record in with_stats] == [i for i, _, _ in expected]
    for record, (i, scores, pool) in zip(with_stats, expected, strict=True):
        assert record == records[i] | similarity_fields(np.array(scores), pool)


def test_both_ways_decide_the_same_on_thousands_of_texts():
    texts = make_texts(1500)
    records = [{"instruction": text} for text in texts]
    kept = [record["instruction"] for record in distinct(records, texts[:20], 0.7, similarity_stats=False)]
    assert kept == [record["instruction"] for record in distinct(records, texts[:20], 0.7)]
    expected = [texts[i] for i, _, _ in keep_slowly(texts[:300], texts[:20], 0.7)]
    assert kept[: len(expected)] == expected
    assert 300 < len(kept) < 1400


def test_a_record_at_the_threshold_is_kept_and_one_above_is_not():
    """F of 7 common tokens of 10 and 10 is the float 0.7; of 9 and 11 it is 0.7000000000000001."""
    common = "c1 c2 c3 c4 c5 c6 c7"
    for stats in (True, False):
        at = [{"instruction": f"{common} a1 a2 a3"}, {"instruction": f"{common} b1 b2 b3"}]
        assert len(list(distinct(at, [], 0.7, stats))) == 2
        above = [{"instruction": f"{common} a1 a2"}, {"instruction": f"{common} b1 b2 b3 b4"}]
        assert len(list(distinct(above, [], 0.7, stats))) == 1


def test_of_two_near_duplicates_the_first_is_kept_and_a_seed_comes_before_both():
    records = [{"instruction": "name a color"}, {"instruction": "name a color now"}]
    assert list(distinct(records, similarity_stats=False)) == records[:1]
    assert list(distinct(records[::-1], similarity_stats=False)) == records[1:]
    assert list(distinct(records, ["name a color"], similarity_stats=False)) == []


def test_the_ten_nearest_fall_and_the_later_of_equals_comes_first():
    texts = [f"text {i}" for i in range(14)]
    scores = np.array([0.1, 0.5, 0.5, 0.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.7, 0.0])
    fields = similarity_fields(scores, texts)
    assert list(fields["most_similar_instructions"].items()) == [
        *(("text 12", 0.7), ("text 2", 0.5), ("text 1", 0.5)),
        *((f"text {i}", 0.2) for i in (11, 10, 9, 8, 7, 6, 5)),
    ]
    assert fields["avg_similarity_score"] == scores.mean()
    json.dumps(fields)


@quick
@given(st.lists(st.sampled_from((0.0, 0.25, 0.5, 2 / 3, 0.7)), max_size=40))
def test_the_fields_are_those_of_sorting_everything(scores):
    texts = [str(i) for i in range(len(scores))]
    scores = np.array(scores)
    order = scores.argsort(kind="stable")[::-1][:10]
    similar = similarity_fields(scores, texts)["most_similar_instructions"]
    assert list(similar.items()) == [(texts[i], scores[i]) for i in order]


def test_the_first_record_without_seeds_is_compared_with_nothing():
    (record,) = distinct([{"instruction": "a"}])
    assert record == {"instruction": "a", "most_similar_instructions": {}, "avg_similarity_score": 0.0}


# ---------------------------------------------------------------------------------------------------------------------
# The task.

RECORDS = [
    {"instruction": "Name three primary colors.", "input": "", "output": "Red, blue, yellow", "id": 7},
    {"instruction": "Name the three primary colors.", "output": "é\u2028 日本", "nested": {"a": [1, None]}},
    {"instruction": "Summarize the plot of Hamlet.", "input": "x\r\ny", "output": "…"},
    {"instruction": "Describe a canal.", "output": ""},
]


@pytest.mark.parametrize("source", ["in.json", "in.jsonl"])
@pytest.mark.parametrize("target", ["out.json", "out.jsonl"])
@pytest.mark.parametrize("stats", [True, False])
def test_records_keep_their_fields_and_gain_two_with_stats(tmp_path, source, target, stats, capsys):
    out = tmp_path / "new" / target
    dedup.dedup(write(tmp_path / source, RECORDS), str(out), similarity_stats=stats)
    kept = utils.jload(out)
    assert [{k: v for k, v in record.items() if k not in STATS} for record in kept] == [
        RECORDS[0],
        RECORDS[2],
        RECORDS[3],
    ]
    assert all((STATS <= record.keys()) == stats for record in kept)
    if stats:
        assert list(kept[2]["most_similar_instructions"]) == [RECORDS[2]["instruction"], RECORDS[0]["instruction"]]
    if target == "out.json":
        utils.jdump(kept, tmp_path / "again.json")
        assert out.read_bytes() == (tmp_path / "again.json").read_bytes()
    assert "1 near-duplicate dropped" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == [target]


def test_nothing_kept_is_an_empty_list(tmp_path):
    source = write(tmp_path / "in.json", RECORDS)
    dedup.dedup(source, str(tmp_path / "out.json"), seed_tasks_path=source)
    assert utils.jload(tmp_path / "out.json") == []


def test_the_seeds_are_compared_and_not_written(tmp_path):
    seeds = write(tmp_path / "seeds.jsonl", [{"instruction": "Describe one canal.", "instances": []}])
    dedup.dedup(write(tmp_path / "in.jsonl", RECORDS), str(tmp_path / "out.jsonl"), seeds, threshold=0.6)
    kept = utils.jload(tmp_path / "out.jsonl")
    assert [record["instruction"] for record in kept] == [RECORDS[0]["instruction"], RECORDS[2]["instruction"]]
    assert list(kept[0]["most_similar_instructions"]) == ["Describe one canal."]


@pytest.mark.parametrize("stats", [True, False])
def test_conversations_are_compared_by_all_their_questions(tmp_path, stats):
    """Neither a shared system text nor a shared greeting counts; the fourth repeats the questions of the first."""
    system = {"role": "system", "content": "You are a careful assistant and answer in short plain sentences. " * 5}
    asks = ["How do I bake bread?", "Why is the sky blue?", "Who wrote Hamlet?", "How do I bake bread"]
    talks = [
        [system] * bool(i)
        + [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
        + [{"role": "user", "content": ask}, {"role": "assistant", "content": "So."}]
        for i, ask in enumerate(asks)
    ]
    source, out = write(tmp_path / "in.jsonl", [{"messages": one} for one in talks]), tmp_path / "out.json"
    dedup.dedup(source, str(out), similarity_stats=stats)
    kept = utils.jload(out)
    assert [one["messages"] for one in kept] == talks[:3]
    if stats:
        assert list(kept[1]["most_similar_instructions"]) == ["Hello\n\nHow do I bake bread?"]


def test_half_of_a_surrogate_pair_survives(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"instruction": "a \\ud83d b"}\n')
    for name in ("out.json", "out.jsonl"):
        dedup.dedup(str(tmp_path / "in.jsonl"), str(tmp_path / name))
        assert utils.jload(tmp_path / name)[0]["instruction"] == "a \ud83d b"


def test_a_warning_where_the_default_tokenizer_sees_nothing(tmp_path, capsys):
    texts = ["请写一首关于春天的诗", "请写一首关于秋天的诗", "Describe a canal."]
    source, out = write(tmp_path / "in.json", [{"instruction": text} for text in texts]), tmp_path / "out.json"
    dedup.dedup(source, str(out))
    printed = capsys.readouterr().out
    assert "warning: 2 of 3 instructions" in printed and "3 kept" in printed
    assert "use tokenizer=unicode" in printed
    dedup.dedup(source, str(out), tokenizer="unicode")
    printed = capsys.readouterr().out
    assert "warning:" not in printed and "2 kept" in printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"instruction": "a"}\n{"instruction": ', ["line 2", "malformed JSON"]),
        ('{"instruction": "a"}\n\n["a"]\n', ["line 3", "a JSON list, not an object"]),
        ('{"instruction": 5}\n', ["line 1", "instruction"]),
        ("\n", ["no records"]),
        (b"\xff\xfe", ["UTF-8"]),
    ],
)
def test_bad_lines_are_named_and_the_output_stays_as_it_was(tmp_path, text, words):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    out.write_text("old")
    with pytest.raises(UserError) as error:
        dedup.dedup(str(source), str(out))
    for word in words:
        assert word in str(error.value)
    assert out.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_bad_arguments_are_refused(tmp_path):
    source = write(tmp_path / "in.json", RECORDS)
    (tmp_path / "link.json").symlink_to(source)
    (tmp_path / "hard.json").hardlink_to(source)
    out = str(tmp_path / "out.json")
    for settings_, words in (
        ({"output_path": source}, "is the input"),
        ({"output_path": str(tmp_path / "." / "in.json")}, "is the input"),
        ({"output_path": str(tmp_path / "link.json")}, "is the input"),
        ({"output_path": str(tmp_path / "hard.json")}, "is the input"),
        ({"output_path": str(tmp_path)}, "is a folder"),
        ({"output_path": out, "threshold": 70.0}, "from 0 to 1"),
        ({"output_path": out, "tokenizer": "words"}, "rouge or unicode"),
        ({"output_path": out, "seed_tasks_path": "no.jsonl"}, "no.jsonl does not exist"),
        ({"output_path": out, "seed_tasks_path": str(tmp_path / "no.json")}, "does not exist"),
        ({"output_path": out, "input_path": write(tmp_path / "empty.json", [])}, "no records"),
        ({"output_path": out, "input_path": write(tmp_path / "bad.json", [{"input": ""}])}, "record 1"),
    ):
        with pytest.raises(UserError, match=words):
            dedup.dedup(**({"input_path": source} | settings_))
    assert json.loads((tmp_path / "in.json").read_text()) == RECORDS and not (tmp_path / "out.json").exists()


def test_from_the_command_line(tmp_path):
    source, out = write(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.json"
    script = ROOT / "generate_instruction.py"
    flags = ["--input_path", source, "--output_path", out, "--similarity_stats", "False", "--threshold", "0.9"]
    result = run_script(script, "dedup", *flags)
    assert result.returncode == 0, result.stderr
    assert "4 records: 4 kept" in result.stdout and utils.jload(out) == RECORDS
    assert_one_line_error(run_script(script, "dedup", "--input_path", source, "--output_path", source), "is the input")


def test_a_list_may_come_from_a_pipe(tmp_path):
    flags = ("--input_path", "/dev/stdin", "--output_path", tmp_path / "out.json", "--nosimilarity_stats")
    result = run_script(ROOT / "generate_instruction.py", "dedup", *flags, input=json.dumps(RECORDS))
    assert result.returncode == 0, result.stderr
    assert f"{len(RECORDS)} records" in result.stdout and utils.jload(tmp_path / "out.json")
