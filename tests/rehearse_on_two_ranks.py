"""Started by torchrun: trains under FSDP2 as it is, then again after a rehearsal, and writes both down."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from made_trainer import make_trainer  # noqa: E402

import train  # noqa: E402
from alpaca.training.preflight.rehearsal import fingerprint, rehearse  # noqa: E402

model, out = sys.argv[1], Path(sys.argv[2])
config = json.loads((Path(train.__file__).parent / "configs" / "fsdp.json").read_text())
config |= {"state_dict_type": "SHARDED_STATE_DICT", "activation_checkpointing": True}


def trainer():
    return make_trainer(model, out, max_steps=1, per_device_train_batch_size=2, fsdp=True, fsdp_config=dict(config))


plain = trainer()
plain.train()
plain_bits = [fingerprint(parameter) for parameter in plain.model.parameters()]
plain_losses = [entry.get("loss") for entry in plain.state.log_history]
AcceleratorState._reset_state()  # else it would take the second model for one that is not to be sharded
rehearsed = trainer()
result = rehearse(rehearsed, out)
rehearsed.train()
equal = plain_bits == [fingerprint(parameter) for parameter in rehearsed.model.parameters()]
everywhere = torch.tensor(int(equal))
torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
if int(os.environ["RANK"]) == 0:
    report = {
        "fsdp": rehearsed.is_fsdp_enabled,
        "sharded": str(rehearsed.accelerator.state.fsdp_plugin.state_dict_type.name) == "SHARDED_STATE_DICT",
        "faults": [fault.what for fault in result.faults],
        "losses": [plain_losses, [entry.get("loss") for entry in rehearsed.state.log_history]],
        "equal": bool(everywhere),
    }
    (out / "report.json").write_text(json.dumps(report))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
