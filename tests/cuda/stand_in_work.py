"""Work on the stand-in GPU: emulated kernels and products, which a graph can repeat."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_microgpt.ops.cuda.loader import FREE_SHARED
from tests.cuda.guarded import GuardedArray, Memory, memory_of, whole_rows
from tests.cuda_on_cpu.loader import EmulatedLoader

if TYPE_CHECKING:
    from tests.cuda.stand_in import StandInGpu


@dataclass(frozen=True)
class Work:
    """Something enqueued: `run` has its scalars baked in, and the addresses of its arrays.

    It does not keep their memory, which a graph's owner has to.
    """

    kind: str  # as counted
    name: str
    run: Callable[[], None]
    memories: tuple[weakref.ref[Memory], ...]

    @classmethod
    def on(cls, kind: str, name: str, run: Callable[[], None], arrays: list[GuardedArray]) -> Work:
        """Work on these arrays."""
        return cls(kind, name, run, tuple(weakref.ref(memory_of(a)) for a in arrays))


class Graph:
    """What was recorded, to be repeated."""

    def __init__(self, gpu: StandInGpu, work: list[Work]) -> None:
        self._gpu, self._work = gpu, work

    @property
    def names(self) -> list[str]:
        """Kernels, "gemm", "zero" and "copy", in order."""
        return [work.name for work in self._work]

    def launch(self) -> None:
        """Raises AssertionError where memory of an array was freed since the capture."""
        gpu = self._gpu
        assert not gpu.capturing, "a replay while capturing"
        gpu.take("replays")
        for work in self._work:
            alive = all(memory() is not None for memory in work.memories)
            assert alive, f"replay: {work.name}: an array was freed since the capture"
            gpu.do(work)


class StandInLoader:
    """Emulated kernels, launched on the stand-in's stream."""

    def __init__(self, gpu: StandInGpu, emulated: EmulatedLoader, guarded: bool) -> None:
        # weak: a GPU that its loader referred to would wait for the garbage collector
        self._gpu: StandInGpu = weakref.proxy(gpu)
        self._emulated, self._guarded = emulated, guarded
        self._shared: dict[tuple[str, str, tuple[str, ...]], int] = {}  # bytes a kernel may take

    def function(self, stem: str, name: str, defines: tuple[str, ...], shared_mem: int = 0) -> Any:
        key, device = (stem, name, defines), self._gpu.device
        known = self._shared.get(key, -1) >= shared_mem
        assert known or not self._gpu.capturing, f"kernel {name} first asked for while capturing"
        assert shared_mem <= device.shared_per_block, f"{name}: {shared_mem:,} bytes shared memory"
        self._shared[key] = max(shared_mem, self._shared.get(key, 0))
        kernel = self._emulated.function(stem, name, defines, shared_mem)
        return partial(self._launch, key, kernel if self._guarded else partial(kernel, guard=""))

    def _launch(
        self, key: Any, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...],
        args: tuple[Any, ...], *, shared_mem: int = 0,
    ) -> None:  # fmt: skip
        name = key[1]
        allowed = max(FREE_SHARED, self._shared[key])
        assert shared_mem <= allowed, f"{name}: {shared_mem:,} bytes, asked for {allowed:,}"
        for arg in args:
            kind = type(arg).__name__
            fine = isinstance(arg, GuardedArray | np.generic)
            assert fine, f"{name}: got {kind}, wanted a device array or a NumPy scalar"
        values = tuple(whole_rows(a) if isinstance(a, GuardedArray) else a for a in args)
        arrays = [a for a in args if isinstance(a, GuardedArray)]
        run = partial(kernel, grid, block, values, shared_mem=shared_mem)
        self._gpu.launch(Work.on("launches", name, run, arrays))
