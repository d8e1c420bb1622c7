"""Plants faults into records, by seed: what a review should find, and the key to what it does find.

    python benchmarks/plant_faults.py --output_dir OUT --each 60

Of each kind of fault so many records get one, and no record two: a wrong sum (a digit of the number behind "=" is
another), a cut ending (the answer stops inside a sentence, after 40 to 70% of its words), swapped answers (two records
have each other's), a contradicted fact ("is" becomes "is not" in an answer's first sentence). OUT gets data.json,
all records in their order, and key.jsonl, one line for each fault: record (from 0), kind, original_output. The other
records are taken for faultless, which lint confirms as far as a program can see.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.common.records import jdump, load_records, write_records  # noqa: E402
from alpaca.data.lint.fields import is_code  # noqa: E402


def wrong_sum(output: str, rng: random.Random) -> str | None:
    """The last number behind an "=" with one digit changed, or None without an equation of numbers."""
    found = [*re.finditer(r"(?<=[\d)%]) ?= ?[$€£]?(\d)", output)]
    if not found or is_code(output):
        return None
    at = found[-1].start(1)
    return output[:at] + rng.choice([digit for digit in "123456789" if digit != output[at]]) + output[at + 1 :]


def cut_ending(output: str, rng: random.Random) -> str | None:
    """The beginning of an answer of 30 words or more, up to a word that ends no sentence."""
    ends = [match.end() for match in re.finditer(r"\S+", output)]
    within = [end for end in ends[int(0.4 * len(ends)) : int(0.7 * len(ends))] if output[end - 1].isalnum()]
    return output[: rng.choice(within)] if len(ends) >= 30 and within else None


def contradicted(output: str, rng: random.Random) -> str | None:
    """The answer with "not" behind "is", "are", "was" or "were", if its first sentence states something with one."""
    found = re.match(
        r"[A-Z][^.?!\n*\"“]*?[a-z)] (?:is|are|was|were)\b(?! (?:not|no|never)\b)(?=[^?\n]*\.(?:\s|$))", output
    )
    return f"{found[0]} not{output[found.end() :]}" if found and not is_code(output) else None


KINDS: dict[str, Callable] = {"wrong sum": wrong_sum, "contradicted fact": contradicted, "cut ending": cut_ending}


def plant(records: list[dict], each: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Returns the records with ``each`` faults of each kind, swapped answers in pairs, and the key to them."""
    rng, planted, kinds = random.Random(seed), list(records), {}

    def put(place: int, output: str, kind: str) -> None:
        planted[place], kinds[place] = records[place] | {"output": output}, kind

    order = rng.sample(range(len(records)), len(records))
    for kind, fault in KINDS.items():  # the rarest first
        for place in order:
            if place not in kinds and [*kinds.values()].count(kind) < each:
                if output := fault(records[place]["output"], rng):
                    put(place, output, kind)
    rest = [place for place in order if place not in kinds][: each // 2 * 2]
    for one, other in zip(rest[::2], rest[1::2], strict=True):
        put(one, records[other]["output"], "swapped answer")
        put(other, records[one]["output"], "swapped answer")
    key = [{"record": i, "kind": kinds[i], "original_output": records[i]["output"]} for i in sorted(kinds)]
    return planted, key


def main(output_dir: str, data_path: str = str(ROOT / "alpaca_data.json"), each: int = 60, seed: int = 0) -> None:
    """Writes OUT/data.json and OUT/key.jsonl.

    Args:
        output_dir: a folder for the two.
        data_path: the records.
        each: faults of each of the four kinds.
        seed: of the places and the faults.
    """
    folder, (planted, key) = Path(output_dir), plant(load_records(data_path), each, seed)
    folder.mkdir(parents=True, exist_ok=True)
    jdump(planted, folder / "data.json")
    write_records(key, folder / "key.jsonl")
    print(f"{len(key)} faults in {len(planted):,} records: {folder / 'data.json'} and {folder / 'key.jsonl'}")


if __name__ == "__main__":
    run_cli(main)
