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


def run_on_both(hosts, script, *argv, restarts=0) -> None:
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


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def arguments(tiny_llama, tmp_path_factory):
    """Four steps over 24 examples in batches of 8, and the data; `out` and the distribution are still to be said."""
    data = tmp_path_factory.mktemp("hosts") / "data.json"
    data.write_text(json.dumps(make_records(24)))
    return [
        *("--model_name_or_path", tiny_llama, "--data_path", data, "--max_steps", 4, "--learning_rate", 1e-2),
        *("--logging_steps", 1, "--disable_tqdm", "True", "--report_to", "none"),
    ]


FSDP = ("--fsdp", "--fsdp_config", "configs/fsdp.json", "--per_device_train_batch_size", 4)


@pytest.fixture(scope="module")
def one_process(arguments, tmp_path_factory):
    """The result of the same run in this process."""
    out = tmp_path_factory.mktemp("hosts") / "one"
    argv = [*arguments, "--output_dir", out, "--save_strategy", "no", "--per_device_train_batch_size", 8]
    argv += ["--skip_save_rehearsal"]
    train.train(*train.parse_args([str(word) for word in argv]))
    return out


def assert_same_result(folder, one_process) -> None:
    assert len(losses(folder)) == 4 and losses(folder) == pytest.approx(losses(one_process), abs=1e-4)
    found, expected = weights(folder), weights(one_process)
    assert found.keys() == expected.keys()
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-4


def test_two_hosts_with_fsdp_equal_one_process(hosts, arguments, one_process, tmp_path):
    run_on_both(hosts, "train.py", *arguments, "--output_dir", tmp_path / "out", "--save_strategy", "no", *FSDP)
    assert_same_result(tmp_path / "out", one_process)


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


def test_a_process_that_is_killed_on_one_host_is_started_again_on_both_and_ends_where_it_would_have(
    hosts, arguments, one_process, tmp_path, monkeypatch
):
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    monkeypatch.setenv("KILLED_ONCE", str(tmp_path / "killed"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    argv = [*arguments, "--output_dir", tmp_path / "out", *FSDP, "--save_strategy", "steps", "--save_steps", 2]
    argv += ["--resume_from_checkpoint", "auto", "--skip_save_rehearsal"]
    run_on_both(hosts, tmp_path / "killed_once.py", *argv, restarts=1)
    assert (tmp_path / "killed").exists()
    assert_same_result(tmp_path / "out", one_process)
