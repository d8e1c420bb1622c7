"""Download a file whose git blob id is known: resume after a break, and trust the id rather than the server."""

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
    """Download to ``part`` until its content is right, or until the server reports twice that there is no more.

    A server's Content-Length is not trusted: a file is right if its blob id is.

    Raises:
        UserError: not an address, an HTTP error that no retry cures, or ATTEMPTS requests without a new byte.
    """
    idle, ended_at, problem = 0, None, "no answer"
    before = _size(part)
    if before:
        print(f"resuming {part} after {before:,} bytes")
        if git_blob_id(part) == blob_id:  # only the rename was missing
            return
    while idle < ATTEMPTS:
        if idle:
            wait = WAIT * 2 ** (idle - 1)
            print(f"{problem or 'the content is not right yet'}; retrying in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
        size = _size(part)
        try:
            ended, problem = _request(url, part, size)
        except urllib.error.HTTPError as e:
            e.close()
            if e.code == 416 and size == before and ended_at is None:  # left by an earlier run, of another file
                part.unlink()
                size, before, ended, problem = 0, 0, False, "the partial file on disk did not fit"
            elif e.code == 416:
                ended = True
            elif e.code in (408, 425, 429) or e.code >= 500:
                ended, problem = False, f"HTTP {e.code}"
            else:
                raise UserError(f"{url} answers HTTP {e.code} ({e.reason}): check the url, or use a mirror's") from None
        new_size = _size(part)
        if new_size and git_blob_id(part) == blob_id:
            return
        if ended and ended_at == new_size:
            return  # the server has reported the end twice; fetch refuses the file
        ended_at = new_size if ended else None
        idle = 0 if new_size > size else idle + 1
    raise UserError(
        f"{url}: {problem}, {ATTEMPTS} times in a row; {part} keeps {_size(part):,} bytes. Run the same command to "
        "resume, or use a mirror's url"
    )


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _request(url: str, part: Path, size: int) -> tuple[bool, str]:
    """Request the bytes after ``size``. Return whether the body came to its announced end, and if not, why.

    Raises:
        urllib.error.HTTPError: the server answered with an error.
    """
    headers = {"User-Agent": "analyze_data.py", "Accept-Encoding": "identity"}
    if size:
        headers["Range"] = f"bytes={size}-"
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except ValueError as e:
        raise UserError(f"{url} is not an address: {e}") from None
    except (OSError, http.client.HTTPException) as e:
        return False, f"no connection ({getattr(e, 'reason', e) or type(e).__name__})"
    with reply:
        resumed = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        if reply.status == 206 and not resumed:
            return False, "the server sent another range than requested"
        length = reply.headers.get("Content-Length", "")
        start = size if resumed else 0  # a server without Range sends all of it again
        end = start + int(length) if length.isdigit() else None
        with (
            open(part, "ab" if resumed else "wb") as out,
            tqdm(total=end, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while True:
                try:
                    chunk = reply.read1(CHUNK)  # read() waits for a full chunk, and loses it when the connection breaks
                except (OSError, http.client.HTTPException) as e:
                    return False, f"the connection broke off ({type(e).__name__})"
                if not chunk:
                    break
                out.write(chunk)
                bar.update(len(chunk))
    got = part.stat().st_size
    return (True, "") if end is None or got >= end else (False, f"the connection broke off at {got:,} of {end:,} bytes")
