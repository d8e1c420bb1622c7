"""A chat server of fixed latency in a process of its own, for benchmarks of what asks it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle


@contextmanager
def local_server(latency: float, replies: list[str]) -> Iterator[str]:
    """Yields the base URL of a server that answers each request after ``latency`` seconds, with the replies in turn."""
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        server.stdin.write(json.dumps({"latency": latency, "replies": replies}) + "\n")
        server.stdin.flush()
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
        server.kill()
        server.wait()


def _response(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    body |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
    tokens = len(text) // 4
    body |= {"usage": {"prompt_tokens": 900, "completion_tokens": tokens, "total_tokens": 900 + tokens}}
    content = json.dumps(body).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(content) + content


async def _serve(latency: float, replies: list[str]) -> None:
    """Prints its port, and answers until it is ended."""
    responses = cycle([_response(text) for text in replies])

    async def answer(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(next(line for line in head.lower().split(b"\r\n") if b"content-length" in line).split()[1])
                await reader.readexactly(length)
                response = next(responses)
                await asyncio.sleep(latency)
                writer.write(response)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(**json.loads(sys.stdin.readline())))
