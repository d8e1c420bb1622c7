"""Looks at instruction data: fetch the released records, count, find what is wrong with them, draw what they ask for.

The 52,002 records that Stanford Alpaca released (CC BY-NC 4.0), checked byte for byte; the same command resumes:

    python analyze_data.py fetch --output_path alpaca_data_released.json

Counts, lengths and first verbs, in tokens too if a folder with a tokenizer is given:

    python analyze_data.py stats --data_path alpaca_data.json --tokenizer MODEL

What is wrong, with a reason and the evidence; the clean part and the rest can be written apart:

    python analyze_data.py lint --data_path alpaca_data.json --output_path clean.json --rejects_path rejects.json

Pictures of the diversity, as PNG files and one HTML page:

    python analyze_data.py plot --data_path alpaca_data.json --output_dir assets
"""

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import json
import os
import re
import shutil
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np

import utils
from alpaca import UserError
from alpaca.common import cli
from alpaca.common.files import git_blob_id
from alpaca.common.records import RELEASED_BLOB
from alpaca.data.lint.run import CLASSES, OPT_IN, find
from alpaca.data.released import download

RELEASED_URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"


# ---------------------------------------------------------------------------------------------------------------------
# fetch


def fetch(output_path: str, url: str = RELEASED_URL, blob_id: str = RELEASED_BLOB) -> None:
    """Downloads the released 52,002 records and proves that they are the released ones before OUTPUT_PATH appears.

    A download that broke off stays in OUTPUT_PATH.part, and the same command resumes it. A whole file with another
    content is kept aside as OUTPUT_PATH.wrong. A file that is there already is never overwritten.

    Args:
        output_path: the file to make.
        url: where from: the original's address, a mirror's, file://…, or the path of a local copy.
        blob_id: the git blob id of the right file; another one only for other versions of the data.
    """
    output = Path(output_path)
    part, wrong = (output.with_name(output.name + suffix) for suffix in (".part", ".wrong"))
    if output.is_dir():
        raise UserError(f"--output_path {output} is a folder: name the file to make in it")
    if output.exists():
        if (found := git_blob_id(output)) != blob_id:
            raise UserError(
                f"{output} is there with blob id {found}, not {blob_id}: move it away, or choose another --output_path"
            )
        print(f"{output} is there already and right (blob id {blob_id}); nothing to do")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    if "://" in url and not url.startswith("file://"):
        download(url, part, blob_id)
    else:
        _copy(url, part)
    if (found := git_blob_id(part)) != blob_id:
        os.replace(part, wrong)
        raise UserError(
            f"{url} holds another file: blob id {found}, not {blob_id}; kept as {wrong}. Try another --url, "
            "or the same command again if the download was started from elsewhere"
        )
    os.replace(part, output)
    print(f"{output}: {output.stat().st_size:,} bytes, and its blob id is {blob_id}, as it should be")


def _copy(source: str, part: Path) -> None:
    """A local copy goes the same way as a download, so that it is checked the same way."""
    path = urllib.request.url2pathname(source.removeprefix("file://")) if source.startswith("file://") else source
    try:
        shutil.copyfile(path, part)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--url {source} is no file: give a web address (https://…) or the path of a copy") from None


# ---------------------------------------------------------------------------------------------------------------------
# stats


def stats(data_path: str, tokenizer: str | None = None, output_path: str | None = None) -> None:
    """Counts, lengths, duplicates and the most common first verbs of a data set.

    Args:
        data_path: records to read, JSON or JSON Lines.
        tokenizer: a folder with a tokenizer (or its name on the hub), to count tokens too.
        output_path: where to write the same figures as JSON.
    """
    _refuse_same_files(data_path=data_path, output_path=output_path)
    records = utils.load_records(data_path)
    instructions = [" ".join(record["instruction"].split()).casefold() for record in records]
    pairs = [(text, " ".join(r["input"].split()).casefold()) for text, r in zip(instructions, records, strict=True)]
    texts = {
        "instruction": [record["instruction"] for record in records],
        "input": [record["input"] for record in records if record["input"]],
        "output": [record["output"] for record in records],
    }
    report = {
        "records": len(records),
        "with_input": len(texts["input"]),
        "share_with_input": round(len(texts["input"]) / len(records), 4),
        "duplicate_instructions": len(records) - len(set(instructions)),
        "duplicate_instructions_and_inputs": len(records) - len(set(pairs)),
        "words": {field: _spread([len(text.split()) for text in values]) for field, values in texts.items()},
    }
    if tokenizer:
        texts["example"] = [utils.format_prompt(r["instruction"], r["input"]) + r["output"] for r in records]
        count = _token_counter(tokenizer)
        report["tokens"] = {field: _spread(count(values)) for field, values in texts.items()}
    first = (re.match(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", record["instruction"].strip()) for record in records)
    report["first_verbs"] = dict(Counter(match[0].lower() for match in first if match).most_common(20))

    print(f"records                          {report['records']:>8,}")
    print(f"with an input                    {report['with_input']:>8,}   {report['share_with_input']:.1%}")
    print(f"instruction there before         {report['duplicate_instructions']:>8,}")
    print(f"instruction, input there before  {report['duplicate_instructions_and_inputs']:>8,}")
    for unit in ("words", "tokens"):
        if unit in report:
            print(f"\n{unit:<12}" + "".join(f"{name:>9}" for name in ("min", "mean", "median", "p90", "p99", "max")))
            for field, spread in report[unit].items():
                print(f"{field:<12}" + "".join(f"{spread[name]:>9,}" for name in spread))
    print("\nmost common first words of an instruction")
    for verb, number in report["first_verbs"].items():
        print(f"  {verb:<16}{number:>8,}   {number / len(records):.1%}")
    if output_path:
        with utils.replace_file(output_path) as file:
            json.dump(report, file, indent=2, ensure_ascii=False)
            file.write("\n")


def _spread(lengths: list[int]) -> dict[str, float]:
    """Percentiles are lengths that occur: 90% of the texts are at most p90 long. Zeros when there is no text."""
    lengths = lengths or [0]
    median, p90, p99 = (int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 99))
    mean = round(sum(lengths) / len(lengths), 1)
    return {"min": min(lengths), "mean": mean, "median": median, "p90": p90, "p99": p99, "max": max(lengths)}


def _token_counter(name: str):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise UserError(f"--tokenizer {name} cannot be loaded: {str(e).splitlines()[0]}") from None

    def count(texts: list[str]) -> list[int]:
        lengths = []
        for start in range(0, len(texts), 1000):  # all at once took 2.6 GB for 52,000 long records
            encoded = tokenizer(texts[start : start + 1000], add_special_tokens=False)
            lengths += [len(ids) for ids in encoded["input_ids"]]
        return lengths

    return count


# ---------------------------------------------------------------------------------------------------------------------
# lint


def lint(
    data_path: str,
    output_path: str | None = None,
    rejects_path: str | None = None,
    report_path: str | None = None,
    only: str | None = None,
    skip: str | None = None,
    strict: bool = False,
) -> None:
    """Finds records that should not be trained on, each with a class, a reason and the evidence.

    DATA_PATH is only read. The exit code is 0 whatever was found; with --strict True findings make it 1. Class
    no-full-stop is looked for only when --only names it. All classes: empty-output, na-output, input-field, link,
    missing-input, empty-code, needs-media, nonsense, merged, cut-off, no-full-stop, wrong-arithmetic, mojibake,
    stray-escape, duplicate, near-duplicate.

    Args:
        data_path: records to read, JSON or JSON Lines.
        output_path: where to write the records without a finding, unchanged (JSON Lines if it ends in .jsonl).
        rejects_path: where to write the others, each with its findings in a field "lint".
        report_path: where to write the findings, one JSON object a line.
        only: classes to look for, separated by commas.
        skip: classes not to look for.
        strict: exit with code 1 when something is found.
    """
    _refuse_same_files(data_path=data_path, output_path=output_path, rejects_path=rejects_path, report_path=report_path)
    wanted = _classes("only", only) or set(CLASSES) - OPT_IN
    wanted -= _classes("skip", skip)
    records = utils.load_records(data_path)
    findings = find(records, wanted)

    counts = Counter(finding["class"] for finding in findings)
    width = max(map(len, CLASSES))
    for name in CLASSES:
        if name in wanted:
            print(f"{name:<{width}}{counts[name]:>8,}   {CLASSES[name]}")
    for finding in findings[:20]:
        print(f"\nrecord {finding['record']}, {finding['class']}\n  {finding['evidence']}")
    bad = {finding["record"] for finding in findings}
    more = " (the first 20 above; --report_path writes all)" if len(findings) > 20 and not report_path else ""
    print(f"\n{len(findings):,} findings in {len(bad):,} of {len(records):,} records{more}")

    if output_path:
        _write([record for i, record in enumerate(records) if i not in bad], output_path)
        print(f"{len(records) - len(bad):,} clean records in {output_path}")
    if rejects_path:
        reasons: dict[int, list] = {i: [] for i in sorted(bad)}
        for finding in findings:
            reasons[finding["record"]].append({key: finding[key] for key in ("class", "reason", "evidence")})
        _write([records[i] | {"lint": found} for i, found in reasons.items()], rejects_path)
        print(f"{len(bad):,} rejected records in {rejects_path}")
    if report_path:
        with utils.replace_file(report_path) as file:
            file.writelines(utils.json_text(finding) + "\n" for finding in findings)
    if strict and findings:
        sys.exit(1)


def _classes(flag: str, text: str | None) -> set[str]:
    names = {name.strip() for name in (text or "").split(",") if name.strip()}
    for name in sorted(names - set(CLASSES)):
        raise UserError(f"--{flag} {name!r} is no class: choose from {', '.join(CLASSES)}")
    return names


def _refuse_same_files(**paths: str | None) -> None:
    seen: dict[str, str] = {}
    for name, path in paths.items():
        if path and (other := seen.setdefault(os.path.realpath(path), name)) != name:
            raise UserError(f"--{name} and --{other} are the same file, {path}: give each its own")


def _write(records: list[dict], path: str) -> None:
    if not path.endswith(".jsonl"):
        utils.jdump(records, path)
        return
    with utils.replace_file(path) as file:
        file.writelines(utils.json_text(record) + "\n" for record in records)


# ---------------------------------------------------------------------------------------------------------------------
# plot


def plot(data_path: str, output_dir: str) -> None:
    """Draws what the instructions ask for, how long the records are and how near to each other, into OUTPUT_DIR.

    Args:
        data_path: records to read, JSON or JSON Lines.
        output_dir: folder for the PNG files and the HTML page.
    """
    from alpaca.data import plots  # loads matplotlib and spaCy, which the other tasks do without

    plots.plot(data_path, output_dir)


if __name__ == "__main__":
    cli.run_cli({"fetch": fetch, "stats": stats, "lint": lint, "plot": plot})
