"""Lint's rules for what chat models, their templates and their servers leave behind: a record in, evidence or None out.

A mark stays where the task is about it: records about HTML, error messages or chatbots contain them rightly.
"""

from __future__ import annotations

import re
from collections import Counter

from alpaca.data.lint.fields import CODE_TASK, around, found, is_code

TOKEN = re.compile(
    r"</?(?:think|thinking|thought|reasoning)>|\[/?(?:think|inst)\]|</?s>|<[|｜][\w▁|]{1,40}[|｜]>|<(?:start|end)_of_turn>|"
    r"<</?sys>>|<(?:bos|eos|pad|unk)>",
    re.IGNORECASE,
)
ABOUT_TOKENS = re.compile(r"\b(tokens?|tokeni[sz]\w+|tags?|templates?|chatml|html|xml|css|strike\w*)\b", re.IGNORECASE)


def chat_token(record: dict) -> str | None:
    """A chat template's token, or the border of a model's thoughts."""
    evidence = found(TOKEN, record)
    return evidence if evidence and not ABOUT_TOKENS.search(record["instruction"]) else None


MODEL = r"an? (?:\w+ )?(?:AI|language model)\b"
SELF = re.compile(rf"\bas {MODEL}[^.!?\n]{{0,40}}\bI\b|\bI(?:['’]m| am) (?:just |only |merely )?{MODEL}", re.IGNORECASE)
ABOUT_MODELS = re.compile(
    r"\b(AI|artificial|robots?|chat-?bots?|assistants?|models?|machines?|humans?|are you|pretend|role)\b", re.IGNORECASE
)


def as_an_ai(record: dict) -> str | None:
    """The output talks of itself as a model, unasked."""
    if "AI" not in record["output"] and "language model" not in record["output"]:  # ten times faster than the search
        return None
    evidence = found(SELF, record, ("output",))
    return evidence if evidence and not ABOUT_MODELS.search(record["instruction"] + record["input"]) else None


ERROR_TEXT = re.compile(
    r"\W{0,4}(?:\$ERROR\$|(?:(?:API|HTTP|server) )?error\W{1,3}(?:code|rate limit|\d{3}\b|the server|model|time|"
    r"request|connection|context|internal)|(?:\d{3} )?(?:rate limit (?:reached|exceeded)|too many requests|bad gateway|"
    r"internal server error|service (?:temporarily )?unavailable|gateway time-?out)|you exceeded your current quota|"
    r"that model is currently overloaded|the server (?:is overloaded|had an error)|this model's maximum context)",
    re.IGNORECASE,
)
ABOUT_ERRORS = re.compile(r"\b(errors?|exceptions?|status|https?|server|logs?|rate limit)\b", re.IGNORECASE)


def error_text(record: dict) -> str | None:
    """A server's error message in place of an answer."""
    match = ERROR_TEXT.match(record["output"])
    if not match or ABOUT_ERRORS.search(record["instruction"]) or CODE_TASK.search(record["instruction"]):
        return None
    return f"output: {around(record['output'], *match.span())}"


LABEL = re.compile(r"\W{0,4}(output|response|answer|输出|回答|答案)\W{0,3}[:：]", re.IGNORECASE)


def label(record: dict) -> str | None:
    """The output begins with the name of its field, and neither instruction nor input has the word."""
    match = LABEL.match(record["output"])
    asked = (record["instruction"] + record["input"]).lower()
    return f"output: {around(record['output'], *match.span())}" if match and match[1].lower() not in asked else None


OFFER = re.compile(
    r"[\n.!?)]\s*(?:please )?((?:I )?hope (?:this|that|it) helps|let me know\b|feel free to (?:ask|let|reach)\b|"
    r"is there anything else\b|(?:would you like|do you want) me to\b|if you\b[^.!?\n]{0,90}\b(?:let me know|feel free|"
    r"just ask|I can|I['’]ll|I['’]?d be|happy to))[^.!?\n]{0,120}[.!?]*\W{0,4}\Z",
    re.IGNORECASE,
)
# Messages and conversations end in offers of their own.
MESSAGE = re.compile(
    r"\b(e-?mails?|letters?|messages?|repl\w+|respon[ds]\w*|dialog\w*|conversations?|chat\w*|scripts?|customers?|clients?|"
    r"invit\w+|posts?|tweets?|speech|announce\w*|memo|pitch|bots?|assistants?|pretend|role|advert\w*|friends?)\b",
    re.IGNORECASE,
)
LETTER = re.compile(r"^\W{0,3}(?:dear|hi|hello|hey)\b|\b(?:regards|sincerely|yours|\[your name\])", re.I | re.M)


def chatter(record: dict) -> str | None:
    """The output ends in an offer to the user, and is no message to somebody else."""
    output = record["output"]
    match = OFFER.search(output, max(0, len(output) - 300))
    if not match or match[1].lower() in record["input"].lower():
        return None
    message = MESSAGE.search(record["instruction"]) or LETTER.search(output)
    return None if message else f"output: {around(output, *match.span())}"


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
    if len(parts) < MOST_OFTEN:
        return None
    sentence, times = Counter(parts).most_common(1)[0]
    if times < MOST_OFTEN or 2 * times <= len(parts) or not re.search(r"[^\W\d_]{2}", sentence):
        return None
    asked = REPEATS.search(record["instruction"])
    return None if asked or is_code(record["output"]) else f"output: {times} times: {sentence[:60]}"
