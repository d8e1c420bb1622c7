"""What `analyze_data.py review` finds of planted faults, and how long it takes against a server of fixed latency.

    python benchmarks/bench_review.py key                                        # about half a minute
    python benchmarks/bench_review.py rate --records 10000 --in_flight 64        # about 90 s
    python benchmarks/bench_review.py embedded --model_path DIR --records 60     # a model of 135 M parameters, on a CPU

key: 240 faults are planted in alpaca_data.json (plant_faults.py), and two reviewers know them. Each overlooks a fault
and raises a false alarm with known probabilities, independently, so precision, recall and agreement can be computed by
hand: they prove the report's arithmetic, and say nothing about a model. embedded: the embedded model reviews short
records, half of them with a planted fault, and its figures are what they are. Each part is written into
benchmarks/results/review.json.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import Teacher  # noqa: E402
from local_server import local_server  # noqa: E402
from plant_faults import plant  # noqa: E402
from provenance import provenance  # noqa: E402

import analyze_data  # noqa: E402
import utils  # noqa: E402
from alpaca import UserError, embedded_model  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.common.records import jload  # noqa: E402
from alpaca.endpoint.budget import RequestSettings  # noqa: E402
from alpaca.judging.review.marks import Rubric  # noqa: E402
from alpaca.judging.statistics import wilson_interval  # noqa: E402

RUBRICS = ROOT / "configs" / "review"
RESULT = ROOT / "benchmarks" / "results" / "review.json"
CRITERIA = ("True", "Complete", "Follows", "Self-contained", "Safe")


def reply(true: int) -> str:
    return "Reason: Each step was checked.\n" + "\n".join(
        f"{name}: {5 if name != 'True' else true}" for name in CRITERIA
    )


def confusion(planted: dict[int, str], found: Iterable[int], reviewed: Iterable[int]) -> dict:
    """Planted against found, over the records that have a review.

    Args:
        planted: record → the kind of its fault.
        found: records that were dropped or corrected.
        reviewed: records with marks.

    Returns:
        counts, precision and recall with their 95% intervals (Wilson), and found of planted by kind.
    """
    reviewed, found = set(reviewed), set(found)
    faulty = planted.keys() & reviewed
    hits, kinds = len(faulty & found), sorted(set(planted.values()))
    counts = {"planted and found": hits, "planted, not found": len(faulty - found)}
    counts |= {"found, not planted": len(found - faulty), "neither": len(reviewed - faulty - found)}
    rates = {}
    for name, of in (("precision", len(found)), ("recall", len(faulty))):
        interval = [round(end, 3) for end in wilson_interval(hits / of, of)] if of else None
        rates |= {name: round(hits / of, 3) if of else None, f"{name}_interval": interval}
    by_kind = {kind: [i for i in faulty if planted[i] == kind] for kind in kinds}
    return counts | rates | {kind: f"{len(found & {*each})} of {len(each)}" for kind, each in by_kind.items()}


def measured(folder: Path, planted: dict[int, str], model: int | None = None) -> dict:
    """The confusion of a finished review: of its actions, or of what one of two models would drop."""
    rows = [row | {"record": row["record"] - 1} for row in jload(folder / "reviews.jsonl")]  # the key counts from 0
    low = {row["record"] for row in rows if row["action"] in ("dropped", "corrected")}
    if model is not None:
        low = {row["record"] for row in rows if min(row["reviews"][model]["scores"].values()) < row["min_score"]}
    return confusion(planted, low, [row["record"] for row in rows if row["scores"]])


def key(each: int = 60, overlooked: float = 0.15, false_alarms: float = 0.05, seed: int = 0) -> None:
    """Two reviewers that answer from the key plus noise.

    Args:
        each: faults of each kind.
        overlooked: the probability that a reviewer overlooks a fault.
        false_alarms: and that it faults a record without one.
        seed: of the faults and the noise.
    """
    records, key = plant(utils.load_records(ROOT / "alpaca_data.json"), each, seed)
    planted, rubric = {fault["record"]: fault["kind"] for fault in key}, Rubric(RUBRICS / "rubric.txt")
    places = {rubric.prompt(record): i for i, record in enumerate(records)}
    assert len(places) == len(records)

    def says_low(model: str, place: int) -> bool:
        wrong = random.Random(f"{seed} {model} {place}").random() < (overlooked if place in planted else false_alarms)
        return (place in planted) != wrong

    def answer(_, body) -> str:
        return reply(2 if says_low(body["model"], places[body["messages"][0]["content"]]) else 5)

    server = Teacher(answer)
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data.json", Path(folder) / "out"
        utils.jdump(records, data)
        analyze_data.review(str(data), str(out), "a,b", requests=RequestSettings(server.base_url))
        report = jload_one(out / "report.json")
        found = {name: measured(out, planted, place) for name, place in (("a", 0), ("b", 1), ("both", None))}
    server.server.shutdown()
    for name in "ab":  # exactly what the server said, record by record
        said = {i for i in range(len(records)) if says_low(name, i)}
        assert found[name] == confusion(planted, said, range(len(records)))
    faults, others = len(planted), len(records) - len(planted)

    def by_hand(miss: float, alarm: float) -> dict:
        hits = faults * (1 - miss)
        return {"precision": round(hits / (hits + others * alarm), 3), "recall": round(1 - miss, 3)}

    low = (faults * (1 - overlooked) + others * false_alarms) / len(records)
    alike = [(1 - p) ** 2 + p**2 for p in (overlooked, false_alarms)]
    same = (faults * alike[0] + others * alike[1]) / len(records)
    chance = low**2 + (1 - low) ** 2
    expected = {"one": by_hand(overlooked, false_alarms)}
    expected |= {"both": by_hand(overlooked**2, 1 - (1 - false_alarms) ** 2)}
    expected |= {"kept": {"same": round(same, 3), "kappa": round((same - chance) / (1 - chance), 3)}}
    keep(
        "key",
        {"records": len(records), "faults": faults, "overlooked": overlooked, "false_alarms": false_alarms}
        | {"expected_by_hand": expected, "measured": found, "agreement_measured": report["agreement"]["kept"]},
    )


def jload_one(path: Path) -> dict:
    return json.loads(path.read_text())


def embedded(model_path: str, records: int = 60, seed: int = 0, time_limit: float = 1800.0) -> None:
    """The embedded model as the reviewer of short records, half of them with a planted fault.

    Args:
        model_path: the folder that `python -m alpaca.embedded_model prepare` makes.
        records: how many; of all 1,075 it would need hours on 2 cores.
        seed: of the faults and the choice.
        time_limit: seconds.
    """
    every, key = plant(utils.load_records(ROOT / "alpaca_data.json"), 60, seed)
    kinds, rng = {fault["record"]: fault["kind"] for fault in key}, random.Random(seed)
    short = [i for i, record in enumerate(every) if sum(map(len, record.values())) < 700]
    chosen = [i for i in short if i not in kinds]
    chosen = rng.sample([i for i in short if i in kinds], records // 2) + rng.sample(chosen, records - records // 2)
    planted = {place: kinds[i] for place, i in enumerate(chosen) if i in kinds}
    with tempfile.TemporaryDirectory() as folder, embedded_model.serve(model_path, f"{folder}/log") as url:
        data, out, started = Path(folder) / "data.json", Path(folder) / "out", time.monotonic()
        utils.jdump([every[i] for i in chosen], data)
        # What this model adds to a score has no end.
        how = {"extra_body": '{"stop": ["\\n"]}', "time_limit": time_limit, "max_failure_rate": 1.0}
        requests = RequestSettings(url, max_concurrency=8, **how)
        model, rubric = str(Path(model_path).resolve()), str(RUBRICS / "short.txt")
        result: dict = {"records": records, "faults": len(planted), "rubric": "short.txt", "ended_with": None}
        try:
            analyze_data.review(str(data), str(out), model, rubric=rubric, max_tokens=32, requests=requests)
        except UserError as e:
            result["ended_with"] = str(e).replace(folder, "OUT")
        if (out / "report.json").exists():
            report = jload_one(out / "report.json")
            figures = report["reviewers"][0]
            result |= {"actions": report["actions"], "scores": figures["scores"], "failed": figures["failed"]}
            result["measured"] = measured(out, planted)
        keep("embedded", result | {"seconds": round(time.monotonic() - started)})


def rate(records: int = 10_000, latency: float = 0.5, in_flight: int = 64, repeat: int = 3) -> None:
    """The whole of a review in this process, from reading the data to the written files, as a share of the ideal.

    Args:
        records: to review; made up, of about the length of Alpaca's.
        latency: of the server, in seconds.
        in_flight: requests at once; the ideal is as many rounds of the latency as they take.
        repeat: runs; the median counts.
    """
    import aiohttp  # noqa: F401  its import is start-up, not throughput

    rng, seconds = random.Random(0), []
    words = utils.read_text(ROOT / "prompt.txt").split()
    made = [
        {
            "instruction": f"{i} " + " ".join(rng.choices(words, k=20)),
            "input": "",
            "output": " ".join(rng.choices(words, k=60)),
        }
        for i in range(records)
    ]
    with local_server(latency, [reply(n) for n in (5, 5, 5, 5, 4, 2)]) as url:
        for _ in range(repeat):
            with tempfile.TemporaryDirectory() as folder:
                utils.jdump(made, f"{folder}/data.json")
                started = time.monotonic()
                requests = RequestSettings(url, max_concurrency=in_flight)
                analyze_data.review(f"{folder}/data.json", f"{folder}/out", "m", requests=requests)
                seconds.append(round(time.monotonic() - started, 2))
                assert len(jload(f"{folder}/out/reviews.jsonl")) == records
    ideal = math.ceil(records / in_flight) * latency
    result = {"records": records, "latency_s": latency, "in_flight": in_flight, "seconds": seconds, "ideal_s": ideal}
    keep("rate", result | {"share_of_ideal": round(ideal / statistics.median(seconds), 3)})


def keep(part: str, result: dict) -> None:
    """Print a part's figures, and write it beside the others."""
    print(json.dumps(result, indent=2, ensure_ascii=False))
    others = jload_one(RESULT) if RESULT.exists() else {}
    utils.jdump(others | {part: provenance("aiohttp") | result}, RESULT, indent=2)


if __name__ == "__main__":
    run_cli({"key": key, "embedded": embedded, "rate": rate})
