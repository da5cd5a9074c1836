"""Softmax over the last axis, on the CPU.

    y = exp(x) / sum(exp(x))        dx = y (dy - sum(dy y))

All (N, V). Row after row; a row is read for its largest element, for exp and its sum, and once more
to be divided, the last two times from L1.
"""

from __future__ import annotations

from typing import Any

from ...types import Array
from .compile import compiled
from .instructions import SOFTMAX, SOFTMAX_BACKWARD, Instructions
from .rows import dot, exp_row, scale_row
from .vector import at, lanes, load, load_some, store, store_some


@compiled
def softmax_rows(y: Any, x: Any, rows: Any, vocab: Any) -> None:
    """The rows of `softmax`; y and x are places."""
    for n in range(rows):
        row = at(y, n * vocab)
        total = exp_row(row, at(x, n * vocab), vocab)
        scale_row(row, row, 1 / total, vocab)


@compiled
def softmax_backward_row(dx: Any, dy: Any, y: Any, vocab: Any) -> None:
    """dx = y (dy - sum(dy y)). dx may be dy."""
    width = lanes(dx)
    whole = vocab // width * width
    mean = dot(dy, y, vocab)
    for j in range(0, whole, width):
        store(dx, j, (load(dy, j) - mean) * load(y, j))
    if whole < vocab:
        rest = vocab - whole
        v = (load_some(dy, whole, rest, 0) - mean) * load_some(y, whole, rest, 0)
        store_some(dx, whole, v, rest)


@compiled
def softmax_backward_rows(dx: Any, dy: Any, y: Any, rows: Any, vocab: Any) -> None:
    """The rows of `softmax_backward`; all are places."""
    for n in range(rows):
        i = n * vocab
        softmax_backward_row(at(dx, i), at(dy, i), at(y, i), vocab)


def softmax(self: Instructions, y: Array, x: Array) -> None:
    """The row's largest x is subtracted first, so that exp cannot overflow."""
    self.do(SOFTMAX, len(x), y, x, x.shape[1])


def softmax_backward(self: Instructions, dx: Array, dy: Array, y: Array) -> None:
    """dx = y (dy - sum(dy y)); derived in reference/softmax.py."""
    self.do(SOFTMAX_BACKWARD, len(y), dx, dy, y, y.shape[1])
