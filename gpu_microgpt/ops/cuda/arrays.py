"""Where an array's numbers are: NumPy's under the emulator, CuPy's on a GPU."""

from __future__ import annotations

import numpy as np

from ...types import Array


def pointer(array: Array) -> int:
    """Address of the first number, on the host or the device."""
    if isinstance(array, np.ndarray):  # under the emulator
        return int(array.ctypes.data)
    return int(array.data.ptr)


def row_stride(array: Array) -> int:
    """Numbers from one row to the next."""
    return int(array.strides[0]) // int(array.dtype.itemsize)
