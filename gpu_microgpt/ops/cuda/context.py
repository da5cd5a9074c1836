"""What every launcher may use: its kernels, the device's properties, checks, scratch memory."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ...arena import Shape, carve
from ...types import Array
from .arrays import pointer
from .device import Device
from .gemm import Gemm

ALIGN = 16  # bytes: the widest access of a thread
NULL = np.uintp(0)  # the pointer to nothing
WARP = 32

Grid = tuple[int, ...]


class Kernel(Protocol):
    """A compiled kernel, called as a `cupy.RawKernel` is; arguments are arrays or NumPy scalars."""

    def __call__(
        self, grid: Grid, block: Grid, args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        """Launch blocks of threads, with so many bytes of dynamic shared memory each."""


class Loader(Protocol):
    """Where kernels come from: a GPU's compiler and cache, or an emulator."""

    def function(
        self, stem: str, name: str, defines: tuple[str, ...], shared_mem: int = 0
    ) -> Kernel:
        """Kernel `name` of `kernels/stem.cu`, compiled with these -D constants, allowed
        `shared_mem` bytes of dynamic shared memory. Raises BackendError where it does not
        compile."""


class Context:
    """A device, its kernels, and one operation's worth of scratch memory, planned beforehand."""

    def __init__(
        self,
        dtype: Any,
        device: Device,
        loader: Loader,
        workspace: Array,
        gemm: Gemm | None = None,
    ) -> None:
        """`dtype`: float32 or bfloat16, of weights and activations; `workspace` is uint8; `gemm`
        may be None where no operation with a matrix product is asked for."""
        self.real: str = np.dtype(dtype).name
        self.device, self.loader, self.workspace, self.gemm = device, loader, workspace, gemm
        self._kernels: dict[Any, Kernel] = {}

    @property
    def pack(self) -> int:
        """Numbers in a thread's widest access."""
        return 8 if self.real == "bfloat16" else 4

    def kernel(self, stem: str, name: str, shared_mem: int = 0, **constants: int) -> Kernel:
        """Kernel `name` of `kernels/stem.cu` for this dtype. Loaded when first asked for: before a
        graph is captured, run the same operation once on the same shapes."""
        key = (stem, name, shared_mem, *constants.items())
        if key not in self._kernels:
            numbers = {"REAL_BF16": int(self.real == "bfloat16"), **constants}
            defines = tuple(f"{k}={v}" for k, v in numbers.items())
            self._kernels[key] = self.loader.function(stem, name, defines, shared_mem)
        return self._kernels[key]

    def check(self, op: str, align: int = ALIGN, /, **arrays: tuple[Array, str, Shape]) -> None:
        """Raise ValueError unless each array (name=(array, dtype, shape)) is as a kernel reads it:
        of that dtype and shape, contiguous, at a multiple of `align` bytes."""
        for name, (array, dtype, shape) in arrays.items():
            self._check_kind(op, name, array, dtype, shape)
            if not array.flags.c_contiguous:
                raise ValueError(
                    f"{op}: {name}: got strides {array.strides}, wanted a contiguous array"
                )
            if pointer(array) % align:
                raise ValueError(
                    f"{op}: {name}: got address {pointer(array):#x}, wanted a multiple of {align}"
                )

    def check_rows(self, op: str, **arrays: tuple[Array, str, Shape]) -> None:
        """The same for (N, V) arrays whose rows may lie further apart than V numbers."""
        for name, (array, dtype, shape) in arrays.items():
            self._check_kind(op, name, array, dtype, shape)
            item = array.dtype.itemsize
            if array.size and (array.strides[1] != item or array.strides[0] < shape[1] * item):
                raise ValueError(
                    f"{op}: {name}: got strides {array.strides}, wanted rows of neighbours"
                )

    def _check_kind(self, op: str, name: str, array: Array, dtype: str, shape: Shape) -> None:
        """On the device (a host array's bytes would be taken for an address), of this dtype and
        shape."""
        wanted = type(self.workspace)
        if type(array) is not wanted:
            raise ValueError(
                f"{op}: {name}: got {_kind(type(array))}, wanted {_kind(wanted)}, on the device"
            )
        if array.dtype.name != dtype or array.shape != shape:
            raise ValueError(
                f"{op}: {name}: got {array.dtype} {array.shape}, wanted {dtype} {shape}"
            )

    def scratch(self, dtype: Any, *shapes: Shape) -> tuple[Array, ...]:
        """Uninitialised arrays side by side in the workspace, valid until the next call.

        Raises MemoryError where the plan was too small: a fault of `workspace_bytes`.
        """
        return carve(self.workspace, dtype, shapes)


def rows_of(op: str, name: str, array: Array) -> tuple[int, int]:
    """N and C of an (N, C) array. Raises ValueError where it has other dimensions."""
    if array.ndim != 2:
        raise ValueError(f"{op}: {name}: got shape {array.shape}, wanted rows and columns")
    rows, columns = array.shape
    return int(rows), int(columns)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def _kind(array: type) -> str:
    return f"{array.__module__.partition('.')[0]}.{array.__name__}"
