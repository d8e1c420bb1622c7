r"""Talks to a model that was trained with train.py, in the terminal, or answers a file of instructions.

python chat.py --model_path DIR
python chat.py --model_path DIR --template chat --temperature 0.7 --top_p 0.9
python chat.py --model_path DIR --instruction "Give three tips for staying healthy."
python chat.py --model_path DIR --instruction "Translate into French." --input "Good morning"
python chat.py --model_path DIR --batch_path IN.jsonl --output_path OUT.jsonl --temperature 0

As a page for the browser (the live demo): python chat.py --model_path DIR --web
"""

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import sys
from collections.abc import Callable
from contextlib import closing

from alpaca import UserError
from alpaca.common import cli

HELP = r'''Type an instruction. Each is answered on its own (with --template chat, turns are remembered).
  a line that ends in \ goes on in the next; a text of several lines stands between two """
  /input TEXT   what the next instruction is about, in one line or several
  /reset        forgets the input and the turns so far
  /help         this
  /quit         leaves, as Ctrl-D does; Ctrl-C stops an answer, twice it leaves'''
COMMANDS = ("/input", "/reset", "/help", "/?", "/quit", "/exit")
BATCH_TOKENS = 16384
FENCE = '"""'


def chat(
    model_path: str,
    instruction: str | None = None,
    input: str = "",
    batch_path: str | None = None,
    output_path: str | None = None,
    template: str = "alpaca",
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    base_path: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    skip_errors: bool = False,
    web: bool = False,
    compare_path: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
) -> None:
    """Answers instructions with a fine-tuned model: yours in the terminal, one on the command line, or those of a file.

    Args:
        model_path: the folder of the model, or of a LoRA adapter.
        instruction: answer this one and leave; the answer alone is on stdout.
        input: what the instruction is about, if that is apart.
        batch_path: answer the records of this file and leave: {"instruction", "input"}, as a JSON list or JSON Lines.
        output_path: where their answers go: the same records with "output" and "generator", in the same order; a JSON
            list, which alpaca_eval reads, if the name ends in .json, else JSON Lines. The same command goes on with a
            run that was killed.
        template: alpaca, the prompt of training, or chat, the model's own chat template, in which turns are remembered.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 always takes the likeliest token.
        top_p: sample from the fewest tokens whose probabilities add up to this.
        seed: the same seed gives the same prompt the same answer, alone or in a file.
        device: cpu, cuda, mps, … (default: the accelerator if there is one).
        dtype: float32, bfloat16 or float16 (default: what suits the device).
        base_path: the base of a LoRA adapter, where it is not where the adapter says.
        batch_tokens: prompts and answers of a batch come to this many tokens at most.
        skip_errors: go on without malformed records of the file, and without those that do not fit the context.
        web: serve a page, for this machine alone; max_new_tokens is then the most that a visitor can ask for.
        compare_path: with --web, a second model that answers the same instructions beside the first.
        host: with --web, the address to listen at; any but this machine's own needs --auth.
        port: with --web; 0 takes a free one.
        auth: with --web, user:password, which the page then asks for.
    """
    if web:
        if instruction is not None or batch_path is not None:
            raise UserError("--instruction and --batch_path answer and leave, --web serves a page: take one of them")
        if template != "alpaca" or input or output_path is not None or skip_errors or batch_tokens != BATCH_TOKENS:
            raise UserError(
                "--web asks with Alpaca's template what is typed there: drop --template, --input, --output_path, "
                "--skip_errors, --batch_tokens"
            )
        from alpaca.inference.web import page as demo

        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        return demo.serve(model_path, compare_path, host, port, auth, device, dtype, base_path, **sampling)
    if batch_path is None and (skip_errors or batch_tokens != BATCH_TOKENS):
        raise UserError("--skip_errors and --batch_tokens are for the records of a file: give --batch_path")
    if compare_path or auth or host != "127.0.0.1" or port != 7860:
        raise UserError("--compare_path, --host, --port and --auth are for the page: add --web")
    if instruction is not None and not instruction.strip():
        raise UserError("--instruction is empty")
    if instruction is not None and batch_path is not None:
        raise UserError("--instruction and --batch_path do not go together: give one of them")
    if batch_path is not None and input:
        raise UserError("--input goes with --instruction; the records of --batch_path have their own: drop it")
    if (batch_path is None) != (output_path is None):
        raise UserError("--batch_path, the instructions, and --output_path, their answers, go together: give both")
    if template not in ("alpaca", "chat"):
        raise UserError(f"--template {template} is not known: choose from alpaca, chat")
    if batch_tokens < 1:
        raise UserError("--batch_tokens must be at least 1")
    # torch and transformers take seconds to load: not before the flags are known good
    from transformers.utils import logging

    from alpaca.inference import answer_file
    from alpaca.inference import load as inference

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    settings = inference.Settings(max_new_tokens, temperature, top_p, seed)
    if batch_path is not None:
        requests, faults = answer_file.read_requests(batch_path, skip_errors)
        identity = answer_file.identity_of(model_path, base_path, template)
        answer_file.check_output(output_path)
    model, tokenizer = inference.load(model_path, device, dtype, base_path)
    if batch_path is not None:
        counts = answer_file.answer_file(
            model,
            tokenizer,
            requests,
            output_path,
            lambda requests: inference.request_ids(tokenizer, template, [(r.instruction, r.input) for r in requests]),
            settings,
            batch_tokens,
            generator=answer_file.name_of(model_path),
            identity=identity | {"dtype": str(model.dtype).removeprefix("torch.")},
            skip_errors=skip_errors,
        )
        report(output_path, counts, faults)
        return
    conversation = inference.Conversation(model, tokenizer, settings, template)
    if instruction is not None:
        answer(conversation, instruction, input)
    elif not talk(conversation, input):
        sys.exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# The terminal. Answers go to stdout; all else does too where that is a terminal, and to stderr where it is not.


def talk(conversation, input: str = "") -> bool:
    """Asks and answers until /quit, the end of stdin, or Ctrl-C twice; False if an answer failed."""
    interactive, good, interrupted = sys.stdin.isatty(), True, False
    if interactive:
        _prepare_terminal()
        say(HELP)
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            message = read_message(_ask if interactive else _next_line)
        except KeyboardInterrupt:
            if interrupted or not interactive:
                say("")
                return good
            interrupted = True
            say("\nCtrl-C again leaves")
            continue
        interrupted = False
        if message is None or message[0] in ("/quit", "/exit"):
            return good
        command, text = message
        if command == "/input":
            input = text
        elif command == "/reset":
            input = ""
            conversation.reset()
        elif command in ("/help", "/?"):
            say(HELP)
        elif text:
            try:
                answer(conversation, text, input)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                interrupted = True
                print(" [stopped]")
            except UserError as e:
                good = False
                print(f"error: {e}", file=sys.stderr)
            input = ""


def answer(conversation, instruction: str, input: str) -> None:
    """Prints an answer as it comes, to a terminal without the control characters that could rewrite what it shows."""
    terminal, empty = sys.stdout.isatty(), True
    with closing(conversation.ask(instruction, input)) as pieces:
        for piece in pieces:
            empty = empty and not piece.strip()
            print(cli.CONTROL.sub("", piece) if terminal else piece, end="", flush=True)
    print(flush=True)
    if conversation.cut:
        limit = "--max_new_tokens" if conversation.cut == "max_new_tokens" else "the end of the context"
        print(f"note: cut off at {limit}", file=sys.stderr, flush=True)
    elif empty:
        print("note: the answer is empty: the model ended at once", file=sys.stderr, flush=True)


def read_message(read_line: Callable[[str], str | None]) -> tuple[str, str] | None:
    r"""A command with its text, or ("", instruction); None at the end.

    A line that ends in \ goes on in the next. A text that begins with three quotes goes on to the next three, and no
    command is looked for in it.

    Args:
        read_line: gives the next line, asked for by the prompt that it gets, or None at the end.
    """
    line = read_line("> ")
    if line is None:
        return None
    head, fence, text = line.partition(FENCE)
    if fence and head.strip() in ("", "/input"):
        while FENCE not in text and (more := read_line("… ")) is not None:
            text += "\n" + more
        return head.strip(), text.partition(FENCE)[0].strip("\n")
    while line.endswith("\\"):
        more = read_line("… ")
        line = line[:-1] + ("" if more is None else "\n" + more)
    line = line.strip()
    command, *text = line.split(maxsplit=1) or [""]
    # A pasted text that begins with another command is not lost to it.
    known = command in COMMANDS and (command == "/input" or "\n" not in line)
    return (command, "".join(text)) if known else ("", line)


def say(text: str) -> None:
    print(text, file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)


def _next_line(prompt: str) -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _ask(prompt: str) -> str | None:
    try:
        if sys.stdout.isatty():
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # input() would write it among the answers
        return input()
    except EOFError:
        return None


def _prepare_terminal() -> None:
    """Line editing and history in input(); a pasted text of several lines is one message, not one for each line."""
    try:
        import readline
    except ImportError:  # Windows
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off


# ---------------------------------------------------------------------------------------------------------------------
# Files.


def report(output_path: str, counts: dict[str, int], faults: list[str]) -> None:
    """Says on stderr what a file's run came to."""
    from alpaca.inference import answer_file

    for line in answer_file.told(faults):
        print(f"left out: {line}", file=sys.stderr)
    notes = [
        f"{counts['earlier']:,} of an earlier run" * bool(counts["earlier"]),
        f"{counts['cut']:,} cut off at --max_new_tokens or the end of the context" * bool(counts["cut"]),
        f'{counts["too_long"]:,} instructions do not fit the context ("error" in their rows)'
        * bool(counts["too_long"]),
        f"{len(faults):,} malformed records left out" * bool(faults),
    ]
    notes = "; ".join(note for note in notes if note)
    print(f"{counts['answers']:,} answers in {output_path}" + (f" ({notes})" if notes else ""), file=sys.stderr)


if __name__ == "__main__":
    cli.run_cli(chat)
