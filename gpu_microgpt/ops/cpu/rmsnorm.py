"""RMSNorm without parameters (Zhang & Sennrich 2019), on the CPU.

    y = x rstd,  rstd = 1 / sqrt(mean(x^2) + eps)        dx = rstd (dy - y mean(dy y))

x, y, dx, dy (N, C); rstd (N,); all of one dtype. Row after row, and a row twice: once for its sum,
which runs along the vectors, once to write. The second time the row is in L1, so memory is read and
written once. The sum before the norm (of the embeddings, or of branch and residual) is taken just
before, some rows at a time, for the same reason. Root and division are in float64, one a row; but a
row of few channels takes less time than these: there as many rows as a vector has lanes go
together, their sums, roots and divisions in one vector.
"""

from __future__ import annotations

import math
from typing import Any

from ...types import Array
from ..reference.rmsnorm import EPS
from .compile import compiled
from .dots import row_dots
from .instructions import ADD_RMSNORM, EMBEDDING_RMSNORM, RMSNORM, RMSNORM_BACKWARD, Instructions
from .rows import add_row, dot, scale_row
from .vector import at, fma, lane_of, lanes, load, load_some, store, store_some, vsqrt

NARROW = 64  # C up to which rows are normalised together


@compiled
def _normalise(y: Any, rstd: Any, x: Any, rows: Any, channels: Any) -> None:
    """y = x rstd for up to a vector of rows. y may be x."""
    if channels > NARROW:
        for i in range(rows):
            row = at(x, i * channels)
            rstd[i] = 1 / math.sqrt(dot(row, row, channels) / channels + EPS)
            scale_row(at(y, i * channels), row, rstd[i], channels)
        return
    scales = 1 / vsqrt(row_dots(x, x, rows, channels) * (1 / channels) + EPS)
    store_some(rstd, 0, scales, rows)
    for i in range(rows):
        row = i * channels
        scale_row(at(y, row), at(x, row), lane_of(scales, i), channels)


@compiled
def rmsnorm_rows(y: Any, rstd: Any, x: Any, rows: Any, channels: Any) -> None:
    """The rows of `rmsnorm`; y, rstd, x are places."""
    for n in range(0, rows, lanes(x)):
        i = n * channels
        _normalise(at(y, i), at(rstd, n), at(x, i), min(lanes(x), rows - n), channels)


@compiled
def embedding_rmsnorm_rows(
    y: Any, rstd: Any, tokens: Any, positions: Any, wte: Any, wpe: Any, rows: Any, channels: Any
) -> None:
    """The rows of `embedding_rmsnorm`; tokens and positions are arrays, the others places."""
    for start in range(0, rows, lanes(y)):
        count, first = min(lanes(y), rows - start), at(y, start * channels)
        for n in range(start, start + count):
            token, position = at(wte, tokens[n] * channels), at(wpe, positions[n] * channels)
            add_row(at(y, n * channels), token, position, channels)
        _normalise(first, at(rstd, start), first, count, channels)


@compiled
def add_rmsnorm_rows(
    x: Any, y: Any, rstd: Any, branch: Any, residual: Any, rows: Any, channels: Any
) -> None:
    """The rows of `add_rmsnorm`; all are places."""
    for n in range(0, rows, lanes(x)):
        i, count = n * channels, min(lanes(x), rows - n)
        add_row(at(x, i), at(residual, i), at(branch, i), count * channels)
        _normalise(at(y, i), at(rstd, n), at(x, i), count, channels)


@compiled
def rmsnorm_backward_row(dx: Any, dy: Any, y: Any, rstd: Any, channels: Any, add: Any) -> None:
    """dx = rstd (dy - y mean(dy y)), or added to dx. dx may be dy."""
    width = lanes(dx)
    whole = channels // width * width
    mean = dot(dy, y, channels) / channels
    for j in range(0, whole, width):
        v = fma(load(y, j), -mean, load(dy, j)) * rstd
        if add:
            v += load(dx, j)
        store(dx, j, v)
    if whole < channels:
        rest = channels - whole
        v = fma(load_some(y, whole, rest, 0), -mean, load_some(dy, whole, rest, 0)) * rstd
        if add:
            v += load_some(dx, whole, rest, 0)
        store_some(dx, whole, v, rest)


@compiled
def rmsnorm_backward_rows(
    dx: Any, dy: Any, y: Any, rstd: Any, rows: Any, channels: Any, add: Any
) -> None:
    """The rows of `rmsnorm_backward`, or with `add` of `rmsnorm_backward_add`; all are places."""
    for n in range(rows):
        i = n * channels
        rmsnorm_backward_row(at(dx, i), at(dy, i), at(y, i), rstd[n], channels, add)


def rmsnorm(self: Instructions, y: Array, rstd: Array, x: Array) -> None:
    """rstd = (mean(x^2) + eps)^(-1/2) a row; y = x rstd."""
    self.do(RMSNORM, len(x), y, rstd, x, x.shape[1])


def embedding_rmsnorm(
    self: Instructions,
    y: Array,
    rstd: Array,
    tokens: Array,
    positions: Array,
    wte: Array,
    wpe: Array,
) -> None:
    """rmsnorm(wte[tokens] + wpe[positions]); the sum is not kept."""
    self.do(EMBEDDING_RMSNORM, len(y), y, rstd, wte, wpe, tokens, positions, y.shape[1])


def add_rmsnorm(
    self: Instructions, x: Array, y: Array, rstd: Array, branch: Array, residual: Array
) -> None:
    """x = residual + branch; y, rstd = rmsnorm(x)."""
    self.do(ADD_RMSNORM, len(x), x, y, rstd, branch, residual, x.shape[1])


def rmsnorm_backward(self: Instructions, dx: Array, dy: Array, y: Array, rstd: Array) -> None:
    """dx = rstd (dy - y mean(dy y)); derived in reference/rmsnorm.py."""
    self.do(RMSNORM_BACKWARD, len(y), dx, dy, y, rstd, y.shape[1], False)


def rmsnorm_backward_add(self: Instructions, dx: Array, dy: Array, y: Array, rstd: Array) -> None:
    """dx += rstd (dy - y mean(dy y))."""
    self.do(RMSNORM_BACKWARD, len(y), dx, dy, y, rstd, y.shape[1], True)
