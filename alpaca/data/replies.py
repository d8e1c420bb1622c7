"""The records in a teacher's reply, as numbered text or as JSON.

Each item of a reply is a record, or stays text: ``CutOff`` if the reply ended in the middle of it, else malformed.
"""

from __future__ import annotations

import html
import json
import re

from alpaca.data.requests import FIELDS, LABEL_FIRST

# "4. Instruction:", also as "**4. Instruction:**", "4) instruction:" and "### 4. **Instruction**：". Repetitions are
# bounded, so that a reply of 100,000 newlines, digits or asterisks takes no time.
HEADER = r"\*{0,3}(?<![\w(])(?P<number>\d{1,4})[.)]\*{0,3}\s{0,9}\*{0,3}(?P<name>%s)\*{0,3}\s{0,3}[:：]\*{0,3}"
FIELD = re.compile(r"(?:^[ \t]{0,9}#{1,6}[ \t]{0,9})?" + HEADER % "Instruction|Input|Output", re.M | re.I)
SEPARATED = r"(?P<separator>#{3,6}|^[-*_=]{3,}[ \t]{0,9}$)\s{0,99}|^[ \t]{0,9}(?:#{1,2}[ \t]{0,9})?"
ITEM = re.compile(f"(?:{SEPARATED})" + HEADER % "Instruction", re.M | re.I)
# The end of a reply that stopped in the separator. A line "###" is not a heading: the next item follows it.
IN_SEPARATOR = re.compile(r"\n(?:#{1,3}|###[ \t]{0,9}\n\s{0,9}.{0,20})\Z")
RULE = re.compile(r"\s*(?:#{3}|-{3,5}|\*{3,5})?\s*")  # a line without text; a longer one may be a table's or a form's
# What a chat model adds after its last task: an offer or a wish (OFFER) that is about the list itself (ABOUT).
OFFER = re.compile(
    r"\W{0,4}(?:please |just )?(?:let me know|feel free|(?:i )?hope|would you like|do you want|shall i|should i"
    r"|if you\b.{0,80}\b(?:let me know|just ask|i can|i['’]ll|feel free))\b",
    re.I,
)
ABOUT = re.compile(
    r"\b(?:more|additional|further|another|other|these|the)\W(?:\w+\W){0,2}(?:tasks?|instructions?|examples?|prompts?)\b"
    r"|\bmore of (?:these|them)\b|\bmore\W*$|\bthese (?:are|help|work|fit|meet)\b|\bthis helps\b"
    r"|\b(?:me to|i) (?:continue|generate)\b",
    re.I,
)


FIRST_OBJECT = re.compile(r'\[\s*(?=\{)|(?=\{\s*"(?:instruction|input|output)")')
NEXT_OBJECT = re.compile(r'\}[\s,]*(?=\{\s*")')  # not inside a JSON string, where a quote has a backslash
BETWEEN = re.compile(r"[\s,]*")
DECODER = json.JSONDecoder(strict=False)  # with line breaks in strings, as some models write them


class CutOff(str):
    """The item in which a reply reached its token limit: never a record, however complete it looks."""


def parse_response(text: str, finish_reason: str | None, num_prompt_instructions: int) -> list[dict | str]:
    """Split a reply into records; an item that is not exactly instruction, input and output stays text.

    The output may come before the input: the label of a classification is asked for first.

    An item begins at its header, "5. Instruction:". Without a "###" or a rule before it, that must be at the start
    of a line and the number must be the next one, because answers have numbers and headings of their own.

    Args:
        text: the reply.
        finish_reason: only "length" means that the reply was cut off; its last item is then ``CutOff``.
        num_prompt_instructions: examples in the prompt; a reply that continues it has the next number.
    """
    text, number = text.replace("\r\n", "\n"), num_prompt_instructions + 1
    first = ITEM.search(text)
    opening = text[: first.start()] if first else text
    # A chat model may say something before its first item. Any other reply continues the prompt.
    if not first or opening.strip() and (int(first["number"]) not in (1, number) or FIELD.search(opening)):
        text = f"{number}. Instruction:{text}"
    starts, ends = [], []
    for found in ITEM.finditer(text):
        if not starts or found["separator"] or int(found["number"]) == number + 1:
            number = int(found["number"])
            starts.append(found.start("number"))
            ends.append(found.start())
    items: list[dict | str] = [text[a:b] for a, b in zip(starts, [*ends[1:], len(text)], strict=True)]
    cut = ""
    if finish_reason == "length":
        cut = items.pop()
        ended = IN_SEPARATOR.search(cut)
        whole = cut[: ended.start()] if ended else ""
        last = _parse_item(whole)
        if last and last["output"] and not re.search(r"^(?:#|```)", FIELD.split(whole)[-1], re.M):
            items.append(whole)  # cut neither in a heading nor in a comment
            cut = cut[ended.start() :].lstrip("\n#")
    ends_here = len(items) - 1 if finish_reason != "length" else None
    records = [_parse_item(item, place == ends_here) or item for place, item in enumerate(items)]
    return records + [CutOff(cut)] * bool(cut.strip())


def _parse_item(item: str, ends_the_reply: bool = False) -> dict | None:
    # split: [before, number, field, text, number, field, text, …]; two items run together give more than three fields
    parts = FIELD.split(item)
    numbers, fields, texts = set(parts[1::3]), [name.lower() for name in parts[2::3]], parts[3::3]
    if tuple(fields) not in (FIELDS, LABEL_FIRST) or len(numbers) != 1:
        return None
    if texts[0].count("**") % 2:  # the bold type of "**4. Instruction: Name a tree.**"
        texts[0] = texts[0].rstrip().removesuffix("**")
    texts[2] = _without_tail(texts[2].strip()) if ends_the_reply else "\n".join(_without_rules(texts[2].split("\n")))
    found = dict(zip(fields, texts, strict=True))
    return _record(*(found[name] for name in FIELDS))


def _record(instruction: str, input_text: str, output: str) -> dict:
    """Return a record; "<noinput>" is an empty input, even if quoted or escaped."""
    if re.sub(r"[\W_]", "", html.unescape(input_text)).lower() == "noinput":
        input_text = ""
    return {"instruction": instruction.strip(), "input": input_text.strip(), "output": output.strip()}


def _without_rules(lines: list[str]) -> list[str]:
    """Return lines without the empty ones and rules ("---", "###") at their end."""
    end = len(lines)
    while end and RULE.fullmatch(lines[end - 1]):
        end -= 1
    return lines[:end]


def _without_tail(output: str) -> str:
    """Return the last output without what belongs to the whole list: the end of a code fence, and closing chatter."""
    lines = output.split("\n")
    fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    if len(fences) % 2 and fences[-1] and lines[fences[-1]].strip() == "```":
        lines = lines[: fences[-1]]
    while True:
        lines = _without_rules(lines)
        start = len(lines)
        while start and not RULE.fullmatch(lines[start - 1]):
            start -= 1
        paragraph = " ".join(lines[start:])
        if not start or len(paragraph) > 300 or not (OFFER.match(paragraph) and ABOUT.search(paragraph)):
            return "\n".join(lines)
        lines = lines[:start]


def parse_json(text: str, finish_reason: str | None) -> list[dict | str]:
    """Read the objects of a JSON reply, also from a code fence, a bare list, and between other text.

    An object without the texts "instruction" and "output" stays text; so does one that is not JSON, up to the next. The
    object in which a reply was cut off (``finish_reason`` "length") is ``CutOff``; those before it are complete.
    """
    records: list[dict | str] = []
    first = FIRST_OBJECT.search(text)
    at = first.end() if first else 0
    while first and text.startswith("{", at):
        try:
            value, end = DECODER.raw_decode(text, at)
            given = [value.get(name) for name in FIELDS]
            given[1] = "" if given[1] is None else given[1]
            # JSON allows half of a surrogate pair, which no file can hold.
            fields = [field.encode("utf-8", "replace").decode() for field in given if isinstance(field, str)]
            records.append(_record(*fields) if len(fields) == 3 else text[at:end])
        except (ValueError, RecursionError):
            following = NEXT_OBJECT.search(text, at)
            end = following.end() if following else len(text)
            cut = finish_reason == "length" and not following
            records.append(CutOff(text[at:]) if cut else text[at:end])
        at = BETWEEN.match(text, end).end()
    return records or [CutOff(text) if finish_reason == "length" else text]
