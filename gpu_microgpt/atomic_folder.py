"""Folders that are there wholly or not at all, also after a crash or a power failure.

The files are written and flushed to disk (fsync) in `NAME.partial`, which is then renamed to NAME,
and the rename is flushed in turn. A rename happens wholly or not at all, so NAME is complete
whenever it exists. A rename cannot replace a folder that is not empty, so a NAME published again is
first set aside as `NAME.replaced`, which stands in for NAME until the new one has taken its place.
One process may write below a parent folder; any number may read.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

PARTIAL, REPLACED = ".partial", ".replaced"


def publish(path: Path, files: Mapping[str, bytes]) -> None:
    """Make `path` a folder of exactly these files (name -> content), durably.

    Raises OSError, naming the file; what was at `path` before is then still there.
    """
    _make_parent(path.parent)
    tidy(path.parent)
    partial, replaced = Path(f"{path}{PARTIAL}"), Path(f"{path}{REPLACED}")
    try:
        partial.mkdir()
        for name, data in files.items():
            _write(partial / name, data)
        fsync_folder(partial)
        if path.exists():
            os.rename(path, replaced)
        os.rename(partial, path)
        fsync_folder(path.parent)
    except OSError:
        with suppress(OSError):  # the first error is the one to report
            tidy(path.parent)
        raise
    tidy(path.parent)


def published(parent: Path) -> dict[str, Path]:
    """Name -> path of every complete folder; the path of a stand-in ends in `.replaced`."""
    if not parent.is_dir():
        return {}
    paths = {path.name: path for path in parent.iterdir() if path.is_dir()}
    folders = {n: p for n, p in paths.items() if p.suffix not in (PARTIAL, REPLACED)}
    stand_ins = {p.stem: p for p in paths.values() if p.suffix == REPLACED}
    return stand_ins | folders


def remove(path: Path) -> None:
    """Delete a folder; its name goes at once, so that no half of it is ever found."""
    partial = Path(f"{path}{PARTIAL}")
    os.rename(path, partial)
    shutil.rmtree(partial)


def tidy(parent: Path) -> None:
    """Clear what killed, failed and finished calls left behind; put stand-ins in their place."""
    for partial in list(parent.glob(f"*{PARTIAL}")):
        shutil.rmtree(partial)
    for stand_in in list(parent.glob(f"*{REPLACED}")):
        path = stand_in.with_suffix("")
        if path.exists():
            fsync_folder(parent)  # its name is durable before its stand-in goes
            shutil.rmtree(stand_in)
        else:
            os.rename(stand_in, path)


def fsync_folder(path: Path) -> None:
    """Flush the names in a folder to disk: created, renamed, removed."""
    if os.name == "nt":  # Windows cannot open folders; NTFS journals names by itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network and shared folders know no such thing
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)


def _make_parent(parent: Path) -> None:
    """As `mkdir -p`, durably."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        fsync_folder(path.parent)


def _write(path: Path, data: bytes) -> None:
    """Create a file and flush it to disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)
