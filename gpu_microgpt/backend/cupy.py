"""A GPU through CuPy: its arrays, allocator, streams, events and graphs, and none of its maths."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from math import prod
from typing import Any

import numpy as np

from ..arena import Shape
from ..errors import BackendError, DeviceError
from ..ops.cuda.context import Loader
from ..ops.cuda.cublaslt import CublasLt
from ..ops.cuda.failures import device_error, device_errors
from ..ops.cuda.loader import CudaLoader, device_properties
from ..types import Array
from .pinned import Arriving, Downloads, Place, Uploads
from .usable import check_usable, release

ALIGN = 256  # bytes: what every allocation of CUDA's starts at a multiple of


def open_gpu(device_id: int) -> CupyGpu:
    """Take GPU `device_id`.

    Raises BackendError, in one line with what to do, where none can be used; ConfigError where
    there are GPUs, but not this one.
    """
    check_usable(device_id)
    try:
        return CupyGpu(device_id)
    except DeviceError as failure:  # taken by another process, or without any memory left
        raise BackendError(f"GPU {device_id} cannot be used: {failure}") from None


class CapturedGraph:
    """Captured work, as `gpu.Graph`. The arrays it works on must outlive it."""

    def __init__(self, graph: Any, stream: Any) -> None:
        """`graph`: CuPy's, launched into `stream`."""
        self._launch, self._stream = graph.launch, stream

    def launch(self) -> None:
        """Enqueue all of it; returns at once."""
        try:
            self._launch(self._stream)
        except RuntimeError as failure:
            raise device_error(failure, "launching a graph") or failure from None


class CupyGpu:
    """One GPU, as `gpu.Gpu`: one stream that waits for no other, one pool of memory.

    Its methods may be called on any thread, whatever GPU and stream are that thread's; kernels and
    libraries between `activate` and `close` only.
    """

    def __init__(self, device_id: int = 0) -> None:
        """Raises BackendError or DeviceError where it cannot be used; `open_gpu` says why."""
        from cupy.cuda import MemoryPool, Stream

        self.device = device_properties(device_id)
        self.loader: Loader = CudaLoader(self.device)
        self.cublaslt = CublasLt()
        self.capturing = False
        self._id, self._active = device_id, list[ExitStack]()
        with device_errors("opening the GPU"), _device(device_id):
            self._queue = Stream(non_blocking=True)
        self.stream = int(self._queue.ptr)
        self._pool = MemoryPool()
        self._uploads, self._downloads = Uploads(self._queue), Downloads(self._queue)

    def describe(self) -> str:
        """One line: the GPU, its memory, the driver and the libraries."""
        import cupy
        from cupy.cuda import runtime

        return (
            f"{self.device.name} ({self.device.arch}, {self.memory()[1] / 2**30:.1f} GiB), "
            f"driver {release(runtime.driverGetVersion())}, CuPy {cupy.__version__}, "
            f"CUDA runtime {release(runtime.runtimeGetVersion())}"
        )

    def memory(self) -> tuple[int, int]:
        """Bytes free, those the pool holds in reserve too, and in all."""
        from cupy.cuda import runtime

        with self._here("asking for its memory"):
            free, total = runtime.memGetInfo()
            return free + self._pool.free_bytes(), total

    def empty(self, shape: Shape, dtype: Any) -> Array:
        """Uninitialised memory at a multiple of 256 bytes. Not while capturing."""
        from cupy import ndarray

        self._refuse_capture("an allocation")
        dtype = np.dtype(dtype)
        size = prod(shape) * dtype.itemsize
        with self._here(f"allocating {size:,} bytes"):
            try:
                memory = self._pool.malloc(max(size, 1))
            except MemoryError:
                free, total = self.memory()
                raise DeviceError(
                    f"the GPU is out of memory: wanted {size:,} bytes, {free:,} of {total:,} are "
                    "free; lower train.batch_size"
                ) from None
            if memory.ptr % ALIGN:
                raise RuntimeError(f"got memory at {memory.ptr:#x}, wanted a multiple of {ALIGN}")
            return ndarray(shape, dtype, memptr=memory)

    def zero(self, array: Array) -> None:
        """Enqueue filling a contiguous array with zero bytes; may be captured."""
        from cupy.cuda import runtime

        _check_contiguous("zero", array)
        if array.nbytes:
            with self._here("filling with zeros"):
                runtime.memsetAsync(array.data.ptr, 0, array.nbytes, self.stream)

    def copy(self, to: Array, source: Array) -> None:
        """Enqueue a copy between contiguous arrays of one size; may be captured."""
        from cupy.cuda import runtime

        _check_contiguous("copy", to, source)
        if to.nbytes != source.nbytes:
            raise ValueError(f"copy: got {source.nbytes:,} bytes, wanted {to.nbytes:,}")
        if to.nbytes:
            with self._here("copying"):
                runtime.memcpyAsync(
                    to.data.ptr, source.data.ptr, to.nbytes, runtime.memcpyDeviceToDevice,
                    self.stream,
                )  # fmt: skip

    def upload(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Copy a host array of the same shape and dtype; `host` may be changed at once."""
        self._refuse_capture("an upload")
        _check_contiguous("upload", array)
        if host.shape != array.shape or host.dtype != array.dtype:
            raise ValueError(
                f"upload: got {host.dtype} {host.shape}, wanted {array.dtype} {array.shape}"
            )
        with self._here("uploading"):
            self._uploads.copy(array, host)

    def download(self, array: Array) -> Arriving:
        """Enqueue a copy to the host; of more than a MiB, waits for it, too."""
        self._refuse_capture("a download")
        _check_contiguous("download", array)
        with self._here("downloading"):
            return self._downloads.start(array)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Call `work`, recording what it enqueues instead of doing it.

        Of this thread's calls CUDA then refuses what no graph can hold, an allocation or a wait,
        and lets other threads be. Nothing is collected as garbage meanwhile: giving back pinned
        memory is such a call.
        """
        from cupy.cuda import runtime

        self._refuse_capture("a capture")
        with self._here("capturing a graph"):
            collects = gc.isenabled()
            gc.disable()
            try:
                self._queue.begin_capture(runtime.streamCaptureModeThreadLocal)
                self.capturing = True
                try:
                    work()
                except BaseException:
                    with suppress(RuntimeError):  # of a capture spoilt by what went wrong
                        self._queue.end_capture()
                    raise
                graph = self._queue.end_capture()
            finally:
                self.capturing = False
                if collects:
                    gc.enable()
            graph.upload(self._queue)  # else the first launch would do it
            return CapturedGraph(graph, self._queue)

    def event(self) -> Place:
        """Enqueue an event. Not while capturing."""
        self._refuse_capture("an event")
        with self._here("recording an event"):
            return Place(self._queue)

    def wait(self) -> None:
        """Wait until all work enqueued is done. Not while capturing."""
        self._refuse_capture("a wait")
        with device_errors("waiting"):
            self._queue.synchronize()

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Show what is enqueued inside as `name` in a profiler's timeline (NVTX)."""
        from cupy.cuda import nvtx

        nvtx.RangePush(name)
        try:
            yield
        finally:
            nvtx.RangePop()

    def activate(self) -> None:
        """Make this GPU and its stream those of the calling thread. May be nested."""
        stack = ExitStack()
        stack.enter_context(self._here("choosing the GPU"))
        self._active.append(stack)

    def close(self) -> None:
        """Wait for the work enqueued and undo the last `activate`, on the same thread."""
        with self._active.pop():
            self.wait()

    @contextmanager
    def _here(self, doing: str) -> Iterator[None]:
        """This GPU and its stream as the calling thread's; CUDA's errors as DeviceError."""
        from cupy.cuda import get_current_stream

        with device_errors(doing), _device(self._id):
            before = get_current_stream()
            self._queue.use()
            try:
                yield
            finally:
                before.use()

    def _refuse_capture(self, what: str) -> None:
        if self.capturing:
            raise RuntimeError(f"got {what} while a graph is captured, wanted it done before")


@contextmanager
def _device(device_id: int) -> Iterator[None]:
    """Make it the calling thread's GPU."""
    from cupy.cuda import runtime

    before = runtime.getDevice()
    if before != device_id:
        runtime.setDevice(device_id)
    try:
        yield
    finally:
        if before != device_id:
            runtime.setDevice(before)


def _check_contiguous(op: str, *arrays: Array) -> None:
    """Their bytes are moved as one."""
    for array in arrays:
        if not array.flags.c_contiguous:
            raise ValueError(f"{op}: got strides {array.strides}, wanted a contiguous array")
