"""The matrix product for few rows (generation): c[i, j] = sum over l < k of a[i, l] bt[j, l].

    product_of_few(mode, m, n, k, a, bt, c, r, ldc)

a (m, k) and bt (n, k) have contiguous rows, end to end; those of c and r (m, n) begin `ldc` numbers
apart, as they may be some columns of a larger product. The modes are tile.py's. bt is read in
place: packing it for so few rows of a would cost more than the product. As many rows of bt as a
vector has lanes make a group, which stays in L1 while the rows of a pass by. A sum runs along a
vector, over l; the vectors of a group are added up together, each into its own lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from .code import I64, Code, places, word
from .compile import compiled
from .tile import ADD, KEEP, RELU, MultiplyAdd
from .vector import at, keep, lanes, load_some, merged, store_some, vmax


def dots_word(multiply_add: MultiplyAdd) -> Any:
    """The word for the dot products of one row with many."""

    @word(places("v", "aaiii"))
    def dots(
        code: Code, a: ir.Value, bt: ir.Value, ldb: ir.Value, n: ir.Value, k: ir.Value
    ) -> ir.Value:
        """Lane j: a (k,) times row j of bt, for j < n; rows past the last repeat it."""
        return _dots(code, [a], bt, ldb, n, k, multiply_add)

    return dots


@word(places("v", "aaii"))
def row_dots(code: Code, a: ir.Value, b: ir.Value, n: ir.Value, k: ir.Value) -> ir.Value:
    """Lane j: row j of a times row j of b, both (n, k), for j < n; rows past the last repeat it."""
    return _dots(code, _starts(code, a, k, n), b, k, n, k, Code.fma)


def _starts(code: Code, a: ir.Value, lda: ir.Value, n: ir.Value) -> list[ir.Value]:
    """Where a vector's worth of rows begin, the last of n again where there are fewer."""
    build = code.builder
    last = build.sub(n, I64(1))
    rows = [build.select(build.icmp_signed("<", I64(j), last), I64(j), last)
            for j in range(code.lanes)]  # fmt: skip
    return [code.at(a, build.mul(row, lda)) for row in rows]


def _dots(
    code: Code, a: list[ir.Value], bt: ir.Value, ldb: ir.Value, n: ir.Value, k: ir.Value,
    multiply_add: MultiplyAdd,
) -> ir.Value:  # fmt: skip
    """The dot products of rows of bt with one row, a[0], or each with its own."""
    build = code.builder
    rows = _starts(code, bt, ldb, n)

    def added(load: Callable[[ir.Value], ir.Value], sums: list[ir.Value]) -> list[ir.Value]:
        left = [load(start) for start in a]
        left *= len(rows) // len(a)
        terms = zip(left, rows, sums, strict=True)
        return [multiply_add(code, x, load(row), s) for x, row, s in terms]

    names = ("dot", "dot_step", "dot_end", "dot_rest", "dotted")
    head, step, end, rest, done = (build.append_basic_block(name) for name in names)
    whole, zero = build.and_(k, I64(-code.lanes)), code.constant(0)
    before = build.block
    build.branch(head)

    build.position_at_end(head)
    at_l, sums = build.phi(I64), [build.phi(code.vector) for _ in rows]
    build.cbranch(build.icmp_signed("<", at_l, whole), step, end)

    build.position_at_end(step)
    new = added(lambda row: code.load(row, at_l), sums)
    at_l.add_incoming(I64(0), before)
    at_l.add_incoming(build.add(at_l, I64(code.lanes)), step)
    for s, value in zip(sums, new, strict=True):
        s.add_incoming(zero, before)
        s.add_incoming(value, step)
    build.branch(head)

    build.position_at_end(end)
    build.cbranch(build.icmp_signed("<", whole, k), rest, done)
    build.position_at_end(rest)
    mask = code.below(build.sub(k, whole))
    with_rest = added(lambda row: code.load_masked(row, whole, mask, zero), sums)
    build.branch(done)

    build.position_at_end(done)
    totals = [build.phi(code.vector) for _ in rows]
    for total, s, value in zip(totals, sums, with_rest, strict=True):
        total.add_incoming(s, end)
        total.add_incoming(value, rest)
    return merged(code, totals)


_dots_of = dots_word(Code.fma)


@compiled
def finished(mode, s, r, i, n):
    """What becomes of sums s, one vector, of which n are there; r's numbers stand at r[i]."""
    if mode == ADD:
        return s + load_some(r, i, n, 0)
    if mode == RELU:
        return vmax(0, s)
    if mode == KEEP:
        return keep(s, load_some(r, i, n, 0))
    return s


@compiled
def product_of_few(mode, m, n, k, a, bt, c, r, ldc):
    """c (m, n) from a (m, k) and bt (n, k): see above."""
    for j in range(0, n, lanes(c)):
        for i in range(m):
            s = _dots_of(at(a, i * k), at(bt, j * k), k, n - j, k)
            store_some(c, i * ldc + j, finished(mode, s, r, i * ldc + j, n - j), n - j)
