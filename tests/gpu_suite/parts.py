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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAST = 15  # lines of a failed part's output that are kept
SPARE = 2.0  # a part may take so many times its share, of what parts before it left over


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
    Part("tests", 100),
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
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command or own, cwd=ROOT, env=_environment(), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        code = waited_for(process, limit)
    row: dict[str, Any] = {
        "name": part.name,
        "status": "ok" if code == 0 else "timed out" if code is None else "failed",
        "seconds": round(time.monotonic() - start, 1),
        "limit": round(limit, 1),
        "results": _read(result),
    }
    if code != 0:
        row["last_lines"] = log.read_text("utf-8", "replace").splitlines()[-LAST:]
    return row


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def waited_for(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit code, or None where it took longer. Whatever comes, it is ended, and what it
    started, which is a group of its own."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(path: Path) -> dict[str, Any]:
    """Results are written in one piece, so they are whole or missing."""
    try:
        results: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except OSError:
        return {}
    return results
