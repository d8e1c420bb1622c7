"""Lint's rules for outputs, and for the marks that a teacher leaves in any field: a record in, evidence or None out."""

from __future__ import annotations

import re

from alpaca.data.lint.fields import CODE_TASK, CONTROL, NO_INPUT, around, found, is_code

# ---------------------------------------------------------------------------------------------------------------------
# Fields that are empty, or say so.

ANSWER_MAY_BE_A_SIGN = re.compile(r"\b(punctuat\w+|symbol|character|sign|operator|emoji|mark|print|blank)", re.I)


def empty_output(record: dict) -> str | None:
    output = record["output"].strip()
    if not output:
        return "output: (empty)"
    if re.fullmatch(r"[\s.…_-]+", output) and not ANSWER_MAY_BE_A_SIGN.search(record["instruction"]):
        return f"output: {output[:40]}"
    return None


NA_OUTPUT = re.compile(
    r"\W*(n/a|n\.a\.?|nan|no[ _-]?(output|input|answer|response)( (is )?(required|needed|necessary|provided|"
    r"available))?|not applicable|output|tbd|to ?do)\W*",
    re.IGNORECASE,
)


def na_output(record: dict) -> str | None:
    """ "N/A" where an answer should be. "none" and "null" pass, because they often are the answer."""
    output = record["output"].strip()
    if not NA_OUTPUT.fullmatch(output) or output.startswith("```"):
        return None
    asked = (record["instruction"] + record["input"]).lower()
    said = output.strip("<>[](){}.\"'` ").lower()
    return None if said in asked else f"output: {output}"


NULL_IS_CONTENT = re.compile(r"\b(word|value|type|term|keyword|null|none|nan|python|translate)\b", re.IGNORECASE)


def input_field(record: dict) -> str | None:
    text = record["input"].strip()
    if record["input"] and not text:
        return "input: white space only"
    if not NO_INPUT.fullmatch(text):
        return None
    if text.lower() in ("none", "null", "nil", "nan") and NULL_IS_CONTENT.search(record["instruction"]):
        return None
    return f"input: {text}"


# ---------------------------------------------------------------------------------------------------------------------
# Marks left by the prompt, the parser and encodings.

NEXT_TASK = re.compile(r"(\d+)\s*\.\s*Instruction:", re.IGNORECASE)
PROMPT_MARKS = re.compile(
    r"(\d+)\s*\.\s*Input:(?=.*\b\1\s*\.\s*Output:)|###\s*(?:Instruction|Response|Input):|"
    r"//\s*(?:EOM|end of output)\s*//|Below is an instruction that describes a task"
    r"|(?:[<\[]|&lt;)no ?(?:input|output)(?:[>\]]|&gt;)",
    re.IGNORECASE | re.DOTALL,
)


def merged(record: dict) -> str | None:
    """A field contains the teacher's prompt or the next task."""
    for field in ("instruction", "input", "output"):
        text = record[field]
        match = NEXT_TASK.search(text)
        # "2. Instruction:" after "1. Warm-up:" is part of a lesson plan, unless "2. Input:" or "2. Output:" follows
        if match and (
            re.search(rf"\b{match[1]}\s*\.\s*(?:Input|Output):", text, re.IGNORECASE)
            or not re.search(rf"^\s*{int(match[1]) - 1}\.\s", text, re.MULTILINE)
        ):
            return f"{field}: {around(text, *match.span())}"
    return found(PROMPT_MARKS, record, ("instruction", "output"))


MOJIBAKE = re.compile(
    "\ufffd|Ã[\u0080-\u00bf\u0152-\u0178\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]|Â[\u0080-\u00bf]|"
    "â€|â\u0080|ðŸ|ï»¿|ΓÇ[ÖöôÿªÑ£¥]|Ð[\u0080-\u00bf]Ñ|[\u0080-\u009f]"
)
ABOUT_ENCODINGS = re.compile(r"\b(mojibake|encod(ed|ing)|decod(ed|ing)|garbled|utf-?8)\b", re.IGNORECASE)


def mojibake(record: dict) -> str | None:
    fields = [field for field in ("instruction", "input", "output") if not record[field].isascii()]  # it never is
    evidence = found(MOJIBAKE, record, fields)
    return None if evidence and found(ABOUT_ENCODINGS, record) else evidence


ESCAPE = re.compile(r"\\[nrt](?![a-z])|\\[\"']|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\\\n")
LATEX = re.compile(r"\\[(\[]|\$[^$\n]*\\[a-z]+[^$\n]*\$")
ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|copy|rsquo|lsquo|rdquo|ldquo|mdash|ndash|hellip|#\d{2,5}|#x[0-9a-f]{2,5});", re.I
)


def stray_escape(record: dict) -> str | None:
    """Control characters anywhere; backslash escapes and HTML entities in records that have nothing to do with code."""
    if evidence := found(CONTROL, record):
        return evidence
    evidence = found(ESCAPE, record) or found(ENTITY, record)
    if not evidence or CODE_TASK.search(record["instruction"]):
        return None
    fields = (record["instruction"], record["input"], record["output"])
    return None if any(is_code(text) or LATEX.search(text) for text in fields) else evidence


# ---------------------------------------------------------------------------------------------------------------------
# Outputs that stop in mid-sentence.

NEVER_LAST = re.compile(r"\b(?:and|or|nor|the|a|an|because|their|my|your|our|whose|such as|than)$", re.IGNORECASE)
SELDOM_LAST = re.compile(
    r"\b(?:of|to|in|at|by|for|from|with|on|into|between|about|approximately|is|are|was|were|be|equals|but|which|that|its|"
    r"including|although|while|whereas|when|if|has|have|will|can|should|would)$",
    re.IGNORECASE,
)
# The original's stop string "20." cuts a text at "in 2020." or "costs $20.", and "\n20" cuts a list after item 19: of
# 2,000 released outputs 2 end with item 15, none with 16 to 18, 20 with 19, none with 20.
MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
STOPPED_AT_20 = re.compile(
    rf"\b(?:in|since|until|during|late|early|mid|(?:{MONTH})(?: \d\d?,)?) (?:18|19|20)$|\s[$€£=]$"
)
CLOSING = re.compile(r"\b(regards|sincerely|yours|love|wishes|thanks|truly|cheers|faithfully|hugs),$", re.IGNORECASE)
TITLES = "".join(rf"(?<!\b{title})" for title in ("Mr", "Mrs", "Ms", "Dr", "St", "vs", "Jr", "Sr", "Inc", "etc", "No"))
SENTENCE_END = re.compile(rf"(?<=[a-z]{{2}}){TITLES}[.!?][\"”']?\s+(?=[A-Z\"“])|(?<=[)\"”])[.!?]\s+(?=[A-Z])")


def _lines(record: dict) -> list[str]:
    """Return the lines of an output, or none if it is code, which ends differently."""
    return [] if is_code(record["output"]) else [s for line in record["output"].split("\n") if (s := line.strip())]


def cut_off(record: dict) -> str | None:
    """Only what cannot be an end: titles, lists, labels, verse, code, forms and signatures need no full stop."""
    if record["output"].count("```") % 2:
        return "output: a ``` block is never closed"
    lines = _lines(record)
    if not lines:
        return None
    last = lines[-1]
    if re.match(r"19[.)]\s", last) and any(re.match(r"18[.)]\s", line) for line in lines):
        asked = re.search(r"\b(19|nineteen)\b", record["instruction"], re.IGNORECASE)
        return None if asked else f"output: ends with item {last[:60]}"
    words = len(re.findall(r"\w+", last))
    # In verse and in lists, where most lines have no punctuation, "… that we are dreaming of" may be an end.
    stops = sum(line[-1] in ".!?:;" for line in lines[:-1])
    free_ends = len(lines) > 2 and stops * 2 < len(lines) - 1
    prose = not free_ends and (words > 11 or SENTENCE_END.search(record["output"]))
    if (
        (STOPPED_AT_20.search(last) and words > 3)
        or (NEVER_LAST.search(last) and words > 5)
        or (SELDOM_LAST.search(last) and words > 3 and prose)
        or (last[-1] in "([{" and words > 5)
        or (last[-1] == "," and words > 5 and not free_ends and not CLOSING.search(last))
    ):
        return f"output: …{last[-60:]}"
    return None


def no_full_stop(record: dict) -> str | None:
    """A last sentence without an end, after sentences with one. Opt-in: usually only the full stop is missing."""
    lines = _lines(record)
    if not lines or not SENTENCE_END.search(lines[-1]) or not lines[-1][-1].isalnum():
        return None
    fragment = SENTENCE_END.split(lines[-1])[-1]
    if len(fragment.split()) < 4 or re.search(r"[#@]|https?:|www\.|\.com", fragment):
        return None
    return f"output: …{lines[-1][-60:]}"
