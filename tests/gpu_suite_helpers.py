"""Parts, reports and a checker for the GPU suite's tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.gpu_suite.parts import Part

ENVIRONMENT = Part("environment", 5, (sys.executable, "-c", "print('here')"))


def python(name: str, seconds: float, code: str) -> Part:
    return Part(name, seconds, (sys.executable, "-c", code))


def written(out: Path) -> dict[str, Any]:
    return json.loads((out / "suite.json").read_text("utf-8"))


def checker(folder: Path, body: str) -> Path:
    """A compute-sanitizer that does what `body` says, $@ being the program to check."""
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\nshift 4\n{body}\n", "utf-8")
    path.chmod(0o755)
    return path
