"""Does it help to show what was generated, or to name topics? Three arms, the same number of requests, two teachers.

    python benchmarks/bench_pool.py synthetic                                     # a minute
    python -m alpaca.embedded_model run --model_path DIR -- python benchmarks/bench_pool.py embedded --model_path DIR

The synthetic teacher has a known diversity: 40 verbs and 40 topics of 50 objects each, all by Zipf's law. Of its tasks,
70% imitate the topic of an example that it was shown, unless the request names a topic; the others are its own habit.
The embedded one is SmolLM2-135M-Instruct, which mostly copies. Both are asked with the same seeds, and each figure is a
mean over runs with its 95% t interval. Writes a section of benchmarks/results/pool.json.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402
from tqdm import tqdm  # noqa: E402

import utils  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.data.requests import Draw  # noqa: E402
from alpaca.data.topics import Topic  # noqa: E402
from alpaca.data.verbs import first_verb_and_object, parse  # noqa: E402
from alpaca.endpoint.client import Completion  # noqa: E402
from generate_instruction import Filters, Selection  # noqa: E402

LAG = 8  # requests asked at once
RESULT = ROOT / "benchmarks" / "results" / "pool.json"
VERBS = [f"verb{v}" for v in range(40)]
OBJECTS = [[f"thing{t}x{o}" for o in range(50)] for t in range(40)]
KNOWN = 5  # topics of the synthetic seed tasks
REAL_TOPICS = (
    "cooking, gardening, chess, tax law, first aid, astronomy, poetry, algebra, travel, music theory, biology, "
)
REAL_TOPICS = (REAL_TOPICS + "history of art, carpentry, economics, grammar, sports").split(", ")


def zipf(rng: random.Random, count: int) -> int:
    return rng.choices(range(count), [1 / (k + 1) for k in range(count)])[0]


def synthetic_task(rng: random.Random, topic: int) -> str:
    """Two with the same verb and object share five words of seven: ROUGE-L 0.71, a near-duplicate."""
    verb, thing = VERBS[zipf(rng, 40)], OBJECTS[topic][zipf(rng, 50)]
    return f"{verb} the {thing} in a{rng.randrange(9999)} b{rng.randrange(9999)} way"


def synthetic_teacher(prompt: str, seed: int, items: int = 16) -> Completion:
    rng, text = random.Random(f"{seed} {prompt}"), ""
    named = re.search(r"about this topic: topic(\d+)\.", prompt)
    shown = [int(number) for number in re.findall(r"thing(\d+)x", prompt)]
    for number in range(4, 4 + items):
        topic = zipf(rng, 40)
        if named:
            topic = int(named[1])
        elif rng.random() < 0.7:
            topic = rng.choice(shown)
        text += f"{number}. Instruction: {synthetic_task(rng, topic)}\n{number}. Input:\n<noinput>\n"
        text += f"{number}. Output:\nAn answer.\n###\n"
    return Completion(text, "stop")


def embedded_teacher(prompt: str, seed: int) -> Completion:
    body = {"model": os.environ["MODEL"], "prompt": prompt, "max_tokens": 160, "temperature": 0.7, "top_p": 0.9}
    body |= {"seed": seed}
    address = os.environ["OPENAI_BASE_URL"] + "/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        choice = json.load(response)["choices"][0]
    return Completion(choice["text"], choice["finish_reason"])


def one_run(teacher: Callable, draw: Draw, requests: int, pairs: Callable[[list[str]], set]) -> dict[str, float]:
    """Return the figures of a run of so many requests, each of which shows what was kept LAG replies before."""
    selection = Selection(draw.seed_tasks, [], 10**9, draw, Filters(), True, io.StringIO())
    with ThreadPoolExecutor(LAG) as pool:
        for begin in range(0, requests, LAG):
            asked = [draw.request(i, selection.kept_by(i - LAG)) for i in range(begin, min(begin + LAG, requests))]
            for reply in pool.map(lambda question: teacher(*question), asked):
                selection.feed(reply)
    near, new = selection.dropped["near-duplicate"], selection.new()
    nearest = [max(record["most_similar_instructions"].values()) for record in selection.kept]
    return {
        "kept_per_request": new / requests,
        "near_duplicate_share": near / max(1, near + new),
        "distinct_verb_object_pairs": len(pairs([record["instruction"] for record in selection.kept])),
        "mean_rouge_l_to_nearest": float(np.mean(nearest)) if nearest else 0.0,
    }


def arms(prompt: str, seed_tasks: list[dict], seed: int, topics: list[Topic], examples: int) -> dict[str, Draw]:
    plain = Draw(prompt, seed_tasks, seed, examples)
    return {
        "seeds_only": plain,
        "growing_pool": Draw(prompt, seed_tasks, seed, examples, generated=max(1, examples // 3)),
        "topics": Draw(prompt, seed_tasks, seed, examples, topics=topics),
    }


def interval(values: list[float]) -> dict:
    mean, error = float(np.mean(values)), scipy.stats.sem(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, mean, error) if error > 0 else (mean, mean)
    return {"mean": round(mean, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def measure(section: str, teacher, tasks, prompt, topics, pairs, requests: int, runs: int) -> None:
    found: dict[str, list[dict]] = {}
    for seed in tqdm(range(runs), unit="run"):
        for arm, draw in arms(prompt, tasks, seed, topics, 3).items():
            found.setdefault(arm, []).append(one_run(teacher, draw, requests, pairs))
    figures = {
        arm: {name: interval([run[name] for run in results]) for name in results[0]} for arm, results in found.items()
    }
    result = provenance("scipy") | {"requests": requests, "runs": runs, "arms": figures}
    everything = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    utils.jdump(everything | {section: result}, RESULT, indent=2)
    print(json.dumps(figures, indent=2))


def synthetic(requests: int = 96, runs: int = 10) -> None:
    """Ask the synthetic teacher.

    Args:
        requests: of each run.
        runs: of each arm, with different seeds.
    """
    rng = random.Random(0)
    tasks = [
        {"instruction": synthetic_task(rng, n % KNOWN), "instances": [{"input": "", "output": "An answer."}]}
        for n in range(20)
    ]
    topics = [Topic(f"topic{number}") for number in range(len(OBJECTS))]

    def pairs(instructions: list[str]) -> set:
        return {tuple(text.split()[:3:2]) for text in instructions}

    measure("synthetic", synthetic_teacher, tasks, "List of 20 tasks:", topics, pairs, requests, runs)


def embedded(model_path: str, requests: int = 24, runs: int = 3) -> None:
    """Ask the embedded model, whose server ``alpaca.embedded_model run`` has started.

    Args:
        model_path: as given to that.
        requests: of each run.
        runs: of each arm, with different seeds.
    """
    os.environ["MODEL"] = str(Path(model_path).resolve())
    tasks = sorted(utils.load_seed_tasks(ROOT / "seed_tasks.jsonl"), key=lambda task: len(json.dumps(task)))[:40]

    def pairs(instructions: list[str]) -> set:
        return {first_verb_and_object(sentences) for sentences in parse(instructions)} - {None}

    topics = [Topic(name) for name in REAL_TOPICS]
    prompt = utils.read_text(ROOT / "prompt.txt")
    measure("embedded", embedded_teacher, tasks, prompt, topics, pairs, requests, runs)


if __name__ == "__main__":
    run_cli({"synthetic": synthetic, "embedded": embedded})
