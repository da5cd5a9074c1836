"""What the doctor finds out about a machine: cores, BLAS and its speed, compiled kernels, GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController

from .backend import cupy
from .backend.beside import usable_cores
from .backend.numpy import PIN, NumpyBackend
from .errors import BackendError, ConfigError

SIZE, REPEATS = 1536, 4  # of the product that is timed
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds it may use, of how many
INSTRUCTIONS = {64: "AVX-512", 32: "AVX"}  # by bytes of a vector


@dataclass(frozen=True)
class Cores:
    """What there is to compute on."""

    machine: int
    usable: int  # by this process
    quota: float | None  # processors' worth of time that a container grants; None: no limit
    threads: int  # asked for, or the default
    load: float | None  # programs that ran in the last minute, where the system tells


@dataclass(frozen=True)
class Blas:
    """NumPy's matrix products."""

    library: str  # with its version; empty: none was found
    core: str  # the kind of core it has its kernels for
    pinned: str  # to that kind by PIN; empty: it chose itself
    one_thread: float  # GFLOP/s of a float32 product
    all_threads: float


@dataclass(frozen=True)
class Compiled:
    """The kernels that Numba compiles."""

    numba: str  # version
    vector_bytes: int
    instructions: str
    bf16: str  # why it cannot be had; empty: it can
    folder: str  # where their machine code is kept
    unwritable: str  # why that folder cannot be written; empty: it can
    kept: int  # files of machine code in it


def find_cores(threads: int) -> Cores:
    """`threads`: asked for; 0: the default."""
    usable = usable_cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Cores(os.cpu_count() or usable, usable, _quota(), threads or usable, load)


def _quota() -> float | None:
    with suppress(OSError, ValueError):  # not Linux, no such limit ("max"), or another format
        granted, period = map(float, QUOTA.read_text().split())
        return granted / period
    return None


def measure_blas(threads: int) -> Blas:
    """Find NumPy's library and time it, about a second."""
    controller = ThreadpoolController()
    found = [library for library in controller.info() if library["user_api"] == "blas"]
    first = found[0] if found else {}
    return Blas(
        library=f"{first.get('internal_api', '')} {first.get('version', '')}".strip(),
        core=first.get("architecture") or "",
        pinned=os.environ.get(PIN, "") if first.get("internal_api") == "openblas" else "",
        one_thread=_sgemm(controller, 1),
        all_threads=_sgemm(controller, threads),
    )


def _sgemm(controller: ThreadpoolController, threads: int) -> float:
    """GFLOP/s of the fastest of a few products."""
    a = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    out = np.empty_like(a)
    seconds = []
    with controller.limit(limits=threads, user_api="blas"):
        for _ in range(REPEATS):
            start = time.perf_counter()
            np.matmul(a, a, out=out)
            seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / min(seconds) / 1e9


def measure_blas_unpinned(threads: int) -> Blas:
    """The same in a process of its own that leaves the choice of core to OpenBLAS."""
    free = {name: value for name, value in os.environ.items() if name != PIN}
    command = [sys.executable, "-m", __name__, str(threads)]
    done = subprocess.run(command, env=free, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BackendError(f"measuring without {PIN} failed: {why}")
    return Blas(**json.loads(done.stdout))


def find_compiled() -> Compiled | None:
    """None: Numba is not installed."""
    if find_spec("numba") is None:
        return None
    from .ops.cpu.code import HAS_FMA, VECTOR_BYTES
    from .ops.cpu.compile import cache_folder, why_unwritable

    folder = cache_folder()
    instructions = INSTRUCTIONS.get(VECTOR_BYTES, "NEON" if HAS_FMA else "SSE2")
    return Compiled(
        numba=metadata.version("numba"),
        vector_bytes=VECTOR_BYTES,
        instructions="AVX2" if instructions == "AVX" and HAS_FMA else instructions,
        bf16=_no_bf16(),
        folder=str(folder),
        unwritable=why_unwritable(folder),
        kept=len(list(folder.rglob("*.nbc"))),
    )


def _no_bf16() -> str:
    try:
        NumpyBackend("bf16", kernels="compiled")
    except BackendError as failure:
        return str(failure)
    return ""


def find_gpu() -> tuple[str, str]:
    """What GPU 0 is, its driver and libraries; or nothing, and what is missing, in one line."""
    try:
        return cupy.open_gpu(0).describe(), ""
    except (BackendError, ConfigError) as failure:
        return "", str(failure)


if __name__ == "__main__":
    print(json.dumps(asdict(measure_blas(int(sys.argv[1])))))
