"""Copies between host and GPU through memory that stays in place, in the order of one stream."""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import cycle
from typing import Any

import numpy as np

from ..ops.cuda.failures import device_errors
from ..types import Array

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

PIECE = 1 << 20  # bytes of a buffer
PIECES = 8  # of them, at most, on their way up
ARRAYS = 64  # whose buffers for downloads are kept
NOT_READY = 600  # CUDA's number for it


class Place:
    """A place in a stream of work, as `gpu.Event`."""

    def __init__(self, stream: Any) -> None:
        """Enqueue it; the stream's GPU is the calling thread's."""
        from cupy.cuda import Event

        self._event = Event()  # CuPy's own times its work
        self._event.record(stream)

    def done(self) -> bool:
        """Whether all work before it is done; does not wait. Raises DeviceError where it failed."""
        from cupy.cuda import runtime

        status = runtime.eventQuery(self._event.ptr)  # CuPy checks it nowhere
        if status == NOT_READY:
            return False
        with device_errors("asking for work done"):
            runtime.check_status(status)
        return True

    def wait(self) -> None:
        """Wait until it is."""
        with device_errors("waiting"):
            self._event.synchronize()

    def ms_since(self, earlier: Any) -> float:
        """Milliseconds of the device from `earlier` to here; waits for both."""
        from cupy.cuda import get_elapsed_time

        earlier.wait()
        self.wait()
        with device_errors("timing"):
            return float(get_elapsed_time(earlier._event, self._event))


class Arriving:
    """A copy on its way to the host, as `gpu.Download`."""

    def __init__(self, host: np.ndarray[Any, Any], place: Place) -> None:
        """`host` is filled once `place` is reached."""
        self._host, self._place = host, place

    def done(self) -> bool:
        """Whether it has arrived; does not wait."""
        return self._place.done()

    def wait(self) -> np.ndarray[Any, Any]:
        """The copy, once it has arrived."""
        self._place.wait()
        return self._host


class Uploads:
    """From any host memory, by way of a few pinned buffers: the caller waits for the GPU only
    where they are all on their way."""

    def __init__(self, stream: Any) -> None:
        """Nothing is taken before the first copy."""
        self._stream = stream
        self._pieces: deque[tuple[Bytes, Place]] = deque()  # the oldest first

    def copy(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Enqueue a copy into a contiguous array of the same shape and dtype."""
        from cupy.cuda import runtime

        data = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        for start in range(0, data.size, PIECE):
            part = data[start : start + PIECE]
            buffer = self._buffer()
            buffer[: part.size] = part
            runtime.memcpyAsync(
                array.data.ptr + start, buffer.ctypes.data, part.size, runtime.memcpyHostToDevice,
                self._stream.ptr,
            )  # fmt: skip
            self._pieces.append((buffer, Place(self._stream)))

    def _buffer(self) -> Bytes:
        """One that may be written: its last copy is done."""
        if len(self._pieces) < PIECES and not (self._pieces and self._pieces[0][1].done()):
            return _pinned(PIECE)
        buffer, place = self._pieces.popleft()
        place.wait()
        return buffer


class Downloads:
    """To pinned buffers, two an array in turn; large ones to fresh memory."""

    def __init__(self, stream: Any) -> None:
        """Nothing is taken before the first copy."""
        self._stream = stream
        self._buffers: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def start(self, array: Array) -> Arriving:
        """Enqueue a copy of a contiguous array; of more than PIECE bytes, waits for it, too."""
        from cupy.cuda import runtime

        large = array.nbytes > PIECE
        memory = np.empty(array.nbytes, np.uint8) if large else self._buffer(array)
        if array.nbytes:
            runtime.memcpyAsync(
                memory.ctypes.data, array.data.ptr, array.nbytes, runtime.memcpyDeviceToHost,
                self._stream.ptr,
            )  # fmt: skip
        place = Place(self._stream)
        if large:  # memory that the GPU may write late must not be given back early
            place.wait()
        host = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
        return Arriving(host, place)

    def _buffer(self, array: Array) -> Bytes:
        """The one of the array's two that was not the last."""
        key = (int(array.data.ptr), int(array.nbytes))
        if key not in self._buffers:
            self._buffers[key] = cycle([_pinned(array.nbytes), _pinned(array.nbytes)])
            if len(self._buffers) > ARRAYS:
                self._stream.synchronize()  # nothing is on its way into what is given back
                self._buffers.popitem(last=False)
        self._buffers.move_to_end(key)
        buffer: Bytes = next(self._buffers[key])
        return buffer


def _pinned(size: int) -> Bytes:
    """Host memory that the system does not move; it goes back to CuPy's pool with the array."""
    from cupy.cuda import alloc_pinned_memory

    return np.frombuffer(alloc_pinned_memory(max(size, 1)), np.uint8, size)
