"""Models of random values in LLaMA's shapes, for benchmarks of things that depend on the shape alone.

python benchmarks/made_up_models.py --size 7 --model_path DIR    # 13 GB, to train and chat with
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

from alpaca import UserError  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.common.records import load_records  # noqa: E402
from alpaca.prompts import format_prompt  # noqa: E402

SHARD_BYTES = 2**30  # a shard of the tuned model is in memory at once, and the same of the raw one at half the size


@dataclass
class Shape:
    """A LLaMA without tied embeddings. ``rows`` is the raw model's vocabulary; the tuned one has a row more."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    rows: int = 32_000

    def tensors(self, rows: int) -> dict[str, tuple[int, ...]]:
        """name → shape, in the order of a state dict, with ``rows`` rows of both embeddings."""
        hidden, wide = self.hidden, self.intermediate
        narrow = hidden // self.heads * self.key_value_heads
        shapes = {"model.embed_tokens.weight": (rows, hidden)}
        for i in range(self.layers):
            layer = {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (narrow, hidden),
                "self_attn.v_proj": (narrow, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (wide, hidden),
                "mlp.up_proj": (wide, hidden),
                "mlp.down_proj": (hidden, wide),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}

    def parameters(self) -> int:
        """Of the tuned model."""
        return sum(torch.Size(shape).numel() for shape in self.tensors(self.rows + 1).values())

    def config(self, rows: int, dtype: str) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": rows,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": dtype,
        }


SHAPES = {  # by billions of parameters
    "0.001": Shape(hidden=64, intermediate=176, layers=4, heads=4, key_value_heads=2, rows=8_000),
    "0.13": Shape(hidden=768, intermediate=2048, layers=12, heads=12, key_value_heads=12),
    "1.1": Shape(hidden=2048, intermediate=5632, layers=22, heads=32, key_value_heads=4),  # TinyLlama
    "7": Shape(hidden=4096, intermediate=11008, layers=32, heads=32, key_value_heads=32),  # LLaMA-7B
}


def write_tokenizer(folder: Path, rows: int, pad: bool) -> None:
    """A tokenizer of exactly ``rows`` words, the last of them [PAD] if ``pad``."""
    # By hand: transformers would take seconds to load.
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, rows - pad)), *["[PAD]"] * pad]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "[PAD]"} if pad else {})
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.add_special_tokens(list(names.values()))
    core.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def make_pair(folder: Path, shape: Shape, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes ``folder/raw`` and ``folder/tuned``, shard by shard.

    raw is float16 in pytorch_model-*.bin, as LLaMA's conversions were; tuned is float32 in safetensors with one row
    more, each value a little off raw's.
    """
    rows = {"raw": shape.rows, "tuned": shape.rows + 1}
    shapes = shape.tensors(rows["tuned"])
    shards: list[list[str]] = [[]]
    size = 0
    for name, dims in shapes.items():
        bytes_ = 4 * torch.Size(dims).numel()
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    files = {"raw": "pytorch_model-{:05}-of-{:05}.bin", "tuned": "model-{:05}-of-{:05}.safetensors"}
    for model in files:
        (folder / model).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards, 1):
        raw, tuned = {}, {}
        for name in names:
            old = shape.rows if len(shapes[name]) == 2 and shapes[name][0] == rows["tuned"] else shapes[name][0]
            weight = torch.empty(old, *shapes[name][1:]).normal_(std=0.02, generator=generator)
            raw[name] = weight.half()
            weight = raw[name].float()
            if old != shapes[name][0]:
                weight = torch.cat([weight, weight.mean(dim=0, keepdim=True)])
            tuned[name] = weight.add_(torch.empty_like(weight).normal_(std=1e-4, generator=generator))
        torch.save(raw, folder / "raw" / files["raw"].format(number, len(shards)))
        save_file(tuned, folder / "tuned" / files["tuned"].format(number, len(shards)), {"format": "pt"})
    indices = {"raw": "pytorch_model.bin.index.json", "tuned": "model.safetensors.index.json"}
    dtypes = {"raw": "float16", "tuned": "float32"}
    for model, file in files.items():
        weight_map = {
            name: file.format(number, len(shards)) for number, names in enumerate(shards, 1) for name in names
        }
        (folder / model / indices[model]).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / model / "config.json").write_text(json.dumps(shape.config(rows[model], dtypes[model])))
        write_tokenizer(folder / model, rows[model], pad=model == "tuned")


def main(size: str, model_path: str) -> None:
    """Make a random model to train and chat with: bf16, and a byte-level BPE of the words of alpaca_data.json.

    Args:
        size: billions of parameters, one of SHAPES.
        model_path: the folder to make. One that exists is whole, and kept.
    """
    import transformers  # 7 s that the other functions do not need

    if size not in SHAPES:
        raise UserError(f"size {size} is unknown: choose from {', '.join(SHAPES)}")
    if Path(model_path).exists():
        return
    shape, part = SHAPES[size], f"{model_path}.part"
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.rows,
        special_tokens=["<unk>", "<s>", "</s>", "[PAD]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = load_records(ROOT / "alpaca_data.json")
    core.train_from_iterator((format_prompt(r["instruction"], r["input"]) + r["output"] for r in records), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(part)
    config = transformers.LlamaConfig.from_dict(shape.config(shape.rows, "bfloat16"))
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(part)
    Path(part).rename(model_path)


if __name__ == "__main__":
    run_cli(main)
