"""Run kernels under AddressSanitizer or ThreadSanitizer, in a Python process made for it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.cuda_on_cpu.compiler import COMPILER

SANITIZER = os.environ.get("CUDA_ON_CPU_SANITIZE", "")  # of this process: "", address or thread

_LOG = os.environ.get("CUDA_ON_CPU_LOG", "")
_SIGNS = ("WARNING:", "ERROR:")
_TITLES = ("  Write", "  Previous", "  Read", "READ", "WRITE", "  Atomic")
_FRAME = re.compile(r"#\d+.* in (\w+).*/(\w+\.cuh?:\d+)|#\d+ (\w+).*/(\w+\.cuh?:\d+)")

_NOISE = re.compile(r"^==\d+==| \(pid=\d+\)| (on address|at) 0x.*")


def missing(kind: str) -> str:
    """Why nothing can run under this sanitizer here; empty where it can."""
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} is missing"
    library = _library(kind)
    if not library.is_absolute():
        return f"{COMPILER} has no {library}"
    preload = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(["true"], env=preload, capture_output=True, text=True, check=False)
    return f"no process runs with {library}: {done.stderr[:200]}" if done.returncode else ""


def environment(kind: str, log: Path) -> dict[str, str]:
    """Variables for a Python process whose kernels run under `kind`: address or thread.

    Reports go to `log`.<process id>; each becomes the KernelError of the launch that caused it.
    """
    options = f"log_path={log}:halt_on_error=0"
    return {
        **os.environ, "LD_PRELOAD": str(_library(kind)), "CUDA_ON_CPU_SANITIZE": kind,
        "CUDA_ON_CPU_LOG": str(log), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:suppress_equal_pcs=0",
        "TSAN_OPTIONS": f"{options}:exitcode=0:report_signal_unsafe=0:suppress_equal_stacks=0",
    }  # fmt: skip


_read = 0  # how far reports() has read the log


def reports() -> str:
    """What the sanitizer has written since the last call, shortened to what and where."""
    global _read
    path = Path(f"{_LOG}.{os.getpid()}")
    if not _LOG or not path.exists():
        return ""
    with path.open("rb") as log:
        log.seek(_read)
        text = log.read().decode(errors="replace")
        _read = log.tell()
    found: list[str] = []
    for line in text.splitlines():
        if any(sign in line for sign in _SIGNS) or line.startswith(_TITLES):
            found.append(_NOISE.sub("", line.strip()))
        elif (match := _FRAME.search(line)) and found and not found[-1].endswith("]"):
            found[-1] += f" [{match[1] or match[3]} {match[2] or match[4]}]"  # the innermost
    return "\n".join(dict.fromkeys(found)) or text[:2000]


_fibers: list[int] = []


def tsan_fibers(count: int) -> ctypes.Array[ctypes.c_void_p] | None:
    """ThreadSanitizer's fibers, kept from launch to launch: making them takes long."""
    if SANITIZER != "thread":
        return None
    process = ctypes.CDLL(None)
    process.__tsan_create_fiber.restype = ctypes.c_void_p
    while len(_fibers) < count:
        _fibers.append(process.__tsan_create_fiber(0))
    return (ctypes.c_void_p * count)(*_fibers[:count])


def forget_fibers() -> None:
    """Begin anew with the next launch."""
    _fibers.clear()


def _library(kind: str) -> Path:
    """The sanitizer's, to be loaded before everything else; a bare name where there is none."""
    command = [COMPILER, f"-print-file-name=lib{kind[0]}san.so"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())
