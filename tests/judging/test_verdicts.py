"""verdicts.py, comparison.py, bias.py: judgments folded into verdicts, and what report_text.py claims of them."""

from __future__ import annotations

import hashlib
import json
import math

import pytest

from alpaca import UserError
from alpaca.data.instruction_sets import Answers, Item
from alpaca.judging import bias, comparison, report_text, verdicts
from alpaca.judging.statistics import without_nan
from alpaca.judging.verdicts import Ask, Verdict

A, B = "alpaca", "davinci"
ANSWERS = {A: "an alpaca's answer", B: "davinci's"}


def answers(generator: str, ids, text: str | None = None) -> Answers:
    return Answers(generator, {id: text or ANSWERS[generator] for id in ids}, [], {})


def row(id: str, first: str, preferred, judge="gpt", kind="model", prompt="p" * 64, **more) -> dict:
    second = B if first == A else A
    return {
        "id": id,
        "first": first,
        "second": second,
        "preferred": preferred,
        "judge": {"kind": kind, "name": judge, "prompt_sha256": prompt if kind == "model" else None},
        "error": None if preferred else "no verdict",
        "answers_sha256": [hashlib.sha256(ANSWERS[name].encode()).hexdigest() for name in (first, second)],
    } | more


def asks_of(rows: list[dict]) -> list[Ask]:
    ids = {row["id"] for row in rows}
    return verdicts.read_asks(rows, answers(A, ids), answers(B, ids))


def outcome_of(*rows: dict) -> tuple:
    (verdict,) = verdicts.fold(asks_of(list(rows)))
    return verdict.outcome, verdict.agreed


def some(wins: int, losses: int, ties: int = 0, judge: str = "gpt", kind: str = "model") -> list[Verdict]:
    outcomes = [1.0] * wins + [0.0] * losses + [0.5] * ties
    return [Verdict(str(number), judge, kind, outcome) for number, outcome in enumerate(outcomes)]


# ---------------------------------------------------------------------------------------------------------------------
# Folding.


@pytest.mark.parametrize(
    "a_first, b_first, folded",
    [
        ("first", "second", (1.0, True)),  # a, shown first; a, shown second
        ("second", "first", (0.0, True)),
        ("tie", "tie", (0.5, True)),
        ("first", "first", (0.5, False)),  # the place, twice
        ("second", "second", (0.5, False)),
        ("first", "tie", (0.5, False)),
        ("tie", "first", (0.5, False)),
        ("first", None, (None, None)),
        (None, "tie", (None, None)),
        (None, None, (None, None)),
    ],
)
def test_both_orders_make_one_verdict(a_first, b_first, folded):
    rows = [row("1", A, a_first), row("1", B, b_first)]
    assert outcome_of(*rows) == outcome_of(*rows[::-1]) == folded


def test_a_model_asked_in_one_order_has_no_verdict_yet_and_a_person_has():
    assert verdicts.fold(asks_of([row("1", B, "second")])) == []
    assert outcome_of(row("1", B, None)) == (None, None)
    assert outcome_of(row("1", B, "second", kind="person")) == (1.0, None)
    assert outcome_of(row("1", B, "first", kind="person")) == (0.0, None)
    assert outcome_of(row("1", B, None, kind="person", error="skipped")) == (None, None)


def test_an_ask_that_was_made_again_counts_once_and_the_last_counts():
    assert outcome_of(row("1", A, None), row("1", B, "tie"), row("1", A, "tie")) == (0.5, True)
    assert len(asks_of([row("1", A, "first"), row("1", A, "first")])) == 1


def test_rows_that_a_later_one_of_the_same_ask_replaces_are_counted():
    rows = [row("1", A, "first"), row("1", B, "tie"), row("1", A, "second"), row("2", A, "first", judge="other")]
    assert verdicts.repeated(rows, asks_of(rows)) == {"gpt": 1}
    assert verdicts.repeated(rows[:2], asks_of(rows[:2])) == {}


def test_judges_are_kept_apart_by_name_kind_and_prompt():
    rows = [row("1", first, "tie", prompt=prompt * 64) for first in (A, B) for prompt in "pq"]
    rows += [row("1", A, "first", kind="person"), row("1", A, "first", judge="Ada", kind="person")]
    found = verdicts.fold(asks_of(rows))
    assert {verdict.judge for verdict in found} == {
        "gpt (model, prompt pppppppp)",
        "gpt (model, prompt qqqqqqqq)",
        "gpt (person)",
        "Ada",
    }
    assert len(found) == 4


def test_one_name_at_two_pages_is_two_people_and_their_votes_make_no_tie():
    rows = [row(id, A, "first", judge="Ada", kind="person") for id in "12"]
    rows += [row(id, B, "first", judge="Ada", kind="person") for id in "12"]
    for place, each in enumerate(rows):
        each["judge"]["settings"] = {"seed": 7 + (place > 1)}
    found = {(v.judge, v.id): v.outcome for v in verdicts.fold(asks_of(rows))}
    one, other = "Ada (person, votes of seed 7)", "Ada (person, votes of seed 8)"
    assert found == {(one, "1"): 1.0, (one, "2"): 1.0, (other, "1"): 0.0, (other, "2"): 0.0}
    assert {v.judge for v in verdicts.fold(asks_of(rows[:2]))} == {"Ada"}


def test_other_generators_and_other_answers_are_refused():
    with pytest.raises(UserError, match="item 1 was judged between alpaca and gpt4"):
        asks_of([row("1", A, "tie", second="gpt4")])
    changed = row("1", A, "tie")
    changed["answers_sha256"][1] = "0" * 64
    with pytest.raises(UserError, match="item 1 was judged with another answer of davinci"):
        asks_of([changed])
    with pytest.raises(UserError, match="item 2 was judged with another answer of alpaca"):
        verdicts.read_asks([row("2", A, "tie")], answers(A, ["1"]), answers(B, ["2"]))


def test_the_same_row_with_another_answers_hash_is_refused():
    again = row("1", A, "tie")
    again["answers_sha256"] = ["0" * 64] * 2
    with pytest.raises(UserError, match="another answer"):
        asks_of([row("1", A, "tie"), again])


def test_an_item_without_an_answer_is_no_verdict_at_all():
    missing = row("2", A, None)
    missing["answers_sha256"][0] = None
    found = verdicts.read_asks([row("1", A, "tie"), missing], answers(A, ["1"]), answers(B, ["1", "2"]))
    assert [ask.id for ask in found] == ["1"]
    with pytest.raises(UserError, match="another answer"):  # it has one by now
        verdicts.read_asks([missing], answers(A, ["2"]), answers(B, ["2"]))


@pytest.mark.parametrize(
    "change",
    [
        {"id": 7},
        {"preferred": "A"},
        {"judge": {"kind": "oracle", "name": "x"}},
        {"judge": "gpt"},
        {"judge": {"kind": "person", "name": ["Ada"]}},
        {"judge": {"kind": "person", "name": "half \ud83d"}},
        {"judge": {"kind": "model", "name": "gpt", "prompt_sha256": [1]}},
        {"judge": {"kind": "model", "name": "gpt", "settings": "none"}},
        {"answers_sha256": ["one"]},
    ],
)
def test_a_malformed_row_is_named(change, tmp_path):
    path = tmp_path / "judged.jsonl"
    path.write_text(json.dumps(row("1", A, "tie")) + "\n" + json.dumps(row("1", B, "tie") | change) + "\n")
    with pytest.raises(UserError, match="judged.jsonl, row 2 is not a judgment: give files that judge.py judge"):
        verdicts.read_judgments([path])


def test_rows_that_are_no_objects_or_no_judgments_are_named(tmp_path):
    path = tmp_path / "judged.jsonl"
    for text in ("[[]]", '{"id": "1", "first": "a", "second": "b"}'):
        path.write_text(text + "\n")
        with pytest.raises(UserError, match="row 1"):
            verdicts.read_judgments([path])


def test_a_file_without_a_row_is_named(tmp_path):
    (tmp_path / "judged.jsonl").write_text("\n")
    with pytest.raises(UserError, match="judged.jsonl has no judgments"):
        verdicts.read_judgments([tmp_path / "judged.jsonl"])


def test_a_majority_is_the_side_of_more_votes():
    votes = {"1": [1.0, 1.0, 0.0], "2": [0.5, 0.5, 0.0], "3": [1.0, 0.0], "4": [None, 0.0], "5": [None]}
    given = [Verdict(id, str(n), "person", vote) for id, each in votes.items() for n, vote in enumerate(each)]
    assert {verdict.id: verdict.outcome for verdict in verdicts.majority(given)} == {
        "1": 1.0,
        "2": 0.0,
        "3": 0.5,
        "4": 0.0,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Rates, and what is said of them.


def test_the_published_90_to_89_is_no_difference():
    rate = comparison.win_rate(some(90, 89, 73))
    assert (rate["judged"], rate["wins"], rate["losses"], rate["ties"], rate["p"]) == (252, 90, 89, 73, 1.0)
    assert rate["win_rate"] == pytest.approx(0.502, abs=1e-3)
    assert rate["interval"] == pytest.approx((0.450, 0.554), abs=4e-3)
    assert report_text.win_words(rate | {"interval": (0.45, 0.554)}, "Alpaca", "text-davinci-003") == (
        "Alpaca wins 90, text-davinci-003 89, 73 ties: a win rate of 50.2% for Alpaca (95% interval 45.0% to 55.4%). "
        "The difference is not significant (sign test, p = 1.00). 252 instructions with so many ties detect, four "
        "times in five, only win rates above 57.4% or below 42.6%."
    )


def test_a_difference_is_called_one_for_the_side_that_wins():
    words = report_text.win_words(comparison.win_rate(some(150, 90, 12)), A, B)
    assert "alpaca wins more often than by chance (sign test, p = 0.0001)." in words
    words = report_text.win_words(comparison.win_rate(some(10, 90)), A, B)
    assert "davinci wins more often than by chance (sign test, p < 0.0001)." in words


def test_p_on_either_side_of_a_twentieth_is_told_apart_from_it():
    """142 of 252 have p 0.0506 and 143 have 0.0374: "0.05" would stand for either claim."""
    assert "The difference is not significant (sign test, p = 0.0506)." in report_text.win_words(
        comparison.win_rate(some(142, 110)), A, B
    )
    assert [report_text.p_value(p) for p in (0, 0.00123, 0.0496, 0.0504, 0.234)] == [
        *("< 0.0001", "= 0.0012", "= 0.0496", "= 0.0504"),
        "= 0.23",
    ]


@pytest.mark.parametrize(
    "wins, losses, ties, words",
    [
        (3, 2, 0, "A sign test of 5 decided instructions cannot show one: it takes at least 6."),
        (5, 0, 0, "A sign test of 5 decided instructions cannot show one: it takes at least 6."),
        (1, 0, 30, "A sign test of 1 decided instruction cannot show one: it takes at least 6."),
        (4, 2, 0, "6 decided instructions are too few to show any but the largest difference."),
    ],
)
def test_of_too_few_no_rate_is_named_that_would_have_shown(wins, losses, ties, words):
    said = report_text.win_words(comparison.win_rate(some(wins, losses, ties)), A, B)
    assert said.endswith(words) and "four times in five" not in said


def test_one_item_has_a_wide_interval_and_no_figure_at_equal_length():
    rate, length = comparison.win_rate(some(1, 0)), bias.length_bias(some(1, 0), {"0": (30, 20)})
    assert report_text.win_words(rate, A, B) == (
        "alpaca wins 1, davinci 0, 0 ties: a win rate of 100.0% for alpaca (95% interval 20.7% to 100.0%). "
        "The difference is not significant (sign test, p = 1.00). A sign test of 1 decided instruction cannot show one"
        ": it takes at least 6."
    )
    assert math.isnan(length["length_controlled"]) and report_text.length_words(rate, length, A, B) is None
    five, six = (bias.length_bias(some(n, 0), {str(i): (30, 20 + i) for i in range(n)}) for n in (5, 6))
    assert math.isnan(five["length_controlled"]) and six["length_controlled"] > 0.9


def test_the_place_of_few_asks_is_named_in_the_singular_and_shows_nothing():
    said = report_text.position_words(bias.position_bias(asks_of([row("1", A, "first", kind="person")])))
    assert said == (
        "The answer shown first was preferred in 100.0% of 1 decided comparison (p = 1.00): too few to show position "
        "bias."
    )


def test_failures_and_skips_are_counted_apart_and_left_out():
    rest = [Verdict("x", "gpt", "model", None, failure=why) for why in ("skipped", "HTTP 500", "no verdict")]
    rate = comparison.win_rate(some(3, 1) + rest)
    assert (rate["judged"], rate["failed"], rate["skipped"], rate["win_rate"]) == (4, 2, 1, 0.75)
    rate = comparison.win_rate(rest)
    assert rate["judged"] == 0 and math.isnan(rate["win_rate"])
    assert report_text.win_words(rate, A, B) == "There are no verdicts."


def test_a_judge_that_always_says_first_is_all_bias_and_no_verdict():
    asks = asks_of([row(str(n), first, "first") for n in range(252) for first in (A, B)])
    position = bias.position_bias(asks)
    assert (position["share_first"], position["interval"], position["agreed"]) == (1.0, (1.0, 1.0), 0.0)
    assert position["p"] < 1e-50
    assert report_text.position_words(position) == (
        "The answer shown first was preferred in 100.0% of 504 decided comparisons (p < 0.0001): more often than by "
        "chance. In both orders, the verdict was the same for 0.0% of the items."
    )
    rate = comparison.win_rate(verdicts.fold(asks))
    assert (rate["wins"], rate["ties"], rate["losses"], rate["win_rate"], rate["p"]) == (0, 252, 0, 0.5, 1.0)
    assert "All are ties" in report_text.win_words(rate, A, B)


def test_a_consistent_judge_has_no_position_bias_whoever_wins():
    asks = asks_of([row(str(n), A, "first") for n in range(40)] + [row(str(n), B, "second") for n in range(40)])
    position = bias.position_bias(asks)
    assert (position["decided"], position["share_first"], position["p"], position["agreed"]) == (80, 0.5, 1.0, 1.0)
    assert "no significant position bias" in report_text.position_words(position)


def test_position_bias_is_tested_over_items_not_over_asks():
    """Of 20 items 6 follow the first place in both orders, 0 the second: 2/64, though 26 of 40 asks would be 0.08."""
    rows = [row(str(n), first, "first") for n in range(6) for first in (A, B)]
    rows += [row(str(n), *pair) for n in range(6, 20) for pair in ((A, "first"), (B, "second"))]
    position = bias.position_bias(asks_of(rows))
    assert position["share_first"] == pytest.approx(26 / 40)
    assert position["p"] == pytest.approx(2 / 64)
    assert position["agreed"] == pytest.approx(14 / 20)


def test_where_one_order_alone_was_answered_a_models_preference_is_for_the_answer_not_the_place():
    """Asks with b first always failed: that a won 20 of 20 says nothing of the first place."""
    rows = [row(str(n), A, "first") for n in range(20)] + [row(str(n), B, None) for n in range(20)]
    rows += [row("both", A, "first"), row("both", B, "second"), row("not yet", A, "first")]
    position = bias.position_bias(asks_of(rows))
    assert (position["decided"], position["share_first"], position["p"]) == (2, 0.5, 1.0)


def test_a_persons_position_bias_is_the_binomial_test_of_what_was_first():
    rows = [row(str(n), A, "first" if n < 9 else "second", kind="person") for n in range(10)]
    position = bias.position_bias(asks_of(rows + [row("t", A, "tie", kind="person")]))
    assert (position["decided"], position["share_first"], position["both_orders"]) == (10, 0.9, 0)
    assert position["p"] == pytest.approx(2 * 11 / 1024)


def test_equal_answers_say_nothing_about_a_judges_consistency():
    rows = [row("1", first, "tie") for first in (A, B)]
    rows[0]["answers_sha256"] = rows[1]["answers_sha256"] = [hashlib.sha256(b"same").hexdigest()] * 2
    asks = verdicts.read_asks(rows, answers(A, ["1"], "same"), answers(B, ["1"], "same"))
    position = bias.position_bias(asks)
    assert position["both_orders"] == 0 and math.isnan(position["share_first"])
    assert "No comparison was decided" in report_text.position_words(position)
    assert verdicts.fold(asks)[0].outcome == 0.5


def test_length_bias_bins_by_the_difference():
    """20 items: a's answers are 10 longer where it wins, and 10 shorter where it loses."""
    lengths = {str(n): (30, 20) if n < 10 else (20, 30) for n in range(20)}
    found = bias.length_bias(some(10, 10), lengths)
    assert [(bin["from"], bin["to"], bin["wins"], bin["losses"]) for bin in found["bins"]] == [
        (-10, -10, 0, 10),
        (10, 10, 10, 0),
    ]
    assert (found["longer"], found["correlation"]) == (0.0, pytest.approx(1.0))
    assert found["length_controlled"] == pytest.approx(0.5)
    assert math.isnan(bias.length_bias([], {})["length_controlled"])


@pytest.mark.parametrize(
    "wins, losses, controlled, interval, words",
    [
        (90, 89, 0.52, (0.46, 0.58), None),
        (
            150,
            90,
            0.52,
            (0.46, 0.58),
            "At equal length the difference is no longer significant: a win rate of 52.0% for alpaca",
        ),
        (
            150,
            90,
            0.60,
            (0.55, 0.65),
            "At equal length the difference remains: a win rate of 60.0% for alpaca (95% interval 55.0% to",
        ),
        (150, 90, 0.40, (0.35, 0.45), "At equal length davinci would win more often: a win rate of 40.0% for alpaca"),
        (90, 89, 0.60, (0.55, 0.65), "At equal length alpaca would win more often"),
        (0, 1, 0.005, (0.005, 0.005), None),  # a regression on one item is as sure as it can be
        (5, 0, 0.995, (0.995, 0.995), None),
        (6, 0, 0.995, (0.995, 0.995), "At equal length the difference remains"),
    ],
)
def test_what_equal_length_would_change_is_said(wins, losses, controlled, interval, words):
    rate = comparison.win_rate(some(wins, losses))
    found = report_text.length_words(rate, {"length_controlled": controlled, "interval": interval}, A, B)
    assert found is None if words is None else found.startswith(words)


def test_a_category_of_fewer_than_ten_has_counts_and_no_rate():
    categories = {str(n): "many" if n < 10 else "few" for n in range(13)}
    many, few = comparison.by_category(some(6, 5, 2), categories)
    assert (many["category"], many["wins"], many["losses"], many["ties"], many["win_rate"]) == ("many", 6, 4, 0, 0.6)
    assert many["interval"] == pytest.approx((0.313, 0.832), abs=1e-3)
    assert (few["category"], few["wins"], few["losses"], few["ties"]) == ("few", 0, 1, 2)
    assert math.isnan(few["win_rate"])


def test_agreement_of_each_two_and_of_all():
    three = {"Ada": [1.0, 0.0, 0.5, 1.0], "Grace": [1.0, 0.0, 0.0, None], "gpt": [1.0, 1.0, None, 1.0]}
    given = [
        Verdict(str(n), judge, "model" if judge == "gpt" else "person", outcome)
        for judge, outcomes in three.items()
        for n, outcome in enumerate(outcomes)
    ]
    found = comparison.agreement(given[::-1])
    pairs = {frozenset(p["judges"]): (p["kinds"], p["items"], p["raw"]) for p in found["pairs"]}
    assert pairs == {
        frozenset(["Ada", "Grace"]): ("person–person", 3, pytest.approx(2 / 3)),
        frozenset(["Ada", "gpt"]): ("person–model", 3, pytest.approx(2 / 3)),
        frozenset(["Grace", "gpt"]): ("person–model", 2, 0.5),
    }
    assert [(kind["kinds"], kind["pairs"], kind["items"], kind["raw"]) for kind in found["by_kinds"]] == [
        ("person–person", 1, 3, pytest.approx(2 / 3)),
        ("person–model", 2, 5, pytest.approx(3 / 5)),
    ]
    assert 0 < found["alpha"] < 1 and math.isnan(found["alpha_people"])


def test_equal_answers_are_no_agreement_between_judges():
    same = {"answers_sha256": ["0" * 64] * 2, "note": "equal answers, not asked"}
    rows = [row(id, first, "tie", judge=judge) | same for id in "123" for judge in "pq" for first in (A, B)]
    rows += [row(id, A, "tie", judge="Ada", kind="person") | same for id in "123"]
    equal = [Ask(r["id"], r["judge"]["name"], r["judge"]["kind"], r["first"] == A, "tie", equal=True) for r in rows]
    decided = [row("4", first, prefers) for first, prefers in ((A, "first"), (B, "second"))]
    asks = equal + asks_of([r | {"judge": r["judge"] | {"name": "p"}} for r in decided])
    asks += asks_of([row("4", first, "tie", judge="q") for first in (A, B)])
    found = comparison.agreement(verdicts.fold(asks))
    assert [(pair["judges"], pair["items"], pair["raw"]) for pair in found["pairs"]] == [(["p", "q"], 1, 0.0)]


def test_the_clearest_win_has_all_judges_then_more_of_them_then_the_reference():
    votes = {"all": [1.0, 1.0], "one": [1.0], "near": [1.0, 1.0], "split": [1.0, 0.5], "tie": [0.5], "lost": [0.0, 0.5]}
    given = [Verdict(id, str(n), "model", vote) for id, each in votes.items() for n, vote in enumerate(each)]
    assert comparison.clearest(given, 1.0, {"near": 0.3, "all": 0.1}, 9) == ["near", "all", "one", "split"]
    assert comparison.clearest(given, 0.0, {}, 9) == ["lost"]
    assert comparison.clearest(given, 1.0, {"near": 0.3}, 1) == ["near"]


def test_figures_of_people_come_first_and_their_majority_before_them():
    ids = [str(n) for n in range(12)]
    rows = [row(id, first, "tie") for id in ids for first in (A, B)]
    rows += [row(id, A, "first", judge=name, kind="person") for id in ids for name in ("Ada", "Grace")]
    items = [Item(id, "Say.", "", None, "app") for id in ids]
    figures, agreement, folded = comparison.judge_figures(asks_of(rows), items, answers(A, ids), answers(B, ids))
    assert [each["judge"] for each in figures] == [verdicts.PEOPLE, "Ada", "Grace", "gpt"]
    assert [each["win_rate"] for each in figures] == [1.0, 1.0, 1.0, 0.5]
    assert figures[0]["position"] is None and figures[1]["position"]["decided"] == 12
    assert len(agreement["pairs"]) == 3 and len(folded) == 36


def test_a_person_who_takes_the_majoritys_name_is_not_counted_with_it():
    ids = [str(n) for n in range(12)]
    rows = [row(id, A, "first", judge=name, kind="person") for id in ids for name in ("Ada", verdicts.PEOPLE)]
    items = [Item(id, "Say.", "", None, "app") for id in ids]
    figures, _, _ = comparison.judge_figures(asks_of(rows), items, answers(A, ids), answers(B, ids))
    assert [(each["judge"], each["judged"], each["not_judged"]) for each in figures] == [
        (verdicts.PEOPLE, 12, 0),
        ("Ada", 12, 0),
        (verdicts.PEOPLE, 12, 0),
    ]
    assert figures[0]["position"] is None and figures[2]["position"]["decided"] == 12


def test_a_way_of_asking_is_told_once_though_not_each_row_has_a_servers_word():
    rows = [row("1", A, "tie", answered_by="gpt-5.1-0401"), row("1", B, None), row("2", A, "tie", note="equal")]
    (way,) = verdicts.settings_of(rows, "gpt")
    assert way == rows[0]["judge"] | {"answered_by": "gpt-5.1-0401"}
    assert verdicts.settings_of(rows[1:], "gpt") == [rows[0]["judge"]]


def test_a_report_has_no_nan_for_json_to_choke_on():
    assert without_nan({"a": [math.nan, 1.0], "b": (math.nan, "x")}) == {"a": [None, 1.0], "b": [None, "x"]}
