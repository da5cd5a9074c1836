"""The compiler of emulated kernels, and what tests do where it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache

import pytest

COMPILER = os.environ.get("CXX", "g++")


def require_compiler() -> None:
    """Skip the test that calls this where kernels cannot be compiled for the CPU, or not run."""
    if sys.platform != "linux":
        pytest.skip(f"the emulator of kernels wants Linux, not {sys.platform}")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is missing: kernels are tested on the CPU by compiling them")


@cache
def supported(flag: str) -> bool:
    """Whether the compiler knows this option."""
    command = [COMPILER, "-Werror", flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
