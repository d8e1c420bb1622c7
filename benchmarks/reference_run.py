"""The embedded model before and after training, and text-davinci-003, on Self-Instruct's 252 instructions.

    python benchmarks/reference_run.py --instructions user_oriented_instructions.jsonl \
        --predictions text-davinci-003_predictions.jsonl --before MODEL --after demo/recovered --work_dir eval

The two files are Self-Instruct's (yizhongw/self-instruct, human_eval; Apache-2.0), MODEL is what `make demo` converts
(~/.cache/alpaca/smollm2-135m-instruct). The models answer greedily, with up to 256 tokens, in float32; answers that lie
in --work_dir already are taken as they are. Before training, the model is asked in its own chat template as well:
Alpaca's is new to it, and a part of what training changes may be no more than that. No judge is asked: what is compared
is ROUGE-L to the reference and the loss on it. Writes report.html and the rest to --work_dir, and the figures to
benchmarks/results/reference_run.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402

import judge  # noqa: E402
import utils  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402

MODEL = "SmolLM2-135M-Instruct"


def main(
    instructions: str,
    predictions: str,
    before: str,
    after: str,
    work_dir: str,
    data_path: str = str(ROOT / "alpaca_data.json"),
    output_path: str = str(ROOT / "benchmarks" / "results" / "reference_run.json"),
) -> None:
    """Answers with both models, and reports.

    Args:
        instructions: the 252.
        predictions: text-davinci-003's answers to them.
        before: the folder of the embedded model.
        after: the folder of the same model, trained.
        work_dir: where answers and the report go.
        data_path: what the model was trained on, at most.
        output_path: the JSON file to write.
    """
    made_with = provenance("torch", "transformers", "rouge-score", "nltk")
    folder = Path(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runs = (
        ("before.jsonl", before, MODEL, "alpaca"),
        ("after.jsonl", after, "after make demo", "alpaca"),
        ("before_chat.jsonl", before, f"{MODEL} with its own template", "chat"),
    )
    for file, model, name, template in runs:
        if not (folder / file).exists():
            local = judge.LocalModel(template, reference_loss=template == "alpaca", device="cpu")
            judge.answer(instructions, str(folder / file), model, generator=name, max_new_tokens=256, local=local)
    files = [str(folder / file) for file, *_ in runs]
    judge.report(instructions, ",".join([*files, predictions]), work_dir, data_path=data_path)
    found = json.loads((folder / "report.json").read_text())
    kept = {key: found[key] for key in ("set", "answerers", "overlap", "notes", "seed")}
    kept["overlap"] = {key: value for key, value in kept["overlap"].items() if key != "nearest"}
    utils.jdump(made_with | kept, output_path, indent=2)
    print(f"wrote {output_path}")


if __name__ == "__main__":
    run_cli(main)
