"""Launchers of kernels/sample.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...types import Array
from ..reference.sample import GREEDY
from .arrays import row_stride
from .context import Context, rows_of

MAX_VOCAB = 1 << 16  # of 2^47 units each: sums below 2^64
LOW = 0xFFFFFFFF


def sample(
    self: Context, tokens: Array, logits: Array, uniforms: Array, temperature: float, top_k: int,
    top_p: float,
) -> None:  # fmt: skip
    """Invert the cumulative distribution at `uniforms`."""
    rows = _check(self, "sample", tokens, logits)
    self.check("sample", uniforms=(uniforms, "float64", (rows,)))
    self.kernel("sample", "sample")((rows,), (_threads(logits),), (
        tokens, logits, uniforms, *_sizes(logits), *_heat(temperature, top_k, top_p),
    ))  # fmt: skip


def sample_philox(
    self: Context, tokens: Array, logits: Array, seed: int, numbers: Array, positions: Array,
    temperature: float, top_k: int, top_p: float,
) -> None:  # fmt: skip
    """The same at the draw of (seed, text, position), made where it is used."""
    rows = _check(self, "sample_philox", tokens, logits)
    draws = {"numbers": numbers, "positions": positions}
    self.check("sample_philox", **{k: (a, "int32", (rows,)) for k, a in draws.items()})
    self.kernel("sample", "sample_philox")((rows,), (_threads(logits),), (
        tokens, logits, numbers, positions, *_sizes(logits), np.uint32(seed & LOW),
        np.uint32(seed >> 32 & LOW), *_heat(temperature, top_k, top_p),
    ))  # fmt: skip


def _check(self: Context, op: str, tokens: Array, logits: Array) -> int:
    """The number of rows."""
    rows, vocab = rows_of(op, "logits", logits)
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"{op}: logits: got {vocab} tokens, wanted 1 to {MAX_VOCAB}")
    self.check_rows(op, logits=(logits, self.real, (rows, vocab)))
    self.check(op, tokens=(tokens, "int32", (rows,)))
    return rows


def _threads(logits: Array) -> int:
    return 1024 if logits.shape[1] > 8192 else 256


def _sizes(logits: Array) -> tuple[Any, ...]:
    return np.int32(len(logits)), np.int32(logits.shape[1]), np.int64(row_stride(logits))


def _heat(temperature: float, top_k: int, top_p: float) -> tuple[Any, ...]:
    """To the kernel, temperature 0 is greedy."""
    heat = 0 if temperature < GREEDY else temperature
    return np.float32(heat), np.int32(min(top_k, MAX_VOCAB)), np.float64(top_p)
