"""docs/troubleshooting.md lists every error of the source: python tests/test_troubleshooting.py writes its table again.

The second column is written by hand and is kept: what to do, where the message does not say so after a ":", ";" or ",".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
HEADING = "## Every error message\n"
ERRORS = {"UserError", "RankError", "Unanswerable"}


def messages(source: str) -> Iterator[str]:
    """Yield each error's text in a source, in order; what is filled in at run time is in {}."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for call in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset)):
        if getattr(call.func, "id", None) in ERRORS:
            around = [f for f in functions if f.lineno <= call.lineno <= f.end_lineno]
            values = _values(max(around, key=lambda f: f.lineno)) if around else {}
            message = call.args[-1]
            for part in filter(_is_text, values.get(message.id, ())) if isinstance(message, ast.Name) else [message]:
                text = " ".join(_text(part, values).split())
                if re.search("[a-z]", re.sub(r"\{.*?\}", "", text)):
                    yield text


def _values(function: ast.AST) -> dict[str, list[ast.expr]]:
    """Return all that is assigned to each variable of a function; in a loop over tuples, from each tuple."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        pairs = []
        if isinstance(node, ast.Assign | ast.NamedExpr):
            pairs = [(node.targets[0] if isinstance(node, ast.Assign) else node.target, node.value)]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            pairs = [(node.target, value) for value in node.iter.elts]
        for target, value in pairs:
            both_tuples = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for name, one in zip(target.elts, value.elts, strict=False) if both_tuples else [(target, value)]:
                if isinstance(name, ast.Name):
                    found.setdefault(name.id, []).append(one)
    return found


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


def _text(node: ast.expr, values: dict[str, list[ast.expr]]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.FormattedValue) else part for part in node.values)
        return "".join(_text(part, values) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, values) + _text(node.right, values)
    if isinstance(node, ast.IfExp) and _is_text(node):
        return "/".join(filter(None, (_text(node.body, values), _text(node.orelse, values))))
    if isinstance(node, ast.Name):
        others = dict(values)  # a text may be made longer under its own name
        texts = others.pop(node.id, [])
        return _text(texts[0], others) if len(texts) == 1 and _is_text(texts[0]) else f"{{{node.id}}}"
    if isinstance(node, ast.Attribute):
        return f"{{{node.attr}}}"
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "counted":
        return f"{{…}} {ast.literal_eval(node.args[1])}s"
    if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "strip":
        return _text(node.func.value, values)
    return "{…}"


def sections() -> dict[str, list[str]]:
    """Return the messages of each script, then of each room of the package."""
    found: dict[str, list[str]] = {}
    for path in [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "alpaca").rglob("*.py"))]:
        parts = path.relative_to(ROOT).parts
        place = parts[0] if len(parts) == 1 else "/".join(parts[:2])
        found.setdefault(place, []).extend(messages(path.read_text()))
    return {place: list(dict.fromkeys(texts)) for place, texts in found.items() if texts}


def cures(page: str) -> dict[str, str]:
    """Return what the table's second column says to each message."""
    rows = re.findall(r"^\| `` (.*?) `` \| (.*?) ?\|$", page.partition(HEADING)[2], re.M)
    return {message.replace(r"\|", "|"): cure for message, cure in rows}


def table(known: dict[str, str]) -> str:
    text = f"""{HEADING}
Braces mark what is filled in. The second column says what to do where the message does not.
"""
    for place, texts in sections().items():
        text += f"\n### {place}\n\n| message | what to do |\n|---|---|\n"
        text += "".join(f"| `` {one.replace('|', chr(92) + '|')} `` | {known.get(one, '')} |\n" for one in texts)
    return text


def test_the_page_lists_every_error_and_no_other():
    page = PAGE.read_text()
    written = page[page.index(HEADING) :]
    assert written == table(cures(page)), "run python tests/test_troubleshooting.py, and fill in the second column"


def test_each_error_says_what_to_do_or_the_page_does():
    rows = cures(PAGE.read_text()).items()
    assert not [message for message, cure in rows if not (cure or re.search("[:;?,] ", message))]


def test_the_page_finds_a_message_however_it_is_put_together():
    source = """
def f(path, many):
    why, cure = f"has {len(many)} parts", "drop one"
    if many:
        raise UserError(f"{path} {why}: {cure}" + (" now" if path else ""))
    for bad, said in ((path, "no path"), (many, f"no {many.name}")):
        if bad:
            raise UserError(said)
    raise UserError(f"{counted(2, 'row')}: {path}")
"""
    assert list(messages(source)) == ["{path} has {…} parts: drop one now", "no path", "no {name}", "{…} rows: {path}"]


if __name__ == "__main__":
    before = PAGE.read_text()
    PAGE.write_text(before.partition(HEADING)[0] + table(cures(before)))
    print(f"{PAGE}: {sum(map(len, sections().values()))} messages")
