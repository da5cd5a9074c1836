"""Which algorithm was chosen for which matrix product, on disk: a second start measures nothing,
and computes the same bits as the first."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from ...errors import warn
from .cache import keep, kernels_cache


class PlanCache:
    """Choices by machine (GPU and library) and problem: a file a machine in the kernels' folder.

    Processes may use it at once: files appear whole. Of two that write at the same time the
    choices of one may be lost; they are then made again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Use `folder`, or the user's cache; nothing is made yet."""
        self.folder = folder or kernels_cache()
        self._read: dict[str, dict[str, str]] = {}
        self._warned = False

    def get(self, machine: str, problem: str) -> str | None:
        """What was put, or None where nothing was or the file is damaged."""
        if machine not in self._read:
            self._read[machine] = _choices(self.path(machine))
        return self._read[machine].get(problem)

    def put(self, machine: str, problem: str, choice: str) -> None:
        """Keep it. Where that is impossible, one warning is printed."""
        path = self.path(machine)
        choices = {**_choices(path), **self._read.get(machine, {}), problem: choice}
        self._read[machine] = choices
        content = {"machine": machine, "digest": _digest(choices), "choices": choices}
        try:
            keep(path, json.dumps(content, indent=1).encode())
        except OSError as failure:
            if not self._warned:
                warn(
                    f"{self.folder}: choices of algorithms cannot be kept ({failure.strerror}), "
                    "so every start measures them anew, and may compute other last bits"
                )
            self._warned = True

    def path(self, machine: str) -> Path:
        """A machine's file: JSON."""
        key = hashlib.sha256(machine.encode()).hexdigest()[:16]
        return self.folder / f"gemm-{re.sub(r'[^A-Za-z0-9]+', '-', machine)[:60]}-{key}.json"


def _choices(path: Path) -> dict[str, str]:
    """A file's, or none where it is missing, unreadable or damaged."""
    try:
        content = json.loads(path.read_bytes())
        choices: dict[str, str] = content["choices"]
        return choices if content["digest"] == _digest(choices) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _digest(choices: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()
