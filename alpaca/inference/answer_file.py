"""Answer a file of instructions; a killed run continues where it stopped.

OUT.journal holds the answers while the run lasts, on disk batch by batch. When it is complete, OUT is written from it
in the order of IN, by one rename, and the journal is removed. The batches are those of the whole file, whatever is
already answered, so that a resumed run computes what an uninterrupted one would.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from alpaca import UserError
from alpaca.chat_template import asked_of, saved_template
from alpaca.common.journal import Journal, check_output
from alpaca.common.records import read_records, write_records
from alpaca.common.shapes import has_several_turns, task_of
from alpaca.common.text import check_utf8, without_thoughts
from alpaca.inference.adapters import base_of, is_adapter
from alpaca.inference.chat import request_ids
from alpaca.inference.generate import Settings, answer_batch, batches, longest_answer

SKIP = " (skip_errors leaves it out)"
UNENDED = "no answer: thoughts without an end; allow more tokens"


@dataclass(frozen=True)
class Request:
    """One record of IN."""

    place: str  # "in.jsonl, line 3"
    record: dict
    instruction: str
    input: str
    messages: list[dict] | None = None  # of a conversation that these cannot hold, its question last


def read_requests(
    path: str | os.PathLike, skip_errors: bool = False, fields: str | None = None, say: Callable[[str], object] = print
) -> tuple[list[Request], list[str]]:
    """Return the requests that a path stands for (see read_records), and the faults of those that are left out.

    Raises:
        UserError: a file cannot be read or holds no record, or (without ``skip_errors``) a record is malformed.
    """
    requests, faults = [], []

    def on_fault(fault: str) -> None:
        if not skip_errors:
            raise UserError(fault + SKIP)
        faults.append(fault)

    for place, record in read_records(path, fields, say, on_fault=on_fault):
        try:
            instruction, input = task_of(record)
            messages = asked_of(record)
            check_utf8("".join([instruction, input, *(message["content"] for message in messages)]), "the text")
            requests.append(Request(place, record, instruction, input, messages if len(messages) > 1 else None))
        except UserError as e:
            on_fault(f"{place}: {e}")
    if not requests and faults:
        raise UserError(f"all {len(faults):,} records are malformed; {faults[0]}")
    return requests, faults


def answer_file(
    model,
    tokenizer,
    requests: list[Request],
    output_path: str | os.PathLike,
    template: str | None,
    settings: Settings,
    max_tokens: int,
    generator: str,
    identity: dict,
    skip_errors: bool = False,
    more: Callable[[], list[dict]] | None = None,
) -> dict[str, int]:
    """Write the requests' records with "output", "generator" and "finish_reason" to ``output_path``, in their order.

    It is JSON Lines, or a JSON list if the name ends in ``.json``. "finish_reason" is "length" for an answer that was
    cut off, else "stop". An instruction that does not fit the context gets "error" and no "output", and so does a reply
    whose thoughts do not end; thoughts before an answer are left out. "messages" get the answer at their end as well.

    Args:
        requests: from read_requests().
        template, max_tokens: see request_ids() and batches(); by default the template that the model was trained with.
        settings: how to sample; without a seed one is drawn, and kept for a resumed run.
        generator: the model's name in the rows.
        identity: what else the answers depend on (see identity_of); a journal that differs in it is refused.
        skip_errors: whether to pass over an instruction that does not fit the context; else it is a UserError.
        more: called when all answers are there; returns further fields for the row of each request.

    Returns:
        Counts: "answers", "earlier" (replies in the journal), "cut" (answers, at max_new_tokens or the context's end),
        "too_long" (instructions), "unended" (thoughts), "examples" (conversations in Alpaca's template).
    """
    output_path, journal_path = check_output(output_path)
    template = template or saved_template(tokenizer)
    prompts = request_ids(tokenizer, template, [vars(request) for request in requests])
    planned, errors = _plan(model, requests, prompts, settings, max_tokens, skip_errors)
    asked = _digest([(request.record, request.instruction, request.input) for request in requests])
    identity |= {"template": template, "requests": asked, "batch_tokens": max_tokens}
    identity |= {"dtype": str(model.dtype).removeprefix("torch.")}
    with Journal(journal_path) as journal:
        if settings.seed is None:
            begun = journal.entries[0].get("run", {}) if journal.entries else {}
            settings = replace(settings, seed=begun.get("seed", random.SystemRandom().getrandbits(48)))
        journal.begin(identity | asdict(settings))
        earlier = _answer_rest(model, tokenizer, prompts, planned, settings, journal)
        replies = {entry["row"]: entry for entry in journal.entries[1:]}
        rows = [_row(request, errors.get(i), replies.get(i), generator) for i, request in enumerate(requests)]
        if more:
            rows = [row | fields for row, fields in zip(rows, more(), strict=True)]
        write_records(rows, output_path, lines=output_path.suffix != ".json")
        journal_path.unlink()
    answers = [row for row in rows if "output" in row]
    return {
        "answers": len(answers),
        "earlier": earlier,
        "cut": sum(row["finish_reason"] == "length" for row in answers),
        "too_long": len(errors),
        "unended": len(rows) - len(answers) - len(errors),
        "examples": (template == "alpaca") * sum(has_several_turns(vars(request)) for request in requests),
    }


def _plan(model, requests: list[Request], prompts, settings: Settings, max_tokens: int, skip_errors: bool):
    """Return batches of the prompts' places, and by place why a prompt is in none; raise that without skip_errors."""
    errors = {}
    for place, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
        try:
            longest_answer(model, ids, settings.max_new_tokens)
        except UserError as e:
            if not skip_errors:
                raise UserError(f"{request.place}: {e}{SKIP}") from None
            errors[place] = str(e)
    fitting = [place for place in range(len(prompts)) if place not in errors]
    made = batches([len(prompts[place]) for place in fitting], settings.max_new_tokens, max_tokens)
    return [[fitting[i] for i in batch] for batch in made], errors


def _answer_rest(model, tokenizer, prompts, planned, settings: Settings, journal: Journal) -> int:
    """Answer the planned batches that the journal has no replies to; return how many replies it had."""
    answered = {entry["row"] for entry in journal.entries[1:]}
    interval = 0.5 if sys.stderr.isatty() else 30  # s; a log file would fill with it
    bar = tqdm(total=sum(map(len, planned)), initial=len(answered), unit="answer", mininterval=interval, miniters=0)
    with bar:
        for rows in planned:
            if answered.issuperset(rows):
                continue
            ids = [prompts[row] for row in rows]
            try:
                answers = answer_batch(model, tokenizer, ids, settings, lambda _: bar.update(0))
            except KeyboardInterrupt:
                print(f"\nrun the same command to continue: the answers are in {journal.path}", file=sys.stderr)
                raise
            pairs = zip(rows, answers, strict=True)
            journal.append({"row": row, "output": answer.text, "cut": answer.cut} for row, answer in pairs)
            bar.update(len(rows))
    return len(answered)


def _row(request: Request, error: str | None, reply: dict | None, generator: str) -> dict:
    """Return a request's record with the reply to it, or with the error that it has instead."""
    text = without_thoughts(reply["output"]) if reply else None
    if text is None:
        said, stale, turn = {"error": error or UNENDED}, "output", []
    else:
        ended = {"generator": generator, "finish_reason": "length" if reply["cut"] else "stop"}
        said, stale = {"output": text.strip()} | ended, "error"  # of an earlier run
        turn = [{"role": "assistant", "content": text.strip()}]
    if request.record.get("messages"):
        said["messages"] = [*asked_of(request.record), *turn]
    return {key: value for key, value in request.record.items() if key != stale} | said


def identity_of(model_path: str, base_path: str | None) -> dict:
    """Return what answers depend on besides settings and template: the model, and its base if it is an adapter."""
    identity = {"model_path": model_path, "model": weights_state(model_path)}
    if is_adapter(model_path):
        base = base_of(Path(model_path), base_path)
        identity |= {"base_path": base, "base": weights_state(base)}
    return identity


def weights_state(path: str | os.PathLike) -> str | None:
    """Return a digest of the names, sizes and times of a local folder's files; None for a hub name.

    A model that was retrained in the same folder must not finish what its predecessor began.
    """
    if not Path(path).is_dir():
        return None
    files = sorted(file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".jinja"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _digest(facts)[:16]


def _digest(data) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
