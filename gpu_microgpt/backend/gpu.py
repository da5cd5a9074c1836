"""What the CUDA backend needs of a GPU: memory, copies, one stream of work, graphs, events.

`cupy.py` gives it through CuPy. Tests give the same on the CPU, which is why nothing else of the
package may touch a GPU by another way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from ..arena import Shape
from ..ops.cuda.context import Loader
from ..ops.cuda.cublaslt import CublasLt
from ..ops.cuda.device import Device
from ..types import Array


class Graph(Protocol):
    """Captured work, to be repeated at the cost of one launch."""

    def launch(self) -> None:
        """Enqueue all of it; returns at once."""


class Event(Protocol):
    """A place in the stream of work."""

    def done(self) -> bool:
        """Whether all work before it is done; does not wait."""

    def wait(self) -> None:
        """Wait until it is."""

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds of the device from `earlier` to here; waits for both."""


class Download(Protocol):
    """A copy on its way to pinned host memory."""

    def done(self) -> bool:
        """Whether it has arrived; does not wait."""

    def wait(self) -> np.ndarray[Any, Any]:
        """The copy, once it has arrived: valid until the same array is downloaded twice more."""


class Gpu(Protocol):
    """One GPU. All work is enqueued on one stream, in order; only what says so waits for it.

    Every method raises DeviceError, in one line, where the device is lost or its memory is full.
    """

    device: Device
    loader: Loader
    cublaslt: CublasLt
    stream: int  # the stream's handle, for libraries
    capturing: bool

    def describe(self) -> str:
        """One line: the GPU, its driver and the libraries."""

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""

    def empty(self, shape: Shape, dtype: Any) -> Array:
        """Uninitialised memory at a multiple of 256 bytes. Not while capturing."""

    def zero(self, array: Array) -> None:
        """Enqueue filling a contiguous array with zero bytes; may be captured."""

    def upload(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Copy a host array of the same shape and dtype into a contiguous one, after all work
        enqueued; `host` may be changed at once. Not while capturing."""

    def download(self, array: Array) -> Download:
        """Enqueue a copy of a contiguous array to the host; a large one may be waited for. Not
        while capturing."""

    def copy(self, to: Array, source: Array) -> None:
        """Enqueue a copy between contiguous arrays of one size on the device; may be captured."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Call `work`, recording what it enqueues instead of doing it."""

    def event(self) -> Event:
        """Enqueue an event. Not while capturing."""

    def wait(self) -> None:
        """Wait until all work enqueued is done. Not while capturing."""

    def range(self, name: str) -> AbstractContextManager[None]:
        """Show what is enqueued inside as `name` in a profiler's timeline (NVTX)."""

    def activate(self) -> None:
        """Make this GPU and its stream those of the calling thread."""

    def close(self) -> None:
        """Undo `activate`; wait for the work enqueued."""
