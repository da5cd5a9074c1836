"""The suite's parts: what they are called, how long they may take, and running one of them.

Only Python's own library is used here, so that a report is written whatever is missing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED = "interrupted"  # a part that the suite was stopped in
LAST = 40  # lines of a failed part's output that are kept
SPARE = 2.0  # a part may take so many times its share, of what parts before it left over
ENDING = 5.0  # seconds for a killed process to go: a driver may hold on to one whose kernel hangs


@dataclass(frozen=True)
class Part:
    """A process of its own, with a share of the time."""

    name: str  # "steps:names"; what is before the colon can be picked
    seconds: float
    command: tuple[str, ...] = ()  # instead of the suite's own

    @property
    def group(self) -> str:
        return self.name.partition(":")[0]


# the most important first
PARTS = [
    Part("environment", 20),
    Part("kernels", 15),
    Part("tests", 85),
    Part("sanitizer", 35),
    Part("ceilings", 15),
    Part("steps:names", 35),
    Part("steps:shakespeare", 45),
    Part("steps:baby-gpt", 55),
    Part("steps:124m", 100),
    Part("ops", 35),
    Part("generation", 20),
    Part("train:shakespeare", 25),
    Part("train:baby-gpt", 35),
]
BUDGET = sum(part.seconds for part in PARTS)
GROUPS = list(dict.fromkeys(part.group for part in PARTS))


class Stop:
    """A signal ends the part that is running, or else the next before it begins."""

    def __init__(self) -> None:
        self._asked = self._listening = False

    def __call__(self, *_: object) -> None:
        """Handle the signal."""
        self._asked = True
        if self._listening:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Raise KeyboardInterrupt in here."""
        self._listening = True
        try:
            if self._asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._listening = False


STOP = Stop()


def run(part: Part, limit: float, dry_run: bool, scratch: Path) -> dict[str, Any]:
    """Run a part, for `limit` seconds at most, with a folder for its files.

    Returns its row of the report. "results" are what it had written when it ended, however it did.
    """
    stem = part.name.replace(":", "-")
    result, log = scratch / f"{stem}.json", scratch / f"{stem}.log"
    own = [
        sys.executable, "-m", "tests.gpu_suite.work", part.name, "--result", str(result),
        "--seconds", f"{limit:.1f}", *(["--dry-run"] if dry_run else []),
    ]  # fmt: skip
    start, process = time.monotonic(), None
    try:
        with STOP.listening(), log.open("wb") as output:
            process = subprocess.Popen(
                part.command or own, cwd=ROOT, env=_environment(), stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            code = waited_for(process, limit)
        status = "ok" if code == 0 else "timed out" if code is None else "failed"
    except KeyboardInterrupt:
        code, status = None, INTERRUPTED
    row: dict[str, Any] = {
        "name": part.name,
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "limit": round(limit, 1),
        "results": _read(result),
    }
    if process is not None and process.poll() is None:
        row["stuck"] = process.pid
    if code:
        row["code"] = code
    if code != 0:
        said = log.read_text("utf-8", "replace") if log.exists() else ""
        row["last_lines"] = said.splitlines()[-LAST:]
    return row


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash says where
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever else is installed
    }
    return {**os.environ, **ours}


def waited_for(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit code, or None where it took longer. Whatever comes, it is ended, and what it
    started, which is a group of its own."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill its group, and its session where that is its own; wait for it, but not for ever."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    end = time.monotonic() + ENDING
    with suppress(subprocess.TimeoutExpired):
        process.wait(ENDING)
    while (others := _session(process.pid)) and time.monotonic() < end:
        for pid in others:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _session(leader: int) -> list[int]:
    """Processes of a session that still run, in whatever group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(folder.name))
    return found


def _read(path: Path) -> dict[str, Any]:
    """Results are written in one piece, so they are whole or missing."""
    try:
        results: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except OSError:
        return {}
    return results
