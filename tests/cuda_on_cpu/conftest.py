"""Runs kernels of this folder: emulated in several schedules, and on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.ops.cuda.compiler import OPTIONS
from tests.cuda_on_cpu.build import HERE, KERNELS, SANITIZER, module

SCHEDULES = [("fifo", 0), ("lifo", 0), ("random", 0), ("random", 1), ("random", 2)]

Run = Callable[..., None]


def emulated(stem: str, name: str, grid: Any, block: Any, args: tuple[Any, ...],
             defines: tuple[str, ...] = ("REAL_BF16=0",), **how: Any) -> None:  # fmt: skip
    """Run kernel `name` of a file of this folder on the CPU."""
    module(HERE / f"{stem}.cu", defines).get_function(name)(grid, block, args, **how)


def on_gpu(stem: str, name: str, grid: Any, block: Any, args: tuple[Any, ...],
           defines: tuple[str, ...] = ("REAL_BF16=0",), shared_mem: int = 0,
           resident: bool = False) -> None:  # fmt: skip
    """The same on a GPU; the few blocks of a self-test are resident anyway."""
    import cupy

    options = (*OPTIONS, f"-I{KERNELS}", *(f"-D{d}" for d in defines))
    source = (HERE / f"{stem}.cu").read_text("utf-8")
    kernel = cupy.RawModule(code=source, options=options).get_function(name)
    arrays = {i: a for i, a in enumerate(args) if isinstance(a, np.ndarray)}
    device = {i: cupy.asarray(a.reshape(-1).view(np.uint8)) for i, a in arrays.items()}
    kernel(grid, block, tuple(device.get(i, a) for i, a in enumerate(args)), shared_mem=shared_mem)
    for i, array in arrays.items():
        array.reshape(-1).view(np.uint8)[...] = cupy.asnumpy(device[i])


def _has_gpu() -> bool:
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        return False
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # whatever is wrong with it: the emulated runs remain
        return False


@pytest.fixture(params=[*SCHEDULES, *(["gpu"] if _has_gpu() else [])], ids=str)
def run(request: pytest.FixtureRequest) -> Run:
    """run(name, grid, block, args, **how): a kernel of selftest.cu."""
    if request.param == "gpu":
        return partial(on_gpu, "selftest")
    if SANITIZER:
        pytest.skip("the emulator is tested without sanitizers")
    order, seed = request.param
    return partial(emulated, "selftest", order=order, seed=seed)
