"""bfloat16 operands for matrix products: rounding, and packing two to a word of 32 bits.

AVX512_BF16 and AMX multiply pairs: c[i, j] += a[i, 2l] b[2l, j] + a[i, 2l + 1] b[2l + 1, j]. So an
operand is packed as words, each two neighbours of the dimension summed over, the first in the low
half. Words lie in float32 arrays, whose vectors move them bit by bit; no arithmetic ever sees them
as floats. Rounding is to nearest, ties to even; NaN stays NaN; subnormal numbers become 0, as the
products' units take them.

    a (m, k)   row i: words(k) words, i.e. k made up to whole tiles of 32 by zeros
    b (k, n)   strips of SIDE columns one after another, each words(k) rows of SIDE words

| function | gives | from |
|---|---|---|
| `pack_rows` | a | a's rows |
| `pack_columns` | a | its columns: a^T (k, m) |
| `pack_strips` | b | b's rows |
| `pack_strips_transposed` | b | its columns: b^T (n, k) |

All matrices are read in contiguous rows `ld` apart, and nothing beside them. What is packed beside
the last row of a, or column of b, is not said: it reaches no sum but its own.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .code import I64, Code, places, word
from .compile import compiled
from .vector import _row, _transposed, at, lanes, store

SIDE = 32  # rows and columns of a block of sums; also the numbers in a tile's row
STEP = 16  # words in it, and in a vector


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
NARROW = ir.VectorType(_BFloat(), 2 * STEP)  # a vector's words as the numbers they hold


def dot(code: Code, u: ir.Value, v: ir.Value, s: ir.Value) -> ir.Value:
    """s + the sum of the products of a word's two numbers, by lanes, for words u and v."""
    u, v = (code.builder.bitcast(x, NARROW) for x in (u, v))
    return code.call("llvm.x86.avx512bf16.dpbf16ps.512", code.vector, [s, u, v])


def _rounded(code: Code, low: ir.Value, high: ir.Value) -> ir.Value:
    """Words of low's numbers, neighbour with neighbour, then of high's."""
    narrow = code.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", NARROW, [high, low])
    return code.builder.bitcast(narrow, code.vector)


def _along(code: Code, a: ir.Value, i: ir.Value, n: ir.Value | None) -> ir.Value:
    """The words of a[i:i + 32], of which there are n (None: all)."""
    if n is None:
        return _rounded(code, code.load(a, i), code.load(a, code.builder.add(i, I64(STEP))))
    zero, after = code.constant(0), code.builder.add(i, I64(STEP))
    low = code.load_masked(a, i, code.below(n), zero)
    rest = code.below(code.builder.sub(n, I64(STEP)))
    return _rounded(code, low, code.load_masked(a, after, rest, zero))


def _across(code: Code, a: ir.Value, i: ir.Value, ld: ir.Value, some: Any) -> ir.Value:
    """The words of (a[i + j], a[i + ld + j]), j < 16; `some`: rows and columns there are."""
    low, high = i, code.builder.add(i, ld)
    if some is None:
        u, v = code.load(a, low), code.load(a, high)
    else:
        rows, columns = some
        masks = [
            code.below(code.builder.select(
                code.builder.icmp_signed("<", I64(k), rows), columns, I64(0)))
            for k in range(2)
        ]  # fmt: skip
        u = code.load_masked(a, low, masks[0], code.constant(0))
        v = code.load_masked(a, high, masks[1], code.constant(0))
    return _paired(code, u, v)


def _paired(code: Code, u: ir.Value, v: ir.Value) -> ir.Value:
    """Word j: u_j and v_j."""
    words = code.builder.bitcast(_rounded(code, u, v), ir.VectorType(ir.IntType(16), 2 * STEP))
    turned = code.shuffle(words, words, [k // 2 + k % 2 * STEP for k in range(2 * STEP)])
    return code.builder.bitcast(turned, code.vector)


@word(places("v", "vv"))
def joined(code: Code, u: ir.Value, v: ir.Value) -> ir.Value:
    """The words of u, neighbour with neighbour, then of v."""
    return _rounded(code, u, v)


@word(places("v", "vv"))
def paired(code: Code, u: ir.Value, v: ir.Value) -> ir.Value:
    """Word j: u_j and v_j."""
    return _paired(code, u, v)


@word(places("v", "ai"))
def load_along(code: Code, a: ir.Value, i: ir.Value) -> ir.Value:
    """The words of a[i:i + 32]."""
    return _along(code, a, i, None)


@word(places("v", "aii"))
def load_some_along(code: Code, a: ir.Value, i: ir.Value, n: ir.Value) -> ir.Value:
    """The same where there are n numbers; zeros then."""
    return _along(code, a, i, n)


@word(places("v", "aii"))
def load_across(code: Code, a: ir.Value, i: ir.Value, ld: ir.Value) -> ir.Value:
    """Word j: a[i + j] and a[i + ld + j], j < 16."""
    return _across(code, a, i, ld, None)


@word(places("v", "aiiii"))
def load_some_across(
    code: Code, a: ir.Value, i: ir.Value, ld: ir.Value, rows: ir.Value, columns: ir.Value
) -> ir.Value:
    """The same where there are so many rows and columns; zeros else."""
    return _across(code, a, i, ld, (rows, columns))


def _store_turned(code: Code, rows: list[ir.Value], c: ir.Value, ldc: ir.Value) -> None:
    """c[s ldc + r] = lane s of row r."""
    for k, row in enumerate(_transposed(code, rows)):
        code.store(row, c, _row(code, I64(0), ldc, k))


@word(places("-", "aiiiai"))
def turn_along(
    code: Code, a: ir.Value, lda: ir.Value, rows: ir.Value, columns: ir.Value, c: ir.Value,
    ldc: ir.Value,
) -> None:  # fmt: skip
    """Row l of c: word l of 16 rows of a (of a's words along its rows); zeros where a has none."""
    build = code.builder
    whole = build.and_(build.icmp_signed(">=", rows, I64(STEP)),
                       build.icmp_signed(">=", columns, I64(SIDE)))  # fmt: skip
    with build.if_else(whole) as (everything, edge):
        with everything:
            loaded = [_along(code, a, _row(code, I64(0), lda, k), None) for k in range(STEP)]
            _store_turned(code, loaded, c, ldc)
        with edge:
            loaded = []
            for k in range(STEP):
                there = build.icmp_signed("<", I64(k), rows)
                count = build.select(there, columns, I64(0))
                loaded.append(_along(code, a, _row(code, I64(0), lda, k), count))
            _store_turned(code, loaded, c, ldc)


@word(places("-", "aiiiai"))
def turn_across(
    code: Code, a: ir.Value, lda: ir.Value, rows: ir.Value, columns: ir.Value, c: ir.Value,
    ldc: ir.Value,
) -> None:  # fmt: skip
    """Row j of c: the words across 32 rows of a's column j; zeros where a has none."""
    build = code.builder
    whole = build.and_(build.icmp_signed(">=", rows, I64(SIDE)),
                       build.icmp_signed(">=", columns, I64(STEP)))  # fmt: skip
    with build.if_else(whole) as (everything, edge):
        with everything:
            loaded = [_across(code, a, _row(code, I64(0), lda, 2 * k), lda, None)
                      for k in range(STEP)]  # fmt: skip
            _store_turned(code, loaded, c, ldc)
        with edge:
            loaded = []
            for k in range(STEP):
                some = build.sub(rows, I64(2 * k)), columns
                loaded.append(_across(code, a, _row(code, I64(0), lda, 2 * k), lda, some))
            _store_turned(code, loaded, c, ldc)


@compiled
def words(k):
    """Words of k numbers, made up to whole tiles."""
    return (k + SIDE - 1) // SIDE * STEP


@compiled
def pack_rows(a, ld, m, k, p):
    """p (m, words(k)) from a's rows."""
    width = words(k)
    for i in range(m):
        for part in range(0, k, SIDE):
            start = i * ld + part
            if part + SIDE <= k:
                store(p, i * width + part // 2, load_along(a, start))
            else:
                store(p, i * width + part // 2, load_some_along(a, start, k - part))


@compiled
def pack_columns(at_, ld, m, k, p):
    """p (m, words(k)), m made up to whole vectors, from a^T (k, m)."""
    width = words(k)
    for part in range(0, k, SIDE):
        for i in range(0, m, STEP):
            turn_across(
                at(at_, part * ld + i), ld, k - part, m - i, at(p, i * width + part // 2), width
            )


@compiled
def pack_strips(b, ld, k, n, p):
    """p, strips of b (k, n)."""
    rows = words(k)
    for j in range(0, n, SIDE):
        for part in range(rows):
            for v in range(j, j + SIDE, lanes(p)):
                start, to = 2 * part * ld + v, j * rows + part * SIDE + v - j
                if 2 * part + 2 <= k and v + lanes(p) <= n:
                    store(p, to, load_across(b, start, ld))
                else:
                    store(p, to, load_some_across(b, start, ld, k - 2 * part, n - v))


@compiled
def pack_strips_transposed(bt, ld, k, n, p):
    """p, strips of b, from b^T (n, k)."""
    rows = words(k)
    for j in range(0, n, SIDE):
        for v in range(j, j + SIDE, lanes(p)):
            for part in range(0, k, SIDE):
                to = j * rows + part // 2 * SIDE + v - j
                turn_along(at(bt, v * ld + part), ld, n - v, k - part, at(p, to), SIDE)
