"""Which records have a token that spans prompt and answer when both are tokenized together, as the original did.

    python benchmarks/border.py released.json,alpaca_data.json FOLDER,qwen.tiktoken,tokenizer.model

The original masks as many tokens as the prompt alone has: such a token is not learned, and chat sends another in its
place. alpaca/training/examples.py tokenizes prompt and answer one by one. A tokenizer is a model's folder, Qwen's
tiktoken file (in the wheel dashscope), or a sentencepiece file of LLaMA's kind (one is in the wheel mistral_common).
"""

from __future__ import annotations

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


def qwen_tokenizer(tiktoken_file: Path) -> Qwen2Tokenizer:
    """Qwen's tokenizer from its tiktoken file (a token and its rank on each line), without the package tiktoken."""
    lines = (line.split() for line in tiktoken_file.read_bytes().splitlines())
    converter, ranks = TikTokenConverter(), {base64.b64decode(token): int(rank) for token, rank in lines}
    converter.load_tiktoken_bpe = lambda _: ranks
    vocab, merges = converter.extract_vocab_merges_from_model("")
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


def tokenizer_of(path: Path):
    if path.is_dir() or path.suffix == ".tiktoken":
        return load_tokenizer(path) if path.is_dir() else qwen_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder) / "tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        mend_merges(tokenizer)
    return tokenizer


def spanning(records: list[dict], tokenizer) -> list[int]:
    """Numbers, from 1, of the records whose prompt has other tokens alone than before its answer.

    All other records must have the tokens of prompt and answer together.
    """
    prompts = [format_prompt(record["instruction"], record["input"]) for record in records]
    wholes = [prompt + record["output"] for prompt, record in zip(prompts, records, strict=True)]
    rows = prompt_ids(tokenizer, prompts), prompt_ids(tokenizer, wholes), preprocess(records, tokenizer, 10**6)
    rows = [(prompt, whole, example["input_ids"][:-1]) for prompt, whole, example in zip(*rows, strict=True)]
    found = [number for number, (prompt, whole, _) in enumerate(rows, 1) if whole[: len(prompt)] != prompt]
    assert found == [number for number, (_, whole, ours) in enumerate(rows, 1) if whole != ours]
    return found


def main(data: str, tokenizers: str) -> None:
    report = provenance("tokenizers", "transformers")
    for path in map(Path, tokenizers.split(",")):
        tokenizer = tokenizer_of(path)
        for records, name in ((load_records(file), Path(file).name) for file in data.split(",")):
            numbers = spanning(records, tokenizer)
            row = {"records": len(records), "spanning": len(numbers), "numbers": ", ".join(map(str, numbers))}
            report.setdefault(f"{path.name}, {len(tokenizer)} tokens", {})[name] = row
            print(f"{path.name}, {len(tokenizer)} tokens: {len(numbers)} of {len(records)} records in {name}")
    jdump(report, ROOT / "benchmarks" / "results" / "border.json", indent=2)


if __name__ == "__main__":
    main(*sys.argv[1:])
