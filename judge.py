"""Compares models on an instruction set, blind, in stages that each leave a file: answer → judge → report.

Answers of a local model (or LoRA adapter), and of a model behind any OpenAI-compatible server:

    python judge.py answer --instructions user_oriented_instructions.jsonl --model_path DIR --output_path ours.jsonl
    python judge.py answer --instructions user_oriented_instructions.jsonl --model_name MODEL --output_path theirs.jsonl

A judge, by its server's name for it, sees each pair twice, with one answer first and with the other:

    python judge.py judge --instructions user_oriented_instructions.jsonl --answers ours.jsonl,theirs.jsonl --model_name MODEL --output_path judged.jsonl

People can judge as well, in a browser (pip install -e '.[web]'):

    python judge.py people --instructions user_oriented_instructions.jsonl --answers ours.jsonl,theirs.jsonl --output_path votes.jsonl

And what that comes to, by more than chance or not:

    python judge.py report --instructions user_oriented_instructions.jsonl --answers ours.jsonl,theirs.jsonl --judgments judged.jsonl,votes.jsonl --output_dir report

Answers that others have published do as well: Self-Instruct's *_predictions.jsonl, alpaca_eval's model_outputs.json.

The instructions are Self-Instruct's 252, AlpacaEval's, or any file in Alpaca's format. Every reply is on disk before it
counts (OUT.journal): after Ctrl-C, a crash or kill -9 the same command goes on, and asks for nothing twice.
"""  # noqa: E501

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import utils
from alpaca import UserError
from alpaca.common.cli import run_cli
from alpaca.common.journal import Journal, check_output
from alpaca.common.records import write_answers
from alpaca.data.instruction_sets import is_name, is_the_252, read_answers, read_pair, read_set
from alpaca.endpoint.asking import Answerer, ask_each, in_brackets, wind_up
from alpaca.endpoint.budget import Budget
from alpaca.endpoint.client import Completion, OpenAIDecodingArguments, Teacher
from alpaca.judging import prompt as judge_prompt

# A base model would write the next instruction, and answer that too.
STOP = ["\n### Instruction:"]
PROMPT = Path(__file__).parent / "configs" / "judge" / "pairwise.txt"
EXAMPLES = 5  # of the clearest wins, and of the clearest losses


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
    template: str = "alpaca",
    reference_loss: bool = False,
    base_path: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_tokens: int = 16384,
    api: str = "chat",
    base_url: str | None = None,
    max_concurrency: int = 32,
    request_timeout: float = 600.0,
    time_limit: float | None = None,
    max_total_tokens: int | None = None,
    max_cost_usd: float | None = None,
    prompt_price: float = 0.0,
    completion_price: float = 0.0,
    max_failure_rate: float = 0.5,
) -> None:
    """Answers an instruction set with a local model (--model_path) or one behind a server (--model_name).

    Each row of OUTPUT_PATH has "id", "instruction", "input", "output", "finish_reason" ("length": it was cut off) and
    "generator"; one that could not be answered has "error" and no "output". By default each model takes its likeliest
    token each time.

    Args:
        instructions: the set: Self-Instruct's 252, AlpacaEval's, or Alpaca's format; JSON, or JSON Lines.
        output_path: where the answers go: JSON Lines, or, if it ends in .json, a list for alpaca_eval, which has the
            input behind the instruction under "### Input:".
        model_path: the folder of a model, or of a LoRA adapter.
        model_name: a model by the name that its server knows.
        generator: the model's name in the rows (default: the folder's, or the server's name for it).
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 always takes the likeliest token.
        top_p: sample from the fewest tokens whose probabilities add up to this.
        seed: the same seed gives the same answers, at a server as far as it can.
        template: of a local model's prompt: alpaca, as in training, or chat, the model's own chat template.
        reference_loss: of a local model: each row also gets its loss on the set's reference, in nats a token, and the
            number of tokens.
        base_path: the base of a LoRA adapter, where it is not where the adapter says.
        device: of a local model: cpu, cuda, mps, … (default: the accelerator if there is one).
        dtype: of a local model: float32, bfloat16 or float16 (default: what suits the device).
        batch_tokens: of a local model: prompts and answers of a batch come to this many tokens at most.
        api: at a server: chat asks with the instruction, and the input behind it under "### Input:"; completions lets
            the model go on from Alpaca's prompt.
        base_url: the server, e.g. http://127.0.0.1:8000/v1 (default: OPENAI_BASE_URL, then api.openai.com).
        max_concurrency: requests in flight at once.
        request_timeout: seconds until a request is tried again (5 times at most, with growing pauses).
        time_limit: send nothing more after this many seconds.
        max_total_tokens: send nothing more when prompts and replies, earlier runs included, have used this many tokens.
        max_cost_usd: the same for a sum in dollars; needs the two prices.
        prompt_price: dollars for a million prompt tokens.
        completion_price: dollars for a million reply tokens.
        max_failure_rate: end the run when more than this share of its last 100 requests (10 at least) failed for good.
    """
    for wrong, message in (
        ((model_path is None) == (model_name is None), "give --model_path, a folder, or --model_name, at a server"),
        (model_name is not None and not is_name(model_name), "--model_name must be a name in one line"),
        (generator is not None and not is_name(generator), "--generator must be a name in one line"),
        (template not in ("alpaca", "chat"), f"--template takes alpaca or chat, not {template!r}"),
        (max_new_tokens < 1, "--max_new_tokens must be at least 1"),
        (batch_tokens < 1, "--batch_tokens must be at least 1"),
        (
            model_name is not None and (reference_loss or base_path or device or dtype or template != "alpaca"),
            "--reference_loss, --base_path, --device, --dtype and --template are for --model_path, not a server",
        ),
        (
            model_path is not None and (base_url or api != "chat"),
            "--base_url and --api are for --model_name: a local model is asked without a server",
        ),
    ):
        if wrong:
            raise UserError(message)
    budget = Budget(time_limit, max_total_tokens, max_cost_usd, prompt_price, completion_price, max_failure_rate)
    items = read_set(instructions)
    output, journal_path = check_output(output_path)
    if model_path is not None:
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        loading = {"device": device, "dtype": dtype, "base_path": base_path}
        _answer_here(
            items, output_path, model_path, generator, template, sampling, loading, batch_tokens, reference_loss
        )
        return
    decoding = OpenAIDecodingArguments(max_new_tokens, temperature, top_p, STOP if api == "completions" else None)
    teacher = Teacher(model_name, decoding, api, base_url, request_timeout, max_concurrency, budget.empty_retries())
    prompts = [item.task if api == "chat" else utils.format_prompt(item.instruction, item.input) for item in items]
    run = {"task": "answer", "model_name": model_name, "api": api, "seed": seed, "prompts": _digest(prompts)}
    with Journal(journal_path) as journal:
        journal.begin(run | asdict(decoding))
        replies = ask_each(Answerer(teacher), prompts, seed, journal, budget, max_new_tokens, max_concurrency, "answer")
    pairs = zip(items, replies, strict=True)
    rows = [item.row(output) | _answered(reply) | {"generator": generator or model_name} for item, reply in pairs]
    if output.suffix == ".json":  # alpaca_eval would take a row without an answer for one that says "nan"
        rows = [row for row in rows if "output" in row]
    write_answers(rows, output)
    notes = [(sum(row.get("finish_reason") == "length" for row in rows), "cut off at --max_new_tokens")]
    notes += [(sum(row.get("output") == "" for row in rows), "empty, and counted as answers")]
    wind_up(journal_path, f"{sum('output' in row for row in rows):,} answers in {output}", replies, budget, notes)


def _answered(reply: Completion | None) -> dict:
    """The fields that a server's reply adds to an item's row."""
    if reply is None or reply.text is None:
        return {"error": reply.error if reply else "not asked"}
    return {"output": reply.text.strip(), "finish_reason": reply.finish_reason, "model": reply.model}


def _answer_here(items, output_path, model_path, generator, template, sampling, loading, batch_tokens, reference_loss):
    """Answers with a model that is loaded for it, as chat.py --batch_path does."""
    # torch and transformers take seconds to load: not before the flags are known good
    from transformers.utils import logging

    from alpaca.inference import answer_file as answers
    from alpaca.inference import load as inference

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    settings = inference.Settings(**sampling)
    identity = answers.identity_of(model_path, loading["base_path"], template)
    model, tokenizer = inference.load(model_path, **loading)
    counts = answers.answer_file(
        model,
        tokenizer,
        [answers.Request(f"id {i.id}", i.row(output_path), i.instruction, i.input) for i in items],
        output_path,
        lambda requests: inference.request_ids(tokenizer, template, [(r.instruction, r.input) for r in requests]),
        settings,
        batch_tokens,
        generator or answers.name_of(model_path),
        identity | {"dtype": str(model.dtype).removeprefix("torch.")},
        skip_errors=True,
        more=(lambda: _reference_fields(model, tokenizer, items)) if reference_loss else None,
        finish_reason=True,
    )
    notes = [(counts["earlier"], "of an earlier run")]
    notes += [(counts["cut"], "cut off at --max_new_tokens or the context's end")]
    notes += [(counts["too_long"], 'instructions do not fit the context: "error" in their rows')]
    print(f"{counts['answers']:,} answers in {output_path}" + in_brackets(notes))


def _reference_fields(model, tokenizer, items) -> list[dict]:
    """{"reference_loss", "reference_tokens"} of each item, or {} for one without a reference that could be scored."""
    from alpaca.training.evaluate import reference_losses

    known = [item for item in items if item.reference]
    records = [{"instruction": item.instruction, "input": item.input, "output": item.reference} for item in known]
    scores = reference_losses(model, tokenizer, records)
    scored = {item.id: score for item, score in zip(known, scores, strict=True) if score}
    return [
        dict(zip(("reference_loss", "reference_tokens"), scored[item.id], strict=True)) if item.id in scored else {}
        for item in items
    ]


def judge(
    instructions: str,
    answers: str,
    output_path: str,
    model_name: str | None = None,
    prompt: str | None = None,
    max_tokens: int = 1024,
    seed: int = 0,
    base_url: str | None = None,
    max_concurrency: int = 32,
    request_timeout: float = 600.0,
    time_limit: float | None = None,
    max_total_tokens: int | None = None,
    max_cost_usd: float | None = None,
    prompt_price: float = 0.0,
    completion_price: float = 0.0,
    max_failure_rate: float = 0.5,
) -> None:
    """Has a model compare two files of answers, each pair in both orders, at temperature 0.

    OUTPUT_PATH gets a row for each time that it was asked: who was shown first, what it preferred and said, which model
    answered by which prompt and settings. A reply without a verdict is asked for again twice, and then is a failure,
    never a tie. Two equal answers are a tie without being asked about.

    Args:
        instructions: the set that was answered.
        answers: the two files, A.jsonl,B.jsonl.
        output_path: where the judgments go, as JSON Lines.
        model_name: the judge, by the name that its server knows.
        prompt: a file of what it is asked, by default configs/judge/pairwise.txt; the README there says what is in it.
        max_tokens: the longest reply, in tokens; a model that thinks first needs more.
        seed: given with each request.
        base_url: the server, e.g. http://127.0.0.1:8000/v1 (default: OPENAI_BASE_URL, then api.openai.com).
        max_concurrency: requests in flight at once.
        request_timeout: seconds until a request is tried again (5 times at most, with growing pauses).
        time_limit: send nothing more after this many seconds.
        max_total_tokens: send nothing more when prompts and replies, earlier runs included, have used this many tokens.
        max_cost_usd: the same for a sum in dollars; needs the two prices.
        prompt_price: dollars for a million prompt tokens.
        completion_price: dollars for a million reply tokens.
        max_failure_rate: end the run when more than this share of its last 100 requests (10 at least) failed for good.
    """
    for wrong, message in (
        (not model_name, "no judge named: --model_name takes the name that its server knows"),
        (not is_name(model_name), f"--model_name must be a name in one line, not {model_name!r}"),
        (max_tokens < 1, "--max_tokens must be at least 1"),
        (output_path.endswith(".json"), "--output_path takes a name that ends in .jsonl: judgments are JSON Lines"),
    ):
        if wrong:
            raise UserError(message)
    budget = Budget(time_limit, max_total_tokens, max_cost_usd, prompt_price, completion_price, max_failure_rate)
    output, journal_path = check_output(output_path)
    items, (a, b) = read_pair(instructions, answers)
    text, prompt_sha256 = judge_prompt.read_prompt(PROMPT if prompt is None else prompt)
    decoding = OpenAIDecodingArguments(max_tokens, temperature=0.0)
    teacher = Teacher(model_name, decoding, "chat", base_url, request_timeout, max_concurrency, budget.empty_retries())
    orders = [(item, shown) for item in items for shown in ((a, b), (b, a))]
    pairs = [(item, [(one.generator, one.outputs.get(item.id)) for one in shown]) for item, shown in orders]
    to_ask = [place for place, (_, shown) in enumerate(pairs) if judge_prompt.to_ask(shown)]
    prompts = [judge_prompt.fill(text, *pairs[place]) for place in to_ask]
    settings = {name: value for name, value in asdict(decoding).items() if value is not None} | {"seed": seed}
    run = {"task": "judge", "model_name": model_name, "prompt": prompt_sha256, "settings": settings}
    run |= {"instructions": _digest([asdict(item) for item in items]), "answers": _digest([a.outputs, b.outputs])}
    with Journal(journal_path) as journal:
        journal.begin(run | {"generators": [a.generator, b.generator]})
        asked = judge_prompt.Judge(teacher)
        replies = ask_each(asked, prompts, seed, journal, budget, max_tokens, max_concurrency, "judgment")
    left_out = {name for reply in replies if reply for name in reply.left_out or ()}
    settings = {name: value for name, value in settings.items() if name not in left_out}
    by = {"kind": "model", "name": model_name, "prompt_sha256": prompt_sha256}
    reply_to = dict(zip(to_ask, replies, strict=True))
    rows = []
    for place, (item, shown) in enumerate(pairs):
        reply = reply_to.get(place)
        if reply is None and place in reply_to:
            continue  # the run ended before
        fewer = {"max_tokens": reply.max_tokens} if reply and reply.max_tokens else {}  # than the flag says
        rows.append(judge_prompt.judgment(item, shown, by | {"settings": settings | fewer}, reply))
    write_answers(rows, output)
    equal = sum("note" in row for row in rows)
    notes = [(equal, "for equal answers, which are a tie unasked")]
    wind_up(journal_path, f"{len(rows):,} judgments in {output}", replies, budget, notes)


def people(
    instructions: str,
    answers: str,
    output_path: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
    seed: int | None = None,
) -> None:
    """Has people compare two files of answers on a page that does not say whose they are.

    Each gives a name, and chooses by a key or a button; votes are on disk at once, and the same command goes on.

    Args:
        instructions: the set that was answered.
        answers: the two files, A.jsonl,B.jsonl.
        output_path: where the votes go, as JSON Lines like the task judge's.
        host: the address to listen at; any but this machine's own needs --auth.
        port: 0 takes a free one.
        auth: user:password, which the page then asks for.
        seed: of the order of the pairs and of the sides (default: drawn, which no voter can guess).
    """
    items, pair = read_pair(instructions, answers)
    from alpaca.judging import page as judge_page

    judge_page.serve(items, *pair, output_path, host, port, auth, seed)


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# report


def report(
    instructions: str,
    answers: str,
    output_dir: str,
    judgments: str | None = None,
    data_path: str | None = None,
    seed: int = 0,
) -> None:
    """Says who is better, and whether by more than chance: report.json, report.png and report.html in OUTPUT_DIR.

    Without judgments it holds what needs no judge: ROUGE-L and the models' loss on the set's reference answers, and
    the overlap with training data.

    Args:
        instructions: the instruction set that was answered.
        answers: files of answers to it, with commas between: A.jsonl,B.jsonl. Wins are A's.
        output_dir: folder for the three files.
        judgments: files that the tasks judge and people wrote about A and B, with commas between.
        data_path: training data in Alpaca's format, to look for the instructions in it.
        seed: of the draws behind the bootstrap intervals.
    """
    # numpy, rapidfuzz and what draws: the other tasks do without
    from alpaca.data import rouge
    from alpaca.judging import comparison, metrics, overlap, report_text, verdicts
    from alpaca.judging import report as report_page

    report_page.check_output_dir(output_dir)
    items = read_set(instructions)
    answerers = [read_answers(path, items) for path in _paths("answers", answers)]
    names = [one.generator for one in answerers]
    if len(set(names)) < len(names):
        raise UserError(f'--answers are by {", ".join(names)}: give each another name ("generator" in its rows)')
    if judgments is not None and len(answerers) != 2:
        raise UserError(
            f"--judgments compare two answerers, and --answers names {len(answerers)}: give A.jsonl,B.jsonl"
        )

    found: dict = {
        "set": {
            "file": Path(instructions).name,
            "items": len(items),
            "is_the_252": is_the_252(instructions),
            "without_reference": sum(item.reference is None for item in items),
            "unseen_by_rouge": sum(rouge.is_mostly_unseen(item.reference or "") for item in items),
        },
        "judges": [],
        "agreement": None,
        "examples": [],
        "overlap": None,
        "seed": seed,
    }
    found["answerers"], scores = metrics.summary(items, answerers, seed)
    if judgments is not None:
        rows = verdicts.read_judgments(_paths("judgments", judgments))
        asks = verdicts.read_asks(rows, *answerers)
        repeated = verdicts.repeated(rows, asks)
        found["judges"], found["agreement"], folded = comparison.judge_figures(asks, items, *answerers, seed)
        for figures in found["judges"]:
            figures["asked_with"] = verdicts.settings_of(rows, figures["judge"])
            figures["repeated"] = repeated[figures["judge"]]
        # What a person or a model took for a clear win, ROUGE-L may bear out: it breaks ties between examples.
        margins = {id: scores[0][id] - scores[1][id] for id in scores[0] if id in scores[1]} if scores else {}
        found["examples"] = comparison.examples(folded, items, *answerers, margins, EXAMPLES)
    if data_path is not None:
        records = utils.load_records(data_path)
        found["overlap"] = {"file": Path(data_path).name} | overlap.summary(items, records)
    files = {"set": [instructions], "answers": _paths("answers", answers), "data": [data_path] if data_path else []}
    files["judgments"] = _paths("judgments", judgments) if judgments is not None else []
    found |= report_page.made_from(files)
    found["notes"] = report_text.notes(found, answerers, scores is None)

    found = comparison.without_nan(found)
    print(report_text.terminal(found))
    for name in report_page.write(found, output_dir):
        print(f"wrote {Path(output_dir) / name}")


def _paths(flag: str, text: str) -> list[str]:
    paths = [path.strip() for path in text.split(",")]
    if not all(paths):
        raise UserError(f"--{flag} {text!r} names no file beside a comma: give A.jsonl,B.jsonl")
    return paths


if __name__ == "__main__":
    run_cli({"answer": answer, "judge": judge, "people": people, "report": report})
