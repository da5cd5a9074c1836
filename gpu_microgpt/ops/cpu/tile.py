"""The matrix product, in tiles of registers: c[i, j] = sum over l < k of a[i, l] b[l, j].

    product(mode, m, n, k, a, as0, as1, b, ldb, c, ldc, r, ldr)

a (m, k) lies at any strides: a[i, l] at i as0 + l as1, so that it may be a transposed matrix.
b (k, n) has contiguous rows `ldb` apart, and then n must be a whole number of vectors; or it was
packed (ldb = 0) by `pack`. c (m, n) and r (m, n) have
rows `ldc` and `ldr` apart. a, b, c, r are places (see vector.py); k >= 1. What is done with the
sum s of an element is its mode:

| mode | c = |
|---|---|
| STORE | s |
| ADD | r + s (r may be c, which so accumulates) |
| RELU | max(s, 0) |
| KEEP | s where r > 0, else 0 |

r is not read by STORE and RELU: give c. Nothing outside the matrices is read or written.

Order: b is cut into strips of STRIP vectors (k rows of 256 bytes with AVX-512, in L1 up to k = 128
and streamed from L2 beyond), and for each strip all of a passes by, some rows at a time. Of a tile,
all sums stay in registers while l runs: a step takes `vectors` loads of b and `rows` broadcasts of
a for rows * vectors FMAs. That many rows as there are registers for: shapes below. A tile at the
lower edge repeats its last row and stores it once; one at the right edge stores with masks.

For few rows of a (generation) dots.py has another form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir

from .code import I64, REGISTERS, Code, places, word
from .compile import compiled
from .vector import at, lanes, load, load_some, store, transpose, transpose_some

STORE, ADD, RELU, KEEP = range(4)
STRIP = 4 if REGISTERS == 32 else 2  # vectors of a strip of b

# (code, a, b, a sum) -> the sum with their product in it
MultiplyAdd = Callable[[Code, ir.Value, ir.Value, ir.Value], ir.Value]


def tile_word(rows: int, vectors: int, multiply_add: MultiplyAdd = Code.fma) -> Any:
    """The word for a tile of rows x vectors: m and n say how much of it there is."""

    @word(places("-", "iiiiaiiaiaiai"))
    def tile(
        code: Code, mode: ir.Value, m: ir.Value, n: ir.Value, k: ir.Value,
        a: ir.Value, as0: ir.Value, as1: ir.Value, b: ir.Value, ldb: ir.Value,
        c: ir.Value, ldc: ir.Value, r: ir.Value, ldr: ir.Value,
    ) -> None:  # fmt: skip
        build = code.builder
        last = build.sub(m, I64(1))
        starts = []
        for i in range(rows):
            there = build.icmp_signed("<", I64(i), last)
            row = build.select(there, I64(i), last)
            starts.append(code.at(a, build.mul(row, as0)))
        sums = _sums(code, starts, as1, b, ldb, k, vectors, multiply_add)
        wide = build.icmp_signed(">=", n, I64(vectors * code.lanes))
        ends = [[code.at(x, build.mul(ld, I64(i))) for i in range(rows)]
                for x, ld in ((c, ldc), (r, ldr))]  # fmt: skip
        with build.if_else(wide) as (whole, edge):
            with whole:
                _finish(code, mode, m, None, sums, *ends)
            with edge:
                masks = [code.below(build.sub(n, I64(j * code.lanes))) for j in range(vectors)]
                _finish(code, mode, m, masks, sums, *ends)

    return tile


Sums = list[list[ir.Value]]


def _sums(
    code: Code, starts: list[ir.Value], as1: ir.Value, b: ir.Value, ldb: ir.Value, k: ir.Value,
    vectors: int, multiply_add: MultiplyAdd,
) -> Sums:  # fmt: skip
    """The loop over l: sums[i][j] += a[i, l] b[l, j]."""
    build = code.builder
    before, loop, done = build.block, *(build.append_basic_block(x) for x in ("sum", "summed"))
    build.branch(loop)
    build.position_at_end(loop)
    step, to_a, to_b = (build.phi(I64) for _ in range(3))
    sums = [[build.phi(code.vector) for _ in range(vectors)] for _ in starts]
    panel = [code.load(code.at(b, to_b), I64(code.lanes * j)) for j in range(vectors)]
    new = []
    for start, row in zip(starts, sums, strict=True):
        x = code.splat(build.load(code.at(start, to_a), typ=code.scalar))
        new.append([multiply_add(code, x, p, s) for p, s in zip(panel, row, strict=True)])
    for phi, by in ((step, I64(1)), (to_a, as1), (to_b, ldb)):
        phi.add_incoming(I64(0), before)
        phi.add_incoming(build.add(phi, by), loop)
    for row, new_row in zip(sums, new, strict=True):
        for phi, value in zip(row, new_row, strict=True):
            phi.add_incoming(code.constant(0), before)
            phi.add_incoming(value, loop)
    build.cbranch(build.icmp_signed("<", build.add(step, I64(1)), k), loop, done)
    build.position_at_end(done)
    return new


def _finish(
    code: Code, mode: ir.Value, m: ir.Value, masks: list[ir.Value] | None, sums: Sums,
    c: list[ir.Value], r: list[ir.Value],
) -> None:  # fmt: skip
    """Store the m rows there are, whole or the masked columns.

    Row after row until there is none, not with masks: who reads soon what a masked store wrote
    waits until it has reached the cache.
    """
    build, zero = code.builder, code.constant(0)
    values: dict[int, Any] = {
        STORE: lambda s, old: s,
        ADD: lambda s, old: code.binary("fadd", old(), s),
        RELU: lambda s, old: code.pick(">", zero, s, zero, s),
        KEEP: lambda s, old: code.pick(">", old(), zero, s, zero),
    }

    def store(value: Any, i: int, j: int) -> None:
        s, index = sums[i][j], I64(j * code.lanes)
        if masks is None:
            code.store(value(s, lambda: code.load(r[i], index)), c[i], index)
        else:
            old = partial(code.load_masked, r[i], index, masks[j], zero)
            code.store_masked(value(s, old), c[i], index, masks[j])

    done = build.append_basic_block("stored")
    blocks = {number: build.append_basic_block("store") for number in values}
    choice = build.switch(mode, blocks[STORE])
    for number, block in blocks.items():
        choice.add_case(I64(number), block)
        build.position_at_end(block)
        for i, row in enumerate(sums):
            if i > 0:
                following = build.append_basic_block("row")
                build.cbranch(build.icmp_signed("<", I64(i), m), following, done)
                build.position_at_end(following)
            for j in range(len(row)):
                store(values[number], i, j)
        build.branch(done)
    build.position_at_end(done)


TWO = 12 if REGISTERS == 32 else 6  # rows of a tile two vectors wide
tile_1, tile_2, tile_3, tile_4 = (
    tile_word(8, 1), tile_word(TWO, 2), tile_word(8, 3), tile_word(6, 4)
)  # fmt: skip


@compiled
def pack_strip(b, ldb, k, n, p):
    """One strip of b (k, n <= STRIP vectors) to p: k rows of whole vectors; their length."""
    width = (n + lanes(p) - 1) // lanes(p) * lanes(p)
    for row in range(k):
        for j in range(0, n, lanes(p)):
            i, whole = row * ldb + j, j + lanes(p) <= n
            store(p, row * width + j, load(b, i) if whole else load_some(b, i, n - j, 0))
    return width


@compiled
def pack_strip_transposed(bt, ldb, k, n, p):
    """The same where b^T (n, k) is given."""
    width = (n + lanes(p) - 1) // lanes(p) * lanes(p)
    for j in range(0, n, lanes(p)):
        for row in range(0, k, lanes(p)):
            i, to = j * ldb + row, row * width + j
            if j + lanes(p) <= n and row + lanes(p) <= k:
                transpose(bt, i, ldb, p, to, width)
            else:
                transpose_some(bt, i, ldb, n - j, k - row, p, to, width)
    return width


@compiled
def pack(b, bs0, bs1, k, n, p):
    """b (k, n) at strides bs0, bs1, one of which is 1, to p: strip by strip, k n' numbers, n' being
    n made up to whole vectors."""
    width = STRIP * lanes(p)
    for j in range(0, n, width):
        columns = min(width, n - j)
        if bs1 == 1:
            pack_strip(at(b, j), bs0, k, columns, at(p, j * k))
        else:
            pack_strip_transposed(at(b, j * bs1), bs1, k, columns, at(p, j * k))


@compiled
def _strip(mode, m, n, k, a, as0, as1, b, ldb, c, ldc, r, ldr):
    """The columns of one strip, by the tile for as many vectors."""
    vectors = (n + lanes(c) - 1) // lanes(c)
    if vectors == 1:
        for i in range(0, m, 8):
            tile_1(mode, m - i, n, k, at(a, i * as0), as0, as1, b, ldb, at(c, i * ldc), ldc,
                   at(r, i * ldr), ldr)  # fmt: skip
    elif vectors == 2:
        for i in range(0, m, TWO):
            tile_2(mode, m - i, n, k, at(a, i * as0), as0, as1, b, ldb, at(c, i * ldc), ldc,
                   at(r, i * ldr), ldr)  # fmt: skip
    elif vectors == 3:
        for i in range(0, m, 8):
            tile_3(mode, m - i, n, k, at(a, i * as0), as0, as1, b, ldb, at(c, i * ldc), ldc,
                   at(r, i * ldr), ldr)  # fmt: skip
    else:
        for i in range(0, m, 6):
            tile_4(mode, m - i, n, k, at(a, i * as0), as0, as1, b, ldb, at(c, i * ldc), ldc,
                   at(r, i * ldr), ldr)  # fmt: skip


@compiled
def product(mode, m, n, k, a, as0, as1, b, ldb, c, ldc, r, ldr):
    """c (m, n) from a (m, k) and b (k, n): see above."""
    width = STRIP * lanes(c)
    for j in range(0, n, width):
        columns = min(width, n - j)
        if ldb > 0:
            strip, step = at(b, j), ldb
        else:
            strip, step = at(b, j * k), (columns + lanes(c) - 1) // lanes(c) * lanes(c)
        _strip(mode, m, columns, k, a, as0, as1, strip, step, at(c, j), ldc, at(r, j), ldr)


@compiled
def product_packing(mode, m, n, k, a, as0, as1, b, bs0, bs1, c, ldc, r, ldr, panel):
    """The same for b (k, n) at strides bs0 and bs1, one of which is 1; any n.

    panel: scratch for one strip, k rows of STRIP vectors.
    """
    width = STRIP * lanes(c)
    for j in range(0, n, width):
        columns = min(width, n - j)
        if bs1 == 1:
            step = pack_strip(at(b, j), bs0, k, columns, panel)
        else:
            step = pack_strip_transposed(at(b, j * bs1), bs1, k, columns, panel)
        _strip(mode, m, columns, k, a, as0, as1, panel, step, at(c, j), ldc, at(r, j), ldr)
