"""Find wrong arithmetic in text, and report nothing where it may be something else.

"12 x 30 = 350" is wrong; "2x + 3 = 7" has an unknown, "18-24 = 20%" is an age range, "22 / 7 = 3.14" is rounded. Values
are exact fractions. Only numbers, brackets, %, + - * / ^ and their printed forms (x × · ÷ − –) are read.
"""

from __future__ import annotations

import ast
import operator
import re
import statistics
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from alpaca.data.lint.fields import input_of, is_code

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
EXPRESSION = r"[\d.,%$€£()+\-*/^×÷·−–x\s]"
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
TO_PYTHON = str.maketrans(
    {"×": "*", "÷": "/", "·": "*", "^": "**", "−": "-", "–": "-", "$": None, "€": None, "£": None}
)


def wrong_arithmetic(record: dict) -> str | None:
    """An equation in the output whose sides differ, or a plain calculation in the instruction with a wrong answer."""
    output, text = record["output"], input_of(record)
    if is_code(output):
        return None
    if evidence := wrong_equation(output, asked=f"{record['instruction']}\n{text}"):
        return f"output: {evidence}"
    return wrong_answer(record["instruction"], text, output)


# ---------------------------------------------------------------------------------------------------------------------
# One side of an equation, and the comparison of two.


class NotArithmetic(Exception):
    pass


class Side(NamedTuple):
    value: Fraction
    operators: int
    decimals: int  # the most of any of its numbers; a % sign counts as two more
    inexact: bool  # has a division, a percentage or decimals: something may have been rounded
    scaled: bool  # has a product or a power, which magnify rounding errors


def evaluate(text: str, percent: bool = True) -> Side:
    """Evaluate "2 x (3 + 4.5)" exactly; without ``percent`` a % sign is only a unit.

    Raises:
        NotArithmetic: text that is not arithmetic; also a division by zero, or a power too big to be meant.
    """
    source = re.sub(r"(?<=[\d\s)%])x(?=[\s(−-]*[$€£]?\d)", "*", text).translate(TO_PYTHON).strip()
    source = re.sub(r"(?<=\d),(?=\d{3}\b)", "", source)
    percents = source.count("%") if percent else 0
    source = re.sub(r"(?<=[\d)])\s*\(", "*(", source)  # 2(3 + 4)
    source = re.sub(rf"({NUMBER})\s?%(?!\s*[\d(])", r"(\1/100)" if percent else r"\1", source)
    if not source or len(source) > 300 or re.search(r"[%,x]|//", source):
        raise NotArithmetic
    try:
        tree = ast.parse(source, mode="eval")
        value = _value(tree.body)
    except (SyntaxError, ZeroDivisionError, ValueError):
        raise NotArithmetic from None
    return Side(
        value,
        sum(isinstance(node, ast.BinOp) for node in ast.walk(tree)) - percents,
        max((len(digits) for digits in re.findall(r"\.(\d+)", text)), default=0) + (2 if percents else 0),
        bool(re.search(r"[/÷%.]", text)),
        "*" in source,
    )


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        raise NotArithmetic
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Pow) and (right.denominator != 1 or abs(right) > 400 or abs(left) > 10**6):
        raise NotArithmetic
    return OPERATORS[type(node.op)](left, right)


def equal(left: str, right: str) -> bool:
    """Return whether the sides agree as far as their decimals show, with % as 1/100 or as a unit on either side."""
    return any(
        _agree(evaluate(left, percent_left), evaluate(right, percent_right))
        for percent_left in (True, False)
        for percent_right in (True, False)
    )


def _agree(left: Side, right: Side) -> bool:
    if left.value == right.value:
        return True
    if not (left.inexact or right.inexact):
        return False
    results = [side.decimals for side in (left, right) if not side.operators]  # "10 / 3 = 3.33" shows two
    decimals = min(results) if results else max(left.decimals, right.decimals)
    error, last_digit = abs(left.value - right.value), Fraction(1, 10**decimals)
    # A truncated digit is as good as a rounded one, but 7 / 2 is not 2.
    if error <= (last_digit if decimals else last_digit / 2):
        return True
    # 3.14 for π is 0.05% off, and a product inherits the error of what was rounded before: 0.5% is tolerated.
    return (left.scaled or right.scaled) and error * 200 <= abs(left.value)


# ---------------------------------------------------------------------------------------------------------------------
# Equations in text.

ENDS_IN_EXPRESSION = re.compile(rf"{EXPRESSION}*$")
STARTS_WITH_EXPRESSION = re.compile(rf"{EXPRESSION}*")
# "= 5x", "= 3rd", "= 4!" and "= 2:1" continue after the number; "= 5cm" and "= 5 m" are only units.
GLUED = re.compile(r"[A-Z_^{\\²³√!:]|[a-z]\b|th\b|rd\b|st\b|nd\b")
GOES_ON = re.compile(
    r"\s*(r\d|r\b|rem\b|((and|with) (a )?)?remainder|hundred|thousand|million|billion|trillion|dozen|"
    r"[a-z]\s*[-+*/^=×]|\\)",
    re.IGNORECASE,
)


def equations(line: str) -> Iterator[tuple[str, str]]:
    """Yield the pairs (left, right) around each "=" of a line that appear to be arithmetic and nothing else."""
    line = re.sub(r"^\s*(?:\d+[.)]|[-*•])\s+", "", line)  # a list's number or bullet
    line = re.sub(rf"\*\*([$€£]?{NUMBER}%?)\*\*", r"\1", line)  # bold
    parts = re.split(r"(?<![=!<>:+*/-])=(?![=>])", line)
    for before, after in zip(parts, parts[1:], strict=False):
        left = ENDS_IN_EXPRESSION.search(before)[0]
        left = re.split(r"[.,]\s+", left)[-1].lstrip()  # "… fails. 3 + 4", "1, 2, 3 + 4"
        edge = before[: len(before) - len(left)]
        while left.count("(") > left.count(")"):  # "40 (5 x 8 = 40)"
            left = left.partition("(")[2].lstrip()
        # "x2 + 3", "√16 + 2", "8:00 + 2" and "f(30) + 1" do not start with a number of their own,
        if edge and not edge[-1].isspace() and edge[-1] not in "\"'“`*_[":
            continue
        # and "x + 2 + 3 = 5" has an unknown before its first operator.
        if not re.match(r"[\d.$€£(]|[-−–]\S", left) or left[0] in "-−–" and edge.strip()[-1:].isalnum():
            continue
        right = STARTS_WITH_EXPRESSION.match(after)[0]
        following = after[len(right) :]
        if right[-1:].strip() and GLUED.match(following) or GOES_ON.match(following):
            continue
        right = right.strip().rstrip(".,").strip()
        if right.count(")") > right.count("("):
            right = right.partition(")")[0]
        yield left.strip(), right


WORD_SUM = re.compile(
    rf"({NUMBER}) (plus|minus|times|multiplied by|divided by) ({NUMBER}),? (?:is equal to|equals|is|makes|gives) "
    r"(?=[$€£]?\d)",
    re.IGNORECASE,
)
WORD_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "multiplied by": "*", "divided by": "/"}
PERCENT_OF = re.compile(
    rf"({NUMBER})\s?% of ([$€£]?{NUMBER}),? (?:is equal to|equals|is|=) (?=[$€£]?\d)", re.IGNORECASE
)
OTHER_ARITHMETIC = re.compile(
    r"\b(binary|hex\w*|octal|base[ -]\d+|modul\w+|mod|boolean|concatenat\w+|clock|riddle|1984|orwell)\b", re.IGNORECASE
)
SAID_TO_BE_WRONG = re.compile(r"\b(not|wrong|incorrect\w*|false|mistake\w*|error|instead of|never)\b|≠|n't\b", re.I)
RANGE = re.compile(r"[\d.,]+(?:[-–−][\d.,]+)+|\d{1,2}/\d{1,2}/\d{4}")  # 18-24, 555-1234, 2020-01-05, 1/5/2020


def wrong_equation(text: str, asked: str = "") -> str | None:
    """Return the first equation of ``text`` whose sides differ, unless it is quoted from ``asked``; else None."""
    text = text.replace("²", "^2").replace("³", "^3")
    text = WORD_SUM.sub(lambda match: f"{match[1]} {WORD_OPERATORS[match[2].lower()]} {match[3]} = ", text)
    text = PERCENT_OF.sub(r"\1% * \2 = ", text)
    if "=" not in text or OTHER_ARITHMETIC.search(asked) or OTHER_ARITHMETIC.search(text):
        return None
    for line in text.split("\n"):
        if "=" not in line or SAID_TO_BE_WRONG.search(line):
            continue
        for left, right in equations(line):
            if _wrong(left, right) and f"{left}={right}".replace(" ", "") not in asked.replace(" ", ""):
                return f"{left} = {right}"
    return None


def _wrong(left: str, right: str) -> bool:
    try:
        if equal(left, right) or not evaluate(left).operators + evaluate(right).operators or RANGE.fullmatch(left):
            return False
        # "2 + 3 = 5 + 4 = 9" is written loosely, but each sum is right.
        first = re.match(NUMBER, right)
        if first and first[0] != right and equal(left, first[0]):
            return False
        # "Step 1 - 5 + 3 = 8" numbers its line.
        label, dash, tail = re.sub("[−–]", "-", left).partition(" - ")
        return not (dash and label.strip().isdigit() and re.search(r"[-+*/x×÷]", tail) and equal(tail, right))
    except NotArithmetic:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Questions that are a calculation.

ASKED_SUM = re.compile(
    r"(?:what is|what's|calculate|compute|evaluate|solve|work out|find|simplify|how much is)\b"
    rf"[^\d(]{{0,60}}?({EXPRESSION}+)\s*=?\s*[?.]?\s*",
    re.IGNORECASE,
)
ASKED_OF_LIST = re.compile(
    r"(?:what is|calculate|compute|find|determine|work out|give me)\s+the\s+(average|mean|median|sum)(?: value)?\s+of"
    r"(?:\W+(?:the|these|this|following|given|all|list|set|array|data ?set|data|numbers?|integers|values|scores|points|"
    r"of|below)\b)*\W*?([-\d\[({].*|)\W*",
    re.IGNORECASE | re.DOTALL,
)
LIST = re.compile(r"[\[({]?\s*(-?\d+(?:\.\d+)?(?:(?:,\s*(?:and )?|\s+(?:and )?)-?\d+(?:\.\d+)?)+)\s*[\])}]?\W*")
NO_PLAIN_RESULT = re.compile(r"\b(remainder|r|round\w*|nearest)\b|\d[eE^]|10\^", re.IGNORECASE)


def wrong_answer(instruction: str, text: str, output: str) -> str | None:
    """Return evidence if no number of a short output answers "What is 5 x 7?" or "Find the median of 3, 9 and 4.".

    The calculation or the list may also be the whole of ``text``, the record's input.
    """
    if len(output.split()) > 25:
        return None
    shown = re.findall(rf"-?{NUMBER}(?:\s?/\s?{NUMBER})?", output.replace("−", "-"))
    if not shown or NO_PLAIN_RESULT.search(output) or NO_PLAIN_RESULT.search(instruction):
        return None
    try:
        if match := ASKED_OF_LIST.fullmatch(instruction.strip()):
            numbers = LIST.fullmatch(match[2].strip() or text)
            if numbers and not (match[2].strip() and text):
                values = [Fraction(number) for number in re.findall(r"-?\d+(?:\.\d+)?", numbers[1])]
                kind = match[1].lower()
                value = {"sum": sum, "median": statistics.median}.get(kind, statistics.mean)(values)
                if not any(_shows(number, value) for number in shown):
                    return f"the {kind} is {float(value):g}, not {shown[-1]}"
        elif match := ASKED_SUM.fullmatch(f"{instruction.strip().rstrip('.:')} {text}".strip()):
            if not RANGE.fullmatch(match[1].strip()) and evaluate(match[1]).operators:
                if not any(equal(match[1], number) for number in shown):
                    return f"{match[1].strip()} is not {shown[-1]}"
    except NotArithmetic:
        pass
    return None


def _shows(number: str, value: Fraction) -> bool:
    """Return whether a number is the value, or the value rounded or truncated to at least one decimal."""
    side = evaluate(number)
    return side.value == value or side.decimals > 0 and abs(side.value - value) < Fraction(1, 10**side.decimals)
