"""cuBLASLt: the few calls of NVIDIA's library of matrix products that are wanted here, by ctypes.

By ctypes, not by nvmath.bindings: that would be one more dependency, and each of its calls wants a
driver. Here all but the handle works on any machine, so that what is packed into the library's
structures is tested without a GPU, against the library itself.

The library's matrices are column-major; `gemm.py` turns ours into them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from ...errors import BackendError, DeviceError
from .compiler import INSTALL

SUCCESS, INVALID_VALUE, ARCH_MISMATCH, NOT_SUPPORTED = 0, 7, 8, 15
ALLOC_FAILED, MAPPING_ERROR, EXECUTION_FAILED, INTERNAL_ERROR = 3, 11, 13, 14
DEVICE_FAILURES = (ALLOC_FAILED, MAPPING_ERROR, EXECUTION_FAILED, INTERNAL_ERROR)
TYPES = {"float32": 0, "bfloat16": 14}  # cudaDataType: CUDA_R_32F, CUDA_R_16BF
NO_PARTS, FLOAT_PARTS, OUTPUT_PARTS = 0, 2, 4  # in which type parts of a sum over k are kept
WHOLE_STEPS = 128  # numbers of k: what the steps of algorithms divide

# attributes: their number, and the type of their value
TRANSPOSE_A, TRANSPOSE_B = (3, c_int32), (4, c_int32)
EPILOGUE, AUX_POINTER, AUX_LD = (7, c_uint32), (11, c_void_p), (12, c_int64)
MAX_WORKSPACE, REDUCTIONS = (1, c_uint64), (3, c_uint32)
ALIGNMENTS = tuple((number, c_uint32) for number in (5, 6, 7, 8))  # of A, B, C, D
Attribute = tuple[int, Any]


class Compute(IntEnum):
    """cublasComputeType_t: all sum in float32."""

    FLOAT32 = 68
    TF32 = 77  # of float32 inputs, 10 bits of the mantissa are multiplied


class Epilogue(IntEnum):
    """cublasLtEpilogue_t: what is done to a product's numbers before they are written."""

    DEFAULT = 1
    RELU = 2
    RELU_AUX = 130  # and a bit for each, set where it is positive
    DRELU = 136  # zero where the bit is not set


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t: plain bytes, which may be kept on disk."""

    _fields_ = (("data", c_uint64 * 8),)


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", ctypes.c_float),
        ("reserved", c_int * 4),
    )


class Operand(NamedTuple):
    """A column-major matrix in memory: one column after another, `ld` numbers apart."""

    rows: int
    columns: int
    ld: int
    dtype: str
    align: int  # bytes that the address and the distance of columns are multiples of


class Product(NamedTuple):
    """D = epilogue(op(A) op(B) + beta C): all that decides which algorithms can do it."""

    a: Operand
    b: Operand
    c: Operand
    d: Operand
    transpose_a: bool
    transpose_b: bool
    beta: bool  # 1; else C is not read
    in_place: bool  # C is D
    compute: Compute
    epilogue: Epilogue = Epilogue.DEFAULT
    aux_ld: int = 0  # bits from one column's mask to the next
    aux_align: int = 0

    @property
    def inner(self) -> int:
        """k: how many products a number of D sums up."""
        return self.a.rows if self.transpose_a else self.a.columns

    def __str__(self) -> str:
        """As the caller sees it, row-major: bfloat16 (N, C) x (C, F) -> float32."""
        n, f, c = self.d.columns, self.d.rows, self.inner
        tf32 = " in TF32" if self.compute is Compute.TF32 else ""
        after = "" if self.epilogue is Epilogue.DEFAULT else f" with {self.epilogue.name}"
        added = ", added" if self.beta else ""
        return f"{self.a.dtype} ({n}, {c}) x ({c}, {f}) -> {self.d.dtype}{added}{tf32}{after}"


class Descriptor:
    """One of the library's structures, given back when nobody holds it any more."""

    def __init__(self, pointer: c_void_p, destroy: Callable[[c_void_p], Any]) -> None:
        """`destroy` gives it back."""
        self._as_parameter_, self._destroy = pointer, destroy

    def __del__(self) -> None:
        """Needs no GPU, so it may happen at any time."""
        self._destroy(self._as_parameter_)


@dataclass(frozen=True)
class Operation:
    """A product's descriptors."""

    description: Descriptor
    layouts: tuple[Descriptor, Descriptor, Descriptor, Descriptor]  # A, B, C, D


class CublasLt:
    """The library and its handle on the GPU in use, which is taken when first needed."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        """Use `library`, or look for NVIDIA's. Raises BackendError where it is not there."""
        self._library = _declared(library or _find())
        self._handle: c_void_p | None = None

    @property
    def version(self) -> int:
        """131000 is 13.10.0."""
        return int(self._library.cublasLtGetVersion())

    def operation(self, product: Product) -> Operation:
        """The descriptors of a product. Needs no GPU."""
        create, destroy = "cublasLtMatmulDescCreate", "cublasLtMatmulDescDestroy"
        description = self._create(create, destroy, product.compute, TYPES["float32"])
        self._describe(description, TRANSPOSE_A, product.transpose_a)
        self._describe(description, TRANSPOSE_B, product.transpose_b)
        self._describe(description, EPILOGUE, product.epilogue)
        if product.aux_ld:
            self._describe(description, AUX_LD, product.aux_ld)
        a, b, c, d = (self._layout(operand) for operand in product[:4])
        return Operation(description, (a, b, c, d))

    def heuristic(
        self, product: Product, operation: Operation, aux: int, workspace: int, count: int
    ) -> list[Algorithm]:
        """Up to `count` algorithms that want at most so many bytes of workspace, the one thought
        fastest first; none where the product is not supported. `aux`: the mask's address."""
        preference = self._preference(product, workspace)
        if aux:
            self._describe(operation.description, AUX_POINTER, aux)
        results, found = (HeuristicResult * count)(), c_int()
        ask = self._library.cublasLtMatmulAlgoGetHeuristic
        status = ask(
            self._open(), operation.description, *operation.layouts, preference, count, results,
            byref(found),
        )  # fmt: skip
        if status in (NOT_SUPPORTED, INVALID_VALUE):
            return []
        self._check("cublasLtMatmulAlgoGetHeuristic", status)
        good = [result for result in results[: found.value] if result.state == SUCCESS]
        return [Algorithm.from_buffer_copy(result.algorithm) for result in good]

    def fits(self, operation: Operation, algorithm: Algorithm, aux: int, workspace: int) -> bool:
        """Whether the algorithm does this operation on this GPU with so many bytes of workspace.
        `aux`: the mask's address, without which no operation with a mask is sound."""
        if aux:
            self._describe(operation.description, AUX_POINTER, aux)
        result = HeuristicResult()
        ask = self._library.cublasLtMatmulAlgoCheck
        status = ask(
            self._open(), operation.description, *operation.layouts, byref(algorithm), byref(result)
        )
        if status in (INVALID_VALUE, ARCH_MISMATCH, NOT_SUPPORTED):
            return False
        self._check("cublasLtMatmulAlgoCheck", status)
        return int(result.workspace) <= workspace

    def matmul(
        self, operation: Operation, algorithm: Algorithm, a: int, b: int, c: int, d: int, aux: int,
        beta: bool, workspace: int, workspace_bytes: int, stream: int,
    ) -> None:  # fmt: skip
        """Enqueue the product: the one call here that does work on the GPU.

        a, b, c, d, aux (the mask's, or 0) and workspace are addresses on the device. Raises
        DeviceError where the GPU fails.
        """
        if aux:
            self._describe(operation.description, AUX_POINTER, aux)
        la, lb, lc, ld = operation.layouts
        status = self._library.cublasLtMatmul(
            self._open(), operation.description, byref(_ONE), a, la, b, lb,
            byref(_ONE if beta else _ZERO), c, lc, d, ld, byref(algorithm), workspace,
            workspace_bytes, stream,
        )  # fmt: skip
        self._check("cublasLtMatmul", status)

    def close(self) -> None:
        """Give the handle back, once the GPU is done; the next call takes another."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._check("cublasLtDestroy", self._library.cublasLtDestroy(handle))

    def _open(self) -> c_void_p:
        if self._handle is None:
            handle = c_void_p()
            self._check("cublasLtCreate", self._library.cublasLtCreate(byref(handle)))
            self._handle = handle
        return self._handle

    def _layout(self, x: Operand) -> Descriptor:
        names = "cublasLtMatrixLayoutCreate", "cublasLtMatrixLayoutDestroy"
        return self._create(*names, TYPES[x.dtype], x.rows, x.columns, x.ld)

    def _preference(self, product: Product, workspace: int) -> Descriptor:
        """What an algorithm may ask for: the library would take arrays to lie at multiples of 256
        bytes."""
        set_one = self._library.cublasLtMatmulPreferenceSetAttribute
        names = "cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceDestroy"
        preference = self._create(*names)
        self._set(set_one, preference, MAX_WORKSPACE, workspace)
        self._set(set_one, preference, REDUCTIONS, _reductions(product))
        for attribute, operand in zip(ALIGNMENTS, product[:4], strict=True):
            self._set(set_one, preference, attribute, operand.align)
        return preference

    def _create(self, create: str, destroy: str, *arguments: int) -> Descriptor:
        pointer = c_void_p()
        self._check(create, getattr(self._library, create)(byref(pointer), *arguments))
        return Descriptor(pointer, getattr(self._library, destroy))

    def _describe(self, description: Descriptor, attribute: Attribute, value: int) -> None:
        self._set(self._library.cublasLtMatmulDescSetAttribute, description, attribute, value)

    def _set(self, function: Any, to: Descriptor, attribute: Attribute, value: int) -> None:
        number, kind = attribute
        status = function(to, number, byref(kind(value)), ctypes.sizeof(kind))
        self._check(f"{function.__name__}({number}, {value})", status)

    def _check(self, call: str, status: int) -> None:
        if status != SUCCESS:
            said = self._library.cublasLtGetStatusString(status).decode()
            said = f"cuBLASLt {self.version}: {call}: status {status}, {said}"
            if status in DEVICE_FAILURES:
                raise DeviceError(f"the GPU failed ({said})")
            raise BackendError(said)


def _reductions(product: Product) -> int:
    """How an algorithm may sum k in parts: not in place, where nothing promises their order, and so
    the same bits; not rounded to bfloat16 between; and not at all where k ends within a step, which
    versions 12.8 and 13.1 are reported to leave out (facebookexperimental/triton #2767)."""
    if product.inner % WHOLE_STEPS:
        return NO_PARTS
    return FLOAT_PARTS | (OUTPUT_PARTS if product.d.dtype == "float32" else 0)


_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)  # read during the call, captured or not

_SET = (c_void_p, c_int, c_void_p, c_size_t)
_FLOAT = POINTER(ctypes.c_float)
_PROBLEM = (c_void_p,) * 6  # handle, description, the layouts of A, B, C, D
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (c_void_p,),
    "cublasLtDestroy": (c_void_p,),
    "cublasLtMatmulDescCreate": (c_void_p, c_int, c_int),
    "cublasLtMatmulDescDestroy": (c_void_p,),
    "cublasLtMatmulDescSetAttribute": _SET,
    "cublasLtMatrixLayoutCreate": (c_void_p, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceCreate": (c_void_p,),
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": _SET,
    "cublasLtMatmulAlgoGetHeuristic": (
        *_PROBLEM, c_void_p, c_int, POINTER(HeuristicResult), POINTER(c_int)
    ),
    "cublasLtMatmulAlgoCheck": (*_PROBLEM, POINTER(Algorithm), POINTER(HeuristicResult)),
    "cublasLtMatmul": (
        c_void_p, c_void_p, _FLOAT, *(c_void_p,) * 4, _FLOAT, *(c_void_p,) * 4, POINTER(Algorithm),
        c_void_p, c_size_t, c_void_p,
    ),
}  # fmt: skip


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with its functions' signatures."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    library.cublasLtGetVersion.argtypes, library.cublasLtGetVersion.restype = (), c_size_t
    library.cublasLtGetStatusString.argtypes = (c_int,)
    library.cublasLtGetStatusString.restype = ctypes.c_char_p
    return library


def _find() -> ctypes.CDLL:
    """NVIDIA's library, from a wheel or an installed CUDA toolkit."""
    try:
        from cuda import pathfinder

        return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (ImportError, RuntimeError, OSError) as failure:
        said = str(failure).partition("\n")[0]
        raise BackendError(f"cuBLASLt cannot be loaded ({said}): {INSTALL}") from None
