"""Every kernel under AddressSanitizer and ThreadSanitizer, each in one process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.sanitized import stems
from tests.cuda_on_cpu.build import KERNELS, SANITIZER
from tests.cuda_on_cpu.sanitize import environment, missing

pytestmark = pytest.mark.skipif(bool(SANITIZER), reason="this process runs under a sanitizer")


def sanitized(kind: str, log: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `python -m tests.cuda.sanitized` says; skips where the sanitizer is missing."""
    if why := missing(kind):
        pytest.skip(why)
    command = [sys.executable, "-m", "tests.cuda.sanitized", kind, *arguments]
    return subprocess.run(
        command, env=environment(kind, log), cwd=KERNELS.parent, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_kernels_are_clean(kind, tmp_path):
    done = sanitized(kind, tmp_path / "log")
    assert done.returncode == 0, done.stdout
    clean = ["mistakes: all reported", *(f"{stem}: clean" for stem in stems())]
    assert done.stdout.splitlines() == clean


def test_every_kernel_is_among_them():
    assert {path.stem for path in KERNELS.glob("*.cu")} <= set(stems())
