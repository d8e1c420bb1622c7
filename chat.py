"""Talks to a model that was trained with train.py, in the terminal.

python chat.py --model_path DIR
python chat.py --model_path DIR --instruction "Give three tips for staying healthy."
python chat.py --model_path DIR --instruction "Translate into French." --input "Good morning"

As a page for the browser (the live demo): python chat.py --model_path DIR --web
"""

from __future__ import annotations

import sys

import utils
from alpaca import UserError, cli

HELP = (
    "Type an instruction. /input TEXT sets an input for the next one, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer."
)


def chat(
    model_path: str,
    instruction: str | None = None,
    input: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int | None = None,
    device: str | None = None,
    web: bool = False,
    compare_path: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
) -> None:
    """Answers instructions with a fine-tuned model, each on its own, in the template of its training.

    Args:
        model_path: the folder of the model.
        instruction: answer this one and leave; without it, a conversation starts.
        input: what the instruction is about, if that is apart.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 always takes the likeliest token.
        top_p: nucleus sampling.
        seed: the same seed gives the same answer.
        device: cpu, cuda, mps, … (default: the accelerator if there is one).
        web: serve a page, for this machine alone; max_new_tokens is then the most that a visitor can ask for.
        compare_path: with --web, a second model that answers the same instructions beside the first.
        host: with --web, the address to listen at; any but this machine's own needs --auth.
        port: with --web; 0 takes a free one.
        auth: with --web, user:password, which the page then asks for.
    """
    if web:
        if instruction is not None:
            raise UserError("--instruction answers one and leaves, --web serves a page: take one of them")
        from alpaca import web as demo

        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        return demo.serve(model_path, compare_path, host, port, auth, device, **sampling)
    if compare_path or auth or host != "127.0.0.1" or port != 7860:
        raise UserError("--compare_path, --host, --port and --auth are for the page: add --web")
    if instruction is not None and not instruction.strip():
        raise UserError("--instruction is empty")
    from alpaca import inference  # torch and transformers take seconds to load: not before the flags are known good

    model, tokenizer = inference.load(model_path, device)

    def answer(instruction: str, input: str) -> None:
        prompt = utils.format_prompt(instruction, input)
        at_start = True
        for piece in inference.stream(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed):
            piece = piece.lstrip() if at_start else piece
            at_start = at_start and not piece
            print(piece, end="", flush=True)
        print()

    if instruction is not None:
        answer(instruction, input)
        return
    print(HELP)
    while True:
        try:
            line = sys.stdin.readline() if not sys.stdin.isatty() else _ask("> ") + "\n"
        except EOFError:
            line = ""
        if not line or line.strip() in ("/quit", "/exit"):
            return
        line = line.strip()
        if line.startswith("/input"):
            input = line.removeprefix("/input").strip()
        elif line in ("/help", "/?"):
            print(HELP)
        elif line:
            try:
                answer(line, input)
            except KeyboardInterrupt:
                print(" [stopped]")
            except UserError as e:
                print(f"error: {e}")
            input = ""


def _ask(prompt: str) -> str:
    import readline  # noqa: F401  line editing and history in input()

    return input(prompt)


if __name__ == "__main__":
    cli.run_cli(chat)
