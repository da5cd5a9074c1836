"""What tests of the stand-in GPU share."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_microgpt.ops.cuda import CudaOps
from tests.cuda.guarded import GuardedArray
from tests.cuda.stand_in import StandInGpu

SHAPE = (4, 8)


def started(**options: Any) -> StandInGpu:
    gpu = StandInGpu(**options)
    gpu.activate()
    return gpu


def filled(gpu: StandInGpu, value: float = 1, shape: tuple[int, ...] = SHAPE) -> GuardedArray:
    array = gpu.empty(shape, np.float32)
    gpu.upload(array, np.full(shape, value, np.float32))
    return array


def operations(gpu: StandInGpu, dtype: Any = np.float32) -> CudaOps:
    return CudaOps(dtype, gpu.device, gpu.loader, gpu.empty((0,), np.uint8))
