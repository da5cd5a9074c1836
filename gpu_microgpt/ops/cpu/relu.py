"""Rectified linear unit, y = max(x, 0), and its backward, dx = dy where y > 0.

Any shapes, all alike, read as flat: one pass of loads, a comparison, stores. Inside the model the
products do it on their way (linear.py), so that it costs no pass at all.
"""

from __future__ import annotations

from ...types import Array
from .compile import compiled
from .instructions import RELU, RELU_BACKWARD, Instructions
from .vector import keep, lanes, load, load_some, store, store_some, vmax


@compiled
def rectify(count, y, x):
    """y = max(x, 0); NaN stays."""
    whole = count - count % lanes(x)
    for i in range(0, whole, lanes(x)):
        store(y, i, vmax(0, load(x, i)))
    rest = count - whole
    store_some(y, whole, vmax(0, load_some(x, whole, rest, 0)), rest)


@compiled
def pass_positive(count, dx, dy, y):
    """dx = dy where y > 0, else 0."""
    whole = count - count % lanes(y)
    for i in range(0, whole, lanes(y)):
        store(dx, i, keep(load(dy, i), load(y, i)))
    rest = count - whole
    kept = keep(load_some(dy, whole, rest, 0), load_some(y, whole, rest, 0))
    store_some(dx, whole, kept, rest)


def relu(self: Instructions, y: Array, x: Array) -> None:
    """y = max(x, 0)."""
    self.do(RELU, len(x), y, x, x[0].size)


def relu_backward(self: Instructions, dx: Array, dy: Array, y: Array) -> None:
    """dx = dy where y > 0, else 0: the slope is 1 where x > 0, which is where y > 0."""
    self.do(RELU_BACKWARD, len(y), dx, dy, y, y[0].size)
