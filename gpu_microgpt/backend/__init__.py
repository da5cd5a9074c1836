"""Where arrays live and who computes: the choice of backend, made once and said aloud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..config import Config
from ..errors import BackendError
from ..types import Array
from .numpy import NumpyBackend

__all__ = ["Backend", "choose"]


class Backend(Protocol):
    """An array module and the device services around it."""

    name: str
    xp: Any  # the array module: numpy, or one that speaks its language
    dtype: np.dtype[Any]  # of weights, moments and activations
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

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        """A NumPy array on the device, dtype kept."""

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        """A NumPy copy of a device array; waits for it."""

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run one task a shard, side by side; the first exception is raised."""

    def memory(self) -> int | None:
        """Bytes the device has in all, or None where it cannot be known."""

    def __enter__(self) -> Backend:
        """Take threads and limits; passes and steps run inside this context."""

    def __exit__(self, *error: object) -> None:
        """Give them back."""


def choose(config: Config) -> Backend:
    """Return the backend the config asks for.

    Raises BackendError where it or the precision cannot run here.
    """
    if config.backend == "cupy":
        raise BackendError(
            "backend: got cupy, but this version has no CUDA engine yet; use backend=numpy"
        )
    why = "auto: this version has no CUDA engine" if config.backend == "auto" else ""
    return NumpyBackend(config.dtype, config.threads, why)
