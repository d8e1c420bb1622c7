"""Compares models blind on an instruction set, in stages that each write a file: answer → judge → report.

Answer with a local model (or LoRA adapter), and with a model on any OpenAI-compatible server:

    python judge.py answer --instructions user_oriented_instructions.jsonl --model_path DIR --output_path ours.jsonl
    python judge.py answer --instructions user_oriented_instructions.jsonl --model_name MODEL --output_path theirs.jsonl

A judge model sees each pair twice, in both orders:

    python judge.py judge --instructions user_oriented_instructions.jsonl --answers ours.jsonl,theirs.jsonl --model_name MODEL --output_path judged.jsonl

People can judge too, in a browser (pip install -e '.[web]'):

    python judge.py people --instructions user_oriented_instructions.jsonl --answers ours.jsonl,theirs.jsonl --output_path votes.jsonl

Report who wins, and whether by more than chance:

    python judge.py report --instructions user_oriented_instructions.jsonl --answers ours.jsonl,theirs.jsonl --judgments judged.jsonl,votes.jsonl --output_dir report

Published answers work too: Self-Instruct's *_predictions.jsonl, alpaca_eval's model_outputs.json.

The instructions are Self-Instruct's 252, AlpacaEval's, or any data that train.py reads. Each reply is saved in
OUT.journal before it counts: after Ctrl-C, a crash or kill -9 the same command continues, and requests nothing twice.
"""  # noqa: E501

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import utils
from alpaca import UserError
from alpaca.common.cli import end_on_signals, run_cli
from alpaca.common.journal import Journal, check_output
from alpaca.common.records import files_of, title, write_records
from alpaca.common.shapes import has_several_turns
from alpaca.common.text import counted, in_brackets, public_name
from alpaca.data.instruction_sets import is_the_252, read_answers, read_pair, read_set
from alpaca.endpoint.budget import Budget, RequestSettings
from alpaca.endpoint.client import THOUGHT, Answerer, Completion, OpenAIDecodingArguments, Talk
from alpaca.endpoint.parallel import ask_each, summarize
from alpaca.judging import prompt as judge_prompt

STOP = ["\n### Instruction:"]  # a base model would write the next one, and answer it too
PROMPT = Path(__file__).parent / "configs" / "judge" / "pairwise.txt"
TEMPLATES = {
    "alpaca": "Alpaca's prompt (--template chat is the model's own)",
    "chat": "the model's own (--template alpaca is Alpaca's prompt)",
}
EXAMPLES = 5  # of the clearest wins, and of the clearest losses


@dataclass(frozen=True)
class LocalModel:
    """How a model on this machine answers.

    Args:
        template: of a local model: alpaca, or chat for its own chat template (default: the one that train.py trained it
            with; alpaca for any other model, such as an untrained base).
        reference_loss: also write a local model's loss on the set's reference answers, in nats per token, and the
            number of tokens.
        base_path: folder of a LoRA adapter's base model, if it has moved.
        device: of a local model: cpu, cuda, mps, … (default: the accelerator if there is one).
        dtype: of a local model: float32, bfloat16 or float16 (default: depends on the device).
        batch_tokens: of a local model: the most tokens in a batch, prompts and answers together.
    """

    template: str | None = None
    reference_loss: bool = False
    base_path: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch_tokens: int = 16384


def answer(
    instructions: str,
    output_path: str,
    model_path: str | None = None,
    model_name: str | None = None,
    generator: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    local: LocalModel = LocalModel(),  # noqa: B008  never changed
    api: str = "chat",
    fields: str | None = None,
    requests: RequestSettings = RequestSettings(),  # noqa: B008
) -> None:
    """Answer an instruction set with a local model (--model_path) or one on a server (--model_name).

    Each row of OUTPUT_PATH has "id", "instruction", "input", "output", "finish_reason" ("length": it was cut off) and
    "generator"; a row without an answer has "error" in place of "output". Decoding is greedy by default.

    Args:
        instructions: the set: Self-Instruct's 252, AlpacaEval's, or any data that train.py reads.
        output_path: file for the answers: JSON Lines, or, if it ends in .json, a list for alpaca_eval, with the input
            after the instruction under "### Input:".
        model_path: folder of a local model or LoRA adapter.
        model_name: the model's name on its server.
        generator: the model's name in the rows (default: the folder's name, or --model_name).
        max_new_tokens: the longest answer, in tokens.
        temperature: sampling temperature; 0 is greedy.
        top_p: nucleus sampling: the share of probability to sample from.
        seed: makes sampling repeatable, as far as the server can.
        api: of a server: chat sends the instruction, with the input after it under "### Input:"; completions lets the
            model continue Alpaca's prompt.
        fields: field names of a set in another format: instruction=question,output=answer.
    """
    if (model_path is None) == (model_name is None):
        raise UserError("give either --model_path (a folder) or --model_name (on a server)")
    if model_name is not None and local != LocalModel():
        flags = ", ".join(f"--{name}" for name in asdict(local))
        raise UserError(f"{flags} need --model_path, a local model")
    if model_path is not None and (requests.base_url or api != "chat" or requests.batched):
        raise UserError("--base_url, --api and --batch need --model_name, a model on a server")
    if local.template not in (None, "alpaca", "chat"):
        raise UserError(f"--template must be alpaca or chat, not {local.template!r}")
    if local.batch_tokens < 1:
        raise UserError("--batch_tokens must be at least 1")
    items = read_set(instructions, fields)
    check_output(output_path)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if model_path is not None:
        _answer_here(items, output_path, model_path, generator, sampling, local)
    else:
        _answer_there(items, output_path, model_name, generator or model_name, api, requests, **sampling)


def _answer_there(items, output_path, model_name, generator, api, requests, max_new_tokens, temperature, top_p, seed):
    """Answer with a model on a server."""
    output, journal_path = check_output(output_path)
    decoding = OpenAIDecodingArguments(max_new_tokens, temperature, top_p, STOP if api == "completions" else None)
    teacher, budget = Answerer(model_name, decoding, api, requests), Budget(requests)
    if api == "chat":
        prompts = [Talk(item.task, item.messages) if item.messages else item.task for item in items]
    elif talks := sum(map(has_several_turns, map(vars, items))):
        talks = counted(talks, "conversation")
        raise UserError(f"--api completions cannot send {talks} of several turns: use --api chat")
    else:
        prompts = [utils.format_prompt(item.instruction, item.input) for item in items]
    run = {"task": "answer", "model_name": model_name, "api": api, "seed": seed, "prompts": _digest(prompts)}
    run |= {"extra_body": requests.extra} if requests.extra else {}
    with Journal(journal_path) as journal:
        journal.begin(run | asdict(decoding))
        replies = ask_each(teacher, prompts, seed, journal, budget)
    pairs = zip(items, replies, strict=True)
    rows = [item.row(output) | _answered(reply) | {"generator": generator} for item, reply in pairs]
    if output.suffix == ".json":  # alpaca_eval would read a row without an answer as "nan"
        rows = [row for row in rows if "output" in row]
    write_records(rows, output, lines=output.suffix != ".json")
    notes = [(sum(row.get("finish_reason") == "length" for row in rows), "cut off at --max_new_tokens")]
    notes += [(sum(row.get("output") == "" for row in rows), "empty, and counted as answers")]
    thought = sum(THOUGHT in row.get("error", "") for row in rows)
    notes += [(thought, "only thoughts: raise --max_new_tokens, and choose another --output_path")]
    summarize(f"{counted(sum('output' in row for row in rows), 'answer')} in {output}", replies, budget, journal, notes)


def _answered(reply: Completion | None) -> dict:
    """Return the fields that a server's reply adds to an item's row."""
    if reply is None or reply.text is None:
        return {"error": reply.error if reply else "not asked"}
    changed = {"changed_settings": reply.changed} if reply.changed else {}
    return {"output": reply.text.strip(), "finish_reason": reply.finish_reason, "model": reply.model} | changed


def _answer_here(items, output_path, model_path, generator, sampling, local):
    """Answer with a model on this machine, as chat.py --batch_path does."""
    # torch and transformers take seconds to load: check the flags first
    from transformers.utils import logging

    from alpaca.chat_template import saved_template
    from alpaca.inference import answer_file as answers
    from alpaca.inference.generate import Settings
    from alpaca.inference.load import load

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    settings = Settings(**sampling)
    identity = answers.identity_of(model_path, local.base_path)
    model, tokenizer = load(model_path, device=local.device, dtype=local.dtype, base_path=local.base_path)
    template = local.template or saved_template(tokenizer)
    print(f"template: {TEMPLATES[template]}")
    requests = [answers.Request(f"id {i.id}", i.row(output_path), i.instruction, i.input, i.messages) for i in items]
    losses = partial(_reference_fields, model, tokenizer, template, items) if local.reference_loss else None
    run = model, tokenizer, requests, output_path, template, settings, local.batch_tokens
    name = generator or public_name(model_path)
    counts = answers.answer_file(*run, name, identity, skip_errors=True, more=losses)
    notes = [(counts["earlier"], "from an earlier run")]
    notes += [(counts["cut"], "cut off at --max_new_tokens or the end of the context")]
    notes += [(counts["too_long"], 'too long for the context: "error" in their rows')]
    notes += [(counts["unended"], 'did not stop thinking: raise --max_new_tokens ("error" in their rows)')]
    notes += [(counts["examples"], "of several turns: in Alpaca's template the earlier ones are examples")]
    print(f"{counted(counts['answers'], 'answer')} in {output_path}" + in_brackets(notes))


def _reference_fields(model, tokenizer, template, items) -> list[dict]:
    """Return {"reference_loss", "reference_tokens"} of each item, or {} if it has no reference to score."""
    from alpaca.training.evaluate import reference_losses

    known = [item for item in items if item.reference]
    records = [vars(item) | {"output": item.reference} for item in known]
    for record in records:
        if record["messages"]:
            record["messages"] = [*record["messages"], {"role": "assistant", "content": record["output"]}]
    scores = zip(known, reference_losses(model, tokenizer, records, template), strict=True)
    found = {item.id: {"reference_loss": score[0], "reference_tokens": score[1]} for item, score in scores if score}
    return [found.get(item.id, {}) for item in items]


def judge(
    instructions: str,
    answers: str,
    output_path: str,
    model_name: str | None = None,
    prompt: str | None = None,
    max_tokens: int = 1024,
    seed: int = 0,
    fields: str | None = None,
    requests: RequestSettings = RequestSettings(),  # noqa: B008  never changed
) -> None:
    """Have a model compare two files of answers, each pair in both orders, at temperature 0.

    OUTPUT_PATH gets a row per request: who was shown first, what the judge preferred and said, its model, prompt and
    settings. A reply without a verdict is requested twice more, and then fails. Equal answers are a tie, not sent.

    Args:
        instructions: the set that was answered.
        answers: the two files: A.jsonl,B.jsonl.
        output_path: file for the judgments, as JSON Lines.
        model_name: the judge's name on its server.
        prompt: file with the judge's prompt (default: configs/judge/pairwise.txt; see configs/judge/README.md).
        max_tokens: the longest reply, in tokens; a reasoning model needs more.
        seed: sent with each request.
        fields: see the task answer.
    """
    if output_path.endswith(".json"):
        raise UserError("--output_path must end in .jsonl: judgments are JSON Lines")
    output, journal_path = check_output(output_path)
    items, (a, b) = read_pair(instructions, answers, fields)
    text, prompt_sha256 = judge_prompt.read_prompt(PROMPT if prompt is None else prompt)
    decoding = OpenAIDecodingArguments(max_tokens, temperature=0.0)
    teacher, budget = judge_prompt.Judge(model_name, decoding, "chat", requests), Budget(requests)
    both = [(item, [(one.generator, one.outputs.get(item.id)) for one in (a, b)]) for item in items]
    pairs = [(item, shown) for item, pair in both for shown in (pair, pair[::-1])]
    to_ask = [place for place, (_, shown) in enumerate(pairs) if judge_prompt.to_ask(shown)]
    prompts = [judge_prompt.fill(text, *pairs[place]) for place in to_ask]
    settings = {name: value for name, value in asdict(decoding).items() if value is not None} | {"seed": seed}
    run = {"task": "judge", "model_name": model_name, "prompt": prompt_sha256, "settings": settings}
    run |= {"extra_body": requests.extra} if requests.extra else {}
    shown = [{key: value for key, value in vars(item).items() if key != "messages"} for item in items]  # as texts
    run |= {"instructions": _digest(shown), "answers": _digest([a.outputs, b.outputs])}
    with Journal(journal_path) as journal:
        journal.begin(run | {"generators": [a.generator, b.generator]})
        replies = ask_each(teacher, prompts, seed, journal, budget)
    settings = {name: value for name, value in settings.items() if f"{name} left out" not in budget.changed}
    by = {"kind": "model", "name": model_name, "prompt_sha256": prompt_sha256}
    reply_to = dict(zip(to_ask, replies, strict=True))
    rows = []
    for place, (item, shown) in enumerate(pairs):
        reply = reply_to.get(place)
        if reply is None and place in reply_to:
            continue  # the run ended before this request
        fewer = {"max_tokens": reply.max_tokens} if reply and reply.max_tokens else {}  # than requested
        rows.append(judge_prompt.judgment(item, shown, by | {"settings": settings | fewer}, reply))
    write_records(rows, output, lines=True)
    notes = [(sum("note" in row for row in rows), "ties of equal answers, not asked")]
    cut = sum(row["error"] == judge_prompt.CUT_OFF for row in rows)
    notes += [(cut, "cut off: raise --max_tokens, and choose another --output_path")]
    summarize(f"{counted(len(rows), 'judgment')} in {output}", replies, budget, journal, notes)


def people(
    instructions: str,
    answers: str,
    output_path: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
    seed: int | None = None,
    fields: str | None = None,
) -> None:
    """Have people compare two files of answers on a web page that does not say which model wrote which.

    They enter a name, and choose by a key or a button. Votes are saved at once; the same command continues a run.

    Args:
        instructions: the set that was answered.
        answers: the two files: A.jsonl,B.jsonl.
        output_path: file for the votes, as JSON Lines in the format of the task judge.
        host: address to listen on; any address but this machine's own needs --auth.
        port: port to listen on; 0 picks a free one.
        auth: user:password to log in to the page (default: the variable ALPACA_AUTH, if it is set).
        seed: for the order of pairs and sides (default: random, so that no voter can guess it).
        fields: see the task answer.
    """
    items, pair = read_pair(instructions, answers, fields)
    from alpaca.judging import page as judge_page

    judge_page.serve(items, *pair, output_path, host, port, auth, seed)


def _digest(content) -> str:
    return judge_prompt.sha256(json.dumps(content, sort_keys=True))


def report(
    instructions: str,
    answers: str,
    output_dir: str,
    judgments: str | None = None,
    data_path: str | None = None,
    seed: int = 0,
    fields: str | None = None,
    data_fields: str | None = None,
) -> None:
    """Report who is better, and whether by more than chance: report.json, report.png and report.html in OUTPUT_DIR.

    Without judgments, the report has what needs no judge: ROUGE-L and the models' loss on the set's reference answers,
    and the overlap with training data.

    Args:
        instructions: the set that was answered.
        answers: files of answers, separated by commas: A.jsonl,B.jsonl. Wins are counted for A.
        output_dir: folder for the three files.
        judgments: files written by the tasks judge and people about A and B, separated by commas.
        data_path: training data to search for the instructions.
        seed: for the bootstrap intervals.
        fields: see the task answer.
        data_fields: the same for the training data.
    """
    # numpy, scipy and plotting: the other tasks do not need them
    from alpaca.common.files import check_writable
    from alpaca.data import rouge
    from alpaca.judging import metrics, overlap, report_text, statistics
    from alpaca.judging import report as report_page

    check_writable(output_dir, "--output_dir")
    items = read_set(instructions, fields)
    answerers = [read_answers(path, items) for path in _paths("answers", answers)]
    if len(set(names := [one.generator for one in answerers])) < len(names):
        raise UserError(f'--answers are by {", ".join(names)}: give each its own name ("generator" in its rows)')
    if judgments is not None and len(answerers) != 2:
        raise UserError(f"--judgments needs two files of --answers, not {len(answerers)}: give A.jsonl,B.jsonl")

    about = {"file": title(instructions), "items": len(items), "is_the_252": is_the_252(instructions)}
    about["without_reference"] = sum(item.reference is None for item in items)
    about["unseen_by_rouge"] = sum(rouge.is_mostly_unseen(item.reference or "") for item in items)
    found: dict = {"set": about, "judges": [], "agreement": None, "examples": [], "overlap": None, "seed": seed}
    found["answerers"], scores = metrics.summary(items, answerers, seed)
    if judgments is not None:
        found |= _judged(_paths("judgments", judgments), items, answerers, scores, seed)
    if data_path is not None:
        records = utils.load_records(data_path, data_fields)
        found["overlap"] = {"file": title(data_path)} | overlap.summary(items, records)
    files = {"set": instructions, "answers": answers, "data": data_path, "judgments": judgments}
    found |= report_page.made_from({kind: files_of(path) if path else [] for kind, path in files.items()})
    found["notes"] = report_text.notes(found, answerers)

    found = statistics.without_nan(found)
    print(report_text.terminal(found))
    for name in report_page.write(found, output_dir):
        print(f"wrote {Path(output_dir) / name}")


def _judged(paths, items, answerers, scores, seed) -> dict:
    """Return the figures of each judge, their agreement, and examples of clear wins."""
    from alpaca.judging import comparison, verdicts

    rows = verdicts.read_judgments(paths)
    asks = verdicts.read_asks(rows, *answerers)
    repeated = verdicts.repeated(rows, asks)
    judges, agreement, folded = comparison.judge_figures(asks, items, *answerers, seed)
    for figures in judges:
        figures["asked_with"] = verdicts.settings_of(rows, figures["judge"])
        figures["repeated"] = repeated[figures["judge"]]
    # ROUGE-L breaks ties between examples: it may confirm what a person or a model saw as a clear win.
    margins = {id: scores[0][id] - scores[1][id] for id in scores[0] if id in scores[1]}
    clear = comparison.examples(folded, items, *answerers, margins, EXAMPLES)
    return {"judges": judges, "agreement": agreement, "examples": clear}


def _paths(flag: str, text: str) -> list[str]:
    paths = [path.strip() for path in text.split(",")]
    if not all(paths):
        raise UserError(f"--{flag} {text!r} has a comma without a file: give A.jsonl,B.jsonl")
    return paths


if __name__ == "__main__":
    end_on_signals()
    run_cli({"answer": answer, "judge": judge, "people": people, "report": report})
