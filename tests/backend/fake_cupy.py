"""A stand-in for CuPy that does late what is enqueued: nothing happens before somebody waits.

Its memory is the host's, so what is copied too early or too late, or by way of a buffer that is
in use, is seen in the numbers. Its names are looked for in the real CuPy by `test_cupy_gpu`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from itertools import count
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

PROPERTIES = {
    "name": b"NVIDIA H200", "major": 9, "minor": 0, "multiProcessorCount": 132,
    "sharedMemPerBlock": 49152, "sharedMemPerBlockOptin": 232448,
    "sharedMemPerMultiprocessor": 233472, "maxThreadsPerMultiProcessor": 2048,
    "maxBlocksPerMultiProcessor": 32, "l2CacheSize": 62914560, "regsPerBlock": 65536,
    "regsPerMultiprocessor": 65536, "reservedSharedMemPerBlock": 1024,
}  # fmt: skip
CLOCK_KHZ = 1_980_000
TOTAL, RESERVE = 1 << 30, 512  # bytes of a fake GPU, and of it what the pool holds unused
ERRORS = {
    2: "cudaErrorMemoryAllocation: out of memory",
    35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
    100: "cudaErrorNoDevice: no CUDA-capable device is detected",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    802: "cudaErrorSystemNotReady: system not yet initialized",
    901: "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error",
}


class CUDARuntimeError(RuntimeError):
    """As CuPy has it."""

    def __init__(self, status: int) -> None:
        super().__init__(ERRORS[status])
        self.status = status


class OutOfMemoryError(MemoryError):
    """The pool's."""


class DeviceArray(np.ndarray):
    """cupy.ndarray, as far as it is looked at."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


class Fake:
    """The driver, and CuPy's modules around it."""

    def __init__(self) -> None:
        self.devices, self.driver, self.built = 2, 13000, 13020
        self.properties = dict(PROPERTIES)
        self.log: list[str] = []  # calls that somebody may ask about
        self.failing: dict[str, int] = {}  # call: status, from now on
        self.used = RESERVE
        self.device, self.streams = 0, dict.fromkeys(range(8), Stream(self, null=True))
        self.pointers = count(1)
        self.ranges: list[str] = []

    def call(self, name: str) -> None:
        """Note a call, or fail it."""
        self.log.append(name)
        if name in self.failing:
            raise CUDARuntimeError(self.failing[name])

    def modules(self) -> dict[str, ModuleType]:
        """cupy and what is below it."""
        cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
        cupy.__spec__ = ModuleSpec("cupy", None)
        cupy.__version__, cupy.cuda, cupy.ndarray = "14.2.0", cuda, _ndarray
        cuda.runtime = self._runtime()
        cuda.nvtx = _module("nvtx", RangePush=self.ranges.append, RangePop=self.ranges.pop)
        cuda.nvrtc = _module("nvrtc", getVersion=lambda: (13, 0))
        cuda.Stream = lambda non_blocking=False: Stream(self, non_blocking=non_blocking)
        cuda.Event, cuda.MemoryPool = (lambda: Event(self)), (lambda: Pool(self))
        cuda.get_current_stream = lambda: self.streams[self.device]
        cuda.get_elapsed_time = lambda a, b: float(b.ptr - a.ptr)
        cuda.alloc_pinned_memory = self._pin
        found = {"cupy": cupy, "cupy.cuda": cuda}
        return found | {m.__name__: m for m in (cuda.runtime, cuda.nvtx, cuda.nvrtc)}

    def _pin(self, size: int) -> np.ndarray:
        self.call("hostAlloc")
        return np.full(size, 0xAA, np.uint8)

    def _runtime(self) -> ModuleType:
        def counted() -> int:
            self.call("getDeviceCount")
            return self.devices

        def choose(device: int) -> None:
            self.call(f"setDevice({device})")
            self.device = device

        def query(event: int) -> int:
            if "eventQuery" in self.failing:
                return self.failing["eventQuery"]
            return 0 if events[event].reached else 600

        def check(status: int) -> None:
            if status:
                raise CUDARuntimeError(status)

        def info() -> tuple[int, int]:
            self.call("memGetInfo")
            return TOTAL - self.used, TOTAL

        def attribute(name: int, device: int) -> int:
            assert name == 13
            return CLOCK_KHZ

        return _module(
            "runtime", CUDARuntimeError=CUDARuntimeError, streamCaptureModeThreadLocal=1,
            cudaDevAttrClockRate=13, memcpyHostToDevice=1, memcpyDeviceToHost=2,
            memcpyDeviceToDevice=3, getDeviceCount=counted, getDevice=lambda: self.device,
            setDevice=choose, getDeviceProperties=lambda device: self.properties,
            deviceGetAttribute=attribute, driverGetVersion=lambda: self.driver,
            runtimeGetVersion=lambda: self.built, memGetInfo=info, eventQuery=query,
            check_status=check, memcpyAsync=self._copy, memsetAsync=self._fill,
        )  # fmt: skip

    def _copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self.call("memcpyAsync")
        streams[stream].enqueue(lambda: ctypes.memmove(to, source, size))

    def _fill(self, to: int, value: int, size: int, stream: int) -> None:
        self.call("memsetAsync")
        streams[stream].enqueue(lambda: ctypes.memset(to, value, size))


class Stream:
    """Work in order, done when waited for."""

    def __init__(self, fake: Fake, null: bool = False, non_blocking: bool = False) -> None:
        self.fake, self.non_blocking = fake, non_blocking
        self.device = None if null else fake.device
        self.ptr = 0 if null else 1000 + len(streams)
        streams[self.ptr] = self
        self.pending: list[Callable[[], Any]] = []
        self.recording: list[Callable[[], Any]] | None = None

    def enqueue(self, work: Callable[[], Any]) -> None:
        (self.pending if self.recording is None else self.recording).append(work)

    def use(self) -> None:
        assert self.device in (None, self.fake.device), "of another GPU than the current one"
        self.fake.streams[self.fake.device] = self

    def synchronize(self) -> None:
        assert self.recording is None, "a wait while capturing"
        self.fake.call("streamSynchronize")
        self.until(lambda: not self.pending)

    def until(self, reached: Callable[[], bool]) -> None:
        """Do the work, in order, up to there."""
        while not reached():
            self.pending.pop(0)()

    def begin_capture(self, mode: int) -> None:
        self.fake.call(f"begin_capture({mode})")
        self.recording = []

    def end_capture(self) -> Graph:
        work, self.recording = self.recording, None
        self.fake.call("end_capture")
        assert work is not None
        return Graph(self.fake, work)


class Graph:
    """What was recorded."""

    def __init__(self, fake: Fake, work: list[Callable[[], Any]]) -> None:
        self.fake, self.work = fake, work

    def upload(self, stream: Stream) -> None:
        self.fake.call("graphUpload")

    def launch(self, stream: Stream) -> None:
        self.fake.call("graphLaunch")
        for work in self.work:
            stream.enqueue(work)


class Event:
    """A place; its number grows with every one made."""

    def __init__(self, fake: Fake) -> None:
        self.fake, self.ptr, self.reached = fake, next(fake.pointers), False
        events[self.ptr] = self

    def record(self, stream: Stream) -> None:
        assert stream.device == self.fake.device, "of another GPU than the current one"
        self.stream = stream
        stream.enqueue(lambda: setattr(self, "reached", True))

    def synchronize(self) -> None:
        self.fake.call("eventSynchronize")
        self.stream.until(lambda: self.reached)


class Pool:
    """Memory that may be had; a part of it is in reserve."""

    def __init__(self, fake: Fake) -> None:
        self.fake, self.misaligned = fake, 0

    def malloc(self, size: int) -> Any:
        self.fake.call("malloc")
        if self.fake.used + size > TOTAL:
            raise OutOfMemoryError("Out of memory allocating")
        self.fake.used += size
        block = np.full(size + 256, 0xFF, np.uint8)
        start = -block.ctypes.data % 256 + self.misaligned
        memory = block[start : start + size]
        return SimpleNamespace(ptr=memory.ctypes.data, memory=memory)

    def free_bytes(self) -> int:
        return RESERVE


streams: dict[int, Stream] = {}
events: dict[int, Event] = {}


def _ndarray(shape: tuple[int, ...], dtype: np.dtype, memptr: Any) -> DeviceArray:
    return (
        memptr.memory[: prod(shape) * dtype.itemsize].view(dtype).reshape(shape).view(DeviceArray)
    )


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(f"cupy.cuda.{name}")
    vars(module).update(names)
    return module


def install(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """In CuPy's place, with a driver and cuBLASLt beside it."""
    streams.clear()
    events.clear()
    fake = Fake()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("gpu_microgpt.backend.usable._loads", lambda library: True)
    monkeypatch.setattr("gpu_microgpt.backend.cupy.CublasLt", lambda: "cuBLASLt")
    return fake
