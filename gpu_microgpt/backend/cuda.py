"""CUDA on one GPU: kernels of our own, matrix products by cuBLASLt, one stream of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..config import Config
from ..dims import Dims
from ..errors import BackendError, DeviceError
from ..ops.cuda import CudaOps, workspace_bytes
from ..ops.cuda.attention import MAX_HEAD_DIM
from ..ops.cuda.batch import MAX_BATCH, MAX_LENGTH, MAX_ROWS
from ..ops.cuda.gemm import GEMM_WORKSPACE, Gemm
from ..ops.cuda.linear import relu_mask_bytes
from ..ops.cuda.plan_cache import PlanCache
from ..ops.cuda.rmsnorm import MAX_CHANNELS
from ..types import Array
from .gpu import Gpu

MODES = ("bf16", "tf32", "fp32")
NARROW, WIDE = 8, 64  # numbers that rows of logits are rounded up to: packs, or tiles of products
WIDE_VOCAB = 1024  # from here on
LINE = 256  # bytes: memory starts at a multiple, which the fastest matrix products may ask for


class CudaBackend:
    """One NVIDIA GPU."""

    name = "cupy"
    is_host = False
    master = np.dtype(np.float32)
    threads = 1

    def __init__(self, gpu: Gpu, dtype: str = "auto", why: str = "") -> None:
        """Compute on `gpu` in `dtype` (auto, bf16, tf32, fp32); `why` it is this backend, for
        `describe`.

        Raises BackendError for a dtype that this GPU does not run.
        """
        self.gpu = gpu
        self.mode = _mode(dtype, gpu)
        self.dtype = _bfloat16() if self.mode == "bf16" else self.master
        self._why = f" ({why})" if why else ""
        self._gemm: Gemm | None = None

    def describe(self) -> str:
        """One line: the GPU, its driver and libraries, precision, and why."""
        return f"{self.gpu.describe()}, {self.mode}{self._why}"

    def split(self, batch_size: int, length: int, flops: float) -> tuple[int, int]:
        """The whole batch at once."""
        return 1, 1

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory."""
        return self.gpu.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Zeroed memory."""
        array = self.gpu.empty(shape, dtype)
        self.gpu.zero(array)
        return array

    def upload(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Copy a host array of the same shape and dtype into a contiguous one of the device."""
        self.gpu.upload(array, host)

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        """A NumPy array of any layout on the device, dtype kept."""
        copy = self.gpu.empty(array.shape, array.dtype)
        self.gpu.upload(copy, array)
        return copy

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        """A NumPy copy of a contiguous array, of the caller's own; waits for it."""
        return self.gpu.download(array).wait().copy()

    def ops(self, workspace: Array) -> CudaOps:
        """The operations; all share one workspace and one set of plans for matrix products."""
        gpu = self.gpu
        if self._gemm is None:
            space = gpu.empty((GEMM_WORKSPACE,), np.uint8)
            self._gemm = Gemm(gpu.cublaslt, gpu.device, self.mode, space, gpu, PlanCache())
        return CudaOps(self.dtype, gpu.device, gpu.loader, workspace, self._gemm)

    def workspace_bytes(self, dims: Dims, rows: int, sequences: int = 0) -> int:
        """Scratch for batches of up to `rows` positions and a KV cache of so many sequences; whole
        lines of `LINE`, as the arrays of a pass lie behind it."""
        size = workspace_bytes(dims, rows, self.gpu.device, self.dtype.itemsize, sequences)
        return -(-size // LINE) * LINE

    def pad_vocab(self, vocab_size: int) -> int:
        """To where rows of logits start at whole packs, and products have whole tiles."""
        step = NARROW if vocab_size < WIDE_VOCAB else WIDE
        return -(-vocab_size // step) * step

    def relu_mask_bytes(self, width: int) -> int:
        """Bytes a row of cuBLASLt's mask of signs."""
        return relu_mask_bytes(width)

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Enqueue the tasks' work, one after the other."""
        for task in tasks:
            task()

    def memory(self) -> int:
        """Bytes of the GPU's memory that are free."""
        return self.gpu.memory()[0]

    def memory_used(self) -> int:
        """Bytes of the GPU's memory that are not, whoever has them."""
        free, total = self.gpu.memory()
        return total - free

    def reserved(self) -> list[tuple[str, int]]:
        """The workspace of cuBLASLt."""
        return [("cuBLASLt", GEMM_WORKSPACE)]

    def peak_flops(self) -> float | None:
        """Floating-point operations a second the GPU promises in this dtype, where published."""
        return self.gpu.device.peak_flops(self.mode)

    def __enter__(self) -> CudaBackend:
        """Make the GPU that of the calling thread. May be nested."""
        self.gpu.activate()
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what was enqueued, and leave the thread as it was.

        A failure of the GPU is raised here only where none is on its way already.
        """
        try:
            self.gpu.close()
        except DeviceError:
            if not error or error[0] is None:
                raise


def unsupported(config: Config) -> str | None:
    """Why the kernels do not take this model or batch, in one line: what was got, what is wanted;
    None where they do."""
    model, batch_size = config.model, config.train.batch_size
    head_dim = model.n_embd // model.n_head
    if head_dim % 4 or head_dim > MAX_HEAD_DIM:
        return (
            f"model.n_head: got {model.n_head}, heads of {head_dim} channels; wanted a multiple of "
            f"4 up to {MAX_HEAD_DIM}"
        )
    for name, got, limit in (
        ("model.n_embd", model.n_embd, MAX_CHANNELS),
        ("model.block_size", model.block_size, MAX_LENGTH - 1),
        ("train.batch_size", batch_size, MAX_BATCH),
        ("train.batch_size x model.block_size", batch_size * model.block_size, MAX_ROWS - 1),
    ):
        if got > limit:
            return f"{name}: got {got:,}, wanted at most {limit:,}"
    return None


def _mode(dtype: str, gpu: Gpu) -> str:
    """The arithmetic of matrix products."""
    device = gpu.device
    if dtype == "auto":
        return "bf16" if device.tensor_cores else "fp32"
    if dtype not in MODES:
        raise BackendError(
            f"dtype: got {dtype}; backend cupy runs {', '.join(MODES)} (fp64: backend=numpy)"
        )
    if dtype != "fp32" and not device.tensor_cores:
        raise BackendError(
            f"dtype: got {dtype}; {device.name} ({device.arch}) runs fp32 only: dtype=fp32"
        )
    return dtype


def _bfloat16() -> np.dtype[Any]:
    """NumPy's name for it, which comes with the extras that bring CuPy."""
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
