"""Where arrays live and who computes: the choice of backend, made once and said aloud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..config import Config
from ..dims import Dims
from ..errors import BackendError
from ..ops import Ops
from ..types import Array
from .numpy import NumpyBackend

__all__ = ["Backend", "choose"]


class Backend(Protocol):
    """A device: its memory, its operations, what it is and what it can hold."""

    name: str
    is_host: bool  # whether its arrays lie in the host's memory
    dtype: np.dtype[Any]  # of activations, and of the weights that enter matrix products
    master: np.dtype[Any]  # of weights as they are kept, gradients, moments and statistics
    threads: int

    def describe(self) -> str:
        """One line: what computes, with which library and how many threads."""

    def split(self, batch_size: int, length: int, flops: float) -> tuple[int, int]:
        """Into how many shards a batch is best cut, and each shard into how many pieces.

        Shards are worked on side by side, a shard's pieces one after the other. The batch has
        `batch_size` sequences of up to `length` rows; a step takes so many `flops`.
        """

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Zeroed memory."""

    def upload(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Copy a host array of the same shape and dtype into a contiguous one of the device."""

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        """A NumPy array on the device, dtype kept."""

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        """A NumPy copy of a device array; waits for it."""

    def ops(self, workspace: Array) -> Ops:
        """The operations, bound to scratch memory of their own (uint8 bytes)."""

    def workspace_bytes(self, dims: Dims, rows: int, sequences: int = 0) -> int:
        """Scratch for batches of up to `rows` positions and a KV cache of so many sequences."""

    def pad_vocab(self, vocab_size: int) -> int:
        """Rows of lm_head in memory, and columns of the logits: at least vocab_size."""

    def relu_mask_bytes(self, width: int) -> int:
        """Bytes a row in which `linear_relu` notes the signs of so many numbers; 0: it does not."""

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run one task a shard, side by side; the first exception is raised."""

    def memory(self) -> int | None:
        """Bytes that may be planned on: a GPU's free ones, all of a host's; None: not known."""

    def memory_used(self) -> int | None:
        """Bytes of the device in use, by whomever; None where that says nothing of the run."""

    def reserved(self) -> list[tuple[str, int]]:
        """What the backend takes for itself: name, bytes."""

    def peak_flops(self) -> float | None:
        """Floating-point operations a second the device promises in this dtype, where known."""

    def __enter__(self) -> Backend:
        """Take threads and limits; passes and steps run inside this context."""

    def __exit__(self, *error: object) -> None:
        """Give them back."""


def choose(config: Config) -> Backend:
    """Return the backend the config asks for.

    auto is cupy where it can run, else numpy, which says why. tf32, which only GPUs run, is asked
    for on purpose: numpy does not take its place; bf16 it runs where the CPU can. Raises
    BackendError where backend or dtype cannot run here, ConfigError where there is no such GPU.
    """
    if config.backend == "numpy":
        return NumpyBackend(config.dtype, config.threads, "", config.kernels)
    if config.backend == "cupy":
        return _cuda(config)
    if config.dtype == "fp64":
        return NumpyBackend(config.dtype, config.threads, "auto: fp64 is for numpy", config.kernels)
    try:
        return _cuda(config, "auto")
    except BackendError as failure:
        if config.dtype == "tf32":
            raise BackendError(
                f"dtype: got tf32, which only backend cupy runs, and it cannot: {failure}"
            ) from None
        why = getattr(failure, "why", str(failure))
        try:
            return NumpyBackend(config.dtype, config.threads, f"auto: {why}", config.kernels)
        except BackendError as refusal:
            if config.dtype != "bf16":
                raise
            raise BackendError(f"{refusal}; and backend cupy cannot run: {failure}") from None


def _cuda(config: Config, why: str = "") -> Backend:
    """Imported here: a run on the CPU loads nothing of it."""
    from . import cupy
    from .cuda import CudaBackend, unsupported

    backend = CudaBackend(cupy.open_gpu(config.device), config.dtype, why)
    if refusal := unsupported(config):
        raise BackendError(f"backend cupy: {refusal}; or backend=numpy")
    return backend
