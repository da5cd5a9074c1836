"""TensorBoard event files: append to them, read them back, cut them at a step.

An event file is a row of records: length (8 bytes), its checksum (4), a protobuf `Event`, its
checksum (4). The `RecordWriter` of the `tensorboard` package frames them. The `EventFileWriter`
around that is left out for three reasons: it imports TensorFlow where that is installed; it writes
from a thread of its own, where a full disk ends in a traceback; and two of its files begun in one
second may be read in the wrong order.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
)
from tensorboard.summary.writer.record_writer import RecordWriter

from .atomic_folder import fsync_folder
from .errors import UserError

PREFIX = "events.out.tfevents."
HPARAMS_TAGS = frozenset({EXPERIMENT_TAG, SESSION_START_INFO_TAG, SESSION_END_INFO_TAG})


class AppendFile:
    """A file that grows by whole records, each handed to the operating system at once.

    So a SIGKILL loses no record; `sync` also makes them outlive a power failure.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for appending. UserError when that cannot be done."""
        self._path = path
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise cannot_write(path, error) from error

    def write(self, record: bytes) -> None:
        """Append all of `record`; when that fails (UserError), nothing of it stays."""
        end = self._file.seek(0, os.SEEK_END)
        left = memoryview(record)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn end is dropped on resume as well
                self._file.truncate(end)
            raise cannot_write(self._path, error) from error

    def sync(self) -> None:
        """Wait until everything written is on the disk. UserError when that fails."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def close(self) -> None:
        """Close the file; more than once is harmless."""
        self._file.close()


class EventFile:
    """A new event file in `run_dir`; TensorBoard reads it after every one already there."""

    def __init__(self, run_dir: Path) -> None:
        """Create the file. UserError when that cannot be done."""
        stamps = [path.name.removeprefix(PREFIX).split(".")[0] for path in event_files(run_dir)]
        stamp = max([int(time.time()), *(int(s) + 1 for s in stamps if s.isdecimal())])
        name = f"{PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendFile(run_dir / name)
        self._records = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, *values: Any) -> None:
        """Append one event of `Summary.Value`s at `step`. UserError when the disk is full."""
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def sync(self) -> None:
        """Wait until every event is on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file; more than once is harmless."""
        self._file.close()


def event_files(run_dir: Path) -> list[Path]:
    """The event files of a run, in the order TensorBoard reads them."""
    return sorted(run_dir.glob(f"{PREFIX}*"))


def split_records(data: bytes) -> tuple[list[bytes], int]:
    """The sound records in `data`, framing included, and the number of bytes outside them.

    A record whose content was altered is left out alone; after a torn or altered length nothing
    can be found.
    """
    records = []
    start = 0
    while start < len(data):
        length = data[start : start + 8]
        end = start + 12 + int.from_bytes(length, "little") + 4
        if end > len(data) or not _checks(length, data[start + 8 : start + 12]):
            break
        if _checks(data[start + 12 : end - 4], data[end - 4 : end]):
            records.append(data[start:end])
        start = end
    return records, len(data) - sum(map(len, records))


def _checks(content: bytes, checksum: bytes) -> bool:
    return bool(masked_crc32c(content) == int.from_bytes(checksum, "little"))


def read_events(path: Path) -> list[Any]:
    """Every sound `Event` of a file, in order."""
    return [Event.FromString(record[12:-4]) for record in split_records(path.read_bytes())[0]]


def cut_event_files(run_dir: Path, last_step: int, warn: Callable[[str], None]) -> dict[str, int]:
    """Drop events after `last_step`, those of hparams, and damage; return each tag's last step.

    hparams go because every session writes its own. Files are replaced atomically, and only where
    that changes them. Each damaged file is named through `warn`.
    """
    last: dict[str, int] = {}
    for path in event_files(run_dir):
        data = path.read_bytes()
        records, lost = split_records(data)
        if lost:
            warn(f"{path}: {lost} bytes are no whole records (an interrupted write?); dropped")
        kept = []
        for record in records:
            event = Event.FromString(record[12:-4])
            tags = {value.tag for value in event.summary.value}
            if event.HasField("file_version") or (
                event.step <= last_step and not tags & HPARAMS_TAGS
            ):
                kept.append(record)
                last.update({tag: max(event.step, last.get(tag, -1)) for tag in tags})
        replace(path, data, b"".join(kept))
    return last


def replace(path: Path, old: bytes, new: bytes) -> None:
    """Make `new` the content of `path` atomically, unless it is already (`old`).

    UserError when that cannot be done; the file is then as before.
    """
    if new == old:
        return
    # TensorBoard reads every file with "tfevents" in its name
    temporary = path.parent / f".rewrite-{path.name.removeprefix(PREFIX)}"
    try:
        with open(temporary, "wb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The one line for a file that cannot be written."""
    return UserError(
        f"cannot write {path}: {error.strerror}; "
        f"free some space or check the folder's permissions, then resume"
    )
