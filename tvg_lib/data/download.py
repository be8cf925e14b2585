"""Fetch public files: resumable, checked, never half-written under their final name."""

import hashlib
import os
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tvg_lib.errors import DataError

CHUNK = 1 << 16
ATTEMPTS = 4
TIMEOUT = 30.0  # seconds without a byte


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    url: str,
    target: Path,
    sha256: str | None = None,
    progress: Callable[[int], object] | None = None,
    pause: float = 1.0,
) -> None:
    """Download `url` to `target`.

    What has arrived is kept in `<target>.part`, so a broken connection, and a broken run, go on
    from there (HTTP Range). The file takes its name only when it is whole and its checksum holds.

    Args:
        url: http or https.
        target: existing content with the right checksum is kept, any other is replaced.
        sha256: expected checksum; without one an existing file is kept and the length that the
            server declares is all that can be checked.
        progress: called with the number of bytes of each piece.
        pause: seconds before the second attempt; doubled for each one after it.

    Raises:
        DataError: the server refuses, the connection breaks again and again, or the checksum is
            wrong; names the address, what was expected and what was found.
    """
    if target.exists() and (sha256 is None or file_sha256(target) == sha256):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for attempt in range(ATTEMPTS):
        try:
            _continue(url, part, progress)
            break
        except HTTPError as error:
            if error.code == 416:  # the part is longer than the file: it belongs to another one
                part.unlink()
            elif error.code not in (408, 429, 500, 502, 503, 504):
                raise DataError(f"{url}: the server answers {error.code} {error.reason}") from error
            found: Exception = error
        except (URLError, HTTPException, OSError) as error:
            found = error
        if attempt + 1 == ATTEMPTS:
            raise DataError(
                f"{url}: the connection broke {ATTEMPTS} times ({found}); what has arrived is kept "
                f"in {part}, run the download again to go on"
            ) from found
        time.sleep(pause * 2**attempt)
    if sha256 is not None:
        digest = file_sha256(part)
        if digest != sha256:
            part.unlink()
            raise DataError(
                f"{url}: expected the SHA-256 {sha256}, found {digest}; nothing was kept"
            )
    os.replace(part, target)


def _continue(url: str, part: Path, progress: Callable[[int], object] | None) -> None:
    """Append what is missing of `part`; ConnectionError if the server stops before the end."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == 206
        declared = response.headers.get("Content-Length")
        arrived = 0
        with part.open("ab" if resumed else "wb") as file:
            while piece := response.read(CHUNK):
                file.write(piece)
                arrived += len(piece)
                if progress is not None:
                    progress(len(piece))
    if declared is not None and arrived != int(declared):
        raise ConnectionError(f"{arrived} of {declared} bytes arrived")
