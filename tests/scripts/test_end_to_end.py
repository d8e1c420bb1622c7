"""Seeds in, an answer out: instructions from a local teacher, then the demo with them, on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from conftest import run_script
from openai import OpenAI

from alpaca.embedded_model import serve


def test_from_seed_tasks_to_an_answer(teacher, tiny_llama, tmp_path):
    words = (
        "river lantern copper maple thunder velvet harbor cactus ribbon falcon marble saffron violin glacier".split()
    )
    verbs = "Describe Compare Praise Rank Sketch Explain Imagine".split()

    def answer(number, body):
        """Two items, then one that the length cut off; every third request fails."""
        if number % 3 == 2:
            return 400
        verb, a, b = verbs[number % 7], words[2 * number % 14], words[(2 * number + 1) % 14]
        return (
            f" {verb} one {a} beside some {b}.\n4. Input:\n<noinput>\n4. Output:\nA {a} is {b}.\n"
            f"###\n5. Instruction: Which {b} would {verb} {a}?\n5. Input:\na {b} or a {a}\n5. Output:\nThe {b}.\n"
            f"###\n6. Instruction: Say no more about any {a} than",
            "length",
        )

    server = teacher(answer)
    made = run_script(
        *("generate_instruction.py", "generate_instruction_following_data", "--base_url", server.base_url),
        *("--model_name", "local", "--api", "completions", "--output_dir", tmp_path / "data"),
        *("--num_instructions_to_generate", 8, "--request_batch_size", 2, "--seed", 0),
    )
    assert made.returncode == 0, made.stderr
    generated = json.loads((tmp_path / "data" / "regen.json").read_text())
    assert len(generated) >= 8 and f"{len(generated)} instructions in" in made.stdout
    assert not any("Say no more" in record["instruction"] for record in generated)

    cache = tmp_path / "cache"
    base = Path(shutil.copytree(tiny_llama, cache / "alpaca" / "smollm2-135m-instruct"))
    demo = run_script(
        *("runs/demo.py", "--output_dir", tmp_path / "data", "--records", 24), env={"XDG_CACHE_HOME": str(cache)}
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "model in" in demo.stdout and ".unfinished" not in demo.stdout  # a temporary name
    receipt = json.loads((tmp_path / "data" / "recovered" / "training_receipt.json").read_text())
    assert receipt["arguments"]["output_dir"] == "tuned"
    before, after = map(float, re.search(r"eval loss .*: ([\d.]+) before, ([\d.]+) after", demo.stdout).groups())
    assert after < before
    end = demo.stdout[demo.stdout.index("\nstage ") :]
    assert max(map(len, end.partition("\nAll of it took")[0].splitlines())) <= 100  # then come paths
    table = [re.split("  +", line, maxsplit=2) for line in end.splitlines()[3:9]]
    assert all(len(row) == 3 for row in table), table  # what each stage made; answers may be white space
    assert end.count("\n  prompt  ") == end.count("\n  before  ") == end.count("\n  after   ") == 3
    for name in ("recovered/config.json", "tuned/loss.png", "tuned/model_card.md", "regen.json", "summary.json"):
        assert (tmp_path / "data" / name).is_file(), name

    recovered = tmp_path / "data" / "recovered"
    question = ("--instruction", "Describe a river.", "--max_new_tokens", 8, "--temperature", 0)
    answers = [run_script("chat.py", "--model_path", path, *question) for path in (recovered, base)]
    assert [a.returncode for a in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout != answers[1].stdout  # training did change what it says

    with serve(recovered, tmp_path / "server.log") as url:
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        reply = client.chat.completions.create(
            model=str(recovered),
            messages=[{"role": "user", "content": question[1]}],
            max_tokens=8,
            temperature=0,
        )
    # The same prompt, token for token; what this model says may be white space alone.
    assert reply.choices[0].message.content.strip() == answers[0].stdout.strip()
