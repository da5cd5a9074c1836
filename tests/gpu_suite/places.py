"""Where the suite runs: the GPU of this machine, or a stand-in for one."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gpu_microgpt.backend.cuda import CudaBackend


@contextmanager
def stand_in() -> Iterator[None]:
    """Have `backend=cupy` run on the CPU."""
    from tests.cuda.stand_in import install

    with pytest.MonkeyPatch.context() as patch:
        install(patch, guarded=False)
        yield


@contextmanager
def backend(dry_run: bool) -> Iterator[CudaBackend]:
    """The engine's backend in its own precision, active."""
    from gpu_microgpt.backend import cupy

    if dry_run:
        with stand_in(), CudaBackend(cupy.open_gpu(0)) as cuda:
            yield cuda
    else:
        with CudaBackend(cupy.open_gpu(0)) as cuda:
            yield cuda


if __name__ == "__main__":  # python -m tests.gpu_suite.places SCRIPT ARGUMENT ...: on the stand-in
    del sys.argv[0]
    with stand_in():
        runpy.run_path(sys.argv[0], run_name="__main__")
