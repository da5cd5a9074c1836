"""The stand-in for cuBLASLt: cublaslt.cpp, compiled once and kept beside the kernels."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.cuda_on_cpu.build import HERE, cache_folder
from tests.cuda_on_cpu.compiler import COMPILER, require_compiler
from tests.cuda_on_cpu.launch import KernelError

SOURCE = HERE / "cublaslt.cpp"
FLAGS = [
    "-std=c++17", "-O3", *(["-mavx2", "-mfma"] if platform.machine() == "x86_64" else []),
    "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra",
]  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """cuBLASLt's functions on the CPU, and `fake_*` switches; its state is the process's.

    Skips the test that needs it where there is no compiler.
    """
    require_compiler()
    text = SOURCE.read_text("utf-8")
    key = hashlib.sha256(repr((COMPILER, FLAGS, text)).encode()).hexdigest()[:16]
    made = cache_folder() / f"cublaslt-{key}.so"
    if not made.exists():
        _compile(made)
    found = ctypes.CDLL(str(made))
    found.fake_version.argtypes = (ctypes.c_uint64,)
    return found


def _compile(library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder, library.name)
        command = [COMPILER, *FLAGS, str(SOURCE), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelError(f"{SOURCE.name}: {done.stderr}")
        os.replace(partial, library)
