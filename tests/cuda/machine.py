"""Where the kernels' tests run: on the CPU by emulation, in several schedules, and on a GPU where
there is one. Test bodies are the same."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_microgpt.ops.cuda import CudaOps
from gpu_microgpt.ops.cuda.cublaslt import CublasLt
from gpu_microgpt.ops.cuda.device import KNOWN, Device
from gpu_microgpt.ops.cuda.gemm import GEMM_WORKSPACE, Gemm
from tests.cuda_on_cpu import cublaslt
from tests.cuda_on_cpu.loader import EmulatedLoader

bf16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": bf16}

Arrays = tuple[Any, ...]


class Machine:
    """Makes arrays for, and operations of, an emulated device."""

    def __init__(self, loader: EmulatedLoader, device: Device = KNOWN["sm_90"]) -> None:
        self.loader, self.device = loader, device

    def array(self, host: np.ndarray) -> Any:
        """A copy on the device."""
        copy = aligned(host.shape, host.dtype)
        copy[...] = host
        return copy

    def host(self, array: Any) -> np.ndarray:
        """A copy on the host."""
        return np.array(array)

    def blank(self, shape: tuple[int, ...] | int, dtype: Any) -> Any:
        """An output filled with NaN (0xFF bytes)."""
        shape = (shape,) if isinstance(shape, int) else shape
        out = aligned(shape, np.dtype(dtype))
        out.reshape(-1).view(np.uint8)[...] = 0xFF
        return out

    def ops(self, dtype: Any, scratch_bytes: int = 0, gemm: Gemm | None = None) -> CudaOps:
        """Operations with exactly so much scratch memory, filled with 0xFF."""
        return CudaOps(dtype, self.device, self.loader, self.blank(scratch_bytes, np.uint8), gemm)

    def gemm(self, mode: str) -> Gemm:
        """Matrix products of a library that computes on the CPU."""
        library = CublasLt(cublaslt.library())
        return Gemm(library, self.device, mode, self.blank(1 << 20, np.uint8), HostQueue())

    def on(self, arch: str) -> Machine:
        """The same, with the properties of another GPU."""
        return Machine(self.loader, KNOWN[arch])


class Gpu(Machine):
    """The same on the first GPU, with CuPy's arrays."""

    def __init__(self) -> None:
        from gpu_microgpt.ops.cuda.loader import CudaLoader, device_properties

        self.device = device_properties(0)
        self.loader = CudaLoader(self.device)

    def array(self, host: np.ndarray) -> Any:
        """A copy on the device."""
        copy = self._empty(host.shape, host.dtype)
        copy.set(np.ascontiguousarray(host))
        return copy

    def host(self, array: Any) -> np.ndarray:
        """A copy on the host."""
        return array.get()

    def blank(self, shape: tuple[int, ...] | int, dtype: Any) -> Any:
        """An output filled with NaN (0xFF bytes)."""
        out = self._empty((shape,) if isinstance(shape, int) else shape, np.dtype(dtype))
        if out.nbytes:
            out.data.memset(0xFF, out.nbytes)
        return out

    def gemm(self, mode: str) -> Gemm:
        """Matrix products of NVIDIA's library."""
        workspace = self.blank(GEMM_WORKSPACE, np.uint8)
        return Gemm(CublasLt(), self.device, mode, workspace, GpuQueue())

    def on(self, arch: str) -> Machine:
        """The GPU is what it is."""
        pytest.skip(f"wants the properties of {arch}; this is {self.device.arch}")

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        import cupy

        return cupy.ndarray(shape, dtype)


class HostEvent:
    """Work on the CPU is done when it is enqueued."""

    def __init__(self) -> None:
        self.time = perf_counter()

    def ms_since(self, earlier: HostEvent) -> float:
        """Milliseconds."""
        return (self.time - earlier.time) * 1e3


class HostQueue:
    """What products want of a GPU, of the CPU."""

    stream, capturing = 0, False

    def event(self) -> HostEvent:
        """The time."""
        return HostEvent()


class GpuEvent:
    """An event of CuPy's current stream."""

    def __init__(self) -> None:
        import cupy

        self._event = cupy.cuda.Event()
        self._event.record()

    def ms_since(self, earlier: GpuEvent) -> float:
        """Milliseconds of the device."""
        import cupy

        self._event.synchronize()
        return cupy.cuda.get_elapsed_time(earlier._event, self._event)


class GpuQueue:
    """What products want of a GPU, of CuPy's default stream."""

    stream, capturing = 0, False

    def event(self) -> GpuEvent:
        """A new one."""
        return GpuEvent()


def gpu_is_there() -> bool:
    """Whether CuPy is installed and finds a GPU."""
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.cuda.is_available())


class DeviceArray(np.ndarray):
    """An array of the emulated device: launchers refuse the host's, as they do on a GPU."""


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
    """Uninitialised, at a multiple of 256 bytes, as a GPU's allocator gives it."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size].view(dtype).reshape(shape).view(DeviceArray)


def normal(dtype: Any, *shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Random numbers that `dtype` holds exactly."""
    draws = np.random.default_rng((seed, *shape)).standard_normal(shape) * scale
    return draws.astype(np.float32).astype(dtype)


def wide(x: np.ndarray) -> np.ndarray:
    """In float64."""
    return x.astype(np.float64)


def twice(machine: Machine, run: Callable[[], Arrays]) -> tuple[np.ndarray, ...]:
    """The outputs of `run`, which writes into fresh blanks: finite, and the same bits again."""
    first = tuple(machine.host(a) for a in run())
    second = tuple(machine.host(a) for a in run())
    for got, again in zip(first, second, strict=True):
        assert np.isfinite(wide(got)).all(), "not finite"
        assert got.tobytes() == again.tobytes(), "other bits the second time"
    return first


def assert_twice_plain(got: np.ndarray, plain: np.ndarray, truth: np.ndarray) -> None:
    """A kernel's error is at most twice that of a plain version of the same precision.

    truth: float64. Errors are the largest and the root mean square. One unit in the last place of
    the largest number is let pass beside (a quarter of it in the mean): a plain version of few
    numbers may happen to be exact.
    """
    assert got.shape == plain.shape == truth.shape
    eps = 2.0**-8 if got.dtype == bf16 else 2.0**-23
    room = eps * np.abs(truth).max(initial=0.0)
    errors = [np.abs(wide(x) - truth) for x in (got, plain)]
    largest, allowed = (e.max(initial=0.0) for e in errors)
    assert largest <= 2 * allowed + room, f"error {largest:.3g}, plain version's {allowed:.3g}"
    rms, plain_rms = (np.sqrt((e**2).mean()) if e.size else 0.0 for e in errors)
    assert rms <= 2 * plain_rms + room / 4, f"rms error {rms:.3g}, plain version's {plain_rms:.3g}"
