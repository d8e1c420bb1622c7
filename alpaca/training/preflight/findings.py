"""What preflight has to say: findings, and one report of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alpaca import UserError

COLOURS = {"error": "31", "warning": "33", "note": "36"}  # SGR codes: red, yellow, cyan


@dataclass(frozen=True)
class Finding:
    """One thing that preflight found.

    Attributes:
        level: "error" (training would be wasted: it stops), "warning" (it may be) or "note" (good to know).
        what: what is the case, in one line.
        why: what it would do to the run.
        cure: what to do about it; empty for a note that needs nothing.
    """

    level: str
    what: str
    why: str = ""
    cure: str = ""


def colour_wanted(stream=None) -> bool:
    """Whether the stream (stdout by default) is a terminal, and NO_COLOR is not set (no-color.org)."""
    return (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, code: str, colour: bool) -> str:
    """The text in an SGR colour code ("31"), line by line, since a pager forgets the colour at a line's end."""
    if not colour:
        return text
    return "\n".join(f"\033[{code}m{line}\033[0m" if line else line for line in text.split("\n"))


def gather(findings: list) -> list:
    """The findings (or anything hashable) of all ranks, each once, in the same order on every rank.

    A rank that alone found an error would leave the others waiting for it in their next collective.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(dict.fromkeys(findings))
    all_of_them: list = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, findings)
    return list(dict.fromkeys(finding for rank in all_of_them for finding in rank))


def format_report(findings: Iterable[Finding], colour: bool = False) -> str:
    """The report: errors first, each finding with what, why and cure; or one line when there is nothing to say."""
    order = list(COLOURS)
    lines = []
    for finding in sorted(findings, key=lambda finding: order.index(finding.level)):
        lines.append(f"{paint(f'{finding.level:8}', COLOURS[finding.level], colour)} {finding.what}")
        lines += [f"{'':8}   why:  {finding.why}"] if finding.why else []
        lines += [f"{'':8}   cure: {finding.cure}"] if finding.cure else []
    return "\n".join(lines)


def finish(findings: Sequence[Finding]) -> None:
    """Prints the report on rank 0.

    Raises:
        UserError: there are errors; it is one line with the first one, and how many more the report names.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        print(format_report(findings, colour_wanted()), flush=True)
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more, above)" if len(errors) > 1 else ""
        raise UserError(f"preflight: {errors[0].what}: {errors[0].cure}{more}; nothing was trained")


def raise_errors(findings: Sequence[Finding]) -> None:
    """Before all is known: ends with the report so far where it has an error, and says nothing where it has none."""
    if any(finding.level == "error" for finding in findings):
        finish(findings)


def lowest(value: float) -> float:
    """The lowest of a number over all ranks, so that each of them reports and decides the same."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return min(values)
