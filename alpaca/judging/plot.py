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
        return png_bytes(figure, tight=False)


def _rows(axes, names: list[str], room: float = 0.0) -> None:
    """Make a row for each name, with the name above it (a margin would be too narrow), and room for a legend below."""
    axes.set(ylim=(len(names) - 0.45 + room, -0.6), yticks=[])
    left, _ = axes.get_xlim()
    for row, name in enumerate(names):
        box = {"fc": PAPER, "ec": "none", "pad": 1.5}  # hides the lines behind a long name
        axes.text(left, row - 0.3, without_middle(name, 48), bbox=box, va="center").set_in_layout(False)


def _counts(axes, judges: list[dict], names: list[str]) -> None:
    axes.set(title="Verdicts", xlim=(0, 1), xticks=[])
    axes.spines["bottom"].set_visible(False)
    _rows(axes, [judge["judge"] for judge in judges], room=0.5)
    places, left = np.arange(len(judges)) + 0.12, np.zeros(len(judges))
    a, b = (f"{without_middle(name, 18)} wins" for name in names)
    parts = (A_COLOR, "white", a), (TIE_COLOR, INK, "ties"), (B_COLOR, INK, b)
    for key, (color, ink, name) in zip(COUNTS, parts, strict=True):
        shares = np.array([judge[key] / judge["judged"] for judge in judges])
        bars = axes.barh(places, shares, height=0.42, left=left, color=color, edgecolor=PAPER, label=name)
        labels = [f"{judge[key]:,}" if share > 0.05 else "" for judge, share in zip(judges, shares, strict=True)]
        axes.bar_label(bars, labels, label_type="center", color=ink)
        left += shares
    axes.legend(loc="lower left", ncols=3).set_in_layout(False)  # a wide one would narrow all panels


def _rates(axes, judges: list[dict], name: str) -> None:
    axes.set(title=f"Win rate of {name}", xlim=(0, 1), xticks=np.arange(0, 1.01, 0.25))
    axes.xaxis.set_major_formatter("{x:.0%}")
    _rows(axes, [judge["judge"] for judge in judges], room=0.5)
    above_legend = -0.6, len(judges) - 0.45
    axes.vlines([0.25, 0.75, 1], *above_legend, color=GRID, lw=0.8)
    axes.vlines(0.5, *above_legend, **HALF)
    rates = [(row, judge["win_rate"], judge["interval"]) for row, judge in enumerate(judges)]
    lengths = [(row + 0.27, judge["length"]) for row, judge in enumerate(judges)]
    equal = [(row, length["length_controlled"], length["interval"]) for row, length in lengths]
    _intervals(axes, rates, label="as the answers are")
    _intervals(axes, equal, "D", FAINT, label="at equal length")
    axes.legend(loc="lower left", ncols=3).set_in_layout(False)


def _intervals(axes, figures: list[tuple], marker: str = "o", color: str = A_COLOR, label: str | None = None) -> None:
    """Draw figures, each (row, value, its interval), without those that are None; a single item has no interval."""
    for row, value, ends in (figure for figure in figures if figure[1] is not None):
        axes.plot([value if end is None else end for end in ends], [row] * 2, color=color)
        axes.plot([value], [row], marker, color=color, clip_on=False, label=label)
        label = None  # once in the legend


def _bins(axes, judge: dict) -> None:
    bins = judge["length"]["bins"]
    lows, highs = zip(*(bin["interval"] for bin in bins), strict=True)
    axes.vlines(range(len(bins)), lows, highs, color=A_COLOR, lw=2.5)
    axes.plot([bin["win_rate"] for bin in bins], "o", color=A_COLOR)
    labels = [f"{signed(bin['from'])}\nto {signed(bin['to'])}" for bin in bins]
    axes.set(title=f"… by length ({without_middle(judge['judge'], 36)})")
    axes.set(xlim=(-0.6, len(bins) - 0.4), xticks=range(len(bins)), xticklabels=labels, ylim=(0, 1), yticks=[0, 0.5, 1])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.axhline(0.5, **HALF)
    axes.grid(axis="y")
    axes.set_xlabel("characters longer than the other answer")


def _rouge(axes, answerers: list[dict]) -> None:
    highest = max(each["rouge_l"]["interval"][1] or each["rouge_l"]["mean"] for each in answerers)
    axes.set(title="ROUGE-L to the reference", xlim=(0, min(1.0, 1.15 * highest + 0.02)))
    axes.xaxis.set_major_formatter(lambda score, _: f"{100 * score:g}")
    _rows(axes, [each["name"] for each in answerers])
    axes.grid(axis="x")
    scores = [each["rouge_l"] for each in answerers]
    _intervals(axes, [(row + 0.05, score["mean"], score["interval"]) for row, score in enumerate(scores)])
