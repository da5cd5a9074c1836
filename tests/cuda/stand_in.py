"""A GPU on the CPU: the whole engine runs on it, and what a GPU forbids fails.

Kernels are emulated, products computed by a library of one's own, a graph is a list of what was
enqueued while capturing. Work is done at once, in order.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from math import prod
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.errors import DeviceError
from gpu_microgpt.ops.cuda.device import KNOWN, Device
from tests.cuda.guarded import GuardedArray, Heap, flat_bytes
from tests.cuda.stand_in_places import Download, Event, Pinned
from tests.cuda.stand_in_products import MemoryPlans, StandInCublasLt
from tests.cuda.stand_in_work import Graph, StandInLoader, Work
from tests.cuda_on_cpu.loader import EmulatedLoader

STREAM = 0x57  # its handle


class StandInGpu:
    """`gpu_microgpt.backend.gpu.Gpu`. Raises AssertionError for what a GPU would not forgive.

    `counts`: allocations, launches, gemms, zeros, copies, replays, captures, uploads, downloads,
    waits (of the host, for something not yet known to be done). What is captured is not counted,
    nor is it on replay.

    `costs`: milliseconds that events tell, by name of a kernel, "gemm", "zero" or "copy"; 1 where
    it is not there. So what is chosen by measuring is the same in every run, or as a test wants it.
    """

    def __init__(
        self, order: str = "lifo", device: Device = KNOWN["sm_90"], *, seed: int = 0,
        guarded: bool = True, late: bool = False, memory_bytes: int = 16 << 30,
    ) -> None:  # fmt: skip
        """order, seed: of the emulator's threads. guarded: kernels' arguments lie between pages
        that fault (slower). late: nothing is done when first asked, and downloads arrive only when
        waited for. memory_bytes: of the device."""
        self.device, self.stream, self.capturing = device, STREAM, False
        self.late, self.heap, self.counts = late, Heap(memory_bytes), Counter[str]()
        self.loader = StandInLoader(self, EmulatedLoader(order, seed), guarded)
        self.cublaslt = StandInCublasLt(self)
        self.enqueued = self.reached = 0  # places in the stream: the last, and the last waited for
        self.clock, self.costs = 0.0, dict[str, float]()  # milliseconds
        self._recording: list[Work] = []
        self._pinned: dict[tuple[int, int], Iterator[Pinned]] = {}  # by address and size
        self._fuse, self._error, self._lost = 0, DeviceError(""), False
        self._active: Counter[int] = Counter()  # by thread

    def fail_after(self, n: int, error: Exception | None = None) -> None:
        """Lose the device at the n-th launch, product or replay from now on: it and all that
        follows raise `error`."""
        lost = f"GPU 0 ({self.device.name}) is lost: unspecified launch failure"
        self._fuse, self._error = n, error or DeviceError(lost)

    def describe(self) -> str:
        return f"stand-in for {self.device.name} ({self.device.arch}) on the CPU"

    def memory(self) -> tuple[int, int]:
        self._alive()
        return self.heap.total - self.heap.used, self.heap.total

    def empty(self, shape: tuple[int, ...], dtype: Any) -> GuardedArray:
        """Filled with 0xFF bytes."""
        self.not_captured("an allocation")
        dtype = np.dtype(dtype)
        nbytes = prod(shape) * dtype.itemsize
        memory = self.heap.allocate(nbytes)
        if memory is None:
            free = self.heap.total - self.heap.used
            raise DeviceError(
                f"{self.device.name}: out of memory: wanted {nbytes:,} bytes, {free:,} are free; "
                "lower train.batch_size"
            )
        self.counts["allocations"] += 1
        return GuardedArray(memory, memory.bytes.view(dtype).reshape(shape))

    def zero(self, array: GuardedArray) -> None:
        self.enqueue(Work.on("zeros", "zero", partial(flat_bytes(array).fill, 0), [array]))

    def copy(self, to: GuardedArray, source: GuardedArray) -> None:
        target, origin = flat_bytes(to), flat_bytes(source)
        assert target.size == origin.size, f"copy: {to} from {source}: other sizes"
        assert not np.may_share_memory(target, origin), f"copy: {to} from {source}: they overlap"
        run = partial(np.copyto, target, origin)
        self.enqueue(Work.on("copies", "copy", run, [to, source]))

    def upload(self, array: GuardedArray, host: np.ndarray) -> None:
        self.not_captured("an upload")
        assert isinstance(host, np.ndarray), f"upload: got {type(host).__name__}, wanted an array"
        same = array.shape == host.shape and array.dtype == host.dtype
        assert same, f"upload: {array} from {host.dtype} {host.shape}"
        flat_bytes(array)[:] = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        self.counts["uploads"] += 1

    def download(self, array: GuardedArray) -> Download:
        self.not_captured("a download")
        key = (int(flat_bytes(array).ctypes.data), array.nbytes)
        if key not in self._pinned:
            self._pinned[key] = cycle([Pinned(array.nbytes), Pinned(array.nbytes)])
        download = Download(self, next(self._pinned[key]), array)
        self.counts["downloads"] += 1
        return download

    def capture(self, work: Callable[[], None]) -> Graph:
        self.not_captured("a capture")
        self.counts["captures"] += 1
        self.capturing, self._recording = True, []
        try:
            work()
        finally:
            self.capturing, recorded, self._recording = False, self._recording, []
        return Graph(self, recorded)

    def event(self) -> Event:
        self.not_captured("an event")
        self._alive()
        return Event(self)

    def wait(self) -> None:
        self.not_captured("waiting")
        self.counts["waits"] += 1
        self.reached = self.enqueued

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        yield

    def activate(self) -> None:
        self._alive()
        self._active[threading.get_ident()] += 1

    def close(self) -> None:
        """Every `close` has its `activate`, also on a lost device, where it raises."""
        assert self._active[threading.get_ident()], "close without activate"
        self._active[threading.get_ident()] -= 1
        self.wait()

    def enqueue(self, work: Work) -> None:
        """Do it, or record it while capturing."""
        self._alive()
        if self.capturing:
            self._recording.append(work)
            return
        self.take(work.kind)
        self.do(work)

    def launch(self, work: Work) -> None:
        """The same, from outside: what is not captured goes to the current thread's stream."""
        active = self.capturing or self._active[threading.get_ident()]
        assert active, f"{work.name}: this GPU and its stream are not active in this thread"
        self.enqueue(work)

    def take(self, kind: str) -> None:
        """Count one more of this kind. Raises where the device is lost."""
        self._alive()
        if kind in ("launches", "gemms", "replays") and self._fuse:
            self._fuse -= 1
            self._lost = not self._fuse
            self._alive()
        self.counts[kind] += 1

    def do(self, work: Work) -> None:
        """Now; the device's clock goes on."""
        work.run()
        self.clock += self.costs.get(work.name, 1.0)

    def place(self) -> int:
        """The next in the stream."""
        self.enqueued += 1
        return self.enqueued

    def _alive(self) -> None:
        if self._lost:
            raise self._error

    def not_captured(self, what: str) -> None:
        self._alive()
        assert not self.capturing, f"{what} while capturing"


def keep_plans_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of algorithms last as long as the test, and are not the user's."""
    plans = MemoryPlans()
    monkeypatch.setattr("gpu_microgpt.backend.cuda.PlanCache", lambda: plans)


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[StandInGpu]:
    """Have `backend=cupy` run on stand-ins with these options; returns those opened."""
    opened: list[StandInGpu] = []

    def open_gpu(device_id: int) -> StandInGpu:
        opened.append(StandInGpu(**options))
        return opened[-1]

    monkeypatch.setattr("gpu_microgpt.backend.cupy.open_gpu", open_gpu)
    keep_plans_in_memory(monkeypatch)
    return opened
