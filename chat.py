r"""Talk to a model that was trained with train.py, in the terminal, or answer a file of instructions.

python chat.py --model_path DIR
python chat.py --model_path DIR --template chat --temperature 0.7 --top_p 0.9
python chat.py --model_path DIR --instruction "Give three tips for staying healthy."
python chat.py --model_path DIR --instruction "Translate into French." --input "Good morning"
python chat.py --model_path DIR --batch_path IN.jsonl --output_path OUT.jsonl --temperature 0

As a page for the browser (the live demo): python chat.py --model_path DIR --web
"""

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

from alpaca import UserError
from alpaca.common import cli
from alpaca.common.journal import check_output
from alpaca.common.text import counted, in_brackets, printable, public_name

HELP = r'''Type an instruction. {}
  \ at the end of a line continues it on the next; put a text of several lines between two """
  /input TEXT   what the next instruction is about, in one line or several
  /reset        forgets the input{}{}
  /temperature 0, /top_p 0.9, /max_new_tokens 200, /seed 1   change how answers are sampled
  /help         prints this
  /quit         leaves, like Ctrl-D; Ctrl-C stops an answer or clears the line, and leaves if pressed twice
An instruction that begins with / and a single word goes between two """'''
SYSTEM = "\n  /system TEXT  begins a new conversation with this system text, in one line or several"
ALONE = HELP.format("Each is answered on its own, without those before it.", "", "")
TURNS = HELP.format("The turns so far are remembered.", " and the turns so far", SYSTEM)
TEXTS = "/input", "/system"  # commands with a text of one line or several
COMMAND = re.compile(r"/[A-Za-z_]+|/\?")  # a path, "/etc/passwd", is an instruction
NUMBERS = {"/temperature": float, "/top_p": float, "/max_new_tokens": int, "/seed": int}
BATCH_TOKENS = 16384
FENCE = '"""'
LISTED = 5  # malformed records that are named one by one
PAGE_FLAGS = {"compare_path", "host", "port", "auth"}
FILE_FLAGS = {"output_path", "skip_errors", "batch_tokens", "fields"}
UNUSED = {  # by a page, by a file of instructions, and by the two others: one instruction, and the terminal
    "web": {"instruction", "batch_path", "input", "template"} | FILE_FLAGS,
    "batch_path": {"instruction", "input"} | PAGE_FLAGS,
    "": PAGE_FLAGS | FILE_FLAGS,
}


def chat(
    model_path: str,
    instruction: str | None = None,
    input: str = "",
    batch_path: str | None = None,
    output_path: str | None = None,
    template: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    base_path: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    skip_errors: bool = False,
    fields: str | None = None,
    web: bool = False,
    compare_path: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
) -> None:
    """Answer instructions with a fine-tuned model: yours in the terminal, one on the command line, or those of a file.

    Args:
        model_path: the folder of the model, or of a LoRA adapter.
        instruction: answer this one and exit; only the answer is on stdout.
        input: the text that the instruction is about, if there is one.
        batch_path: answer the instructions in this file and exit; any data that train.py reads, answers or not.
        output_path: where their answers go: the same records with "output", "generator" and "finish_reason" ("length"
            if it was cut off), in the same order; a JSON list, which alpaca_eval reads, if the name ends in .json, else
            JSON Lines. The same command continues a run that was killed.
        template: alpaca, the prompt of the original, or chat, the model's own chat template, in which turns are
            remembered (default: the one that the model was trained with).
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 always takes the likeliest token.
        top_p: sample from the fewest tokens whose probabilities add up to this.
        seed: the same seed gives the same prompt the same answer, alone or in a file.
        device: cpu, cuda, mps, … (default: the accelerator if there is one).
        dtype: float32, bfloat16 or float16 (default: what suits the device).
        base_path: the base of a LoRA adapter, if it is not where the adapter says.
        batch_tokens: the most tokens of a batch, prompts and answers together.
        skip_errors: leave out malformed records of the file, and those that do not fit the context.
        fields: of a file in an unknown format: instruction=question,input=context, with the names of its fields.
        web: serve a page, for this machine alone; max_new_tokens is then the most that a visitor can ask for.
        compare_path: with --web, a second model that answers the same instructions beside the first.
        host: with --web, the address to listen at; any but this machine's own needs --auth.
        port: with --web; 0 takes a free one.
        auth: with --web, user:password, which the page then asks for (default: the variable ALPACA_AUTH, if it is set).
    """
    flags = SimpleNamespace(**locals())
    check_flags(vars(flags))
    run(flags)


def run(flags: SimpleNamespace) -> None:
    """Do what chat()'s flags ask for: serve a page, answer a file or one instruction, or talk."""
    sampling = {name: getattr(flags, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    loading = flags.device, flags.dtype, flags.base_path
    if flags.web:
        from alpaca.inference.web import page

        exposed = flags.host, flags.port, flags.auth
        return page.serve(flags.model_path, flags.compare_path, *exposed, *loading, **sampling)
    # torch and transformers take seconds to load: not before the flags are known to be good
    from transformers.utils import logging

    from alpaca.inference.chat import Conversation
    from alpaca.inference.generate import Settings
    from alpaca.inference.load import load

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    settings = Settings(**sampling)
    if flags.batch_path is not None:
        return answer_records(flags, settings)
    conversation = Conversation(*load(flags.model_path, *loading), settings, flags.template)
    if flags.instruction is not None:
        answer(conversation, flags.instruction, flags.input)
    elif not talk(conversation, flags.input):
        sys.exit(1)


def check_flags(flags: dict) -> None:
    """Raise UserError for flags that do not go together, by which of them differ from chat()'s defaults."""
    parameters = inspect.signature(chat).parameters
    given = {name for name, value in flags.items() if value != parameters[name].default}
    way = next(way for way in UNUSED if way in given or not way)
    if unused := ", ".join(f"--{name}" for name in parameters if name in given & UNUSED[way]):
        needed = "--web" if given & PAGE_FLAGS else "--batch_path"
        raise UserError(f"--{way} does not use {unused}: drop it" if way else f"{unused} goes with {needed}: add that")
    if way == "batch_path" and "output_path" not in given:
        raise UserError("--batch_path needs --output_path, for the answers")
    if "instruction" in given and not flags["instruction"].strip():
        raise UserError("--instruction is empty")
    if flags["template"] not in (None, "alpaca", "chat"):
        raise UserError("--template must be alpaca or chat")
    if flags["batch_tokens"] < 1:
        raise UserError("--batch_tokens must be at least 1")


# ---------------------------------------------------------------------------------------------------------------------
# The terminal. Answers go to stdout, and so does everything else if that is a terminal; if not, to stderr.


class Cleared(Exception):
    """Ctrl-C has cleared what was typed."""


def talk(conversation, input: str = "") -> bool:
    """Ask and answer until /quit, the end of stdin, or Ctrl-C twice; return False if an answer or a command failed."""
    interactive, good, interrupted = sys.stdin.isatty(), True, False
    if interactive:
        _prepare_terminal()
        say(TURNS if conversation.template == "chat" else ALONE)
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            message = read_message(_ask if interactive else _next_line)
        except Cleared:
            interrupted = False
            continue
        except KeyboardInterrupt:
            if interrupted or not interactive:
                say("")
                return good
            interrupted = True
            say("\npress Ctrl-C again to leave")
            continue
        interrupted = False
        if message is None or message[0] in ("/quit", "/exit"):
            return good
        command, text = message
        try:
            if command == "/input":
                input = text
            elif command == "/reset":
                input = ""
                conversation.turns = []
            elif command:
                say(obey(conversation, command, text))
            elif text:
                try:
                    answer(conversation, text, input)
                finally:
                    input = ""
        except KeyboardInterrupt:
            if not interactive:
                raise
            interrupted = True
            print(" [stopped]")
        except UserError as e:
            good = False
            hint = " (/reset forgets the turns so far)" if conversation.turns and not command else ""
            say_error(f"error: {e}{hint}")


def obey(conversation, command: str, text: str) -> str:
    """Do what a command asks, and return what there is to say; raise UserError for one that is unknown or wrong."""
    if command in ("/help", "/?"):
        return TURNS if conversation.template == "chat" else ALONE
    if command == "/system":
        if conversation.template != "chat":
            raise UserError("Alpaca's prompt has no system text: put it into the instruction")
        from alpaca.inference.chat import next_turn, request_ids

        system = [{"role": "system", "content": text}] if text else []
        asked = [next_turn(turns, "x", "") for turns in (system, [])]
        with_it, without = request_ids(conversation.tokenizer, "chat", asked)  # a template may also refuse it
        if text and with_it == without:
            raise UserError("this model's chat template leaves a system text out: put it into the instruction")
        conversation.turns = system
        return "a new conversation" + (" with this system text" if text else "")
    if command not in NUMBERS:
        raise UserError(f"unknown command {command}: /help lists them")
    name = command[1:]
    if text:
        try:
            number = NUMBERS[command](text)
        except ValueError:
            raise UserError(f"{command} needs a number, as in the line that /help shows") from None
        conversation.settings = replace(conversation.settings, **{name: number})
    return f"{name} is {getattr(conversation.settings, name)}"


def answer(conversation, instruction: str, input: str) -> None:
    """Print an answer as it comes; a terminal gets control characters spelled out: they could rewrite the screen."""
    shown = printable if sys.stdout.isatty() else str
    text = conversation.ask(instruction, input, lambda piece: print(shown(piece), end="", flush=True))
    print(flush=True)
    if conversation.cut:
        limit = "--max_new_tokens" if conversation.cut == "max_new_tokens" else "the end of the context"
        print(f"note: cut off at {limit}", file=sys.stderr, flush=True)
    elif not text:
        print("note: the answer is empty: the model ended at once", file=sys.stderr, flush=True)


def read_message(read_line: Callable[[str], str | None]) -> tuple[str, str] | None:
    r"""Return a command with its text, or ("", instruction); None at the end.

    A line that ends in \ continues on the next. A text that begins with three quotes extends to the next three, and
    no command is looked for in it.

    Args:
        read_line: called with the prompt to show; returns the next line, or None at the end.
    """
    line = read_line("> ")
    if line is None:
        return None
    head, fence, text = line.partition(FENCE)
    if fence and head.strip() in ("", *TEXTS):
        while FENCE not in text and (more := read_line("… ")) is not None:
            text += "\n" + more
        return head.strip(), text.partition(FENCE)[0].strip("\n")
    while line.endswith("\\"):
        more = read_line("… ")
        line = line[:-1] + ("" if more is None else "\n" + more)
    line = line.strip()
    command, *text = line.split(maxsplit=1) or [""]
    # A pasted text of several lines that happens to begin with a command other than these two is an instruction.
    is_command = COMMAND.fullmatch(command) and (command in TEXTS or "\n" not in line)
    return (command, "".join(text)) if is_command else ("", line)


def say_error(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


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
    except KeyboardInterrupt:  # clears a line that had begun, in a message of several lines too
        readline = sys.modules.get("readline")
        if prompt == "> " and not (readline and readline.get_line_buffer()):
            raise
        say("")
        raise Cleared from None


def _prepare_terminal() -> None:
    """Line editing and history in input(); a pasted text of several lines is one message, not one for each line."""
    try:
        import readline
    except ImportError:  # Windows
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off


# ---------------------------------------------------------------------------------------------------------------------
# Files.


def answer_records(flags: SimpleNamespace, settings) -> None:
    """Answer the records of a file, and report on stderr how many."""
    from alpaca.inference.answer_file import answer_file, identity_of, read_requests
    from alpaca.inference.load import load

    model_path, output_path = flags.model_path, flags.output_path
    requests, faults = read_requests(flags.batch_path, flags.skip_errors, flags.fields, say_error)
    identity = identity_of(model_path, flags.base_path)  # of the files as they are loaded
    check_output(output_path)
    model, tokenizer = load(model_path, flags.device, flags.dtype, flags.base_path)
    name = public_name(model_path)
    output = output_path, flags.template, settings, flags.batch_tokens, name, identity, flags.skip_errors
    counts = answer_file(model, tokenizer, requests, *output)
    for fault in faults[:LISTED]:
        say_error(f"left out: {fault}")
    if len(faults) > LISTED:
        print(f"left out: … and {len(faults) - LISTED} more", file=sys.stderr)
    notes = [
        (counts["earlier"], "of an earlier run"),
        (counts["cut"], "cut off at --max_new_tokens or the end of the context"),
        (counts["too_long"], 'too long for the context ("error" in their rows)'),
        (counts["unended"], 'thought without an end: raise --max_new_tokens ("error" in their rows)'),
        (counts["examples"], "of several turns: in Alpaca's template the earlier ones are examples"),
        (len(faults), "malformed records left out"),
    ]
    print(f"{counted(counts['answers'], 'answer')} in {output_path}" + in_brackets(notes), file=sys.stderr)


if __name__ == "__main__":
    cli.run_cli(chat)
