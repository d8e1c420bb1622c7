"""Two hosts on one machine: a torchrun agent in each of two network namespaces, which share nothing but a cable.

Needs root, or what else may make a network namespace, and `ip` (Debian's iproute2).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, make_records
from safetensors.torch import load_file

import train

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)


@pytest.fixture(scope="module")
def hosts():
    """The names of two namespaces, joined by a veth pair with an address at each end."""
    if shutil.which("ip") is None:
        pytest.fail("ip is missing: install iproute2")
    names = [f"alpaca-{os.getpid()}-{letter}" for letter in "ab"]
    if (made := ip("netns", "add", names[0])).returncode:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
    try:
        assert ip("netns", "add", names[1]).returncode == 0
        cable = ["link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]]
        for words in (cable, *(words for pair in zip(names, ADDRESSES, strict=True) for words in plug(*pair))):
            result = ip(*words)
            assert result.returncode == 0, result.stderr
        yield names
    finally:
        for name in names:  # and with them the cable
            ip("netns", "del", name)


def plug(name: str, address: str) -> list[list[str]]:
    return [
        ["-n", name, "address", "add", f"{address}/24", "dev", "cable"],
        ["-n", name, "link", "set", "cable", "up"],
        ["-n", name, "link", "set", "lo", "up"],
    ]


def run_on_both(hosts, script, *argv, restarts) -> None:
    """One process a host, as runs/alpaca_7b.sh would start them."""
    agents = []
    for rank, (name, address) in enumerate(zip(hosts, ADDRESSES, strict=True)):
        is_host = "true" if rank == 0 else "false"
        command = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:29500", "--rdzv_id", "test"),
            *("--rdzv_conf", f"is_host={is_host}", "--local_addr", address, "--nproc_per_node", "1"),
            *("--max_restarts", str(restarts), "--monitor_interval", "0.2", script, *map(str, argv)),
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as runs/alpaca_7b.sh: else a restart hangs
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        agents.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
    try:
        printed = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


# train.py, in which the second process kills itself once, right after step 3; a checkpoint of step 2 is there then.
KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
import transformers, train
from alpaca.training import trainer

marker = Path(os.environ["KILLED_ONCE"])

class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

class Trainer(trainer.Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Kill())

trainer.Trainer = Trainer
train.main()
"""


def test_two_hosts_with_fsdp_equal_one_process_also_when_a_process_is_killed_and_both_are_started_again(
    hosts, tiny_llama, tmp_path, monkeypatch
):
    """Four steps over 24 examples in batches of 8, rehearsed at each start."""
    (tmp_path / "data.json").write_text(json.dumps(make_records(24)))
    arguments = [
        *("--model_name_or_path", tiny_llama, "--data_path", tmp_path / "data.json", "--max_steps", 4),
        *("--learning_rate", 1e-2, "--logging_steps", 1, "--disable_tqdm", "True", "--report_to", "none"),
    ]
    argv = [*arguments, "--output_dir", tmp_path / "one", "--save_strategy", "no", "--skip_save_rehearsal"]
    train.train(*train.parse_args([str(word) for word in [*argv, "--per_device_train_batch_size", 8]]))

    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    monkeypatch.setenv("KILLED_ONCE", str(tmp_path / "killed"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fsdp = ("--fsdp", "--fsdp_config", "configs/fsdp.json", "--per_device_train_batch_size", 4, "--save_steps", 2)
    argv = [*arguments, "--output_dir", tmp_path / "two", *fsdp, "--resume_from_checkpoint", "auto"]
    run_on_both(hosts, tmp_path / "killed_once.py", *argv, restarts=1)
    assert (tmp_path / "killed").exists()
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys()
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-4
