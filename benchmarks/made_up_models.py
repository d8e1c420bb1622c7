"""Models of random values in LLaMA's shapes, for the benchmarks of weight_diff.py; and what lies in a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

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
