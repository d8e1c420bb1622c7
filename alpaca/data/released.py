"""Downloads a file whose git blob id is known: resumes what broke off, and believes the id, not the server."""

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

ATTEMPTS = 6  # requests that brought nothing new, in a row
WAIT = 1.0  # seconds before the second of them; doubled each time, 31 s in all
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 18


def download(url: str, part: Path, blob_id: str) -> None:
    """Fills ``part`` until its content is right, or until the server says again that there is no more.

    What a server says of its length is not believed: a file is right when its blob id is.
    """
    idle, ended_at, problem = 0, None, "no answer"
    before = part.stat().st_size if part.exists() else 0
    if before:
        print(f"{part}: {before:,} bytes are there, resuming")
        if git_blob_id(part) == blob_id:  # only the rename was missing
            return
    while idle < ATTEMPTS:
        if idle:
            wait = WAIT * 2 ** (idle - 1)
            print(f"{problem or 'the content is not right yet'}; asking again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
        size = part.stat().st_size if part.exists() else 0
        try:
            ended, problem = _request(url, part, size)
        except urllib.error.HTTPError as e:
            e.close()
            if e.code == 416 and size == before and ended_at is None:  # older than this run: of some other file
                part.unlink()
                size, before, ended, problem = 0, 0, False, "the part on disk did not fit"
            elif e.code == 416:
                ended = True
            elif e.code in (408, 425, 429) or e.code >= 500:
                ended, problem = False, f"HTTP {e.code}"
            else:
                raise UserError(f"{url} answers HTTP {e.code} ({e.reason}): check --url, or give a mirror's") from None
        new_size = part.stat().st_size if part.exists() else 0
        if new_size and git_blob_id(part) == blob_id:
            return
        if ended and ended_at == new_size:
            return  # the server has said so twice, and fetch refuses the file
        ended_at = new_size if ended else None
        idle = 0 if new_size > size else idle + 1
    kept = f"{part.stat().st_size:,} bytes are kept in {part}" if part.exists() else "nothing came"
    raise UserError(
        f"{url}: {problem}, {ATTEMPTS} times in a row; {kept}. The same command resumes; --url takes a mirror"
    )


def _request(url: str, part: Path, size: int) -> tuple[bool, str]:
    """One request for what comes after ``size`` bytes: whether the body came to the end that was announced, or why not.

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
        raise UserError(f"--url {url} is not an address: {e}") from None
    except (OSError, http.client.HTTPException) as e:
        return False, f"no connection ({getattr(e, 'reason', e) or type(e).__name__})"
    with reply:
        resumed = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        if reply.status == 206 and not resumed:
            return False, "the server sent another range than asked for"
        length = reply.headers.get("Content-Length", "")
        start = size if resumed else 0  # a server without Range sends all of it again
        end = start + int(length) if length.isdigit() else None
        with (
            open(part, "ab" if resumed else "wb") as out,
            tqdm(total=end, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while True:
                try:
                    chunk = reply.read1(CHUNK)  # not read: it waits for a full chunk, and loses it when the line dies
                except (OSError, http.client.HTTPException) as e:
                    return False, f"the connection broke off ({type(e).__name__})"
                if not chunk:
                    break
                out.write(chunk)
                bar.update(len(chunk))
    got = part.stat().st_size
    return (True, "") if end is None or got >= end else (False, f"the connection broke off at {got:,} of {end:,} bytes")
