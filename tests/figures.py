"""The figures in README.md and docs/results.md: for each row, the value in the result file that it names.

A row is found by its file and by a phrase of its first cell; the function returns its second cell from the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable


def minutes(seconds: int) -> str:
    return f"{seconds // 60} min {seconds % 60} s"


def eval_loss(run: dict) -> str:
    (made,) = [stage["made"] for stage in run["stages"] if stage["stage"] == "fine-tuning"]
    examples, before, after = re.findall(r"[\d.]+\d|\d", made)
    return f"{float(before):.3f} → {float(after):.3f} on {examples} held-out records"


def rouge_l(index: int) -> Callable:
    return lambda run: f"{100 * run['answerers'][index]['rouge_l']['mean']:.1f}"


def rouge_l_gain(run: dict) -> str:
    difference = run["answerers"][1]["rouge_l_difference"]
    mean, low, high = (100 * value for value in (difference["mean"], *difference["interval"]))
    return f"{rouge_l(0)(run)} → {rouge_l(1)(run)}, difference {mean:.1f} (95%: {low:.1f} to {high:.1f})"


def loss_gain(run: dict) -> str:
    (low, high), means = run["answerers"][1]["loss_difference"]["interval"], [a["loss"] for a in run["answerers"][:2]]
    return f"{means[0]['mean']:.2f} → {means[1]['mean']:.2f} (95% of the difference: {low:.2f} to {high:.2f})"


def trained(name: str, against: str) -> Callable:
    def figure(run: dict) -> str:
        speed, base = (run["contenders"][key]["tokens_per_second"] for key in (name, against))
        return f"{speed:.0f}, {speed / base:.2f}×"

    return figure


def loading(what: str, kind: str = "anonymous") -> Callable:
    return lambda run: f"{run[what][f'{kind}_peak_in_models']:.2f}"


def against_rouge_score(run: dict) -> str:
    contender = run["pairs"]["result"]["contenders"]["RougePool.scores_of_each, 16 at a time"]
    return f"{contender['times_rouge_score']:.0f}×"


def deduplicated(growth: str, records: int) -> Callable:
    def figure(run: dict) -> str:
        (row,) = [row for row in run[growth]["result"] if row["records"] == records]
        return f"{row['seconds']:.0f} s, {row['peak_rss_mb']} MB"

    return figure


def on_ray(run: dict) -> str:
    runs = run["natural 1000000"]["runs"]
    one, two, local = (runs[name]["seconds"] for name in ("ray, 1 workers", "ray, 2 workers", "one process"))
    assert run["natural 1000000"]["same_bytes"]
    return f"{two:.0f} s, {one / two:.2f}×, {local / two:.1f}×"


def ten_million(run: dict) -> str:
    two = run["natural 10000000"]["runs"]["ray, 2 workers"]
    return f"{two['seconds'] / 60:.0f} min, {two['peak_mb'] / 1024:.1f} GB"


def in_flight(run: dict) -> str:
    (row,) = [row for row in run["rows"] if row["in_flight"] == 64]
    return f"{row['share_of_ideal']:.0%}"


def throttled(rate: float) -> Callable:
    def figure(run: dict) -> str:
        rows = [row for row in run["rows"] if row["version"] == "now" and row["requests_per_minute"] == rate]
        assert [row["retry_after"] for row in rows] == [True, False]
        sent, share = (
            [row[key] for row in rows] for key in ("requests_per_answer", "share_of_rate_after_first_minute")
        )
        return f"{sent[0]:.2f}, {sent[1]:.2f} requests an answer; {share[0]:.1%}, {share[1]:.1%} of the rate"

    return figure


def against_original(task: str) -> Callable:
    def figure(run: dict) -> str:
        size = run["sizes"]["1.1"][task]
        ours, original = (size[who]["peak_anonymous_bytes"] / 1e9 for who in ("ours", "original"))
        return f"{size['times_faster']:.1f}×, {ours:.2f} GB for {original:.1f} GB of memory"

    return figure


def against_disk(size: str, task: str) -> Callable:
    return lambda run: f"{1 / run['sizes'][size][task]['floor_share']:.1f} times"


def seven(task: str) -> Callable:
    def figure(run: dict) -> str:
        ours = run["sizes"]["7"][task]["ours"]
        return f"{ours['seconds']:.0f} s, {ours['peak_rss_bytes'] / 1e9:.2f} GB"

    return figure


def against_generate(how: str) -> Callable:
    def figure(run: dict) -> str:
        greedy, sampled = (run["against_generate"][f"{how}, {kind}"] for kind in ("greedy", "sampled"))
        rounds = [*greedy["rounds"], *sampled["rounds"]]
        both = f"{greedy['median']:.2f}×, {sampled['median']:.2f}×"
        return f"{both} (rounds: {min(rounds):.2f} to {max(rounds):.2f})"

    return figure


def votes(run: dict) -> str:
    before, now = (run[when]["voters"]["seconds_median"] for when in ("before", "now"))
    return f"{1000 * before:.1f} → {1000 * now:.1f} ms"


def one_login(run: dict) -> str:
    login = run["now"]["greedy_login"]
    return f"{login['answered']} of {login['asked']}, after {login['answer_times_median']:.2f} answer times"


def generation_kills(run: dict) -> str:
    """Runs that were never killed are in the file too, and are not counted here."""
    killed = sum(not each.endswith(": 0 kills") for each in run["every_run"])
    return f"{run['runs_that_differ']} of {killed} resumed runs, {run['kills']} kills"


def batch_kills(run: dict) -> str:
    runs, kills, twice, differ = (
        sum(step[key] for step in run["steps"].values()) for key in ("runs", "kills", "asked_twice", "differs")
    )
    return f"{twice}; {differ} of {runs} runs, {kills} kills"


def diff_kills(run: dict) -> str:
    moments, operations = run["kills_at_random_moments"], run["kills_before_an_operation"]
    assert moments + operations == len(run["every_kill"])
    both = f"{moments} at random moments, {operations} before an operation on a file"
    return f"{run['kills_with_a_complaint']} of {moments + operations} kills ({both})"


def pool(name: str, form: str, teacher: str = "synthetic") -> Callable:
    def figure(run: dict) -> str:
        arms = [run[teacher]["arms"][arm][name] for arm in ("seeds_only", "growing_pool", "topics")]
        return ", ".join(f"{arm['mean']:{form}} ({arm['low']:{form}} to {arm['high']:{form}})" for arm in arms)

    return figure


def reviewed(run: dict) -> str:
    found, by_hand = run["key"]["measured"]["a"], run["key"]["expected_by_hand"]["one"]
    parts = []
    for name in ("precision", "recall"):
        low, high = found[f"{name}_interval"]
        parts.append(f"{name} {found[name]:.2f} ({low:.2f} to {high:.2f}), by hand {by_hand[name]:.2f}")
    return "; ".join(parts)


def reviewed_by_the_embedded_model(run: dict) -> str:
    found = run["embedded"]["measured"]
    return f"precision {found['precision']:.2f}, recall {found['recall']:.2f}"


FIGURES: dict[str, dict[str, Callable]] = {
    "demo_cpu.json": {"`make demo`": lambda run: minutes(run["seconds"]), "Eval loss": eval_loss},
    "reference_run.json": {
        "before → after `make demo`": rouge_l_gain,
        "in its own chat template": rouge_l(2),
        "text-davinci-003": rouge_l(3),
        "Loss on the reference answers": loss_gain,
    },
    "train_cpu.json": {"against the original's recipe": trained("ours", "original")},
    "train_cpu_bf16.json": {"against float32": trained("ours_bf16", "ours")},
    "loading.json": {
        "from a bf16 file:": loading("bfloat16 file"),
        "from a float32 file:": loading("float32 file"),
        "LoRA": loading("bfloat16 file, LoRA, --bf16"),
        "from a bf16 file, resident": loading("bfloat16 file", "resident"),
        "from a float32 file, resident": loading("float32 file", "resident"),
    },
    "tokens.json": {"tokenized": lambda run: f"{run['seconds']['first']:.1f} s, {run['seconds']['again']:.1f} s"},
    "rouge.json": {
        "per pair": against_rouge_score,
        "52,000 records": deduplicated("growth with stats", 52_000),
        "1,000,000 records": deduplicated("growth decisions only", 1_000_000),
    },
    "scale.json": {"1,000,000 records": on_ray, "10,000,000 records": ten_million},
    "pool.json": {
        "Kept for each request": pool("kept_per_request", ".1f"),
        "Share of near-duplicates": pool("near_duplicate_share", ".0%"),
        "Distinct verb-object pairs": pool("distinct_verb_object_pairs", ",.0f"),
        "embedded teacher": pool("kept_per_request", ".1f", "embedded"),
    },
    "review.json": {
        "answers from the key": reviewed,
        "embedded model as the reviewer": reviewed_by_the_embedded_model,
        "10,000 records": lambda run: f"{run['rate']['share_of_ideal']:.0%}",
    },
    "client.json": {"64 requests in flight": in_flight},
    "throttle.json": {"60 requests a minute": throttled(60), "600 requests a minute": throttled(600)},
    "weight_diff.json": {
        "`recover`, 1.1 B parameters, against the original's": against_original("recover"),
        "`make_diff`, 1.1 B parameters, against the original's": against_original("make_diff"),
        "`recover`, 1.1 B parameters, against the disk": against_disk("1.1", "recover"),
        "`make_diff`, 1.1 B parameters, against the disk": against_disk("1.1", "make_diff"),
    },
    "weight_diff_7b.json": {f"`{task}`, 7 B parameters": seven(task) for task in ("recover", "make_diff", "verify")}
    | {
        f"`{task}`, 7 B parameters, against the disk": against_disk("7", task)
        for task in ("recover", "make_diff", "verify")
    },
    "chat.json": {
        "one answer at a time": against_generate("one by one"),
        "in batches": against_generate("by length"),
        "by length against file order": lambda run: (
            f"{run['batches_by_length_against_file_order']['greedy, answer_batch()']['median']:.2f}×"
        ),
    },
    "judge.json": {"252 pairs": lambda run: f"{run['share_of_ideal']:.0%}"},
    "web.json": {"one login": one_login, "vote": votes},
    "kills.json": {"killed at random": generation_kills},
    "batch_kills.json": {"in batches": batch_kills},
    "diff_kills.json": {"damaged or lost": diff_kills},
}
