"""Started by torchrun: trains under FSDP2 as it is, then again after a rehearsal, and writes both down."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from made_trainer import make_run, save_whole  # noqa: E402

import train  # noqa: E402
from alpaca.training.checkpoints import set_aside_newer  # noqa: E402
from alpaca.training.preflight.rehearsal import fingerprint, rehearse  # noqa: E402

model, out = sys.argv[1], Path(sys.argv[2])
config = json.loads((Path(train.__file__).parent / "configs" / "fsdp.json").read_text())
config |= {"state_dict_type": "SHARDED_STATE_DICT", "activation_checkpointing": True}
make, args, rows = make_run(model, out, max_steps=1, per_device_train_batch_size=2, fsdp=True, fsdp_config=config)


def trained() -> tuple[list[int], list[float], bool]:
    """Fingerprints of this rank's shards, losses, and whether all of it was sharded."""
    trainer = make(args, rows)
    set_aside_newer(out, None)
    trainer.train()
    parameters = list(trainer.model.parameters())
    sharded = trainer.is_fsdp_enabled and all(isinstance(p, torch.distributed.tensor.DTensor) for p in parameters)
    return [fingerprint(p) for p in parameters], [entry.get("loss") for entry in trainer.state.log_history], sharded


bits, losses, sharded = trained()
found = rehearse(make, args, rows, None, save_whole)
bits_after, losses_after, sharded_after = trained()
everywhere = torch.tensor(int(bits == bits_after and sharded and sharded_after))
torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
if int(os.environ["RANK"]) == 0:
    report = {
        "found": [[finding.level, finding.what] for finding in found],
        "losses": [losses, losses_after],
        "equal": bool(everywhere),
    }
    (out / "report.json").write_text(json.dumps(report))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
