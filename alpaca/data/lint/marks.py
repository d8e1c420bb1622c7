"""Lint's rules for what chat models, their templates and their servers leave behind: a record in, evidence or None out.

A mark stays where the task is about it: records about HTML, error messages or chatbots contain them rightly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from alpaca.data.lint.fields import CODE_TASK, around, found, is_code


def _unless(about: str, mark: str, fields=("output",)) -> Callable:
    """Return the rule that finds a mark, but not in records whose instruction or input is about such things."""
    searched, allowed = re.compile(mark), re.compile(about, re.IGNORECASE)

    def rule(record: dict) -> str | None:
        evidence = found(searched, record, fields)
        return None if evidence and allowed.search(f"{record['instruction']} {record['input']}") else evidence

    return rule


chat_token = _unless(
    r"\b(tokens?|tokeni[sz]\w+|tags?|templates?|chatml|html|xml|css|strike\w*)\b",
    r"(?i)</?(?:think|thinking|thought|reasoning)>|\[/?(?:think|inst)\]|</?s>|<[|｜][\w▁|]{1,40}[|｜]>|<(?:start|end)_of_turn>"
    r"|<</?sys>>|<(?:bos|eos|pad|unk)>",
    fields=("instruction", "input", "output"),
)
as_an_ai = _unless(
    r"\b(AI|artificial|GPT\S*|robots?|\w*bots?|assistants?|models?|machines?|humans?|are you|pretend|role)\b",
    r"[AaI](?:s|['’]m| am)(?<!\w[Aa]s)(?: just| only)? an? (?:\w+ )?(?:AI(?:,| assistant| model)|language model\b)",
)
error_text = _unless(
    rf"\b(errors?|exceptions?|status|https?|server|logs?|rate limit)\b|{CODE_TASK.pattern}",
    r"(?i)\A\W{0,4}(?:\$ERROR\$|(?:(?:API|HTTP|server) )?error\W{1,3}(?:code|rate limit|\d{3}\b|the server|model|time|"
    r"request|connection|context|internal)|(?:\d{3} )?(?:rate limit (?:reached|exceeded)|too many requests|bad gateway|"
    r"internal server error|service (?:temporarily )?unavailable|gateway time-?out)|you exceeded your current quota|"
    r"that model is currently overloaded|the server (?:is overloaded|had an error)|this model's maximum context)",
)
LABELS = r"(?:output|response|answer|输出|回答|答案)"
label = _unless(LABELS, rf"(?i)\A\W{{0,4}}{LABELS}\W{{0,3}}[:：]")
chatter = _unless(  # messages and conversations end in offers of their own
    r"\b(e-?mails?|letters?|messages?|repl\w+|respon[ds]\w*|dialog\w*|conversations?|chat\w*|scripts?|customers?|clients?|"
    r"invit\w+|posts?|tweets?|speech|announce\w*|memo|pitch|bots?|assistants?|pretend|role|advert\w*|friends?|"
    r"let me know|feel free|helps)\b",
    r"(?i)[\n.!?)]\s{0,9}(?:please )?(?:(?:I )?hope (?:this|that|it) helps|let me know\b|feel free to (?:ask|reach)|"
    r"is there anything else\b|(?:would you like|do you want) me to\b|if you\b[^.!?\n]{0,90}\b(?:let me know|feel free|"
    r"just ask|I can|I['’]ll|I['’]?d be|happy to))[^.!?\n]{0,120}[.!?]*\W{0,4}\Z",
)
COPIES = re.compile(r"\b(repeat|echo|quot\w+|copy|recite|verbatim)\b", re.IGNORECASE)


def echo(record: dict) -> str | None:
    """The output begins with the whole instruction. To complete a sentence that has no full stop is something else."""
    whole, output = record["instruction"].strip().rstrip(".:?!。：？！"), record["output"].strip()
    if len(whole) < 12 or not output[: len(whole)].lower() == whole.lower() or COPIES.search(whole):
        return None
    return f"output: {around(output, 0, 60)}" if output[len(whole) :][:1] in ("", *".:?!。：？！\n") else None


SENTENCE_ENDS = re.compile(r"[.!?。！？\n]+")
REPEATS = re.compile(
    r"\b(repeat\w*|times|again|lines|loops?|mantra|lyrics|songs?|chant|poems?|rhym\w*|refrain)\b", re.I
)
MOST_OFTEN = 5  # and more than half of the output: a refrain is less


def repetition(record: dict) -> str | None:
    """One sentence fills the output."""
    parts = [part for piece in SENTENCE_ENDS.split(record["output"]) if len(part := piece.strip()) >= 8]
    sentence, times = Counter(parts).most_common(1)[0] if len(parts) >= MOST_OFTEN else ("", 0)
    if times < MOST_OFTEN or 2 * times <= len(parts) or not re.search(r"[^\W\d_]{2}", sentence):
        return None
    asked = REPEATS.search(record["instruction"]) or is_code(record["output"])
    return None if asked else f"output: {times} times: {sentence[:60]}"
