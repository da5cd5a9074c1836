"""Arguments of an emulated launch, copied to memory that nothing else lies beside."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

FILL = 0xFF  # bytes around an array: they read as NaN, and as -1
ALIGN = 16  # what an array's address keeps its remainder of

_PAGE = mmap.PAGESIZE
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.malloc.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


@dataclass
class Extent:
    """Host addresses [low, high) that a kernel may read, and write if `written`."""

    low: int
    high: int
    written: bool


class Region:
    """A copy of an extent. `shift` is what its addresses grow by."""

    def __init__(self, extent: Extent) -> None:
        self.extent, self.shift = extent, 0

    def intact(self) -> bool:
        """Whether nothing beside the copy was written."""
        return True

    def close(self) -> None:
        """Bring back what the kernel wrote, and free the memory."""


class PageRegion(Region):
    """The copy begins or ends at a page that faults; what is left between is looked at after."""

    def __init__(self, extent: Extent, at_start: bool) -> None:
        """`at_start`: what is read in front of the copy faults; else what is read behind it."""
        super().__init__(extent)
        size = extent.high - extent.low
        self._mapped = -(-(size + ALIGN) // _PAGE) * _PAGE + 2 * _PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._base = _libc.mmap(None, self._mapped, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if self._base in (None, _FAILED):
            raise MemoryError(f"{self._mapped} bytes for a copy of an argument")
        first, end = self._base + _PAGE, self._base + self._mapped - _PAGE
        for page in (self._base, end):
            if _libc.mprotect(page, _PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = first + extent.low % ALIGN if at_start else end - size
        start -= (start - extent.low) % ALIGN
        self.shift = start - extent.low
        self._before, self._after = _bytes(first, start), _bytes(start + size, end)
        self._before[:], self._after[:] = FILL, FILL
        _copy(start, extent.low, size)

    def intact(self) -> bool:
        return bool((self._before == FILL).all() and (self._after == FILL).all())

    def close(self) -> None:
        if self.extent.written:
            low, high = self.extent.low, self.extent.high
            _copy(low, low + self.shift, high - low)
        _libc.munmap(self._base, self._mapped)


class HeapRegion(Region):
    """The copy is an allocation, exactly so large: AddressSanitizer knows its ends."""

    def __init__(self, extent: Extent) -> None:
        super().__init__(extent)
        size, offset = extent.high - extent.low, extent.low % ALIGN
        self._base = _libc.malloc(offset + size)
        self.shift = self._base + offset - extent.low
        _copy(extent.low + self.shift, extent.low, size)

    def close(self) -> None:
        if self.extent.written:
            low, high = self.extent.low, self.extent.high
            _copy(low, low + self.shift, high - low)
        _libc.free(self._base)


def regions(extents: Iterable[Extent], kind: str) -> list[Region]:
    """One region for each extent; those that overlap share one, as in-place arguments do.

    kind: "after" or "before" (where a page faults), "heap", or "" for no copies.
    """
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda e: e.low):
        if merged and extent.low < merged[-1].high:
            merged[-1].high = max(merged[-1].high, extent.high)
            merged[-1].written |= extent.written
        elif extent.low < extent.high:
            merged.append(Extent(extent.low, extent.high, extent.written))
    if kind == "":
        return [Region(e) for e in merged]
    if kind == "heap":
        return [HeapRegion(e) for e in merged]
    return [PageRegion(e, at_start={"before": True, "after": False}[kind]) for e in merged]


def moved(extent: Extent, places: Iterable[Region]) -> int:
    """Where an extent of the regions begins now; 0 for an empty one."""
    for place in places:
        if place.extent.low <= extent.low < extent.high <= place.extent.high:
            return extent.low + place.shift
    return 0


def _bytes(low: int, high: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_ubyte * (high - low)).from_address(low), np.uint8)


def _copy(to: int, source: int, size: int) -> None:
    ctypes.memmove(to, source, size)
