"""The plot of a report: who wins, by how much, by length, and how close the answers are to the references."""

from __future__ import annotations

import numpy as np

from alpaca.data.plots import FAINT, INK, PAPER, png_bytes
from alpaca.judging.report_text import COUNTS, signed, without_middle

A_COLOR, TIE_COLOR, B_COLOR = "#332288", "#ddcc77", "#cc6677"  # of Paul Tol's "muted" scheme; distinct in gray, too
GRID = "#dfe2e5"
WIDTH = 7.0  # inches at 1,500 pixels
MOST_JUDGES = 8  # drawn; the page's table has them all
STYLE = {
    "font.size": 13,
    "text.parse_math": False,  # "$" in a name is a dollar
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.axisbelow": True,
    **{"axes.spines.left": False, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.titlelocation": "left", "axes.titlesize": 15, "axes.titleweight": "bold", "axes.titlepad": 10},
    **{"grid.color": GRID, "lines.linewidth": 2.5, "lines.markersize": 9},
    **{"legend.facecolor": PAPER, "legend.edgecolor": "none", "legend.framealpha": 1},  # hides the lines behind it
    **{"legend.fontsize": 12, "legend.handlelength": 1, "legend.columnspacing": 1.2},
}
HALF = {"color": INK, "lw": 1.2, "ls": (0, (4, 2))}  # the line at a win rate of one half


def picture(report: dict) -> bytes | None:
    """Return the figures of a report as a PNG, 1,500 pixels wide; None if there is nothing to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    judges = [judge for judge in report["judges"] if judge["judged"]][:MOST_JUDGES]
    panels = []  # (height in inches, function that draws)
    if judges:
        names = [each["name"] for each in report["answerers"]]
        panels.append((0.9 + 0.75 * len(judges), lambda axes: _counts(axes, judges, names)))
        panels.append((1.3 + 0.75 * len(judges), lambda axes: _rates(axes, judges, without_middle(names[0], 24))))
        if len(judges[0]["length"]["bins"]) > 1:
            panels.append((3.6, lambda axes: _bins(axes, judges[0])))
    scored = [each for each in report["answerers"] if each["rouge_l"]]
    if scored:
        panels.append((1.1 + 0.75 * len(scored), lambda axes: _rouge(axes, scored)))
    if not panels:
        return None
    heights = [height for height, _ in panels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=1500 / WIDTH, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12, hspace=0.03)
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (_, draw) in zip(grid, panels, strict=True):
            draw(axes)
        return png_bytes(figure)


def _rows(axes, names: list[str], room: float = 0.0) -> None:
    """Make a row for each name, with the name above it (a margin would be too narrow), and room for a legend below."""
    axes.set(ylim=(len(names) - 0.45 + room, -0.6), yticks=[])
    left, _ = axes.get_xlim()
    for row, name in enumerate(names):
        box = {"fc": PAPER, "ec": "none", "pad": 1.5}  # hides the lines behind a long name
        axes.text(left, row - 0.3, without_middle(name, 48), bbox=box, va="center").set_in_layout(False)


def _legend(axes, handles: list, labels: list[str]) -> None:
    """Write a row of labels at the bottom of the axes, in the room that _rows left."""
    axes.legend(handles, labels, loc="lower left", ncols=3).set_in_layout(False)  # a wide one would narrow all panels


def _counts(axes, judges: list[dict], names: list[str]) -> None:
    axes.set(title="Verdicts", xlim=(0, 1), xticks=[])
    axes.spines["bottom"].set_visible(False)
    _rows(axes, [judge["judge"] for judge in judges], room=0.5)
    left, bars = np.zeros(len(judges)), []
    for key, color, ink in zip(COUNTS, (A_COLOR, TIE_COLOR, B_COLOR), ("white", INK, INK), strict=True):
        shares = np.array([judge[key] / judge["judged"] for judge in judges])
        places = np.arange(len(judges)) + 0.12
        bars.append(axes.barh(places, shares, height=0.42, left=left, color=color, edgecolor=PAPER))
        labels = [f"{judge[key]:,}" if share > 0.05 else "" for judge, share in zip(judges, shares, strict=True)]
        axes.bar_label(bars[-1], labels, label_type="center", color=ink)
        left += shares
    a, b = (without_middle(name, 18) for name in names)
    _legend(axes, bars, [f"{a} wins", "ties", f"{b} wins"])


def _rates(axes, judges: list[dict], name: str) -> None:
    axes.set(title=f"Win rate of {name}", xlim=(0, 1))
    axes.set(xticks=np.arange(0, 1.01, 0.25), xticklabels=["0", "25%", "50%", "75%", "100%"])
    _rows(axes, [judge["judge"] for judge in judges], room=0.5)
    above_legend = -0.6, len(judges) - 0.45
    axes.vlines([0.25, 0.75, 1], *above_legend, color=GRID, lw=0.8)
    axes.vlines(0.5, *above_legend, **HALF)
    drawn = {}
    for row, judge in enumerate(judges):
        drawn["as the answers are"] = _interval(axes, judge["win_rate"], judge["interval"], row, "o", A_COLOR)
        if (equal := judge["length"])["length_controlled"] is not None:
            rate, place = equal["length_controlled"], row + 0.27
            drawn["at equal length"] = _interval(axes, rate, equal["interval"], place, "D", FAINT)
    _legend(axes, list(drawn.values()), list(drawn))


def _interval(axes, value: float, interval: list, y: float, marker: str, color: str, scale: float = 1.0):
    """Draw a figure and its interval; the ends are None for a single item."""
    ends = [scale * end for end in interval if end is not None]
    axes.plot(ends, [y] * len(ends), color=color)
    return axes.plot([scale * value], [y], marker, color=color, clip_on=False)[0]


def _bins(axes, judge: dict) -> None:
    bins = judge["length"]["bins"]
    lows, highs = zip(*(bin["interval"] for bin in bins), strict=True)
    axes.vlines(range(len(bins)), lows, highs, color=A_COLOR, lw=2.5)
    axes.plot([bin["win_rate"] for bin in bins], "o", color=A_COLOR)
    labels = [f"{signed(bin['from'])}\nto {signed(bin['to'])}" for bin in bins]
    axes.set(title=f"… by length ({without_middle(judge['judge'], 36)})")
    axes.set(xlim=(-0.6, len(bins) - 0.4), xticks=range(len(bins)), xticklabels=labels)
    axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], yticklabels=["0", "50%", "100%"])
    axes.axhline(0.5, **HALF)
    axes.grid(axis="y")
    axes.set_xlabel("characters longer than the other answer")


def _rouge(axes, answerers: list[dict]) -> None:
    highest = max(each["rouge_l"]["interval"][1] or each["rouge_l"]["mean"] for each in answerers)
    axes.set(title="ROUGE-L to the reference", xlim=(0, 100 * min(1.0, 1.15 * highest + 0.02)))
    _rows(axes, [each["name"] for each in answerers])
    axes.grid(axis="x")
    for row, each in enumerate(answerers):
        _interval(axes, each["rouge_l"]["mean"], each["rouge_l"]["interval"], row + 0.05, "o", A_COLOR, 100)
