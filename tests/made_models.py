"""Model folders made for tests, and what tests say about them."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alpaca import UserError
from alpaca.inference.generate import Settings, answer_batch
from alpaca.prompts import prompt_ids


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def whole(reader, name: str) -> torch.Tensor:
    """A whole tensor, as a CheckpointReader reads it block by block."""
    rows = [reader.rows(name, *block) for block in reader.blocks(name)]
    return torch.cat(rows).reshape(reader.spec(name)[1])


def write_model(folder: Path, tensors: dict, layout: str = "safetensors", like: Path | None = None, **config) -> Path:
    """Writes a model folder in one of four layouts; config.json and tokenizer files come from ``like`` if it is given.

    Sharded layouts have two shards, every second tensor in each.
    """
    folder.mkdir(parents=True)
    if like:
        for file in like.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
        config = json.loads((like / "config.json").read_text()) | config
    else:
        (folder / "tokenizer.json").write_text('{"a tokenizer": "as it is"}')
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "drop"}))
    names = sorted(tensors)
    suffix = layout.removesuffix("-sharded")
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    if layout.endswith("-sharded"):
        parts = {f"{stem}-{i + 1:05}-of-00002.{suffix}": names[i::2] for i in range(2)}
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    else:
        parts = {f"{stem}.{suffix}": names}
    for file, part in parts.items():
        shard = {name: tensors[name].contiguous() for name in part}
        save_file(shard, folder / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(
            shard, folder / file
        )
    return folder


def fine_tuned(tensors: dict, rows: int = 0, scale: float = 1e-3) -> dict[str, torch.Tensor]:
    """float32 tensors a little off; the embeddings get ``rows`` more, as train.py adds them.

    The change is made in float64, as the many steps of a training have it: after one float32 step t = fl(r + e) the
    difference fl(t - r) is e, and subtract recovers t bit for bit.
    """
    generator = torch.Generator().manual_seed(1)
    tuned = {}
    for name, tensor in tensors.items():
        tensor = tensor.float()
        if rows and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = torch.cat([tensor, tensor.mean(dim=0, keepdim=True).expand(rows, -1)])
        change = scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tuned[name] = (tensor.double() + change).float()
    return tuned


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(ours: dict, expected: dict) -> None:
    assert sorted(ours) == sorted(expected)
    assert [name for name in ours if bits(ours[name]) != bits(expected[name])] == []


def folder_with(path: Path, config: dict | None = None, **files) -> Path:
    """A folder with config.json and files by name (``__`` for a dot): tensors to save, JSON, text or bytes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or {}))
    for name, content in files.items():
        file = path / name.replace("__", ".")
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif file.suffix == ".safetensors":
            save_file(content, file)
        elif file.suffix == ".bin":
            torch.save(content, file)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def made_pair(tmp_path: Path) -> Path:
    """``raw`` and ``tuned``: two matrices of 4 rows and of 5, and a vector."""
    generator = torch.Generator().manual_seed(0)
    raw = {
        "lm_head.weight": torch.randn(4, 8, generator=generator),
        "model.embed_tokens.weight": torch.randn(4, 8, generator=generator),
        "model.norm.weight": torch.ones(8),
    }
    config = {"model_type": "llama", "vocab_size": 4, "dtype": "float32"}
    write_model(tmp_path / "raw", raw, **config)
    write_model(tmp_path / "tuned", fine_tuned(raw, rows=1, scale=0.1), **config | {"vocab_size": 5})
    return tmp_path


def refused(folders: Path, task, *args, **kwargs) -> str:
    """The message of the UserError that ``task`` must raise without leaving anything new in ``folders``."""
    before = left_in(folders)
    with pytest.raises(UserError) as error:
        task(*args, **kwargs)
    assert left_in(folders) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, **changes) -> None:
    """Changes tensors (None takes one away); ``__`` in a name stands for a dot."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@contextmanager
def at_most_more(size: int) -> Iterator[None]:
    """Lets this process have ``size`` bytes of addresses more than it has now: to take more is an error."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(4 * size, dtype=torch.uint8)  # some of what is counted as taken may be free
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def bin_folder(tmp_path: Path, tensors: dict, **kwargs) -> Path:
    folder = folder_with(tmp_path / "model")
    torch.save(tensors, folder / "pytorch_model.bin", **kwargs)
    return folder


def repacked(path: Path, change) -> None:
    """Writes a zip anew; ``change(name, data)`` gives the data and the compression of each record."""
    with zipfile.ZipFile(path) as archive:
        records = [(member.filename, archive.read(member)) for member in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, *change(name, data))


def chain(path: Path, *pieces: str, loop: bool = False) -> Path:
    """Make a model that says the pieces, in their order, whatever it is asked, and then EOS, or them again.

    Its vocabulary is <unk> <s> </s> and the pieces, so that any prompt is <unk>. A token's embedding is its unit
    vector, the one layer adds nothing, and the output embedding points from each token to the next.
    """
    words = ["<unk>", "<s>", "</s>", *pieces]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=10**6,
    )
    model = LlamaForCausalLM(config)
    follows = {0: 3} | {i: i + 1 for i in range(3, len(words) - 1)} | {len(words) - 1: 3 if loop else 2}
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(words), 32))
        model.lm_head.weight.zero_()
        for token, next_token in follows.items():
            model.lm_head.weight[next_token, token] = 10.0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def stream_text(model, tokenizer, prompt, max_new_tokens=512, temperature=0.7, top_p=0.9, seed=None, **options):
    """The pieces of the answer to a text, as they come."""
    pieces, settings = [], Settings(max_new_tokens, temperature, top_p, seed)
    given = prompt_ids(tokenizer, [prompt]), settings, lambda step: pieces.extend(step)
    (answer,) = answer_batch(model, tokenizer, *given, **options)
    return [piece for piece in [*pieces, answer.rest()] if piece]


def count_fed(model) -> list[int]:
    """How many tokens the model is given, call by call, from now on."""
    fed = []
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True)
    return fed


SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 1024}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
HEADS = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
WIDE = HEADS | {"head_dim": 8}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EYES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGES = {"mm_tokens_per_image": 4, "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5}
STATE = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
# Architectures: a config's class and what its tiny model has beside the class's defaults.
FAMILIES = {
    "Llama 3": ("LlamaConfig", HEADS | {"rope_parameters": LLAMA_3}),
    "Mistral": ("MistralConfig", HEADS | {"sliding_window": 64}),
    "Qwen3": ("Qwen3Config", WIDE),
    "SmolLM3": ("SmolLM3Config", HEADS),
    "Phi": ("PhiConfig", HEADS),
    "GPT-NeoX": ("GPTNeoXConfig", SIZES | {"num_attention_heads": 4, "intermediate_size": 48}),
    "OPT": ("OPTConfig", SIZES | {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Gemma 3, text": ("Gemma3TextConfig", WIDE | {"sliding_window": 64, "query_pre_attn_scalar": 8}),
    "Gemma 3, text and images": (
        "Gemma3Config",
        {"text_config": WIDE, "vision_config": EYES | {"image_size": 16, "patch_size": 8}} | IMAGES,
    ),
    "Qwen3.5, text and images": (
        "Qwen3_5Config",
        {"text_config": WIDE | LINEAR | {"layer_types": ["linear_attention", "full_attention"]}}
        | {"vision_config": {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16}
        | {"out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16}},
    ),
    "Qwen3-MoE": ("Qwen3MoeConfig", WIDE | EXPERTS | {"moe_intermediate_size": 16}),
    "Mixtral": ("MixtralConfig", HEADS | LOCAL_EXPERTS),
    "OLMoE": ("OlmoeConfig", HEADS | EXPERTS),
    "GPT-OSS": ("GptOssConfig", WIDE | LOCAL_EXPERTS | {"sliding_window": 64}),
    "Granite hybrid": (
        "GraniteMoeHybridConfig",
        HEADS | LOCAL_EXPERTS | STATE | {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"}
        | {"shared_intermediate_size": 16, "mamba_n_heads": 8, "mamba_d_head": 8},
    ),
    "Falcon-H1": ("FalconH1Config", WIDE | STATE | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
    "Mamba": ("MambaConfig", {key: SIZES[key] for key in SIZES if "position" not in key} | {"state_size": 8}),
}  # fmt: skip


def family(folder: Path, name: str, tokenizer, **config) -> Path:
    """Save a random model of one of FAMILIES, with a tokenizer of 300 tokens and more of its config in ``config``."""
    kind, values = FAMILIES[name]
    made = getattr(transformers, kind)(**copy.deepcopy(values) | config)
    torch.manual_seed(0)
    auto = "AutoModelForImageTextToText" if "vision_config" in values else "AutoModelForCausalLM"
    getattr(transformers, auto).from_config(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
