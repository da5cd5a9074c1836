"""Shared by the tests of matrix products: plans whose measurements are made up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_microgpt.ops.cuda.cublaslt import CublasLt
from gpu_microgpt.ops.cuda.device import KNOWN, Device
from gpu_microgpt.ops.cuda.gemm import Gemm
from gpu_microgpt.ops.cuda.plan_cache import PlanCache
from tests.cuda.machine import DTYPES, aligned, normal
from tests.cuda_on_cpu.cublaslt import library

MIB = 1 << 20


class Clock:
    """A queue whose time passes as its products say."""

    def __init__(self) -> None:
        self.stream, self.capturing, self.now = 3, False, 0.0

    def event(self) -> Tick:
        return Tick(self.now)


@dataclass
class Tick:
    now: float

    def ms_since(self, earlier: Tick) -> float:
        return self.now - earlier.now


class Library(CublasLt):
    """The fake one; a product takes as many milliseconds as its algorithm's id says."""

    def __init__(self, clock: Clock, cost: dict[int, float]) -> None:
        super().__init__(library())
        self.clock, self.cost = clock, cost

    def matmul(self, *args) -> None:
        super().matmul(*args)
        self.clock.now += self.cost[library().fake_last_id()]


EQUAL = {1: 1.0, 2: 1.0, 3: 1.0}


def make(
    cost: dict[int, float] = EQUAL,
    mode: str = "fp32",
    cache: PlanCache | None = None,
    device: Device = KNOWN["sm_90"],
    nbytes: int = 8 * MIB,
) -> tuple[Gemm, Clock]:
    clock = Clock()
    workspace = aligned((nbytes,), np.dtype(np.uint8))
    return Gemm(Library(clock, cost), device, mode, workspace, clock, cache), clock


def on_device(host: np.ndarray, skip: int = 0) -> np.ndarray:
    """At `skip` bytes behind a multiple of 256."""
    raw = aligned((host.nbytes + skip,), np.dtype(np.uint8))
    array = raw[skip:].view(host.dtype).reshape(host.shape)
    array[...] = host
    return array


X, W = normal("f4", 5, 16), normal("f4", 7, 16, seed=1)


def product(gemm: Gemm, skip: int = 0, dtype: str = "float32", **more) -> np.ndarray:
    """X W^T by `gemm`."""
    x, w = (on_device(a.astype(DTYPES[dtype]), skip) for a in (X, W))
    y = on_device(np.full((5, 7), np.nan, DTYPES[dtype]), skip)
    gemm.multiply(y, x, w, transpose_b=True, **more)
    return y


def used() -> int:
    return int(library().fake_last_id())
