"""Many workers keep what one process keeps, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ROOT, assert_one_line_error, run_script
from ray.cluster_utils import Cluster
from test_dedup import make_texts

from alpaca import UserError
from alpaca.data import cluster, join
from alpaca.data.dedup import Engine, dedup, distinct

SCRIPT = ROOT / "generate_instruction.py"


def natural(count: int) -> list[str]:
    texts = [record["instruction"] for record in json.loads((ROOT / "alpaca_data.json").read_text())[:count]]
    return texts + [text.replace(" a ", " the ") for text in texts[: count // 4]]


def skewed(count: int) -> list[str]:
    """One rare-looking token is in every text, and the same text comes often."""
    rng = random.Random(0)
    return [
        f"zebra {rng.randrange(9)} " + " ".join(rng.choices("abcdefghij", k=rng.randrange(6))) for _ in range(count)
    ]


def near_the_threshold(count: int) -> list[str]:
    """Texts of 10 and 20 tokens, of which 6 to 8 of 10 are common, in order or not."""
    rng, texts = random.Random(0), []
    for i in range(count):
        words = [f"c{i % 50}x{k}" for k in range(10)] * rng.choice((1, 1, 2))
        for place in rng.sample(range(len(words)), len(words) * rng.choice((2, 3, 4)) // 20):
            words[place] = f"u{rng.randrange(40)}"
        if rng.random() < 0.3:
            a, b = rng.sample(range(len(words)), 2)
            words[a], words[b] = words[b], words[a]
        texts.append(" ".join(words))
    return texts


def foreign(count: int) -> list[str]:
    return ["请写一首关于春天的诗", "请写一首关于秋天的诗", "日本", "", "…"] * 3 + make_texts(count)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"instruction": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def one_process(texts: list[str], seeds=(), threshold=0.7, tokenizer="rouge") -> list[dict]:
    records = [{"instruction": text, "n": i} for i, text in enumerate(texts)]
    return list(distinct(records, seeds, threshold, False, tokenizer))


# ---------------------------------------------------------------------------------------------------------------------
# The join, without workers.


class Here:
    """Does what a Join asks of Ray at once, in this process."""

    exceptions = ray.exceptions

    def __init__(self):
        self.ran = []

    def remote(self, **options):
        def remote(function):
            def run(*arguments):
                self.ran.append(function.__name__)
                return function(*arguments)

            return SimpleNamespace(remote=run)

        return remote

    def wait(self, left):
        return left, []

    def put(self, value):
        return value

    get = put


def joined(work: Path, texts, seeds=(), threshold=0.7, tokenizer="rouge", worker_gb=2.0, here=None) -> list[dict]:
    half = len(texts) // 2
    work.mkdir(exist_ok=True)
    shards = [(write(work / f"{i}.jsonl", part), None) for i, part in enumerate((seeds, texts[:half], texts[half:]))]
    _, repeats, pairs = cluster.Join(here or Here(), work, threshold, worker_gb).near_duplicates(shards, tokenizer)
    kept = cluster.keep(repeats, pairs, len(seeds))[len(seeds) :]
    return [{"instruction": text, "n": i} for i, text in enumerate(texts) if kept[i]]


@pytest.mark.parametrize("make", [natural, skewed, near_the_threshold, foreign, make_texts])
@pytest.mark.parametrize("tokenizer", ["rouge", "unicode"])
def test_the_join_keeps_what_one_process_keeps(tmp_path, monkeypatch, make, tokenizer):
    monkeypatch.setattr(join, "UNIT", 301)
    texts = make(1000)
    kept = joined(tmp_path, texts, tokenizer=tokenizer)
    assert kept == one_process(texts, tokenizer=tokenizer) and len(kept) < len(texts)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 2 / 3, 0.9, 1.0])
@pytest.mark.parametrize("worker_gb", [2.0, 1e-4, 1e-5])
def test_at_any_threshold_and_in_any_memory(tmp_path, monkeypatch, threshold, worker_gb):
    """Little memory splits tokens into many cells: one of 60 texts at 1e-5 GB, 25 entries."""
    monkeypatch.setattr(join, "DENSE", 30 if worker_gb < 1 else 4096)
    monkeypatch.setattr(join, "PAIRS_AT_ONCE", 500 if worker_gb < 1 else 1 << 21)
    texts = make_texts(150) + skewed(60) + near_the_threshold(90)
    assert joined(tmp_path, texts, texts[7:20], threshold, worker_gb=worker_gb) == one_process(
        texts, texts[7:20], threshold
    )


def test_a_text_of_more_tokens_than_characters_is_compared_by_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(join, "CHARACTERS", 3)
    texts = near_the_threshold(300)
    assert joined(tmp_path, texts) == one_process(texts)


def test_a_heavy_token_is_spread_over_the_partitions():
    """All 4,000 texts hold the first token: 16 partitions get a share of its pairs, none more than twice the mean."""
    here = cluster.Join(Here(), Path(), 0.7, 2.0)
    held = pa.table({"key": np.arange(3, dtype=np.int32), "count": np.array([4000, 2, 1])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq, "read_table", lambda path: held)
        first, chunks, partition = here._plan([Path()], 3)
    assert chunks.tolist() == [4, 1, 0] and first[1] == 16
    upper = [partition[4 * a + b] for a in range(4) for b in range(a, 4)]
    assert np.bincount(upper, minlength=16).max() == 1


def test_a_killed_driver_repeats_only_what_was_not_complete(tmp_path, monkeypatch):
    texts, pairs = make_texts(600), join.write_pairs

    def killed_at_the_third(path, *task):
        if path.name == "pairs-00002.parquet":
            raise KeyboardInterrupt
        pairs(path, *task)

    monkeypatch.setattr(join, "write_pairs", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        joined(tmp_path, texts)
    monkeypatch.setattr(join, "write_pairs", pairs)
    again = Here()
    assert joined(tmp_path, texts, here=again) == one_process(texts)
    assert again.ran == ["spread_unit"] * 2 + ["write_pairs"] * 14
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# With Ray.


@pytest.fixture(scope="module")
def address():
    """Of a cluster of 2 CPUs on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        yield started.address
        started.shutdown()


def test_shards_in_and_out(tmp_path, address, capsys):
    texts = near_the_threshold(600)
    folder = tmp_path / "in"
    folder.mkdir()
    records = [{"instruction": text, "n": i} for i, text in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(records[:200]), folder / "a.parquet")
    (folder / "b.jsonl").write_text("")
    (folder / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[200:]))
    engine = Engine("ray", address, worker_gb=0.2)
    dedup(str(folder), str(tmp_path / "out"), engine=engine)
    expected = one_process(texts)
    parts = tmp_path / "out"
    assert sorted(path.name for path in parts.iterdir()) == [
        "part-00000.parquet",
        "part-00001.jsonl",
        "part-00002.jsonl",
    ]
    kept = pq.read_table(parts / "part-00000.parquet").to_pylist()
    assert kept + [*map(json.loads, (parts / "part-00002.jsonl").open())] == expected
    dedup(str(folder), str(tmp_path / "out.jsonl"), engine=engine)
    dedup(str(folder), str(tmp_path / "local.jsonl"), similarity_stats=False)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
    assert f"600 records: {len(expected):,} kept in" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "local.jsonl", "out", "out.jsonl"]


def test_a_killed_worker_is_retried(tmp_path, address):
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    try:

        def dies_once(path, number):
            marker = path.with_suffix(".marker")
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            path.write_text(str(number))

        paths = cluster.Join(ray, tmp_path, 0.7, 0.1).stage("made", dies_once, [(1,), (2,)])
        assert [path.read_text() for path in paths] == ["1", "2"]
    finally:
        ray.shutdown()


def test_bad_shards_are_named_and_nothing_is_written(tmp_path, address):
    write(tmp_path / "good.jsonl", ["Describe a canal."])
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a"}\n{"instr')
    pq.write_table(pa.table({"instruction": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"instruction": ["a"], "n": [1]}), tmp_path / "b.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    before = sorted(tmp_path.iterdir())
    for names, words, memory in (
        ("good.jsonl,bad.jsonl", "bad.jsonl, line 2: malformed JSON", 0.1),
        ("a.parquet,cut.parquet", "cut.parquet is not a complete Parquet file", 0.1),
        ("a.parquet,b.parquet", "b.parquet has other columns than .*a.parquet: ", 0.1),
        ("good.jsonl,none.jsonl", "none.jsonl does not exist", 0.1),
        ("good.jsonl", "no machine of the cluster has 99999.0 GB", 99999.0),
    ):
        source = ",".join(str(tmp_path / name) for name in names.split(","))
        with pytest.raises(UserError, match=words):
            dedup(source, str(tmp_path / "out"), engine=Engine("ray", address, worker_gb=memory))
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("fault", "raised", "words"),
    [
        (ray.exceptions.OutOfDiskError(), OSError, "the disk is full while spilling"),
        (ray.exceptions.WorkerCrashedError(), UserError, "workers keep dying .*: lower worker_gb"),
    ],
)
def test_what_ray_gives_up_on_is_one_line_and_what_is_complete_stays(
    tmp_path, address, monkeypatch, fault, raised, words
):
    def fails(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(cluster.Join, "_plan", fails)
        with pytest.raises(raised, match=words):
            dedup(write(tmp_path / "in.jsonl", ["a"]), str(tmp_path / "out.jsonl"), engine=Engine("ray", address))
    names = sorted(path.name for path in tmp_path.glob(".*.work/*"))
    assert names == ["ids-00000.ids", "ids-00000.parquet", "words-00000.parquet", "words-00000.texts"]


def test_a_driver_killed_with_kill_9_is_continued_and_leaves_no_worker(tmp_path):
    """Ray's two agents may live longer; they hold no file of the run."""
    texts = near_the_threshold(4000)
    source, out = write(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl"
    command = ["dedup", "--input_path", source, "--output_path", out, "--engine", "ray", "--workers", "2"]
    driver = subprocess.Popen([sys.executable, SCRIPT, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob(".*.work/words-*.parquet")):
        assert driver.poll() is None
        time.sleep(0.02)
    children = [child for child in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in child.name()]
    driver.kill()
    driver.wait()
    (words,) = tmp_path.glob(".*.work/words-*.parquet")
    written = words.stat().st_mtime_ns
    assert children and not psutil.wait_procs(children, timeout=60)[1] and not out.exists()
    assert words.stat().st_mtime_ns == written
    result = run_script(SCRIPT, *command)
    assert result.returncode == 0, result.stderr
    assert [*map(json.loads, out.open())] == one_process(texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    source, out = write(tmp_path / "in.jsonl", ["a"]), str(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="engine must be local or ray, not 'spark'"):
        dedup(source, out, engine=Engine("spark"))
    flags = ("--input_path", source, "--output_path", out, "--engine", "ray", "--address", "127.0.0.1:1")
    assert_one_line_error(run_script(SCRIPT, "dedup", *flags), "no Ray cluster at 127.0.0.1:1 (")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="engine ray is not installed: pip install"):
        dedup(source, out, engine=Engine("ray"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
