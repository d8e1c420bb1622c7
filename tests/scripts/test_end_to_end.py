"""The demo's stages, by their commands, on a tiny model and a local teacher: seeds in, an answer out."""

from __future__ import annotations

import json
import re

from conftest import ROOT, run_script, torchrun
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

    records = json.loads((ROOT / "alpaca_data.json").read_text())[:24] + generated
    (tmp_path / "train.json").write_text(json.dumps(records))
    trained = torchrun(
        2,
        *("train.py", "--model_name_or_path", tiny_llama, "--data_path", tmp_path / "train.json"),
        *("--output_dir", tmp_path / "tuned", "--eval_fraction", 0.2, "--fsdp", "--fsdp_config", "configs/fsdp.json"),
        *("--num_train_epochs", 1, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2),
        *("--save_strategy", "no", "--logging_steps", 1),
        cold=True,
    )
    assert trained.returncode == 0, trained.stderr
    before, after = map(float, re.search(r"eval loss .*: ([\d.]+) before, ([\d.]+) after", trained.stdout).groups())
    assert after < before

    diff = run_script(
        *("weight_diff.py", "make_diff", "--path_raw", tiny_llama, "--path_tuned", tmp_path / "tuned"),
        *("--path_diff", tmp_path / "diff", "--method", "exact"),
    )
    assert diff.returncode == 0, diff.stderr
    recovered = run_script(
        *("weight_diff.py", "recover", "--path_raw", tiny_llama, "--path_diff", tmp_path / "diff"),
        *("--path_tuned", tmp_path / "recovered", "--test_inference", "False"),
    )
    assert recovered.returncode == 0, recovered.stderr
    compared = run_script(
        *("weight_diff.py", "compare", "--path_a", tmp_path / "recovered", "--path_b", tmp_path / "tuned")
    )
    assert compared.returncode == 0, compared.stderr
    assert "are equal, bit for bit" in compared.stdout

    question = ("--instruction", "Describe a river.", "--max_new_tokens", 8, "--temperature", 0)
    answers = [run_script("chat.py", "--model_path", path, *question) for path in (tmp_path / "recovered", tiny_llama)]
    assert [a.returncode for a in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout != answers[1].stdout  # training did change what it says

    with serve(tmp_path / "recovered", tmp_path / "server.log") as url:
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        reply = client.chat.completions.create(
            model=str(tmp_path / "recovered"),
            messages=[{"role": "user", "content": question[1]}],
            max_tokens=8,
            temperature=0,
        )
    # The same prompt, token for token; what this model says may be white space alone.
    assert reply.choices[0].message.content.strip() == answers[0].stdout.strip()
