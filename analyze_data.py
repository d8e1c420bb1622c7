"""Analyze instruction data: fetch the released records, count, find faults, plot, publish.

Fetch the 52,002 records that Stanford Alpaca released (CC BY-NC 4.0), verified by hash; the same command resumes:

    python analyze_data.py fetch --output_path alpaca_data_released.json

Counts, lengths and first words; in tokens too, given a folder with a tokenizer:

    python analyze_data.py stats --data_path alpaca_data.json --tokenizer MODEL

Find faulty records, each with a reason and evidence; write clean and rejected records to separate files:

    python analyze_data.py lint --data_path alpaca_data.json --output_path clean.json --rejects_path rejects.json

Let a model review each record by a rubric: kept, corrected and dropped records, with scores and reasons:

    python analyze_data.py review --data_path alpaca_data.json --model_name MODEL --output_dir reviewed

Plot lengths and diversity, as PNG files and one HTML page:

    python analyze_data.py plot --data_path alpaca_data.json --output_dir pictures

Publish a folder of Parquet, JSON Lines and a dataset card; with --push OWNER/NAME also on the Hugging Face hub:

    python analyze_data.py publish --data_path alpaca_data.json --output_dir published --license cc-by-nc-4.0
"""

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

import utils
from alpaca import UserError
from alpaca.common import cli
from alpaca.common.files import git_blob_id, new_folder
from alpaca.common.records import RELEASED_BLOB, files_of, read_records, restricted_parts, sources, write_records
from alpaca.common.shapes import FIELDS, whole_text
from alpaca.common.text import counted, first_line, printable, utc_now
from alpaca.data.instruction_sets import is_name
from alpaca.data.lint.classes import CLASSES, OPT_IN, duplicates, find
from alpaca.data.released import download
from alpaca.data.rouge import count_words
from alpaca.endpoint.budget import RequestSettings

SHIPPED_LICENSE = "cc-by-nc-4.0"  # also of the released data
RUBRIC = Path(__file__).parent / "configs" / "review" / "rubric.txt"
RELEASED_URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"


def fetch(output_path: str, url: str = RELEASED_URL, blob_id: str = RELEASED_BLOB) -> None:
    """Download the released 52,002 records, and verify them before OUTPUT_PATH appears.

    An interrupted download stays in OUTPUT_PATH.part, and the same command resumes it. A complete file with the wrong
    content is kept as OUTPUT_PATH.wrong. An existing file is never overwritten.

    Args:
        output_path: file to write.
        url: the original's address, a mirror's, file://…, or the path of a local copy.
        blob_id: the right file's git blob id; change it only for another version of the data.
    """
    output = Path(output_path)
    part, wrong = (output.with_name(output.name + suffix) for suffix in (".part", ".wrong"))
    if output.exists():
        if (found := git_blob_id(output)) != blob_id:
            raise UserError(
                f"{output} exists with blob id {found}, not {blob_id}: remove it, or choose another --output_path"
            )
        print(f"{output} exists and is correct (blob id {blob_id}); nothing to do")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    download(url if "://" in url else Path(url).absolute().as_uri(), part, blob_id)
    if (found := git_blob_id(part)) != blob_id:
        os.replace(part, wrong)
        raise UserError(
            f"{url} is a different file (blob id {found}, not {blob_id}), kept as {wrong}: try another --url, "
            "or run the same command again if the download started from another one"
        )
    os.replace(part, output)
    print(f"{output}: {output.stat().st_size:,} bytes, with the correct blob id {blob_id}")


def stats(
    data_path: str, tokenizer: str | None = None, output_path: str | None = None, fields: str | None = None
) -> None:
    """Print counts, lengths, duplicates and the most common first words of a dataset.

    Args:
        data_path: records to read: a file, a folder, several separated by commas, or a hub dataset.
        tokenizer: folder or hub name of a tokenizer, to count tokens too.
        output_path: file for the same figures as JSON.
        fields: field names of data in another format: instruction=question,output=answer.
    """
    _refuse_same_files(data_path=data_path, output_path=output_path)
    records = utils.load_records(data_path, fields)
    report = figures(records)
    if tokenizer:
        count, texts = _token_counter(tokenizer), _texts(records)
        texts["example"] = [
            "".join(message["content"] for message in r.get("messages") or ())
            or utils.format_prompt(r["instruction"], r["input"]) + r["output"]
            for r in records
        ]
        report["tokens"] = {field: _spread(count(values)) for field, values in texts.items()}

    print(f"records                          {report['records']:>8,}")
    print(f"with an input                    {report['with_input']:>8,}   {report['share_with_input']:.1%}")
    print(f"repeated instruction             {report['duplicate_instructions']:>8,}")
    print(f"repeated instruction and input   {report['duplicate_instructions_and_inputs']:>8,}")
    for unit in ("words", "tokens"):
        if unit in report:
            print(f"\n{unit:<12}" + "".join(f"{name:>9}" for name in ("min", "mean", "median", "p90", "p99", "max")))
            for field, spread in report[unit].items():
                print(f"{field:<12}" + "".join(f"{spread[name]:>9,}" for name in spread))
    print("\nmost common first words of an instruction")
    for verb, number in report["first_verbs"].items():
        print(f"  {verb:<16}{number:>8,}   {number / len(records):.1%}")
    if output_path:
        utils.jdump(report, output_path, indent=2)


def figures(records: list[dict]) -> dict:
    """Return counts, lengths in words, and the most common first words of an instruction."""
    texts = _texts(records)
    first = (re.match(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text.strip()) for text in texts["instruction"])
    return {
        "records": len(records),
        "with_input": len(texts["input"]),
        "share_with_input": round(len(texts["input"]) / len(records), 4),
        "duplicate_instructions": len(records) - len({" ".join(t.split()).casefold() for t in texts["instruction"]}),
        "duplicate_instructions_and_inputs": len(duplicates(records)),
        "words": {field: _spread([count_words(text) for text in values]) for field, values in texts.items()},
        "first_verbs": dict(Counter(match[0].lower() for match in first if match).most_common(20)),
    }


def _texts(records: list[dict]) -> dict[str, list[str]]:
    return {field: [whole_text(r, field) for r in records if r[field] or field != "input"] for field in FIELDS}


def _spread(lengths: list[int]) -> dict[str, float]:
    """Return statistics of lengths; zeros without any. Percentiles are lengths that occur: 90% are at most p90."""
    lengths = lengths or [0]
    median, p90, p99 = (int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 99))
    mean = round(sum(lengths) / len(lengths), 1)
    return {"min": min(lengths), "mean": mean, "median": median, "p90": p90, "p99": p99, "max": max(lengths)}


def _token_counter(name: str) -> Callable[[list[str]], list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise UserError(f"--tokenizer {name} cannot be loaded: {first_line(e)}") from None

    def count(texts: list[str]) -> list[int]:
        lengths: list[int] = []
        for start in range(0, len(texts), 1000):  # all at once took 2.6 GB for 52,000 long records
            lengths += map(len, tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"])
        return lengths

    return count


def lint(
    data_path: str,
    output_path: str | None = None,
    rejects_path: str | None = None,
    report_path: str | None = None,
    only: str | None = None,
    skip: str | None = None,
    strict: bool = False,
    fields: str | None = None,
) -> None:
    """Find records that should not be trained on, each with a class, a reason and the evidence.

    DATA_PATH is not changed. A record's number is its place in the file (of several files: among all records). The exit
    code is 0 even with findings; with --strict True it is then 1. The class no-full-stop is checked only if --only
    names it. All classes: empty-output, na-output, input-field, link, missing-input, empty-code, needs-media, nonsense,
    merged, chat-token, as-an-ai, error-text, label, chatter, echo, repetition, cut-off, no-full-stop, wrong-arithmetic,
    mojibake, stray-escape, duplicate, near-duplicate.

    Args:
        data_path: records to read: a file, a folder, several separated by commas, or a hub dataset.
        output_path: file for the records without a finding, in Alpaca's fields (JSON Lines if it ends in .jsonl).
        rejects_path: file for the others, each with its findings in a field "lint".
        report_path: file for the findings, as JSON Lines.
        only: classes to check, separated by commas.
        skip: classes to leave out, separated by commas.
        strict: exit with code 1 if there are findings.
        fields: field names of data in another format: instruction=question,output=answer.
    """
    _refuse_same_files(data_path=data_path, output_path=output_path, rejects_path=rejects_path, report_path=report_path)
    wanted = _classes("only", only) or set(CLASSES) - OPT_IN
    wanted -= _classes("skip", skip)
    numbered = _numbered(data_path, fields)
    records = list(numbered.values())
    findings = find(records, wanted, list(numbered))

    counts = Counter(finding["class"] for finding in findings)
    width = max(map(len, CLASSES))
    for name in CLASSES:
        if name in wanted:
            print(f"{name:<{width}}{counts[name]:>8,}   {CLASSES[name]}")
    for finding in findings[:20]:
        print(f"\nrecord {finding['record']}, {finding['class']}\n  {printable(finding['evidence'])}")
    bad = {finding["record"] for finding in findings}
    more = " (the first 20 above; --report_path writes all)" if len(findings) > 20 and not report_path else ""
    print(f"\n{counted(len(findings), 'finding')} in {len(bad):,} of {counted(len(records), 'record')}{more}")

    if output_path:
        write_records([record for number, record in numbered.items() if number not in bad], output_path)
        print(f"{counted(len(records) - len(bad), 'clean record')} in {output_path}")
    if rejects_path:
        reasons: dict[int, list] = {i: [] for i in sorted(bad)}
        for finding in findings:
            reasons[finding["record"]].append({key: finding[key] for key in ("class", "reason", "evidence")})
        write_records([numbered[i] | {"lint": found} for i, found in reasons.items()], rejects_path)
        print(f"{counted(len(bad), 'rejected record')} in {rejects_path}")
    if report_path:
        write_records(findings, report_path, lines=True)
    if strict and findings:
        sys.exit(1)


def _numbered(data_path: str, fields: str | None) -> dict[int, dict]:
    """Return records by number: their places in the file from 1; of several files, their places among all records."""
    rows, one = read_records(data_path, fields, answers=True), len(sources(data_path)) == 1
    return {int(place.split()[-1]) if one else i: record for i, (place, record) in enumerate(rows, 1)}


def _classes(flag: str, text: str | None) -> set[str]:
    names = {name.strip() for name in (text or "").split(",") if name.strip()}
    for name in sorted(names - set(CLASSES)):
        raise UserError(f"--{flag} {name!r} is not a class: choose from {', '.join(CLASSES)}")
    return names


def _refuse_same_files(**paths: str | None) -> None:
    seen: dict[str, str] = {}
    for name, path in paths.items():
        for file in files_of(path) if path and name == "data_path" else filter(None, [path]):
            if (other := seen.setdefault(os.path.realpath(file), name)) != name:
                raise UserError(f"--{name} and --{other} are the same file, {path}: give each its own")


def review(
    data_path: str,
    output_dir: str,
    model_name: str | None = None,
    rubric: str | None = None,
    min_score: int = 3,
    max_tokens: int = 2048,
    seed: int = 0,
    fields: str | None = None,
    requests: RequestSettings = RequestSettings(),  # noqa: B008  never changed
) -> None:
    """Have a model score each record by a rubric, at temperature 0, and drop or correct those with a low score.

    OUTPUT_DIR gets kept.json (unchanged, or with a corrected answer and the original one in a field "review"),
    dropped.jsonl, reviews.jsonl (what became of each record, and why) and report.json. DATA_PATH is not changed. A
    record without a readable review after three tries is neither kept nor dropped. Each reply is saved before it
    counts: after Ctrl-C, a crash or kill -9, run the same command to continue.

    Args:
        data_path: records to review: a file, a folder, several separated by commas, or a hub dataset.
        output_dir: folder for the four files.
        model_name: the reviewer's name on its server, or two separated by a comma: then the lower score counts, and the
            report has their agreement.
        rubric: file with the reviewer's prompt (default: configs/review/rubric.txt; the README there describes it).
        min_score: the lowest score, 1 to 5, with which a record is kept unchanged.
        max_tokens: the longest reply, in tokens; a reasoning model needs more.
        seed: sent with each request.
        fields: field names of data in another format: instruction=question,output=answer.
    """
    from alpaca.judging.review import marks, run  # the other tasks need no client

    models = [name.strip() for name in (model_name or "").split(",")]
    if not all(map(is_name, models)):
        raise UserError("--model_name must be a reviewer's name on its server, or two separated by a comma")
    if len(models) > 2:
        raise UserError(f"--model_name names {len(models)} reviewers: give one or two")
    if len(set(models)) < len(models):
        raise UserError(f"--model_name names {models[0]!r} twice: it would agree with itself")
    if len(models) > 1 and requests.offline:
        raise UserError("--batch_write and --batch_read are for one reviewer: name it alone")
    if not 1 <= min_score <= 5:
        raise UserError("--min_score must be 1 to 5, as scores are")
    if Path(output_dir).resolve() in [file.resolve().parent for file in files_of(data_path)]:
        raise UserError(f"--output_dir {output_dir} is the folder of the data: choose another one")
    asked, numbered = marks.Rubric(rubric or RUBRIC), _numbered(data_path, fields)
    run.review(numbered, models, asked, Path(output_dir), min_score, max_tokens, seed, requests)


def plot(data_path: str, output_dir: str, fields: str | None = None) -> None:
    """Plot what the instructions ask for, how long the records are, and how similar, into OUTPUT_DIR.

    Args:
        data_path: records to read: a file, a folder, several separated by commas, or a hub dataset.
        output_dir: folder for the PNG files and the HTML page.
        fields: field names of data in another format: instruction=question,output=answer.
    """
    from alpaca.data import plots  # the other tasks need neither matplotlib nor spaCy

    plots.plot(data_path, output_dir, fields)


def publish(
    data_path: str,
    output_dir: str,
    license: str | None = None,
    language: str | None = None,
    eval_fraction: float = 0.0,
    eval_data_path: str | None = None,
    report_path: str | None = None,
    fields: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Make a folder that others can load: Parquet, JSON Lines, and a dataset card (README.md) to complete.

    The card has the counts and lengths of stats, the findings of lint, and the questions of a datasheet; those that the
    figures do not answer are marked "To be answered by the publisher". Nothing is uploaded without --push.

    Args:
        data_path: records to publish: a file, a folder, several separated by commas, or a hub dataset.
        output_dir: folder to make, new or empty.
        license: the data's license, by the hub's name for it: cc-by-nc-4.0, cc-by-4.0, apache-2.0, …
        language: language codes of the records: en, or en,zh.
        eval_fraction: about this share becomes the split "test"; copies of a task stay together.
        eval_data_path: records for the split "test".
        report_path: the report.json that generate_instruction.py wrote next to the data, for the card.
        fields: field names of data in another format: instruction=question,output=answer.
        push: OWNER/NAME of the hub dataset to upload the folder to; created if it does not exist.
        private: whether a dataset created by --push is private.
    """
    from alpaca.data import publish as folders  # the other tasks need neither pyarrow nor the hub's client

    if eval_data_path and eval_fraction:
        raise UserError("--eval_data_path and --eval_fraction both set the split test: drop one of them")
    report = folders.read_report(report_path) if report_path else None
    output, paths = Path(output_dir).absolute(), [data_path, *filter(None, [eval_data_path])]
    splits = {name: folders.read(path, fields) for name, path in zip(("train", "test"), paths, strict=False)}
    records = [record for split in splits.values() for record in split]
    restricted = _restricted(records, paths)
    _check_license(license, restricted)
    folders.give_ids(records)
    if eval_fraction:
        splits = dict(zip(("train", "test"), folders.split(records, eval_fraction), strict=True))
        if not all(splits.values()):
            raise UserError(f"--eval_fraction {eval_fraction} of {len(records)} records leaves a split empty: try 0.1")
    facts = {"license": license, "restricted": restricted, "drawn": eval_fraction, "date": utc_now()[:10]}
    facts |= {"languages": re.findall(r"[\w-]+", language or ""), "address": push or output.name, "generator": report}
    inputs = [Path(part.strip()) for path in paths for part in path.split(",")]
    with new_folder(output, "--output_dir", [part for part in inputs if part.is_dir()]) as folder:
        schema = folders.columns(records)
        folders.write(folder, splits, schema)
        findings = find(records, set(CLASSES) - OPT_IN)
        card = folders.card(splits, schema, paths, findings, figures=figures(records), **facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
    for path in sorted(output.rglob("*.*")):
        print(f"{path.stat().st_size:>12,} bytes   {path.relative_to(output)}")
    left = counted(card.count(folders.OPEN), "question")
    print(f"{counted(len(records), 'record')} in {output_dir}; README.md leaves {left} to you: {folders.OPEN!r}")
    if push:
        print(f"uploading these files to {push}")
        print(f"published: {folders.upload(Path(output_dir), push, private)}")


def _restricted(records: list[dict], paths: list[str]) -> str:
    """Return which records must keep their license: those of Alpaca and of this project; "" for none."""
    parts = restricted_parts(records, [file for path in paths for file in files_of(path)])
    found = [f"{counted(count, 'record')} {'is' if count == 1 else 'are'} from {name}" for name, count in parts.items()]
    return f"{' and '.join(found)}, under CC BY-NC 4.0." if found else ""


def _check_license(license: str | None, restricted: str) -> None:
    names = SHIPPED_LICENSE if restricted else "cc-by-4.0, cc-by-nc-4.0, apache-2.0, …"
    if not license:
        raise UserError(f"{restricted} --license is missing: give the data's license ({names})".strip())
    if restricted and license != SHIPPED_LICENSE:
        cure = f"give --license {SHIPPED_LICENSE}, or remove those records"
        raise UserError(f"--license {license} is not possible: {restricted} Only its owners may change that: {cure}")
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license):
        raise UserError(f"--license {license!r} is not a name on the hub, in lower case without spaces: use {names}")


if __name__ == "__main__":
    cli.end_on_signals()
    cli.run_cli({"fetch": fetch, "stats": stats, "lint": lint, "review": review, "plot": plot, "publish": publish})
