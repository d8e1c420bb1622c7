"""Alpaca's prompt as a chat template, so that servers and chat programs ask a trained model what training asked it."""

from __future__ import annotations

import json

import utils

INPUT_HEADING = "\n\n### Input:\n"


def chat_template(tokenizer) -> str:
    """A Jinja chat template that gives utils.format_prompt's text for one user message, as training's tokens.

    The message is the instruction; an input stands behind it under the heading "### Input:", as in the prompt itself:
    "Translate into French.\\n\\n### Input:\\nGood morning". Training knows one turn, so an earlier turn is written as
    an example of its own, prompt, answer and EOS. A system message is refused, not dropped: training had none.
    """
    with_input, without = utils.PROMPT_DICT["prompt_input"], utils.PROMPT_DICT["prompt_no_input"]
    preface_input, preface = (text[: text.index("{instruction}")] for text in (with_input, without))
    ending = without.removeprefix(preface + "{instruction}")
    assert with_input == f"{preface_input}{{instruction}}{INPUT_HEADING}{{input}}{ending}"
    refusal = "Alpaca is trained without messages of this role, put their text into the instruction: "
    return (
        "{%- for message in messages -%}"
        "{%- set text = message['content'] if message['content'] is string"
        " else message['content'] | map(attribute='text') | join -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- {json.dumps(_start(tokenizer))} -}}}}"
        f"{{{{- {json.dumps(preface_input)} if {json.dumps(INPUT_HEADING)} in text else {json.dumps(preface)} -}}}}"
        f"{{{{- text + {json.dumps(ending)} -}}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{- text + {json.dumps(tokenizer.eos_token)} -}}}}"
        "{%- else -%}"
        f"{{{{- raise_exception({json.dumps(refusal)} + message['role']) -}}}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )


def _start(tokenizer) -> str:
    """What must be written in front of a prompt that is tokenised without the tokenizer's own special tokens.

    That is how a rendered chat template is tokenised. Some tokenizers put BOS in front by themselves, some (LLaMA's)
    a space as well, which they leave out behind a special token.
    """
    prompt = utils.format_prompt("Hello")
    wanted = tokenizer(prompt)["input_ids"]
    if tokenizer.eos_token_id == wanted[-1]:  # one that appends EOS: to be answered, a prompt must not end
        wanted = wanted[:-1]
    bos = tokenizer.bos_token or ""
    for start in ("", bos, bos + " "):
        if tokenizer(start + prompt, add_special_tokens=False)["input_ids"] == wanted:
            return start
    return bos
