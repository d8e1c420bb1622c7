"""Started by torchrun: loads and shards models as train.py does, and writes down what each rank then has of them.

Each folder given has ``base-0`` and ``base-1``, what rank 0 and rank 1 are told to load.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]
import train  # noqa: E402
from alpaca import UserError  # noqa: E402

rank, data, folders = int(os.environ["RANK"]), sys.argv[1], list(map(Path, sys.argv[2:]))


class Loaded(Exception):
    """The model is complete; nothing needs to be trained."""


def create_scheduler(self, *args, **kwargs):
    inner(self, *args, **kwargs)
    tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in tensors}
    found = {"whole": {name: x.detach() for name, x in whole.items()}}
    found["sharded"] = all(hasattr(x, "full_tensor") for x in self.model.parameters())
    found["trained"] = sum(len(group["params"]) for group in self.optimizer.param_groups)
    torch.save(found, Path(self.args.output_dir).parent / f"loaded-{rank}.pt")
    self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None  # kept from model to model
    raise Loaded


inner, train.Trainer.create_scheduler = train.Trainer.create_scheduler, create_scheduler
argv = ["--model_name_or_path", ".", "--data_path", data, "--output_dir", folders[0], "--max_steps", 1]
argv += ["--per_device_train_batch_size", 2, "--save_strategy", "no", "--report_to", "none", "--skip_save_rehearsal"]
argv += ["--disable_tqdm", "True", "--fsdp", "--fsdp_config", "configs/fsdp.json"]
model_args, data_args, args = train.parse_args([str(word) for word in argv])  # once: accelerate keeps its state
for folder in folders:
    model_args.model_name_or_path, args.output_dir = str(folder / f"base-{rank}"), str(folder / "out")
    args.lora_r = 4 if folder.name.startswith("lora") else 0
    try:
        train.train(model_args, data_args, args)
    except Loaded:
        pass
    except UserError as e:
        (folder / f"error-{rank}.txt").write_text(str(e))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
