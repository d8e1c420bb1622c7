"""Tiny models, made once a session, and a real HTTP teacher on 127.0.0.1 that can misbehave."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from made_tokenizers import (  # noqa: E402, F401
    gpt4_tokenizer,
    llama3_tokenizer,
    llama_tokenizer,
    mistral_tokenizer,
    opt_tokenizer,
    qwen_tokenizer,
    smollm2_tokenizer,
)

from alpaca import UserError  # noqa: E402

# Nothing here may reach a hub, and two cores are shared by up to two processes.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
_cache = tempfile.TemporaryDirectory(prefix="alpaca-cache-")  # gone at exit: no test reads or fills the user's own
os.environ["XDG_CACHE_HOME"] = _cache.name
# A shell's background job ignores Ctrl-C, and all that it starts would as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
    os.environ.pop(name, None)


def run_script(*argv, env=None, cwd=ROOT, timeout=300, input=None) -> subprocess.CompletedProcess:
    """Runs ``python argv…`` from the repository root, as a user would; output is text.

    A script starts warm, but not with ``env``: libraries read it as they are imported.
    """
    argv = [*map(str, argv)]
    if argv[0].endswith(".py") and not env:
        return warm.launch(argv, dict(os.environ), cwd, timeout, input)
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        env=os.environ | (env or {}),
    )


def call(command, *arguments, **flags):
    """Call a script's task as its command line does: the fields of its dataclasses are flags of their own."""
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if dataclasses.is_dataclass(group := parameter.annotation):
            fields = [field.name for field in dataclasses.fields(group)]
            flags[name] = group(**{field: flags.pop(field) for field in fields if field in flags})
    return command(*arguments, **flags)


def torchrun(processes: int, *argv, env=None, timeout=300, cold=False) -> subprocess.CompletedProcess:
    """Runs a script under torchrun on a free port, one thread a process; on GPUs if each process has one.

    Cold: by torchrun's own command. Else its agent starts the ranks in processes that have imported the libraries.
    """
    import torch

    env = {"OMP_NUM_THREADS": "1"} | (env or {})
    if torch.cuda.device_count() < processes:
        env["CUDA_VISIBLE_DEVICES"] = ""
    if not cold:
        return warm.launch([*map(str, argv)], os.environ | env, ROOT, timeout, ranks=processes)
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return run_script(*torchrun, *argv, env=env, timeout=timeout)


def assert_one_line_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """Bad input: exit code ≠ 0, a last line ``error: …`` with the cause and the cure, and no traceback."""
    assert result.returncode not in (0, None), result.stdout
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines and lines[-1].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[-1], lines[-1]


def assert_user_error(call, *words: str) -> None:
    """The message is one line and has each of the words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def losses(output: str) -> list[float]:
    """The losses that a run of train.py has printed, in order."""
    return [float(value) for value in re.findall(r"\| loss ([\d.e-]+)", output)]


def make_records(count: int) -> list[dict]:
    """Records of varied length; every third has an input."""
    return [
        {
            "instruction": f"Count from {i} to {i + 3} in words.",
            "input": f"Start at {i}." if i % 3 == 0 else "",
            "output": " ".join(f"number {j}" for j in range(i, i + 2 + i % 5)),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Let gc.collect(), which training calls 6 times a run, search what tests made and not the libraries (0.5 s)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of 300 tokens with LLaMA's special tokens, BOS in front, and no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([(ROOT / "prompt.txt").read_text()], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_llama(tokenizer, tmp_path_factory) -> Path:
    """A folder with a random LLaMA: 2 layers, hidden 64, 4 heads over 2 key/value heads, 300 rows, no pad token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_opt(tokenizer, tmp_path_factory) -> Path:
    """A folder with a random OPT: 2 layers, hidden 64, tied embeddings, float32, no pad token."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        word_embed_proj_dim=64,
        dropout=0.0,  # else two runs draw different masks
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    path = tmp_path_factory.mktemp("models") / "tiny-opt"
    OPTForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    """A LLaMA-style folder with a tokenizer.model alone whose scores are not in the order of its ids."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    folder = tmp_path_factory.mktemp("spm")
    text = folder / "text"
    lines = (ROOT / "train.py").read_text().splitlines()
    text.write_text("\n".join(line for line in lines if line.strip()) + "\n" + "\n".join([" " * 40 + "x"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_whitespace=True,
        minloglevel=2,
    )
    text.unlink()
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    joined = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
    for piece, score in zip(joined, [piece.score for piece in joined][::-1], strict=True):
        piece.score = score
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def folders(tmp_path) -> Path:
    """A small made-up pair and its subtract diff: ``raw``, ``tuned``, ``diff``; embeddings of 4 and of 5 rows."""
    import made_models

    import weight_diff

    made_models.made_pair(tmp_path)
    weight_diff.make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    return tmp_path


class Teacher:
    """An OpenAI-compatible server. ``answer(n, body)`` gives the n-th reply: text, or a fault.

    A fault is an int (HTTP status), "reset" (connection closed), "half" (body cut off), "null" (null content),
    "empty" (no choices), "garbage" (a body that is not UTF-8), "hang" (nothing for 3 s), ("context", 400) (the context
    is too long), ("wait", seconds) (429 with Retry-After), ("quota", 429) (no credit), ("unsupported", name) (400, that
    setting is not taken), (status, body) (that response, bytes as they are), ("refusal", text) (null content, and the
    text as a refusal), or a (text, finish_reason) pair for a reply that is not a fault at all.
    """

    def __init__(self, answer):
        self.answer, self.requests, self.headers, self.times = answer, [], [], []
        lock = threading.Lock()
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(teacher.requests)
                    teacher.requests.append(body)
                    teacher.headers.append(dict(self.headers))
                    teacher.times.append(time.monotonic())
                reply = teacher.answer(number, body)
                if reply == "hang":
                    time.sleep(3)
                if reply in ("reset", "hang"):
                    self.close_connection = True
                    self.connection.close()
                    return
                status, headers = 200, {}
                if isinstance(reply, tuple) and isinstance(reply[0], int):
                    status, data = reply
                    data = data if isinstance(data, bytes) else json.dumps(data).encode()
                elif reply == ("context", 400):
                    status = 400
                    message = "maximum context length is 1024 tokens"
                    data = json.dumps({"error": {"message": message, "code": "context_length_exceeded"}}).encode()
                elif isinstance(reply, tuple) and reply[0] == "unsupported":
                    status, error = 400, {"message": f"no {reply[1]} here", "param": reply[1]}
                    data = json.dumps({"error": error | {"code": "unsupported_parameter"}}).encode()
                elif reply == ("quota", 429):
                    status, data = 429, b'{"error": {"message": "pay", "code": "insufficient_quota"}}'
                elif isinstance(reply, tuple) and reply[0] == "wait":
                    status, headers, data = 429, {"Retry-After": str(reply[1])}, b"{}"
                elif isinstance(reply, int):
                    status, headers = reply, {"Retry-After": "0.1"} if reply == 429 else {}
                    data = json.dumps({"error": {"message": f"fault {reply}", "code": reply}}).encode()
                else:
                    text, reason = reply if isinstance(reply, tuple) else (reply, "stop")
                    message = {"role": "assistant", "content": None if reply == "null" else text}
                    if text == "refusal":
                        message, reason = {"role": "assistant", "content": None, "refusal": reason}, "stop"
                    text = message["content"]
                    chat = self.path.endswith("/chat/completions")
                    choice = {"index": 0, "finish_reason": reason}
                    choice |= {"message": message} if chat else {"text": text}
                    data = {"id": "x", "object": "chat.completion" if chat else "text_completion", "created": 0}
                    data |= {"model": body["model"], "choices": [] if reply == "empty" else [choice]}
                    data |= {"usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}
                    data = json.dumps(data).encode()
                if reply == "garbage":
                    data = b"\xff\xfe" + data
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if reply == "half" else data)
                if reply == "half":
                    self.close_connection = True
                    self.connection.close()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that was killed is no news
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def teacher():
    """``teacher(answer)`` starts a server; all are stopped at the end of the test."""
    running = []

    def start(answer) -> Teacher:
        running.append(Teacher(answer))
        return running[-1]

    yield start
    for server in running:
        server.server.shutdown()
        server.server.server_close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium with a user folder of its own."""
    from browser import BROWSER, FLAGS
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"), executable_path=BROWSER, headless=True, args=FLAGS
        )
        yield context.browser or context
        context.close()
