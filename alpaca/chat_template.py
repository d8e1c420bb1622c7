"""Conversations as tokens: the Alpaca prompt as a chat template for servers, and any model's own template."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache

from tokenizers import AddedToken, Tokenizer

from alpaca import UserError
from alpaca.common.shapes import INPUT_HEADING, user_message
from alpaca.common.text import check_utf8, first_line
from alpaca.prompts import BEFORE_ANSWER, PROMPT_DICT, continued, format_prompt

PRIVATE = "\U000f0000"  # a private-use character
# Marks a template that its model was trained with: chat and judging then use it without a flag. It is a comment, so it
# changes nothing for servers, and it travels with the tokenizer's files.
TRAINED = "{# its model was trained with this template #}"


def mark_trained(template: str) -> str:
    """Return a chat template, marked as the one its model was trained with. What it renders stays the same."""
    return template if template.startswith(TRAINED) else before_template(TRAINED, template)


def before_template(block: str, template: str) -> str:
    """Return a template with a block or comment before it, after which Jinja drops a line end."""
    return block + "\n" * template.startswith("\n") + template


def saved_template(tokenizer) -> str:
    """Return "chat" for a model that was trained with its own chat template, "alpaca" for any other."""
    return "chat" if str(tokenizer.chat_template).startswith(TRAINED) else "alpaca"


def messages_of(record: dict) -> list[dict]:
    """Return a record's conversation: its "messages", or one turn made of Alpaca's fields (without an answer: half)."""
    if record.get("messages"):
        return record["messages"]
    answer = [{"role": "assistant", "content": record["output"]}] if record.get("output") is not None else []
    return [user_message(record["instruction"], record.get("input") or ""), *answer]


def without_system(messages: Sequence[dict]) -> list[dict]:
    """Return messages with a system text, if any, put into the first question: Alpaca's prompt has no place for it."""
    if messages[0]["role"] != "system":
        return list(messages)
    system, first, *others = messages
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *others]


def asked_of(record: dict) -> list[dict]:
    """Return the messages to send to a model: a record's conversation without the answer at its end."""
    messages = messages_of(record)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


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
    refusal = "Alpaca was not trained on messages of this role, put their text into the instruction: "
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


def end_token(tokenizer) -> str | None:
    """Return the token with which the tokenizer's chat template ends an answer, or None.

    Raises:
        UserError: the template fails, or leaves the answer out.
    """
    [text] = _rendered(tokenizer, [[user_message("x"), {"role": "assistant", "content": PRIVATE}]], False)
    names = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    found = _any_of(name for name in names if name.strip()).search(_tail(text))
    return found and found[0]


def go_template(tokenizer) -> str:
    """Return the tokenizer's chat template as Ollama needs it, in Go's language, for questions and answers in turn.

    It is derived from a rendered question, answer and question, and from the same after a system text. A system text
    takes the place of the template's own. One that the template refuses, or writes into the question, is left out. So
    is a BOS that the tokenizer adds by itself: Ollama adds it too.

    Raises:
        UserError: the template fails, or does more than write something around each message.
    """
    first, answered, between, asks = turns = _around(tokenizer, "user", "assistant", "user")
    if not answered.startswith(asks):
        raise UserError("this tokenizer's chat template writes earlier turns differently")
    before = os.path.commonprefix([first[::-1], between[::-1]])[::-1]  # each question
    first, system = first.removesuffix(before), ""
    with suppress(UserError):
        opens, closes, *others = _around(tokenizer, "system", "user", "assistant", "user")
        if others == turns[1:] and closes.endswith(before):
            first = first and "{{ if not .System }}" + first + "{{ end }}"
            system = '{{ else if eq .Role "system" }}' + opens + "{{ .Content }}" + closes.removesuffix(before)
    user = '{{ if eq .Role "user" }}' + before + "{{ .Content }}" + asks
    assistant = '{{ else if eq .Role "assistant" }}' + answered.removeprefix(asks) + "{{ .Content }}"
    each = user + assistant + between.removesuffix(before) + system + "{{ end }}"
    return first + "{{ range .Messages }}" + each + "{{ end }}"


def _around(tokenizer, *roles: str) -> list[str]:
    """Return what the chat template writes before, between and after messages of these roles, the last one a question.

    UserError if it fails, or leaves one out.
    """
    signs = [chr(ord(PRIVATE) + i) for i in range(len(roles))]
    turns = [{"role": role, "content": sign} for role, sign in zip(roles, signs, strict=True)]
    first, *others = re.split("|".join(signs), _rendered(tokenizer, [turns], True)[0])
    if len(others) != len(roles):
        raise UserError("this tokenizer's chat template leaves messages out")
    if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        first = first.removeprefix(tokenizer.bos_token)
    return [first, *others]


def chat_ids(tokenizer, messages: Sequence[dict]) -> list[int]:
    """Return the tokens of a conversation by the tokenizer's own chat template, up to where the answer begins.

    A special token in the text stays text, as in training, unless the tokenizer is a slow one.

    Args:
        tokenizer: with a chat template.
        messages: with "role" and "content".

    Raises:
        UserError: the tokenizer has no template, or it fails.
    """
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template: use the alpaca template")
    check_utf8("".join(message["content"] for message in messages), "the prompt")
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        [text] = _rendered(tokenizer, [messages], True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    chats = _chats(tokenizer, [messages])
    try:
        [text] = chats.render([messages], True)
    except Unanswerable as e:
        raise UserError(f"{e}: remove such messages, or use the alpaca template") from None
    [(ids, _)] = chats.encode([text])
    return ids


def chat_turns(tokenizer, conversations: Sequence[Sequence[dict]]) -> list[tuple[list[int], list[int]]]:
    """Return, for the last answer of each conversation, the tokens of its prompt and those that must be generated.

    The prompt is chat_ids() of the messages before it. What must be generated is what the template writes after that,
    as in answer_ids(), up to the first special token after the answer, or up to EOS if it writes no special token.

    Raises:
        Unanswerable: the template fails, or does not start answers as it prompts for them.
    """
    chats = _chats(tokenizer, conversations)
    prompts = chats.render([messages[:-1] for messages in conversations], True)
    answers, ends = [], []
    for i, (prompt, whole) in enumerate(zip(prompts, chats.render(conversations, False), strict=True)):
        if not whole.startswith(prompt):
            same = len(os.path.commonprefix([prompt, whole]))
            why = f"this chat template prompts with {prompt[same:]!r}, but does not start answers with it"
            raise Unanswerable(i, why)
        answer, end = chats.split(whole[len(prompt) :], conversations[i])
        answers.append(answer)
        ends.append(tokenizer.eos_token_id if end is None else end)
    befores = [[chats.since_mark(prompt) for prompt in prompts]]
    befores += [[text] * len(prompts) for text in BEFORE_ANSWER[1:]]
    answers = [[*ids, end] for ids, end in zip(continued(chats.encode, befores, answers), ends, strict=True)]
    return list(zip((ids for ids, _ in chats.encode(prompts)), answers, strict=True))


class Unanswerable(UserError):
    """A conversation that a chat template cannot write; ``place`` is its index in the list."""

    def __init__(self, place: int, message: str):
        super().__init__(message)
        self.place = place


def _rendered(tokenizer, conversations: Sequence[Sequence[dict]], asks: bool) -> list[str]:
    """Return the texts that the template writes; with ``asks``, up to where the next answer begins."""
    plain = [[{name: message[name] for name in ("role", "content")} for message in one] for one in conversations]
    try:
        return tokenizer.apply_chat_template(plain, add_generation_prompt=asks, tokenize=False)
    except Exception as e:  # a third party's template can raise anything
        if len(plain) > 1:  # find out which one failed
            for place, messages in enumerate(plain):
                try:
                    _rendered(tokenizer, [messages], asks)
                except Unanswerable as one:
                    raise Unanswerable(place, str(one)) from None
        raise Unanswerable(0, f"this tokenizer's chat template fails: {first_line(e)}") from None


def _tail(text: str) -> str:
    """Return what a template writes after an answer that ends in PRIVATE."""
    if PRIVATE not in text:
        raise UserError("this tokenizer's chat template leaves answers out")
    return text.rpartition(PRIVATE)[2]


def _any_of(texts: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")  # which matches nothing


def _chats(tokenizer, conversations: Sequence[Sequence[dict]]) -> _Chats:
    """Return the _Chats for these conversations; it is made once for each tokenizer and template."""
    used = set().union(*(message["content"] for messages in conversations for message in messages))
    count = 2 * sum(token.special for token in tokenizer.added_tokens_decoder.values()) or 1
    start = ord(PRIVATE) + 1
    first = next(n for n in range(start, 0xFFF00, count) if not any(chr(n + i) in used for i in range(count)))
    return _made(tokenizer, first, len(tokenizer), str(tokenizer.chat_template), tokenizer.eos_token)


@lru_cache(maxsize=2)
def _made(tokenizer, first: int, *state) -> _Chats:
    return _Chats(tokenizer, first)


class _Chats:
    """Conversations as texts and tokens in which the template's special tokens are kept apart from those in the text.

    A private-use character stands for each typed name while the template is rendered. Then another one, a mark, takes
    the place of each of the template's own tokens. In a copy of the tokenizer the marks are added tokens, and the names
    are text. It is immutable, so threads may share it.

    Args:
        tokenizer: a fast one, with a chat template.
        first: the code of the first private-use character, of two for each special token.
    """

    def __init__(self, tokenizer, first: int):
        special = {
            token.content: (id_, token) for id_, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        names = sorted(special, key=len, reverse=True)  # one may begin with another
        self.tokenizer = tokenizer
        self.names = _any_of(names)
        self.stand_ins = {name: chr(first + 2 * i) for i, name in enumerate(names)}
        self.marks = {name: chr(first + 2 * i + 1) for i, name in enumerate(names)}
        self.typed = {sign: name for name, sign in self.stand_ins.items()}
        self.any_typed, self.any_mark = _any_of(self.typed), _any_of(self.marks.values())
        self.core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.core.encode_special_tokens = True  # as text
        self.core.no_truncation()
        self.core.no_padding()
        kept = ("single_word", "lstrip", "rstrip", "normalized")
        flags = {name: {flag: getattr(token, flag) for flag in kept} for name, (_, token) in special.items()}
        self.core.add_tokens([AddedToken(self.marks[name], **flags[name]) for name in names])
        self.special = {self.marks[name]: special[name][0] for name in names}
        self.ids = {self.core.token_to_id(mark): id_ for mark, id_ in self.special.items()}

    @cached_property
    def tail(self) -> str:
        """What the template writes after an answer."""
        return self._tail_of([user_message("x")], "")

    def render(self, conversations: Sequence[Sequence[dict]], asks: bool) -> list[str]:
        """Return the template's texts, with marks in place of its special tokens."""
        hidden = [
            [message | {"content": self._put(self.stand_ins, message["content"])} for message in messages]
            for messages in conversations
        ]
        texts = _rendered(self.tokenizer, hidden, asks)
        marked = (self._put(self.marks, text) for text in texts)
        return [self.any_typed.sub(lambda sign: self.typed[sign[0]], text) for text in marked]

    def _put(self, signs: dict[str, str], text: str) -> str:
        return self.names.sub(lambda name: signs[name[0]], text)

    def _tail_of(self, before: Sequence[dict], answer: str) -> str:
        [text] = self.render([[*before, {"role": "assistant", "content": answer + PRIVATE}]], False)
        return _tail(text)

    def split(self, rest: str, messages: Sequence[dict]) -> tuple[str, int | None]:
        """Return the text to generate, and the special token that ends it (None: the template writes none).

        Args:
            rest: what the template writes after the prompt for the last one of ``messages``.
        """
        tail = self.tail
        if not rest.endswith(tail):
            tail = self._tail_of(messages[:-1], messages[-1]["content"])
        answer, end = rest.removesuffix(tail), self.any_mark.search(tail)
        return (answer + tail[: end.start()], self.special[end[0]]) if end else (answer, None)

    def since_mark(self, text: str) -> str:
        """Return the end of a text, from its last mark on: the text before it does not change its tokens."""
        return text[max((mark.start() for mark in self.any_mark.finditer(text)), default=0) :]

    def encode(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield the tokens of each text, and where each begins and ends."""
        for encoding in self.core.encode_batch(list(texts), add_special_tokens=False):
            yield [self.ids.get(id_, id_) for id_ in encoding.ids], encoding.offsets
