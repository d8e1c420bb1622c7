"""Download a file with a known git blob id: resume after a break, and trust the id rather than the server."""

from __future__ import annotations

import http.client
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from alpaca import UserError
from alpaca.common.files import git_blob_id

ATTEMPTS = 6  # requests in a row without a new byte
WAIT = 1.0  # seconds before the second of them; doubled each time, 31 s in all
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 18


def download(url: str, part: Path, blob_id: str) -> None:
    """Download to ``part`` until its content is right, or until the server has sent all that it announced.

    Raises:
        UserError: not a URL, a permanent HTTP error, or ATTEMPTS requests without a new byte.
    """
    idle, problem = 0, ""
    if size := _size(part):
        print(f"resuming {part} after {size:,} bytes")
    while idle < ATTEMPTS:
        if _size(part) and git_blob_id(part) == blob_id:  # also if only the rename was missing
            return
        if idle:
            wait = WAIT * 2 ** (idle - 1)
            print(f"{problem}; retrying in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
        size = _size(part)
        if not (problem := _request(url, part, size)):
            return
        idle = 0 if _size(part) > size else idle + 1
    raise UserError(
        f"{url}: {problem}, {ATTEMPTS} times in a row; {part} has {_size(part):,} bytes: run the same command to "
        "resume, or give a mirror's url"
    )


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _request(url: str, part: Path, size: int) -> str:
    """Request the bytes after ``size``. Return "" if everything announced has arrived, else why not."""
    headers = {"User-Agent": "analyze_data.py", "Accept-Encoding": "identity"}
    if size:
        headers["Range"] = f"bytes={size}-"
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == 416:  # there are no bytes after these
            part.unlink()
            return "the partial file on disk did not match"
        if e.code in (408, 425, 429) or e.code >= 500:
            return f"HTTP {e.code}"
        raise UserError(f"{url} answers HTTP {e.code} ({e.reason}): check the url, or give a mirror's") from None
    except ValueError as e:
        raise UserError(f"{url} is not a URL ({e}): give an https address or the path of a copy") from None
    except (OSError, http.client.HTTPException) as e:
        if url.startswith("file:"):
            raise UserError(f"{url} is not a file: give an https address or the path of a copy") from None
        return f"no connection ({getattr(e, 'reason', e) or type(e).__name__})"
    with reply:
        resumed = reply.status == 206
        length = reply.headers.get("Content-Length", "")
        start = size if resumed else 0  # a server without Range sends all of it again
        end = start + int(length) if length.isdigit() else None
        with (
            open(part, "ab" if resumed else "wb") as out,
            tqdm(total=end, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            try:
                while chunk := reply.read1(
                    CHUNK
                ):  # read() waits for a full chunk, and loses it if the connection breaks
                    out.write(chunk)
                    bar.update(len(chunk))
            except (OSError, http.client.HTTPException) as e:
                return f"the connection broke ({type(e).__name__})"
    got = _size(part)
    return "" if end is None or got >= end else f"the connection broke at {got:,} of {end:,} bytes"
