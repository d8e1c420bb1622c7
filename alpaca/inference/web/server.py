"""Serve a Gradio page: how it looks, which of Gradio's routes are open, how it starts and ends.

The live demo and the blind page of judging both use it, and import Gradio from here, where it is set up.
"""

from __future__ import annotations

import asyncio
import html
import importlib.util
import logging
import os
import re
import signal
import threading
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from alpaca import UserError
from alpaca.common.text import first_line, printable

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)  # else pandas counts all requests again after each one
for _package in ("gradio", "markdown_it"):
    if importlib.util.find_spec(_package) is None:
        raise UserError("a page in the browser needs Gradio: pip install -e '.[web]'")

import gradio as gr  # noqa: E402
import h11  # noqa: E402
from markdown_it import MarkdownIt  # noqa: E402
from starlette.datastructures import Headers, MutableHeaders  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.body_limit import RequestBodyLimitMiddleware  # noqa: E402
from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: E402

MAX_BODY_BYTES = 256_000  # two texts of 8,000 characters, each escaped as \uXXXX\uXXXX, and what is around them
MAX_CONNECTIONS = 800  # below the 1,024 files that a process may usually have open
MAX_FROM_ADDRESS = 200  # connections of another machine; through a proxy on this one come those of many
REQUEST_SECONDS = 20.0  # for a whole request to arrive; uvicorn waits for ever
MAX_JOBS = 200  # answers and reports that Gradio has begun, which mostly wait for their turn
LOGIN_PAUSE = 2.0  # s between attempts to log in from one address, after a wrong password
ASK_PAUSE = 0.25  # s between questions from one address, which would otherwise keep Gradio busy with refusals
MAX_HELD = 10.0  # s; what would wait longer is refused
WORKER = "alpaca-answer"  # the name of each thread in which a model writes an answer
# Browsers have no clipboard object in a page that comes neither by https nor from this machine.
COPY = """(text) => {
  if (navigator.clipboard) { navigator.clipboard.writeText(text); return; }
  const area = document.createElement("textarea");
  area.value = text; document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
}"""
CSS = (Path(__file__).parent / "templates" / "page.css").read_text()


def _markdown() -> MarkdownIt:
    def open_link(self, tokens, i, options, env):
        tokens[i].attrSet("target", "_blank")
        tokens[i].attrSet("rel", "noopener noreferrer nofollow")
        return self.renderToken(tokens, i, options, env)

    # With html off, < and & come out escaped. javascript:, vbscript:, file: and data: links are left as text.
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    markdown.disable("image")  # loading it would tell another machine that the answer was read
    markdown.add_render_rule("link_open", open_link)
    return markdown


_MARKDOWN = _markdown()


def render_answer(name: str, text: str, before: Sequence[dict] = (), note: str = "") -> str:
    """Return the HTML of an answer under its model's name, between the messages before it and a note on it."""
    name, body = html.escape(name), ""
    for role, said in [*((message["role"], message["content"]) for message in before), ("assistant", text)]:
        if role == "user":
            body += f'<div class="asked" role="note" aria-label="You">{html.escape(said)}</div>'
        else:
            body += _MARKDOWN.render(said.strip("\n"))
    body += f'<p class="notice">{html.escape(note)}</p>' if note else ""
    return f'<section class="answer" aria-label="{name}" dir="auto"><h2>{name}</h2>{body}</section>'


def render_status(text: str) -> str:
    """Return the HTML of a line that a screen reader speaks when it changes."""
    return f'<div class="status" role="status">{html.escape(text)}</div>'


def page_error(message: str, title: str = "Not answered") -> gr.Error:
    """Return an error that the page shows in red; the message may quote what a visitor typed."""
    return gr.Error(html.escape(message), title=title, print_exception=False)


class Connection(H11Protocol):
    """A connection that is closed if there are too many, or if a request takes too long to arrive."""

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        address = self.client and self.client[0]
        same = sum(other.client is not None and other.client[0] == address for other in self.connections)
        if len(self.connections) > MAX_CONNECTIONS or (same > MAX_FROM_ADDRESS and not is_local(address)):
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.deadline:
            self.deadline.cancel()

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
    Passwords are tried one after another, with a pause after a wrong one, and questions come one after another where
    there are passwords: else all come from this machine. A request that fails is one line in the log.
    """

    GET = re.compile(
        r"/|/(login_check|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(assets|static)/.*"
        r"|/gradio_api/((info|startup-events|theme\.css|app_id|user|login_check|queue/data)/?|(heartbeat|call)/.+)"
    )
    POST = re.compile(r"/login/?|/gradio_api/(queue/join|cancel|reset|(call|run)/.+)/?")  # run: only what is not queued
    ASK = re.compile(r"/gradio_api/(queue/join|call/)")
    HEADERS = {
        "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
        "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    def __init__(self, app, passwords: bool = True):
        self.app, self.passwords = app, passwords
        self.next: dict[tuple[str, str], float] = {}  # "login" or "ask", address → when it may do that again

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket: there is none
            return await send({"type": "websocket.close", "code": 1000})
        request = printable(f"{scope['method']} {scope['path']}")[:200]
        if refusal := self._refusal(scope):
            logging.warning("%s: %d %s", request, refusal[0], refusal[1].strip())
            return await PlainTextResponse(refusal[1], refusal[0])(scope, receive, send)
        login = scope["method"] == "POST" and scope["path"].startswith("/login")
        address = (scope.get("client") or ("",))[0]  # behind a proxy on this machine, the client that it names
        ask = self.passwords and scope["method"] == "POST" and self.ASK.match(scope["path"])
        if (login and not await self._hold("login", address, LOGIN_PAUSE)) or (
            ask and not await self._hold("ask", address, ASK_PAUSE)
        ):
            return await PlainTextResponse("Too many attempts: wait.\n", 429)(scope, receive, send)

        started = False

        async def send_with_headers(message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.HEADERS)
                if login and message["status"] == 200:
                    self.next.pop(("login", address), None)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as e:  # a function that does not exist, for example
            logging.error("%s failed: %s: %s", request, type(e).__name__, printable(first_line(e))[:200])
            logging.debug("its traceback", exc_info=e)
            if not started:
                await PlainTextResponse("This cannot be answered.\n", 500)(scope, receive, send_with_headers)

    async def _hold(self, kind: str, address: str, pause: float) -> bool:
        """Wait for the turn of an attempt; return False if there are too many before it."""
        now = time.monotonic()
        self.next = {known: at for known, at in self.next.items() if at > now}
        turn = max(now, self.next.get((kind, address), now))
        if turn - now > MAX_HELD:
            return False
        self.next[kind, address] = turn + pause
        await asyncio.sleep(turn - now)
        return True

    def _refusal(self, scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        # A proxy may pass on another Host than it was asked for. X-Forwarded-Host and Sec-Fetch-Site, in which the
        # browser says where a request comes from, cannot be set by another site's page.
        origin = headers.get("origin")
        ours = headers.get("sec-fetch-site") == "same-origin" or origin is None
        known = headers.get("host"), headers.get("x-forwarded-host")
        if not ours and urllib.parse.urlsplit(origin).netloc not in known:
            return 403, "Requests from pages of other sites are refused (a proxy must pass on the Host header).\n"
        paths = {"GET": self.GET, "HEAD": self.GET, "POST": self.POST}.get(scope["method"])
        if paths is None or not paths.fullmatch(scope["path"]):
            return 404, "Not here.\n"
        return None


def check_exposure(host: str, auth: str | None) -> tuple[str, str] | None:
    """Return user and password of ``auth`` ("user:password"); any ``host`` but this machine's own needs them.

    Raises:
        UserError: ``auth`` is malformed, or needed and missing.
    """
    user, _, password = (auth or "").partition(":")
    if auth is not None and not (user.strip() and password):
        raise UserError("auth must be user:password, neither of them empty")
    if not is_local(host) and not auth:
        raise UserError(f"host {host} lets other machines in: set auth to user:password too")
    return (user.strip(), password) if auth else None


def is_local(host: str) -> bool:
    return host in ("127.0.0.1", "localhost")


def run(
    page: gr.Blocks, host: str, port: int, auth: tuple[str, str] | None, name: str, notes: list[str], css: str = ""
) -> None:
    """Serve a page until Ctrl-C or SIGTERM; print its ``name``, its address and the notes."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    url = launch(page, host, port, auth, css)
    if not is_local(host):
        print(
            f"warning: other machines can reach this page at port {port}, and passwords are sent unencrypted: put a "
            "proxy with https in front, and let in only people whom you trust with what it shows.",
            flush=True,
        )
    print(f"{name} at {url} (Ctrl-C ends it)", flush=True)
    for note in notes:
        print(note, flush=True)
    try:
        stopped.wait()
    finally:
        close(page)
    print("stopped", flush=True)


def launch(page: gr.Blocks, host: str, port: int, auth: tuple[str, str] | None, css: str = "") -> str:
    """Start the server in a thread; return its address."""
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own server whether it is up
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    guards = [
        Middleware(Guard, passwords=bool(auth)),
        Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES),
    ]
    if not auth:  # else a page of another site could reach this one through a name of its own that points at 127.0.0.1
        guards.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]))
    # Gradio ships these fonts, but the semibold one of its default theme lacks most letters.
    theme = gr.themes.Default(font=[gr.themes.LocalFont("Source Sans Pro", (400, 700)), "system-ui", "sans-serif"])
    theme.set(  # white on its orange, and its grey on white, are hard to read
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            css=CSS + css,
            theme=theme,
            max_threads=MAX_JOBS,
            app_kwargs={"middleware": guards},
        )
    except OSError:
        raise UserError(f"{host}:{port} cannot be used: choose another port or host") from None
    page.server.config.http_protocol_class = Connection  # launch() passes nothing on to uvicorn (Gradio 6.31)
    return url


def close(page: gr.Blocks) -> None:
    """End the server and wait for the models, which stop at their next token."""
    page.server.force_exit = True  # else it waits 5 s for open pages; it logs each connection that it cuts
    log = logging.getLogger("uvicorn.error")
    log.disabled = True
    page.close(verbose=False)
    log.disabled = False
    for thread in threading.enumerate():
        if thread.name == WORKER:
            thread.join(10)
