"""Serve a Gradio page: how it looks, which of Gradio's routes are open, how it starts and ends.

The live demo and the blind page of judging both use it, and import Gradio from here, where it is set up.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import importlib.util
import logging
import os
import re
import signal
import threading
import urllib.parse
import weakref
from collections.abc import Sequence
from pathlib import Path

from alpaca import UserError
from alpaca.common.text import first_line, printable, templates

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)  # else pandas counts all requests again after each one
if importlib.util.find_spec("gradio") is None:
    raise UserError("a page in the browser needs Gradio: pip install -e '.[web]'")

import gradio as gr  # noqa: E402
import h11  # noqa: E402
from markdown_it import MarkdownIt  # noqa: E402
from starlette.datastructures import Headers  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.body_limit import RequestBodyLimitMiddleware  # noqa: E402
from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: E402

LOCAL = ["127.0.0.1", "localhost"]
AUTH = "ALPACA_AUTH"
MAX_BODY_BYTES = 256_000  # two texts of 8,000 characters, each escaped as \uXXXX\uXXXX, and what is around them
MAX_CONNECTIONS = 800  # below the 1,024 files that a process may usually have open
REQUEST_SECONDS = 20.0  # for a whole request to arrive; uvicorn waits for ever
MAX_JOBS = 200  # answers and reports that Gradio has begun, which mostly wait for their turn
PAUSE = 0.25  # s after an attempt to log in or a question, before the next one of that address: 345,600 a day
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; frame-ancestors 'self'"
WORKER = "alpaca-answer"  # the name of each thread in which a model writes an answer
CSS = (Path(__file__).parent / "templates" / "page.css").read_text()
# With html off, < and & come out escaped. javascript:, vbscript:, file: and data: links are left as text. Loading an
# image would tell another machine that the answer was read. gr.Chatbot (6.31) renders HTML and loads images; given
# escaped text it shows "a&lt;b" in code.
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
_MARKDOWN.disable("image")
_TEMPLATES = templates(Path(__file__).parent / "templates", html=True)


def render(template: str, **values) -> str:
    """Return the HTML of a template, with its values escaped."""
    return _TEMPLATES.get_template(template).render(values)


def render_answer(name: str, text: str, before: Sequence[dict] = (), note: str = "") -> str:
    """Return the HTML of an answer under its model's name, between the messages before it and a note on it."""
    messages = [*before, {"role": "assistant", "content": text}]
    return render("answer.html", name=name, text=text, messages=messages, note=note, markdown=_markdown)


def _markdown(text: str) -> str:
    # "<" that a model wrote comes out escaped: this one begins a link.
    link = '<a target="_blank" rel="noopener noreferrer nofollow" '
    return _MARKDOWN.render(text.strip("\n")).replace("<a ", link)


def render_status(text: str) -> str:
    """Return the HTML of a line that a screen reader speaks when it changes."""
    return f'<div class="status" role="status">{html.escape(text)}</div>'


def page_error(message: str, title: str = "Not answered") -> gr.Error:
    """Return an error that the page shows in red; the message may quote what a visitor typed."""
    return gr.Error(html.escape(message), title=title, print_exception=False)


class Connection(H11Protocol):
    """A connection that ends if there are too many, or if a request takes long to arrive: uvicorn bounds neither."""

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        arriving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if arriving and self.deadline is None:
            self.deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)
        elif not arriving and self.deadline:
            self.deadline.cancel()
            self.deadline = None


class Guard:
    """Middleware that opens only the routes that the page needs (Gradio also has uploads, proxies, files, recordings).

    Pages of other sites are refused: Gradio lets any origin read, and over https its cookie is sent with the request.
    Attempts to log in, and questions, of one address come one after another: refusals of a program that asks in a loop
    would keep Gradio busy. A request that fails is one line in the log.
    """

    OPEN = re.compile(
        r"/|/(login|login_check|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(assets|static)/.*|"
        r"/gradio_api/((info|startup-events|theme\.css|app_id|user|login_check|queue/data|queue/join|cancel|reset)/?|"
        r"(heartbeat|call|run)/.+)"  # run: only what is not queued
    )
    ONE_AT_A_TIME = re.compile(r"/login/?|/gradio_api/(queue/join|call/[^/]+)/?")

    def __init__(self, app):
        self.app = app
        self.busy = weakref.WeakValueDictionary()  # address → its lock, as long as a request holds it or waits for it

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = printable(f"{scope['method']} {scope['path']}")[:200]
        try:
            if refusal := self._refusal(scope):
                logging.warning("%s: %d %s", request, refusal.status_code, refusal.body.decode().strip())
                await refusal(scope, receive, send)
            elif self.ONE_AT_A_TIME.fullmatch(scope["path"]):
                address = (scope.get("client") or ("",))[0]  # behind a proxy on this machine, the client that it names
                async with self.busy.setdefault(address, asyncio.Lock()):
                    await self.app(scope, receive, send)
                    await asyncio.sleep(PAUSE)
            else:
                await self.app(scope, receive, send)
        except Exception as e:  # a function that does not exist, for example
            logging.error("%s failed: %s: %s", request, type(e).__name__, printable(first_line(e))[:200])
            logging.debug("its traceback", exc_info=e)
            with contextlib.suppress(RuntimeError):  # the answer had begun
                await PlainTextResponse("This cannot be answered.\n", 500)(scope, receive, send)

    def _refusal(self, scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        # A proxy may pass on another Host than it was asked for. X-Forwarded-Host and Sec-Fetch-Site, in which the
        # browser says where a request comes from, cannot be set by another site's page.
        known = None, headers.get("host"), headers.get("x-forwarded-host")
        origin = headers.get("origin") and urllib.parse.urlsplit(headers["origin"]).netloc
        if origin not in known and headers.get("sec-fetch-site") != "same-origin":
            return PlainTextResponse("Pages of other sites are refused (a proxy must pass on the Host header).\n", 403)
        return None if self.OPEN.fullmatch(scope["path"]) else PlainTextResponse("Not here.\n", 404)


def check_exposure(host: str, auth: str | None) -> tuple[str, str] | None:
    """Return user and password of ``auth`` ("user:password"); raise UserError if they are malformed or missing.

    Any ``host`` but this machine's own needs them. Without ``auth`` they come from the environment's ALPACA_AUTH, which
    no list of processes shows.
    """
    if auth is None:
        auth = os.environ.get(AUTH) or None
    user, _, password = (auth or "").partition(":")
    if auth is not None and not (user.strip() and password):
        raise UserError(f"auth, or {AUTH} in the environment, must be user:password, neither of them empty")
    if host not in LOCAL and not auth:
        raise UserError(f"host {host} lets other machines in: set auth, or {AUTH} in the environment, to user:password")
    return (user.strip(), password) if auth else None


def run(page: gr.Blocks, host: str, port: int, auth: tuple | None, name: str, notes: list[str], css: str = "") -> None:
    """Serve a page until Ctrl-C or SIGTERM; print its ``name``, its address and the notes."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    url = launch(page, host, port, auth, css)
    if host not in LOCAL:
        warning = "warning: other machines can reach this page, and passwords are sent unencrypted: put a proxy with "
        print(warning + "https in front, and let in only people whom you trust with what it shows.", flush=True)
    print(f"{name} at {url} (Ctrl-C ends it)", *notes, sep="\n", flush=True)
    try:
        stopped.wait()
    finally:
        close(page)
    print("stopped", flush=True)


def launch(page: gr.Blocks, host: str, port: int, auth: tuple[str, str] | None, css: str = "") -> str:
    """Start the server in a thread; return its address."""
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own server whether it is up
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    guards = [Middleware(Guard), Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)]
    if not auth:  # else a page of another site could reach this one through a name of its own that points at 127.0.0.1
        guards.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL))
    # Gradio ships these fonts, but the semibold one of its default theme lacks most letters.
    theme = gr.themes.Default(font=[gr.themes.LocalFont("Source Sans Pro", (400, 700)), "system-ui", "sans-serif"])
    theme.set(button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700")
    off = {"share": False, "ssr_mode": False, "mcp_server": False, "run_history": False, "footer_links": []}
    options = {"theme": theme, "css": CSS + css, "max_threads": MAX_JOBS, "app_kwargs": {"middleware": guards}} | off
    options |= {"server_name": host, "server_port": port, "auth": auth, "quiet": True, "prevent_thread_lock": True}
    try:
        _, url, _ = page.launch(**options)
    except OSError:
        raise UserError(f"{host}:{port} cannot be used: choose another port or host") from None
    # launch() passes nothing on to uvicorn (Gradio 6.31), which reads these again for a connection, and each second
    page.server.config.http_protocol_class = Connection
    page.server.config.encoded_headers = [(b"content-security-policy", POLICY)]
    return url


def close(page: gr.Blocks) -> None:
    """End the server and wait for the models, which stop at their next token."""
    page.server.force_exit = True  # else it waits 5 s for open pages; and no further answer begins
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it logs each connection that it cuts
    page.close(verbose=False)
    for thread in threading.enumerate():
        if thread.name == WORKER:
            thread.join(10)
