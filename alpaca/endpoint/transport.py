"""HTTP to one server: its address, key and proxy, and clear names for connection errors."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import ssl
import urllib.parse
import urllib.request
from collections.abc import Mapping

import aiohttp
import certifi

from alpaca import UserError

IDLE = 30.0  # seconds without a byte, once a reply has begun, until it counts as stalled


class Lost(Exception):
    """A request without an HTTP response. ``unreachable``: there was not even a connection."""

    unreachable = False


class Server:
    """Connections to a server.

    Args:
        base_url: its address (default: OPENAI_BASE_URL, then api.openai.com); user:password@ in it is sent as a login.
        timeout: seconds that a request may take in total.
        offline: whether nothing will be sent, so that no address is needed.

    Raises:
        UserError: neither a key nor a base URL; a key that no header can carry, or a key and user:password@.
    """

    def __init__(self, base_url: str | None, timeout: float, offline: bool = False):
        given = base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if odd := re.search("[^!-~]", key):
            where = f"{odd[0]!a} as character {odd.start() + 1}"
            raise UserError(f"OPENAI_API_KEY has {where}, which is not allowed in a key: copy it again")
        if not (key or given or offline):
            own = "base_url (or OPENAI_BASE_URL) for another server"
            raise UserError(f"no server to ask: set OPENAI_API_KEY, or {own}")
        base_url = given or "https://api.openai.com/v1"
        try:
            parts = urllib.parse.urlsplit(base_url)
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # ValueError for a bad port
        except ValueError:
            fits = False
        if not (fits and base_url.isprintable() and " " not in base_url):
            raise UserError("base_url is not a URL: use one such as http://127.0.0.1:8000/v1")
        login, _, netloc = parts.netloc.rpartition("@")
        if login and key:
            raise UserError("base_url has user:password@, and OPENAI_API_KEY is set: remove one of them")
        secret = urllib.parse.unquote(login) or key
        coded = base64.b64encode(secret.encode()).decode()
        # A local server needs no key, but some refuse a request without one.
        self._headers = {"Authorization": f"Basic {coded}" if login else f"Bearer {secret or 'none'}"}
        in_query = [value for name, value in urllib.parse.parse_qsl(parts.query) if name != "api-version"]
        self.secrets = (secret, coded, login, *in_query)
        self._query = parts.query
        where = parts._replace(netloc=netloc, query="", fragment="").geturl().rstrip("/")
        self.where = where if given or not offline else "the server"  # in messages: without secrets
        self._proxy, self._proxied = _proxy_for(parts.scheme, parts.hostname)
        self._session, self._timeout = None, timeout

    async def http(self, method: str, path: str, json=None, data=None) -> tuple[int, Mapping[str, str], bytes]:
        """Send one request to a path below the base URL; return its status, headers and body.

        Raises:
            Lost: no response, or only a part of one; the message names what happened.
        """
        url = self.where + path + ("&?"["?" not in path] + self._query if self._query else "")
        session, received, idle = self._session or self._open(), bytearray(), asyncio.timeout(None)
        try:
            async with session.request(method, url, json=json, data=data, proxy=self._proxy) as response:
                while not response.content.at_eof():
                    # A reply may take its time until it begins; some proxies send white space meanwhile.
                    async with asyncio.timeout(IDLE if received[:999].strip() else None) as idle:
                        received += await response.content.readany()
                if response.history and (response.method != method or response.status == 401):
                    there = response.url.with_query(None)  # the key, or the body, was not sent there
                    raise UserError(f"{self.where} redirects to {there}: change base_url")
                return response.status, response.headers, bytes(received)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as e:
            lost = Lost(_transport_fault(e, stalled=idle.expired()) + self._proxied)
            lost.unreachable = isinstance(e, aiohttp.ClientConnectorError)
            raise lost from None

    def _open(self) -> aiohttp.ClientSession:
        # Python has no root certificates of its own on some systems (macOS); SSL_CERT_FILE is used too.
        context = ssl.create_default_context() if self.where.startswith("https") else None
        if context:
            context.load_verify_locations(certifi.where())
        # Servers close idle connections after 5 s (uvicorn) or more: a request on a closing connection is lost.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4, ssl=context or True)
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        return self._session

    async def close(self) -> None:
        """Close the connections, which belong to the event loop that opened them."""
        if self._session:
            await self._session.close()
        self._session = None


def _transport_fault(e: Exception, stalled: bool) -> str:
    """Name what happened to a request without a response."""
    if isinstance(e, aiohttp.ClientConnectorCertificateError):
        return f"certificate refused: {e.certificate_error}"
    for kind, name in (
        (TimeoutError, f"timeout: the reply stalled for {IDLE:g} s" if stalled else "timeout"),
        (aiohttp.ClientConnectorSSLError, "TLS failed: if the server has none, use http://"),
        (aiohttp.ClientConnectorDNSError, "no such host"),
        (aiohttp.ClientHttpProxyError, f"the proxy answered HTTP {getattr(e, 'status', None)}"),
        (aiohttp.ClientResponseError, "the response is not HTTP"),
        (aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError, "connection closed"),
    ):
        if isinstance(e, kind):
            return name
    number = getattr(e, "errno", None)
    return os.strerror(number).lower() if number else f"connection: {type(e).__name__}"


def _proxy_for(scheme: str, host: str) -> tuple[str | None, str]:
    """Return the proxy that the environment names for a host (none for this machine), and a note for errors."""
    local = host in ("localhost", "::1") or host.startswith("127.")
    proxy = None if local or urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
    proxy = f"http://{proxy}" if proxy and "://" not in proxy else proxy  # as curl reads "proxy:3128"
    return proxy, f", through the proxy of {scheme}_proxy" if proxy else ""
