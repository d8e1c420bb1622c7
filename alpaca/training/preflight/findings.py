"""The preflight's findings, and one report of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from accelerate.utils import gather_object

from alpaca import UserError
from alpaca.common.cli import say

COLOURS = {"error": "31", "warning": "33", "note": "36"}  # SGR codes: red, yellow, cyan


@dataclass(frozen=True)
class Finding:
    """One thing that preflight found."""

    level: str  # "error" (training would be wasted, so it stops), "warning" (it may be wasted) or "note"
    what: str  # what was found, in one line
    why: str = ""  # what it would do to the run
    cure: str = ""  # what to do about it


def colour_wanted() -> bool:
    """Return whether stdout is a terminal and NO_COLOR is not set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, code: str) -> str:
    """Return the text in an SGR colour code ("31") if colour is wanted."""
    return f"\033[{code}m{text}\033[0m" if colour_wanted() else text


def gather(findings: list[Finding]) -> list[Finding]:
    """Return the findings of all ranks, each once, in the same order on every rank; every rank must call it.

    If only one rank stopped at an error, the others would wait for it in their next collective.
    """
    return list(dict.fromkeys(gather_object(findings)))


def lowest(value: float) -> float:
    """Return the lowest value of all ranks, so that each reports and decides the same; every rank must call it."""
    return min(gather_object([value]))


def format_report(findings: Iterable[Finding]) -> str:
    """Return the report: errors first, then warnings and notes, each with what, why and cure."""
    lines = []
    for finding in sorted(findings, key=lambda finding: list(COLOURS).index(finding.level)):
        lines.append(f"{paint(f'{finding.level:8}', COLOURS[finding.level])} {finding.what}")
        lines += [f"{'':8}   why:  {finding.why}"] if finding.why else []
        lines += [f"{'':8}   cure: {finding.cure}"] if finding.cure else []
    return "\n".join(lines)


def finish(findings: Sequence[Finding]) -> None:
    """Print the report on rank 0.

    Raises:
        UserError: there are errors; one line with the first of them and the number of others.
    """
    say(format_report(findings))
    if errors := [finding for finding in findings if finding.level == "error"]:
        more = f" (and {len(errors) - 1} more, above)" if len(errors) > 1 else ""
        raise UserError(f"preflight: {errors[0].what}: {errors[0].cure}{more}; nothing was trained")


def raise_errors(findings: Sequence[Finding]) -> None:
    """Finish if there is an error among the findings so far; else print nothing."""
    if any(finding.level == "error" for finding in findings):
        finish(findings)
