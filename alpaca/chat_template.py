"""Conversations as tokens: the Alpaca prompt as a chat template for servers, and any model's own template."""

from __future__ import annotations

import json
from collections.abc import Sequence

import jinja2
from tokenizers import AddedToken, Tokenizer

from alpaca import UserError
from alpaca.common.text import first_line
from alpaca.prompts import INPUT_HEADING, PROMPT_DICT, format_prompt

# The beginning of a template with which its model was trained: chat and judging then use it without being told. As a
# comment it changes nothing for servers, and it goes wherever the tokenizer's files go.
TRAINED = "{# its model was trained with this template #}"


def mark_trained(template: str) -> str:
    """Return a chat template that says that its model was trained with it. What it renders stays the same."""
    if template.startswith(TRAINED):
        return template
    return TRAINED + "\n" * template.startswith("\n") + template  # Jinja drops a line end after a comment


def saved_template(tokenizer) -> str:
    """Return "chat" for a model that was trained with its own chat template, "alpaca" for every other."""
    return "chat" if str(tokenizer.chat_template).startswith(TRAINED) else "alpaca"


def user_message(instruction: str, input: str = "") -> dict[str, str]:
    """Return a task as a user's message: an input follows the instruction under Alpaca's heading."""
    return {"role": "user", "content": instruction + (INPUT_HEADING + input if input else "")}


def messages_of(record: dict) -> list[dict]:
    """Return a record's conversation: its "messages", or one turn made of Alpaca's fields (without an answer: half)."""
    if record.get("messages"):
        return record["messages"]
    answer = [{"role": "assistant", "content": record["output"]}] if record.get("output") is not None else []
    return [user_message(record["instruction"], record.get("input") or ""), *answer]


def chat_template(tokenizer) -> str:
    """Return a Jinja chat template that writes format_prompt's text for one user message, as training's tokens.

    The message is the instruction; an input follows it under the heading "### Input:", as in the prompt itself:
    "Translate into French.\\n\\n### Input:\\nGood morning". Training has one turn, so an earlier turn becomes an
    example: prompt, answer and EOS. A system message is refused, not dropped: training had none.
    """
    with_input, without = PROMPT_DICT["prompt_input"], PROMPT_DICT["prompt_no_input"]
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
    """Return the text to put before a prompt that is tokenized without the tokenizer's own special tokens.

    Servers tokenize a rendered chat template that way. Some tokenizers put BOS first by themselves, some (LLaMA's) a
    space too, but not after a special token.
    """
    prompt = format_prompt("Hello")
    wanted = tokenizer(prompt)["input_ids"]
    if tokenizer.eos_token_id == wanted[-1]:
        wanted = wanted[:-1]  # as in prompt_ids()
    bos = tokenizer.bos_token or ""
    for start in ("", bos, bos + " "):
        if tokenizer(start + prompt, add_special_tokens=False)["input_ids"] == wanted:
            return start
    return bos


def chat_ids(tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the tokens of a conversation by the tokenizer's own chat template, up to where the answer begins.

    A special token that somebody types stays text, as in training, unless the tokenizer is a slow one.

    Args:
        tokenizer: with a chat template.
        messages: with "role" and "content".

    Raises:
        UserError: the tokenizer has no template, or it fails.
    """
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template: use the alpaca template")
    special = {id_: token for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    typed = any(token.content in message["content"] for token in special.values() for message in messages)
    core = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if typed and isinstance(core, Tokenizer):
            return _typed_as_text(tokenizer, core, special, messages)
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except (jinja2.TemplateError, TypeError, UnicodeEncodeError) as e:
        raise UserError(f"this tokenizer's chat template fails: {first_line(e)}") from None


def _typed_as_text(
    tokenizer, core: Tokenizer, special: dict[int, AddedToken], messages: Sequence[dict[str, str]]
) -> list[int]:
    """Do chat_ids() for messages that contain the names of special tokens.

    Private-use characters keep the two kinds apart: one for each typed name while the template is rendered, and one for
    each of the template's own tokens in a copy of the tokenizer, where they are added tokens and the names are text.
    """
    order = sorted(special, key=lambda id_: len(special[id_].content), reverse=True)  # one may contain another
    said = "".join(message["content"] for message in messages)
    count = 2 * len(order)
    first = next(n for n in range(0xF0000, 0xFFF00, count) if not any(chr(n + i) in said for i in range(count)))
    marks, stand_ins = ({id_: chr(first + 2 * i + k) for i, id_ in enumerate(order)} for k in (0, 1))

    def put(text: str, names: dict[int, str], instead_of: dict[int, str]) -> str:
        for id_ in order:
            text = text.replace(instead_of[id_], names[id_])
        return text

    contents = {id_: token.content for id_, token in special.items()}
    hidden = [message | {"content": put(message["content"], stand_ins, contents)} for message in messages]
    text = tokenizer.apply_chat_template(hidden, add_generation_prompt=True, tokenize=False)
    text = put(put(text, marks, contents), contents, stand_ins)
    core = Tokenizer.from_str(core.to_str())
    core.encode_special_tokens = True  # as text
    core.no_truncation()
    core.no_padding()
    kept = ("single_word", "lstrip", "rstrip", "normalized")
    core.add_tokens([AddedToken(marks[i], **{name: getattr(special[i], name) for name in kept}) for i in order])
    ids = {core.token_to_id(marks[id_]): id_ for id_ in order}
    return [ids.get(id_, id_) for id_ in core.encode(text, add_special_tokens=False).ids]
