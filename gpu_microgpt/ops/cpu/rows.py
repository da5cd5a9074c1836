"""Loops over one row of n elements, which the operations by rows share.

y, x, ... are places (see vector.py). Whole vectors go first, without masks; what is left of the row
is masked, so that nothing behind it is read or written. Sums have two vectors of terms under way
(one FMA takes four cycles) and one fixed order: the same bits for the same row, whatever the rows
beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compile import compiled
from .vector import fma, lanes, load, load_some, splat, store, store_some, vexp, vmax, vmax_of, vsum


@compiled
def dot(x: Any, y: Any, n: Any) -> Any:
    """Sum of x y."""
    width = lanes(x)
    pairs, whole = n // (2 * width) * (2 * width), n // width * width
    even, odd = splat(x, 0), splat(x, 0)
    for j in range(0, pairs, 2 * width):
        even = fma(load(x, j), load(y, j), even)
        odd = fma(load(x, j + width), load(y, j + width), odd)
    if pairs < whole:
        even = fma(load(x, pairs), load(y, pairs), even)
    if whole < n:
        rest = n - whole
        odd = fma(load_some(x, whole, rest, 0), load_some(y, whole, rest, 0), odd)
    return vsum(even + odd)


@compiled
def add_row(y: Any, a: Any, b: Any, n: Any) -> None:
    """y = a + b; y may be either."""
    width = lanes(y)
    whole = n // width * width
    for j in range(0, whole, width):
        store(y, j, load(a, j) + load(b, j))
    if whole < n:
        rest = n - whole
        total = load_some(a, whole, rest, 0) + load_some(b, whole, rest, 0)
        store_some(y, whole, total, rest)


@compiled
def scale_row(y: Any, x: Any, factor: Any, n: Any) -> None:
    """y = x factor; y may be x."""
    width = lanes(y)
    whole = n // width * width
    for j in range(0, whole, width):
        store(y, j, load(x, j) * factor)
    if whole < n:
        store_some(y, whole, load_some(x, whole, n - whole, 0) * factor, n - whole)


@compiled
def copy_row(y: Any, x: Any, n: Any) -> None:
    """y = x."""
    width = lanes(y)
    whole = n // width * width
    for j in range(0, whole, width):
        store(y, j, load(x, j))
    if whole < n:
        store_some(y, whole, load_some(x, whole, n - whole, 0), n - whole)


@compiled
def fill_row(y: Any, value: Any, n: Any) -> None:
    """y = value."""
    width = lanes(y)
    whole = n // width * width
    for j in range(0, whole, width):
        store(y, j, splat(y, value))
    if whole < n:
        store_some(y, whole, splat(y, value), n - whole)


@compiled
def largest_of(x: Any, n: Any) -> Any:
    """The largest element; a NaN may be passed over."""
    width = lanes(x)
    whole = n // width * width
    largest = splat(x, -np.inf)
    for j in range(0, whole, width):
        largest = vmax(largest, load(x, j))
    if whole < n:
        largest = vmax(largest, load_some(x, whole, n - whole, -np.inf))
    return vmax_of(largest)


@compiled
def exp_row(y: Any, x: Any, n: Any) -> Any:
    """y = exp(x - largest); returns the sum of y. y may be x.

    One NaN or inf, or nothing but -inf, makes the sum NaN.
    """
    width = lanes(x)
    whole = n // width * width
    largest = largest_of(x, n)
    total = splat(x, 0)
    for j in range(0, whole, width):
        e = vexp(load(x, j) - largest)
        total += e
        store(y, j, e)
    if whole < n:
        e = vexp(load_some(x, whole, n - whole, -np.inf) - largest)  # 0 behind the row
        total += e
        store_some(y, whole, e, n - whole)
    return vsum(total)


@compiled
def exp_sum(x: Any, largest: Any, n: Any) -> Any:
    """The sum that `exp_row` returns, `largest` being known and nothing written."""
    width = lanes(x)
    whole = n // width * width
    total = splat(x, 0)
    for j in range(0, whole, width):
        total += vexp(load(x, j) - largest)
    if whole < n:
        total += vexp(load_some(x, whole, n - whole, -np.inf) - largest)
    return vsum(total)


@compiled
def scaled_exp_row(y: Any, x: Any, largest: Any, factor: Any, n: Any) -> None:
    """y = factor exp(x - largest); y may be x.

    The last vector is a whole one that ends with the row, where the row has so many: a masked store
    reaches into the next row as far as the processor knows, and reading that would wait for it.
    """
    width = lanes(x)
    if n < width:
        store_some(y, 0, vexp(load_some(x, 0, n, 0) - largest) * factor, n)
        return
    last = load(x, n - width)  # before it is written, if y is x
    for j in range(0, n - width, width):
        store(y, j, vexp(load(x, j) - largest) * factor)
    store(y, n - width, vexp(last - largest) * factor)


@compiled
def sum_of(x: Any, n: Any) -> Any:
    """Sum of x, in float64 and in order."""
    total = 0.0
    for i in range(n):
        total += x[i]
    return total
