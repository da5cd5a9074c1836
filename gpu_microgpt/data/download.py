"""One file from the network: whole, verified and in place, or a clear error and nothing."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from ..errors import DataError

_CONNECT_SECONDS = 10.0
_CHUNK_BYTES = 1 << 16


class DownloadError(DataError):
    """The file could not be had, or is not the expected one."""


@dataclass(frozen=True)
class Remote:
    """A file on the network; `size` in bytes and `sha256` where they are known beforehand."""

    url: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Patience:
    """How long to wait for the server, how often to try, how long to rest (doubling) between."""

    seconds: float = 30.0
    attempts: int = 3
    rest: float = 1.0  # seconds


class _LostError(Exception):
    """This attempt failed in a way that another may not."""


def download(
    remote: Remote, target: Path, log: Callable[[str], None], patience: Patience | None = None
) -> None:
    """Fetch into a temporary file beside `target`, verify it, rename it.

    A lost connection, a time-out and a fault of the server's own (429, 5xx) are tried again. A
    whole file with the wrong checksum is kept as NAME.bad. Raises DownloadError.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        try:
            with open(handle, "wb") as file:
                _persist(remote, file, log, patience or Patience())
                file.flush()
                os.fsync(file.fileno())
            wrong = mismatch(temporary.read_bytes(), remote)
            if wrong:
                aside = set_aside(temporary, target)
                raise DownloadError(f"{remote.url}: {wrong}; not used, kept as {aside}")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as failure:
        raise DownloadError(f"{target}: cannot be written: {failure.strerror}") from None


def mismatch(content: bytes, remote: Remote) -> str:
    """What is wrong with a file's content; empty if nothing that is known beforehand."""
    got = hashlib.sha256(content).hexdigest()
    if remote.sha256 in (None, got):
        return ""
    wanted = f"{remote.size:,} bytes with" if remote.size else "a file with"
    return (
        f"wrong checksum: got {len(content):,} bytes with sha256 {got}, "
        f"wanted {wanted} sha256 {remote.sha256}"
    )


def set_aside(bad: Path, target: Path) -> Path:
    """Rename a bad file to `target`'s name with .bad behind, and say where that is."""
    aside = target.with_name(target.name + ".bad")
    os.replace(bad, aside)
    return aside


def _persist(
    remote: Remote, file: BinaryIO, log: Callable[[str], None], patience: Patience
) -> None:
    """Fill `file`, trying again as long as `patience` lasts."""
    for attempt in range(1, patience.attempts + 1):
        try:
            return _fetch(remote, file, patience.seconds)
        except _LostError as failure:
            if attempt == patience.attempts:
                raise DownloadError(
                    f"{remote.url}: {failure} (attempt {attempt} of {patience.attempts}): "
                    "check the network and try again"
                ) from None
            log(f"{remote.url}: {failure}; trying again ({attempt + 1} of {patience.attempts})")
        time.sleep(patience.rest * 2 ** (attempt - 1))


def _fetch(remote: Remote, file: BinaryIO, seconds: float) -> None:
    """One attempt to fill `file` from its start."""
    import requests  # here: a run that has its text loads nothing of it

    file.seek(0)
    file.truncate()
    lost = "cannot be reached"
    try:
        with requests.get(
            remote.url,
            stream=True,
            timeout=(min(seconds, _CONNECT_SECONDS), seconds),
            headers={"Accept-Encoding": "identity"},  # so that lengths are those of the file
        ) as answer:
            status = f"the server answered {answer.status_code} {answer.reason}"
            if answer.status_code == 429 or answer.status_code >= 500:
                raise _LostError(status)
            if answer.status_code != 200:
                raise DownloadError(f"{remote.url}: {status}: check the address")
            lost = "the connection broke off or fell silent"
            length = answer.raw.length_remaining
            total = remote.size if length is None else length
            with tqdm(
                desc=remote.url.rsplit("/", 1)[-1], total=total, unit="B", unit_scale=True,
                disable=None, leave=False,
            ) as bar:  # fmt: skip
                for chunk in answer.iter_content(_CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
            if total is not None and file.tell() < total:
                raise _LostError(f"cut off after {file.tell():,} of {total:,} bytes")
    except requests.Timeout:
        raise _LostError(f"no answer within {seconds:g} s") from None
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        raise _LostError(lost) from None
    except requests.RequestException as failure:
        raise DownloadError(f"{remote.url}: {failure}") from None
