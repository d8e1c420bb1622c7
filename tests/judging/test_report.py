"""judge.py report: what it writes, on the terminal, as JSON, PNG and a page that is opened in a real browser."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from browser import References
from conftest import call

import judge
from alpaca import UserError
from alpaca.judging import plot as report_plot
from alpaca.judging import report as report_page
from alpaca.judging import report_text

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = (
    "<script>window.hit = 1</script> <img src=x onerror='window.hit = 1'> </p></article></style> &amp; "
    "$x_1$ ![far](http://192.0.2.1/far.png) " + "long" * 100
)
A, B = "alpaca <7B>", "text-davinci-003"
COUNT = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A set of 24, two answerers, a model that prefers a in 18 items, two people, and training data with a leak."""
    folder = tmp_path_factory.mktemp("judged")
    items = [
        {
            "id": f"t{n}",
            "motivation_app": "Gmail" if n < 12 else "<b>Netflix</b>",
            "instruction": f"Write a short note about topic number {n} for my friend.",
            "instances": [
                {"input": HOSTILE if n == 0 else "", "output": f"This is the note about {n}." if n else HOSTILE}
            ],
        }
        for n in range(COUNT)
    ]
    outputs = {
        A: [HOSTILE if n == 0 else f"This is my note about {n}." for n in range(COUNT)],
        B: [f"A note. It says that {n} is a number, and goes on {'and on ' * (n % 5)}." for n in range(COUNT)],
    }
    for name, texts in zip("ab", outputs.values(), strict=True):
        rows = [
            {"id": item["id"], "instruction": item["instruction"], "input": item["instances"][0]["input"]}
            | {"output": text, "generator": (A, B)["ab".index(name)]}
            | ({"reference_loss": 2.0, "reference_tokens": 6} if name == "a" else {})
            for item, text in zip(items, texts, strict=True)
        ]
        write(folder / f"{name}.jsonl", rows)
    write(folder / "set.jsonl", items)

    def row(n: int, first: str, preferred: str | None, judge: str, kind: str) -> dict:
        second = B if first == A else A
        hashes = [hashlib.sha256(outputs[name][n].encode()).hexdigest() for name in (first, second)]
        error = None if preferred else "no verdict in 3 replies"
        return {"id": f"t{n}", "first": first, "second": second, "preferred": preferred, "error": error} | {
            "judge": {"kind": kind, "name": judge, "prompt_sha256": "p" * 64 if kind == "model" else None},
            "answers_sha256": hashes,
        }

    model = []
    for n in range(COUNT):
        for first in (A, B):
            prefers = A if n < 18 else B
            preferred = None if n == 23 else "first" if prefers == first else "second"
            model.append(row(n, first, preferred, "<i>gpt</i>", "model"))
    people = [row(n, (A, B)[n % 2], "first", name, "person") for n in range(COUNT) for name in ("Ada", "Grace")]
    write(folder / "model.jsonl", model)
    write(folder / "people.jsonl", people)
    leak = {"instruction": items[3]["instruction"], "input": "", "output": "…"}
    (folder / "train.json").write_text(json.dumps([{"instruction": "Sing.", "input": "", "output": "La"}, leak]))
    return folder


def write(path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(files, output_dir, **more) -> dict:
    arguments = {"instructions": str(files / "set.jsonl"), "answers": f"{files}/a.jsonl,{files}/b.jsonl"} | more
    judge.report(output_dir=str(output_dir), **arguments)
    return json.loads((output_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def judged(files, tmp_path_factory):
    """A whole report: its folder and its figures."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    judgments = f"{files}/model.jsonl,{files}/people.jsonl"
    return folder, run(files, folder, judgments=judgments, data_path=str(files / "train.json"))


def test_the_figures_of_a_report(judged):
    folder, found = judged
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "report.png"]
    majority, ada, grace, model = found["judges"]
    assert [each["judge"] for each in found["judges"]] == ["people, by majority", "Ada", "Grace", "<i>gpt</i>"]
    assert (model["wins"], model["losses"], model["ties"], model["failed"]) == (18, 5, 0, 1)
    assert (ada["wins"], ada["losses"], ada["position"]["share_first"]) == (12, 12, 1.0)
    assert model["position"]["agreed"] == 1.0 and model["asked_with"][0]["prompt_sha256"] == "p" * 64
    assert [c["category"] for c in model["categories"]] == ["Gmail", "<b>Netflix</b>"]
    first, second = found["answerers"]
    assert first["loss"]["mean"] == 2.0 and second["loss"] is None
    assert first["rouge_l"]["mean"] > second["rouge_l"]["mean"]
    assert found["overlap"]["same_task"] == ["t3"] and found["overlap"]["nearest"][0]["record"] == 1
    assert {example["winner"] for example in found["examples"]} == {A, B}
    assert "<i>gpt</i> gave no verdict on 1 item: left out, not counted as ties." in found["notes"]
    assert "NaN" not in (folder / "report.json").read_text()


def test_a_report_names_what_it_was_made_from(files, judged):
    named = judged[1]["files"]
    assert {kind: [each["file"] for each in of_kind] for kind, of_kind in named.items()} == {
        "set": ["set.jsonl"],
        "answers": ["a.jsonl", "b.jsonl"],
        "judgments": ["model.jsonl", "people.jsonl"],
        "data": ["train.json"],
    }
    for each in sum(named.values(), []):
        assert each["sha256"] == hashlib.sha256((files / each["file"]).read_bytes()).hexdigest()
    assert judged[1]["versions"].keys() == {"python", "numpy", "scipy", "rapidfuzz", "rouge-score", "nltk"}
    assert judged[1]["versions"]["numpy"] == sys.modules["numpy"].__version__


def test_the_page_says_how_a_model_was_asked_and_a_second_way_is_told(files, tmp_path):
    rows = [json.loads(line) for line in (files / "model.jsonl").read_text().splitlines()]
    for row in rows:
        row["judge"]["settings"] = {"temperature": 0.0, "seed": 1}
        row["answered_by"] = "<b>gpt-5.1</b>-0401"
    write(tmp_path / "again.jsonl", [row | {"judge": row["judge"] | {"settings": {"seed": 2}}} for row in rows])
    write(tmp_path / "once.jsonl", rows)
    found = run(files, tmp_path / "out", judgments=f"{tmp_path}/once.jsonl")
    said = "Asked with prompt pppppppp, temperature 0.0, seed 1; its server names &lt;b&gt;gpt-5.1&lt;/b&gt;-0401."
    assert said in (tmp_path / "out" / "report.html").read_text()
    assert not [note for note in found["notes"] if "ways" in note]
    found = run(files, tmp_path / "out", judgments=f"{tmp_path}/once.jsonl,{tmp_path}/again.jsonl")
    assert [note for note in found["notes"] if "was asked in 2 ways" in note]
    assert found["judges"][0]["judged"] == 23  # not 46


def test_the_terminal_says_who_wins_and_whether_by_chance(judged):
    text = report_text.terminal(judged[1])
    flat = " ".join(text.split())
    assert f"{A} wins 18, {B} 5, 0 ties" in flat and f"{A} wins more often than by chance" in flat
    assert "The difference is not significant" in flat  # Ada, Grace and both
    assert "The answer shown first was preferred in 100.0% of 24 decided comparisons (p < 0.0001)" in flat
    assert "share 8 consecutive words with a record: 1 of the 24 that are long enough" in flat
    table = next(line for line in text.splitlines() if line.startswith("<i>gpt</i>  "))
    assert table.split()[1:6] == ["23", "18", "0", "5", "1"]


def test_a_judge_that_always_says_a_is_reported_as_bias(files, teacher, tmp_path):
    """From the server's reply to the report, by judge.py's own judgments; one reply in both orders has no verdict."""

    def answer(number, body):
        return "I cannot decide." if "topic number 5 " in body["messages"][0]["content"] else "Verdict: A"

    arguments = {"instructions": str(files / "set.jsonl"), "answers": f"{files}/a.jsonl,{files}/b.jsonl"}
    base_url = teacher(answer).base_url
    call(judge.judge, **arguments, output_path=str(tmp_path / "j.jsonl"), model_name="m", base_url=base_url)
    (found,) = run(files, tmp_path / "out", judgments=str(tmp_path / "j.jsonl"))["judges"]
    assert (found["wins"], found["ties"], found["losses"], found["failed"]) == (0, COUNT - 1, 0, 1)
    assert (found["win_rate"], found["p"], found["not_judged"]) == (0.5, 1.0, 0)
    assert (found["position"]["share_first"], found["position"]["agreed"]) == (1.0, 0.0)
    assert found["asked_with"][0]["answered_by"] == "m"


def test_without_judgments_there_are_the_reference_metrics_of_any_number_of_answerers(files, tmp_path, capsys):
    third = [json.loads(line) | {"generator": "third"} for line in (files / "b.jsonl").read_text().splitlines()]
    write(tmp_path / "c.jsonl", third[:-2])
    names = f"{files}/a.jsonl,{files}/b.jsonl,{tmp_path}/c.jsonl"
    found = run(files, tmp_path / "out", answers=names)
    assert found["judges"] == [] and [each["name"] for each in found["answerers"]] == [A, B, "third"]
    assert found["notes"] == ["third has no answer to 2 instructions, which are left out: t22, t23"]
    assert "third" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()


def test_references_that_rouge_does_not_see_are_told(tmp_path):
    write(tmp_path / "set.jsonl", [{"instruction": "Greet.", "output": text} for text in ("Привет!", "Hello!")])
    rows = [{"instruction": "Greet.", "output": text, "generator": "a"} for text in ("Привет!", "Hello!")]
    write(tmp_path / "a.jsonl", rows)
    found = run(tmp_path, tmp_path / "out", answers=f"{tmp_path}/a.jsonl")
    assert found["answerers"][0]["rouge_l"]["mean"] == 0.5
    assert found["notes"] == ["ROUGE-L reads only a to z and 0 to 9, which omits most of 1 reference."]


def test_answers_that_were_cut_off_are_counted_and_told(files, tmp_path):
    rows = [json.loads(line) for line in (files / "a.jsonl").read_text().splitlines()]
    ends = ["length", "length", *["stop"] * (COUNT - 2)]
    write(tmp_path / "a.jsonl", [row | {"finish_reason": end} for row, end in zip(rows, ends, strict=True)])
    found = run(files, tmp_path / "out", answers=f"{tmp_path}/a.jsonl,{files}/b.jsonl")
    assert [each["cut"] for each in found["answerers"]] == [2, None]  # nobody says how b's ended
    assert found["notes"] == [f"{A} was cut off in 2 of {COUNT} answers: raise max_new_tokens."]


def test_a_model_before_and_after_training_is_compared_by_its_loss(files, tmp_path):
    before = [json.loads(line) for line in (files / "a.jsonl").read_text().splitlines()]
    write(tmp_path / "after.jsonl", [row | {"generator": "after", "reference_loss": 1.5} for row in before])
    found = run(files, tmp_path / "out", answers=f"{files}/a.jsonl,{tmp_path}/after.jsonl")
    head, first, second = report_text.reference_table(found)
    assert head[-1] == "loss difference" and head[4] == "difference from the first"
    assert first[-3:] == ["2.000 (2.000 to 2.000)", "7.39", "–"]
    assert second[-3:] == ["1.500 (1.500 to 1.500)", "4.48", "−0.500 (−0.500 to −0.500)"]
    found["answerers"][1]["rouge_l_difference"] = {"mean": 0.097, "interval": (-0.01, 0.2)}
    assert report_text.reference_table(found)[2][4] == "+9.7 (−1.0 to +20.0)"


def test_a_model_whose_losses_are_all_nan_has_none_and_that_is_told(files, tmp_path):
    rows = [
        json.loads(line) | {"reference_loss": float("nan")} for line in (files / "a.jsonl").read_text().splitlines()
    ]
    write(tmp_path / "a.jsonl", rows)
    found = run(files, tmp_path / "out", answers=f"{tmp_path}/a.jsonl")
    assert found["answerers"][0]["loss"] is None
    assert found["notes"] == [f"{A}'s loss is not finite on {COUNT} references: left out."]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answers": "a.jsonl,,b.jsonl"}, "--answers 'a.jsonl,,b.jsonl' has a comma without a file"),
        ({"answers": "{0}/a.jsonl,{0}/a.jsonl"}, "give each its own name"),
        ({"answers": "{0}/a.jsonl", "judgments": "{0}/model.jsonl"}, "--judgments needs two files of --answers, not 1"),
        ({"judgments": "{0}/missing.jsonl"}, "missing.jsonl does not exist"),
        ({"judgments": "{0}/a.jsonl"}, "a.jsonl, row 1 is not a judgment: give files that judge.py"),
        ({"data_path": "{0}/missing.json"}, "missing.json does not exist"),
        ({"output_dir": "{0}/a.jsonl"}, "--output_dir .*a.jsonl is a file or read-only: choose another folder"),
        ({"output_dir": "{0}/a.jsonl/new"}, "--output_dir .*a.jsonl/new .*a.jsonl is a file or read-only: choose"),
    ],
)
def test_a_bad_argument_is_one_line_and_nothing_is_written(change, message, files, tmp_path):
    change = {key: value.format(files) for key, value in change.items()}
    with pytest.raises(UserError, match=message) as caught:
        run(files, **{"output_dir": tmp_path / "out"} | change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_report_of_two_items_and_of_a_judge_without_a_verdict(files, tmp_path):
    """Too little for bins, categories or a picture of them: dashes, and no warning of numpy's."""
    for name in ("set", "a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join((files / f"{name}.jsonl").read_text().splitlines(True)[-2:]))
    judged = (files / "model.jsonl").read_text().splitlines(True)[-2:]
    (tmp_path / "failed.jsonl").write_text("".join(judged))
    found = run(tmp_path, tmp_path / "out", judgments=f"{tmp_path}/failed.jsonl")
    assert found["judges"][0]["judged"] == 0 and found["judges"][0]["win_rate"] is None
    assert found["judges"][0]["words"] == "There are no verdicts."
    assert report_text.judge_table(found)[1] == ["<i>gpt</i>", "0", "0", "0", "0", "1", "–", "–", "–", "–"]


def test_one_item_is_named_in_the_singular_has_a_wide_interval_and_no_figure_at_equal_length(files, tmp_path, capsys):
    for name, row in (("set", 2), ("a", 2), ("b", 2), ("people", 4)):  # Ada prefers a in the third item
        (tmp_path / f"{name}.jsonl").write_text((files / f"{name}.jsonl").read_text().splitlines(True)[row])
    found = run(tmp_path, tmp_path / "out", judgments=f"{tmp_path}/people.jsonl", data_path=str(files / "train.json"))
    assert report_text.judge_table(found)[1] == [
        *["Ada", "1", "1", "0", "0", "0"],
        *["100.0% (20.7 to 100.0)", "1.0000", "–", "100.0%"],
    ]
    printed = capsys.readouterr()
    shown, text = " ".join(printed.out.split()), (tmp_path / "out" / "report.html").read_text()
    assert "published set of 252 (1 instruction, git blob" in printed.err
    for said in (shown, text):
        assert "1 instruction from set.jsonl" in said and "1 instructions" not in said and "(2 records)" in said
        assert "A sign test of 1 decided instruction cannot show one: it takes at least 6." in said
        assert (
            "At equal length its" not in said
            and "At equal length the difference remains" not in said
            and "nan" not in said
        )
    assert "Does the longer answer win?" not in text and "too narrow" not in shown
    assert (tmp_path / "out" / "report.png").exists()


def test_a_terminal_gets_no_control_characters_from_a_file(judged):
    said = report_text.terminal(judged[1] | {"notes": ["third has no answer to 1 instruction: \x1b[2J\x07"]})
    assert "\x1b" not in said and "\\x1b[2J" in said


def test_a_very_long_name_does_not_widen_the_terminals_tables(judged):
    found = judged[1] | {"judges": [{**each, "judge": "j" * 300 + " (prompt 1)"} for each in judged[1]["judges"]]}
    said = report_text.terminal(found).splitlines()
    (table,) = (said[n + 1 :] for n, line in enumerate(said) if line.startswith("wins, losses and rates"))
    assert table[1].startswith("j" * 30 + "…" + "j" * 18 + " (prompt 1)  ") and max(map(len, table)) < 180


def test_judgments_that_were_given_twice_are_told_and_count_once(files, tmp_path):
    found = run(files, tmp_path, judgments=f"{files}/model.jsonl,{files}/model.jsonl")
    assert found["judges"][0]["judged"] + found["judges"][0]["failed"] == COUNT
    assert f"<i>gpt</i> has {2 * COUNT} rows replaced by a later one on the same pair." in found["notes"]


def test_without_matplotlib_the_page_has_no_picture_and_says_why(judged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report_page.write(judged[1], tmp_path) == ["report.json", "report.html"]
    text = (tmp_path / "report.html").read_text()
    assert "<img" not in text and "matplotlib is not installed" in text


@pytest.mark.parametrize("name", ["report.json", "report.png", "report.html"])
def test_a_failed_write_leaves_the_old_file(judged, tmp_path, monkeypatch, name):
    """Each of the three is replaced whole or not at all; what would be written differs from what is there."""
    report_page.write(judged[1], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace, failed = os.replace, []

    def full(source, target):
        if Path(target).name == name:
            failed.append(Path(source).read_bytes())
            raise OSError("disk")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    judges = [each | {"judge": f"another {each['judge']}"} for each in judged[1]["judges"]]
    with pytest.raises(OSError, match="disk"):
        report_page.write(judged[1] | {"judges": judges}, tmp_path)
    assert (tmp_path / name).read_bytes() == before[name] and failed[0] != before[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.png"]


def test_the_page_holds_all_it_shows_and_asks_for_nothing(judged):
    references = References((judged[0] / "report.html").read_text())
    assert references.outside == []
    (image,) = references.images
    assert image["src"].startswith("data:image/png;base64,") and f"{A} wins" in image["alt"]
    text = (judged[0] / "report.html").read_text()
    assert "<script" not in text and "<i>gpt" not in text and "<b>Netflix" not in text


def test_the_picture_is_drawn_whatever_the_names(judged):
    names = [{**each, "name": "$x_1$ " + "very long name " * 9} for each in judged[1]["answerers"]]
    judges = [{**each, "judge": "$" + "judge " * 30} for each in judged[1]["judges"]] * 3
    png = report_plot.picture(judged[1] | {"answerers": names, "judges": judges})
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20], "big") == 1500
    foreign = [{**each, "name": "日本語 🦙"} for each in judged[1]["answerers"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one for each letter that the font lacks would fill a terminal
        report_plot.picture(judged[1] | {"answerers": foreign})
    assert report_plot.picture({"judges": [], "answerers": [{"rouge_l": None}]}) is None


def test_verdicts_that_are_all_alike_have_an_interval_as_wide_as_they_are_few(files, tmp_path):
    """Resamples of them are all equal: a bootstrap would say 100.0 to 100.0."""
    rows = [json.loads(line) for line in (files / "people.jsonl").read_text().splitlines()]
    for count, interval in ((1, "20.7"), (3, "43.9"), (12, "75.8")):
        own = [row | {"preferred": "first" if row["first"] == A else "second"} for row in rows]
        write(tmp_path / "j.jsonl", [row for row in own if row["judge"]["name"] == "Ada"][:count])
        found = run(files, tmp_path / "out", judgments=f"{tmp_path}/j.jsonl")
        assert report_text.judge_table(found)[1][6] == f"100.0% ({interval} to 100.0)"
        assert f"95% interval {interval}% to 100.0%" in found["judges"][0]["words"]


def test_the_line_at_one_half_ends_above_the_legend(judged):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    report_plot._rates(axes, judged[1]["judges"], "a")
    canvas.draw()
    (half,) = (each for line in axes.collections for each in line.get_segments() if each[0][0] == 0.5)
    lowest = min(y for _, y in axes.transData.transform(half))
    assert lowest >= axes.get_legend().get_window_extent(canvas.get_renderer()).y1


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_in_a_browser_is_as_wide_as_a_phone_and_runs_nothing_it_was_told(judged):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in ((360, "light"), (360, "dark"), (1200, "light")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            asked, errors = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.on("console", lambda message, errors=errors: errors.append(message.text))
            page.goto((judged[0] / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollHeight") < (7_000 if width == 360 else 5_500)
            hint = page.evaluate("getComputedStyle(document.querySelector('.wide'), '::before').content")
            assert ("Scroll sideways" in hint) == (width == 360)
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, scheme)
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == [] and errors == []
            assert page.evaluate("window.hit") is None
            assert (
                page.locator("main").inner_text().count(HOSTILE.split("</p>")[0].strip()) == 3
            )  # input, answer, reference
            back, ink = (page.evaluate(f"getComputedStyle(document.body).{c}") for c in ("backgroundColor", "color"))
            assert (luminance(back) < luminance(ink)) == (scheme == "dark")
            page.close()
        browser.close()


def luminance(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
