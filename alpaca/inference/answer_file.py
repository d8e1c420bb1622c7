"""Answers a file of instructions: what a run has answered is on disk batch by batch, and a killed run goes on.

OUT.journal holds the answers while the run lasts. When all are there, OUT is written from it in the order of IN, by one
rename, and the journal goes. The batches are those of the whole file, whatever is answered already, so that a resumed
run computes what an uninterrupted one would.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from alpaca import UserError
from alpaca.common.files import read_text
from alpaca.common.journal import Journal, check_output
from alpaca.common.records import LIST_HINT, begins_a_list, jload, json_fault, write_answers
from alpaca.inference.adapters import base_of, is_adapter
from alpaca.inference.generate import Settings, longest_answer
from alpaca.inference.load import answer_batch, batches

LISTED = 5  # faults that are told one by one
ON_WITHOUT = " (--skip_errors goes on without it)"


@dataclass(frozen=True)
class Request:
    """One record of IN."""

    place: str  # "record 3" or "line 3"
    record: dict
    instruction: str
    input: str


def read_requests(path: str | os.PathLike, skip_errors: bool = False) -> tuple[list[Request], list[str]]:
    """The records of a JSON list, or of JSON Lines if the name ends in ``.jsonl``, and what was wrong with the others.

    A record has an "instruction" and may have an "input" (Alpaca, alpaca_eval), or has it in its only one of
    "instances" (self-instruct); other fields are kept.

    Args:
        path: the file.
        skip_errors: leave out what is malformed, instead of raising at the first.

    Raises:
        UserError: a file that cannot be read or holds no record; without ``skip_errors`` also a malformed one, with its
            number.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        entries = [(f"line {number}", line) for number, line in lines if line.strip()]
    else:
        entries = [(f"record {number}", record) for number, record in enumerate(jload(path), 1)]
    requests, faults = [], []
    for place, entry in entries:
        try:
            requests.append(_request(place, entry))
        except UserError as e:
            if not skip_errors:
                hint = LIST_HINT if begins_a_list(entry, place == "line 1") else ON_WITHOUT
                raise UserError(f"{path}, {place}: {e}{hint}") from None
            faults.append(f"{path}, {place}: {e}")
    if not requests and faults:
        raise UserError(f"all {len(faults):,} records are malformed, so that nothing can be answered; {faults[0]}")
    if not requests:
        raise UserError(f"{path} holds no instructions: give a file with at least one")
    return requests, faults


def _request(place: str, entry: str | dict) -> Request:
    if isinstance(entry, str):
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError) as e:
            raise UserError(f"malformed JSON, {json_fault(e)}") from None
    if not isinstance(entry, dict):
        raise UserError(f"a {type(entry).__name__} where an object was expected")
    instruction, input = entry.get("instruction"), entry.get("input")
    if input is None and "instances" in entry:
        instances = entry["instances"]
        if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
            raise UserError('"instances" must be a list of one object: give each a record of its own')
        input = instances[0].get("input")
    input = "" if input is None else input
    if not isinstance(instruction, str) or not instruction.strip() or not isinstance(input, str):
        raise UserError('needs a text "instruction", and "input" must be a text if it is there')
    try:
        (instruction + input).encode()
    except UnicodeEncodeError:
        raise UserError("holds half of a surrogate pair, which is no text") from None
    return Request(place, entry, instruction, input)


def answer_file(
    model,
    tokenizer,
    requests: list[Request],
    output_path: str | os.PathLike,
    to_ids: Callable[[list[Request]], list[list[int]]],
    settings: Settings,
    max_tokens: int,
    generator: str,
    identity: dict,
    skip_errors: bool = False,
    more: Callable[[], list[dict]] | None = None,
    finish_reason: bool = False,
) -> dict[str, int]:
    """Writes the requests' records with "output" and "generator" to ``output_path``, in their order.

    It is JSON Lines, or a JSON list when the name ends in ``.json``: alpaca_eval reads that. An instruction that
    does not fit the context gets "error" and no "output".

    Args:
        model: a causal model.
        tokenizer: its own.
        requests: from read_requests.
        output_path: the file to make.
        to_ids: the tokens of the requests' prompts.
        settings: how to sample; without a seed one is drawn, and kept for a resumed run.
        max_tokens: as in batches().
        generator: the model's name in the rows.
        identity: what else the answers depend on; a run that differs in it does not go on from this one's journal.
        skip_errors: whether an instruction that does not fit the context is passed over.
        more: called when all answers are there; gives what else goes into the row of each request.
        finish_reason: whether a row has "finish_reason", as a server tells it: "length" where the answer was cut off,
            else "stop".

    Returns:
        Counts: "answers", "earlier" (of them found in the journal), "tokens" (of this run's answers), "cut" (answers
        that reached max_new_tokens or the end of the context), "too_long".

    Raises:
        UserError: the file exists, another run's journal is there, or an instruction does not fit the context.
    """
    output_path, journal_path = check_output(output_path)
    prompts, errors = to_ids(requests), {}
    for number, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
        try:
            longest_answer(model, ids, settings.max_new_tokens)
        except UserError as e:
            if not skip_errors:
                raise UserError(f"{request.place}: {e}{ON_WITHOUT}") from None
            errors[number] = str(e)
    fitting = [number for number in range(len(requests)) if number not in errors]
    planned = batches([len(prompts[number]) for number in fitting], settings.max_new_tokens, max_tokens)
    content = hashlib.sha256(json.dumps([asdict(request) for request in requests], sort_keys=True).encode()).hexdigest()
    identity = identity | {"requests": content, "batch_tokens": max_tokens}
    with Journal(journal_path) as journal:
        settings = _with_seed(journal, settings)
        journal.begin(identity | asdict(settings))
        answered = {entry["row"]: entry for entry in journal.entries[1:]}
        counts = {"answers": len(fitting), "earlier": len(answered), "too_long": len(errors)}
        started, new = time.monotonic(), 0
        interval = 0.5 if sys.stderr.isatty() else 30  # a file would fill with it
        due = started + interval
        with tqdm(total=len(fitting), initial=len(answered), unit="answer", mininterval=interval) as bar:

            def count(tokens: int) -> None:
                nonlocal new, due
                new += tokens
                if time.monotonic() >= due:
                    due = time.monotonic() + interval
                    bar.set_postfix_str(f"{new / (time.monotonic() - started):,.0f} tokens/s")

            for batch in planned:
                rows = [fitting[place] for place in batch]
                if all(row in answered for row in rows):
                    continue
                try:
                    made = answer_batch(model, tokenizer, [prompts[row] for row in rows], settings, count)
                except KeyboardInterrupt:
                    print(f"\nthe same command goes on: the answers are in {journal_path}", file=sys.stderr)
                    raise
                entries = [
                    {"row": row, "output": text.strip(), "tokens": tokens, "cut": cut}
                    for row, (text, tokens, cut) in zip(rows, made, strict=True)
                    if row not in answered  # of a batch whose end was torn off
                ]
                journal.append(entries)
                answered |= {entry["row"]: entry for entry in entries}
                bar.update(len(entries))
        counts |= {"tokens": new, "cut": sum(entry["cut"] for entry in answered.values())}
        fields = more() if more else [{} for _ in requests]
        if finish_reason:
            for row, entry in answered.items():
                fields[row]["finish_reason"] = "length" if entry["cut"] else "stop"
        _write(output_path, requests, answered, errors, generator, fields)
        journal_path.unlink()
    return counts


def _with_seed(journal: Journal, settings: Settings) -> Settings:
    """The settings with a seed: the one that is given, that of the run that the journal is of, or a new one."""
    if settings.seed is not None:
        return settings
    begun = journal.entries[0].get("run", {}) if journal.entries else {}
    return replace(settings, seed=begun.get("seed", random.SystemRandom().getrandbits(48)))


def _write(path: Path, requests: list[Request], answered: dict, errors: dict, generator: str, more: list[dict]) -> None:
    rows = [
        {key: value for key, value in request.record.items() if key != "error"}  # that of an earlier run
        | {"output": answered[row]["output"], "generator": generator}
        if row in answered
        else {key: value for key, value in request.record.items() if key != "output"} | {"error": errors[row]}
        for row, request in enumerate(requests)
    ]
    write_answers([row | fields for row, fields in zip(rows, more, strict=True)], path)


def identity_of(model_path: str, base_path: str | None, template: str) -> dict:
    """What answers depend on besides the settings: the model, its base if it is a LoRA adapter, and the template."""
    identity = {"model_path": model_path, "model": weights_state(model_path), "template": template}
    if is_adapter(model_path):
        base = base_of(Path(model_path), base_path)
        identity |= {"base_path": base, "base": weights_state(base)}
    return identity


def name_of(model_path: str) -> str:
    """What a model is called in its rows: its folder's own name, or the hub's."""
    return Path(model_path).resolve().name if Path(model_path).exists() else model_path


def weights_state(path: str | os.PathLike) -> str | None:
    """A digest of names, sizes and times of the files in a local folder; None for a hub name.

    A model that was trained anew in the same folder must not finish what another began.
    """
    if not Path(path).is_dir():
        return None
    files = sorted(file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".jinja"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def told(faults: list[str]) -> list[str]:
    """The first of the faults, and how many more there are."""
    more = [f"… and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
    return faults[:LISTED] + more
