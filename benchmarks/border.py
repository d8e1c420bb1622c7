"""Which records have a token that spans prompt and answer when both are tokenized together, as the original did.

    python benchmarks/border.py --data released.json,alpaca_data.json --tokenizers FOLDER,qwen.tiktoken,tokenizer.model

The original masks as many tokens as the prompt alone has. In these records that hides the answer's first characters, or
shows the model prompts that chat never sends; training/examples.py tokenizes the two parts one by one. A tokenizer is a
model's folder, a sentencepiece file of LLaMA's kind, or Qwen's tiktoken file, as in the wheel dashscope.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402
from transformers import LlamaTokenizer, Qwen2Tokenizer  # noqa: E402
from transformers.convert_slow_tokenizer import TikTokenConverter  # noqa: E402

from alpaca.common.records import jdump, load_records  # noqa: E402
from alpaca.inference.load import load_tokenizer  # noqa: E402
from alpaca.prompts import format_prompt, prompt_ids  # noqa: E402
from alpaca.training.examples import preprocess  # noqa: E402
from alpaca.training.preflight.merges import mend_merges  # noqa: E402


def qwen_tokenizer(tiktoken_file: Path):
    """Qwen's tokenizer from its tiktoken file (a token and its rank on each line), without the package tiktoken."""
    lines = (line.split() for line in tiktoken_file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda _: ranks
    vocab, merges = converter.extract_vocab_merges_from_model("")
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


def tokenizer_of(path: Path):
    if path.suffix == ".tiktoken":
        return qwen_tokenizer(path)
    if path.is_dir():
        return load_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder) / "tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        mend_merges(tokenizer)
    return tokenizer


def spanning(records: list[dict], tokenizer) -> list[int]:
    """Numbers, from 1, of the records whose tokens of prompt and answer together do not begin with the prompt's.

    In every other record, training's tokens must be those of both together.
    """
    prompts = [format_prompt(record["instruction"], record["input"]) for record in records]
    texts = [prompt + record["output"] for prompt, record in zip(prompts, records, strict=True)]
    rows = prompt_ids(tokenizer, prompts), prompt_ids(tokenizer, texts), preprocess(records, tokenizer, 10**6)
    found = []
    for number, (prompt, both, example) in enumerate(zip(*rows, strict=True), 1):
        if both[: len(prompt)] != prompt:
            found.append(number)
        elif example["input_ids"] != [*both, tokenizer.eos_token_id]:
            sys.exit(f"error: record {number} has other tokens than the original's rule gives")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="files with records, commas between")
    parser.add_argument("--tokenizers", required=True, help="folders or files, commas between")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "border.json"))
    a = parser.parse_args()
    report = provenance("tokenizers", "transformers")
    for path in map(Path, a.tokenizers.split(",")):
        tokenizer = tokenizer_of(path)
        for data in a.data.split(","):
            records = load_records(data)
            numbers = spanning(records, tokenizer)
            row = {"tokens": len(tokenizer), "records": len(records), "spanning": len(numbers)}
            row["numbers"] = ", ".join(map(str, numbers))
            report.setdefault(path.name, {})[Path(data).name] = row
            print(f"{path.name}, {len(tokenizer)} tokens: {len(numbers)} of {len(records)} records in {data}")
    jdump(report, a.output, indent=2)


if __name__ == "__main__":
    main()
