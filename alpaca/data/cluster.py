"""De-duplication on many workers with Ray: the same records as in one process, bit for bit.

All pairs of instructions above the threshold are found by a set-similarity join with a shuffle by token (Vernica, Carey
and Li, SIGMOD 2010), and verified exactly. Then one pass in input order decides: a record is dropped if a kept earlier
one is its neighbor. Ray schedules, shuffles, spills to disk and retries. Each task's output is a Parquet file in a
folder beside the result, complete by rename; a task whose file exists is not run again:

    words   a task for each shard: its texts as tokens, and how often each token occurs
    ids     a task for 50,000 texts: their tokens as numbers, the rarest first
    pairs   the shuffle, then a task for each partition: the pairs above the threshold

What the tasks do is in join.py, which knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from itertools import compress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

import alpaca
from alpaca import UserError
from alpaca.common.files import check_writable, new_folder, only_process
from alpaca.common.records import sources, write_records
from alpaca.common.text import counted, first_line
from alpaca.data import join
from alpaca.data.dedup import Engine
from alpaca.data.rouge import unseen_warning

ENTRY_BYTES = 400  # of a token in a partition, with its text, and what sorting and comparing copy
PARTITIONS = (16, 500)  # at least, for balance; at most one a unit, since each unit sends something to each


class Join:
    """One de-duplication: its folder, its threshold, and its cluster."""

    def __init__(self, ray, work: Path, threshold: float, worker_gb: float):
        self.ray, self.work, self.threshold, self.worker_gb = ray, work, threshold, worker_gb
        self.seconds: dict[str, float] = {}  # stage → since the end of the one before
        self._since = time.monotonic()

    def ended(self, name: str) -> None:
        """Note that a stage has ended."""
        now = time.monotonic()
        self.seconds[name], self._since = now - self._since, now

    def stage(self, name: str, function: Callable, tasks: list[tuple]) -> list[Path]:
        """Run ``function(path, *task)`` for each task whose file does not exist; return the files."""
        paths = [self.work / f"{name}-{i:05}.parquet" for i in range(len(tasks))]
        remote = self._remote(function)
        left = [remote.remote(path, *task) for path, task in zip(paths, tasks, strict=True) if not path.exists()]
        with tqdm(total=len(paths), initial=len(paths) - len(left), desc=name, unit="task", disable=None) as bar:
            while left:
                done, left = self.ray.wait(left)
                self.ray.get(done)
                bar.update(len(done))
        self.ended(name)
        return paths

    def _remote(self, function: Callable, **options):
        return self.ray.remote(max_retries=5, memory=int(self.worker_gb * 1e9), **options)(function)

    def near_duplicates(self, shards: list[tuple[str, str | None]], tokenizer: str) -> tuple[list, np.ndarray, list]:
        """Return what the shards hold, as metadata; which texts repeat an earlier one; and the files of the pairs."""
        words = self.stage("words", join.write_words, [(one, tokenizer, fields) for one, fields in shards])
        texts = [pq.ParquetFile(path.with_suffix(".texts")) for path in words]
        repeats = _repeats([file.read(["high", "low"]) for file in texts]) & (self.threshold < 1)
        vocabulary = _vocabulary(words)
        units, start = [], 0  # file, row group, first number
        for path, file in zip(words, texts, strict=True):
            for group in range(file.num_row_groups):
                units.append((path.with_suffix(".texts"), group, start))
                start += file.metadata.row_group(group).num_rows
        ends = [first for _, _, first in units[1:]] + [start]
        shared = [self.ray.put(column) for column in vocabulary]
        tasks = [
            (path, group, repeats[first:end], self.threshold, *shared)
            for (path, group, first), end in zip(units, ends, strict=True)
        ]
        ids = self.stage("ids", join.write_ids, tasks)
        plan = self._plan(ids, len(vocabulary[0]))
        count = plan[2].max(initial=0) + 1
        wanted = [p for p in range(count) if not (self.work / f"pairs-{p:05}.parquet").exists()]
        parts: list[tuple] = [()] * count
        if wanted:
            spread, plan = self._remote(join.spread_unit, num_returns=len(wanted)), self.ray.put(plan)
            sent = [
                spread.remote(path.with_suffix(".ids"), first, self.threshold, wanted, plan)
                for path, (_, _, first) in zip(ids, units, strict=True)
            ]
            sent = [[one] for one in sent] if len(wanted) == 1 else sent
            for p, of_each_unit in zip(wanted, zip(*sent, strict=True), strict=True):
                parts[p] = (self.threshold, *of_each_unit)
            del sent
        pairs = self.stage("pairs", join.write_pairs, parts)
        return [pq.read_schema(path).metadata for path in words], repeats, pairs

    def _plan(self, ids: list[Path], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return how the shuffle goes: of each token its first cell and in how many chunks; of each cell its partition.

        A token in many texts is split into k chunks, and its pairs into the cells (a, b) with a ≤ b, so that no cell
        takes longer or needs more memory than a partition should.
        """
        held = np.zeros(count, np.int64)  # texts that have the token among their rarest
        for path in ids:
            table = pq.read_table(path)
            held[table["key"].to_numpy()] += table["count"].to_numpy()
        held[held < 2] = 0  # meets nothing
        room = self.worker_gb * 1e9 / ENTRY_BYTES
        parts = int(max(min(max(PARTITIONS[0], len(ids)), PARTITIONS[1]), np.ceil(2 * held.sum() / room)))
        most = max(1.0, min((held.astype(float) ** 2).sum() / parts, room**2 / 4) ** 0.5)
        chunks = np.ceil(held / most).astype(np.int64)
        cells = chunks**2
        first = np.cumsum(cells) - cells
        owner = np.repeat(np.arange(count), cells)
        a, b = np.divmod(np.arange(len(owner)) - first[owner], chunks[owner])
        work = np.where(a <= b, (held[owner] / chunks[owner]) ** 2, 0)
        turn = np.arange(len(owner)) % (2 * parts)  # 0, 1, 2, 2, 1, 0, 0, …: the heaviest are dealt out evenly
        partition = np.empty(len(owner), np.int32)
        partition[np.argsort(-work, kind="stable")] = np.minimum(turn, 2 * parts - 1 - turn)
        return first, chunks.astype(np.int32), partition


def _repeats(digests: list[pa.Table]) -> np.ndarray:
    """Return which texts have the tokens of an earlier one, by 128 bits of a hash; a text without tokens never does."""
    table = pa.concat_tables(digests)
    high, low = table["high"].to_numpy(), table["low"].to_numpy()
    order = np.lexsort((np.arange(len(high)), low, high))
    same = np.zeros(len(high), bool)
    same[order[1:]] = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    empty = np.frombuffer(hashlib.blake2b(b"", digest_size=16).digest(), np.uint64)
    return same & ~((high == empty[0]) & (low == empty[1]))


def _vocabulary(words: list[Path]) -> tuple[pa.Array, np.ndarray]:
    """Return all keys, the rarest first, and of each the number of its token: of "the 1" that of "the"."""
    counts = pa.concat_tables([pq.read_table(path) for path in words]).group_by("key").aggregate([("count", "sum")])
    keys = counts.sort_by([("count_sum", "ascending"), ("key", "ascending")])["key"].combine_chunks()
    token = pc.index_in(pc.replace_substring_regex(keys, " .*", ""), value_set=keys)
    return keys, token.to_numpy(zero_copy_only=False).astype(np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The whole.


def keep(repeats: np.ndarray, pairs: list[Path], seeds: int) -> bytearray:
    """Return a byte for each text, 1 if it is kept: the greedy rule in input order. Seeds are kept always."""
    table = pa.concat_tables([pq.read_table(path) for path in pairs])
    earlier, later = table["earlier"].to_numpy(), table["later"].to_numpy()
    order = later.argsort(kind="stable")
    kept = bytearray((~repeats).astype(np.uint8).tobytes())
    kept[:seeds] = b"\1" * seeds
    for part in range(0, len(order), join.PAIRS_AT_ONCE):  # as Python numbers they take eight times the memory
        some = order[part : part + join.PAIRS_AT_ONCE]
        for i, j in zip(earlier[some].tolist(), later[some].tolist(), strict=True):
            if kept[i] and j >= seeds:
                kept[j] = 0
    return kept


def write_shard(path: Path, shard: str, fields: str | None, kept: bytes) -> None:
    """Write the kept records of a shard: the rows of Parquet as they are, others as JSON Lines."""
    if path.suffix == ".jsonl":
        write_records(compress(join.records_of(shard, fields, []), kept), path)
        return
    file, start = pq.ParquetFile(shard), 0
    if file.metadata.num_rows != len(kept):
        raise UserError(f"{shard} has rows that are not records: choose an output_path that ends in .jsonl")
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for batch in file.iter_batches():
            here = np.frombuffer(kept, np.uint8)[start : start + len(batch)]
            writer.write_batch(batch.filter(pa.array(here.astype(bool))))
            start += len(batch)


def dedup_on_ray(
    input_path: str,
    target: Path,
    seed_tasks_path: str | None,
    threshold: float,
    tokenizer: str,
    fields: str | None,
    engine: Engine,
) -> None:
    """Do what ``dedup`` does, without similarity statistics; see there.

    Raises:
        UserError: Ray is not installed, no cluster answers, a shard is malformed, schemas differ, or the disk is full.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine ray is not installed: pip install -c constraints.txt -e '.[ray]'") from None
    target = target.absolute()
    shards = [(_absolute(one), fields) for one in sources(input_path)]
    seeds = [(_absolute(one), None) for one in sources(seed_tasks_path)] if seed_tasks_path else []
    if not target.suffix:
        _check_schemas([shard for shard, _ in shards])
    check_writable(target.parent, "output_path")
    stamps = [os.stat(one)[6:9:2] for one, _ in seeds + shards if os.path.exists(one)]  # bytes and time of change
    given = json.dumps([seeds, shards, stamps, threshold, tokenizer, engine.worker_gb, join.UNIT])
    work = target.parent / f".{target.name}.{hashlib.sha256(given.encode()).hexdigest()[:12]}.work"
    with only_process(work):
        _connect(ray, engine, work)
        try:
            job = Join(ray, work, threshold, engine.worker_gb)
            total, kept = _run(job, seeds, shards, tokenizer, target)
        except ray.exceptions.OutOfDiskError:
            raise OSError(errno.ENOSPC, "the disk is full while spilling", str(work)) from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as e:
            raise UserError(f"workers keep dying ({first_line(e)}): lower worker_gb or workers") from None
        except ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, UserError):
                ray.shutdown()  # first: another task, still running, would make the folder again
                shutil.rmtree(work)  # a shard will change
            raise e.cause if isinstance(e.cause, UserError | OSError) else e from None
        finally:
            ray.shutdown()
        shutil.rmtree(work)  # Ray makes it again until it has ended
    print(f"{counted(total, 'record')}: {kept:,} kept in {target}, {counted(total - kept, 'near-duplicate')} dropped")
    print("seconds:", ", ".join(f"{name} {seconds:.1f}" for name, seconds in job.seconds.items()))


def _run(job: Join, seeds: list, shards: list, tokenizer: str, target: Path) -> tuple[int, int]:
    """Write what is kept; return how many records there are, and how many were kept."""
    about, repeats, pairs = job.near_duplicates(seeds + shards, tokenizer)
    counts, about = [int(one[b"records"]) for one in about], about[len(seeds) :]
    first = sum(counts[: len(seeds)])
    total, unseen = sum(counts) - first, sum(int(one[b"unseen"]) for one in about)
    if not total:
        raise UserError(f"{', '.join(shard for shard, _ in shards)}: no records: choose another file")
    for said in filter(None, (one[b"said"].decode() for one in about)):
        print(said)
    if unseen:
        print(unseen_warning(unseen, counted(total, "instruction")))
    kept = bytes(keep(repeats, pairs, first)[first:])
    job.ended("decisions")
    _write(job, shards, counts[len(seeds) :], kept, target)
    job.ended("result")
    return total, sum(kept)


def _absolute(source: str) -> str:
    return os.path.abspath(source) if os.path.exists(source) else source


def _check_schemas(shards: list[str]) -> None:
    """Raise UserError unless all Parquet shards have the same columns: a folder of them could not be read as one."""
    schemas = {}
    for shard in shards:
        if shard.endswith(".parquet"):
            with contextlib.suppress(pa.ArrowException, OSError):  # named by the first stage
                schemas[shard] = pq.read_schema(shard)
    for shard, schema in schemas.items():
        if not schema.equals(schemas[first := next(iter(schemas))]):
            raise UserError(f"{shard} has other columns than {first}: choose an output_path that ends in .jsonl")


def _connect(ray, engine: Engine, work: Path) -> None:
    """Join the cluster at an address, or start one of ``workers`` processes here."""
    address, size = engine.address, int(engine.worker_gb * 1e9)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        workers = engine.workers or os.cpu_count() or 1
        store = {"object_store_memory": max(100 * 2**20, workers * size // 4), "object_spilling_directory": str(work)}
        ray.init("local", num_cpus=workers, include_dashboard=False, _memory=workers * size, **store, **quiet)
        return
    try:
        if (host := address.rpartition(":"))[2].isdecimal() and "://" not in address:  # Ray itself waits for minutes
            socket.create_connection((host[0], int(host[2])), 10).close()
        ray.init(address, runtime_env={"py_modules": [str(Path(alpaca.__file__).parent)]}, **quiet)
    except Exception as e:  # of the network, and of Ray
        raise UserError(f"no Ray cluster at {address} ({first_line(e)}): start one with ray start --head") from None
    if max(node["Resources"].get("memory", 0) for node in ray.nodes()) < size:  # Ray would wait for one
        ray.shutdown()
        raise UserError(f"no machine of the cluster has {engine.worker_gb} GB for a worker: lower worker_gb")


def _write(job: Join, shards: list, counts: list[int], kept: bytes, target: Path) -> None:
    if target.suffix:
        records = (record for shard, fields in shards for record in join.records_of(shard, fields, []))
        write_records(compress(records, kept), target)
        return
    remote, ends = job._remote(write_shard), join.offsets_of(np.array(counts))
    with new_folder(target, "output_path", [Path(shard) for shard, _ in shards]) as folder:
        tasks = []
        for i, (shard, fields) in enumerate(shards):
            name = f"part-{i:05}" + (".parquet" if shard.endswith(".parquet") else ".jsonl")
            tasks.append(remote.remote(folder / name, shard, fields, kept[ends[i] : ends[i + 1]]))
        job.ray.get(tasks)
