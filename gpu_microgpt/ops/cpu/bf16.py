"""bfloat16 operands for matrix products: rounding, and packing two to a word of 32 bits.

AVX512_BF16 and AMX multiply pairs: c[i, j] += a[i, l] b[l, j] + a[i, l'] b[l', j]. So an operand is
packed as words of two numbers each, 16 apart in a step of 32 of the dimension summed over: of step
s, word j holds numbers 32 s + j and, in the high half, 32 s + 16 + j. Words lie in float32 arrays,
whose vectors move them bit by bit; no arithmetic ever sees them as floats.

    a (m, k)   row i: words(k) words, i.e. k made up to whole tiles of 32 by zeros
    b (k, n)   strips of SIDE columns one after another, each words(k) rows of SIDE words

Of one part, a number is x rounded, to nearest, ties to even; NaN stays NaN. Of three, x1, x2, x3,
their sum is x (split.py). Then a too comes in blocks, of SIDE rows, and of a block or strip a step
is TILES words of first parts, as many of second and of third parts, so that a product reads memory
end to end: of a step, 32 rows of 16 words of a, 16 of 32 of b.

| function | gives | from |
|---|---|---|
| `pack_rows` | a | a's rows |
| `pack_columns` | a | its columns: a^T (k, m) |
| `pack_strips` | b | b's rows |
| `pack_strips_transposed` | b | its columns: b^T (n, k) |

All matrices are read in contiguous rows `ld` apart, and nothing beside them. What is packed beside
the last row of a, or column of b, is not said: it reaches no sum but its own. turned: STAGE numbers
of scratch. Units take subnormal numbers as 0.
"""

from __future__ import annotations

from llvmlite import ir

from .code import I64, Code, places, word
from .compile import compiled
from .split import three_parts
from .vector import at, load, load_some, prefetch, transpose

SIDE = 32  # rows and columns of a block of sums; also the numbers in a tile's row
STEP = 16  # words in it, and in a vector
STAGE = 3 * SIDE * STEP
TILES = SIDE * STEP  # words of a step of a block of rows, or of a strip


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


def _paired(code: Code, u: ir.Value, v: ir.Value) -> ir.Value:
    """Word j: u_j and v_j, rounded."""
    narrow = code.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", NARROW, [v, u])
    words = code.builder.bitcast(narrow, ir.VectorType(ir.IntType(16), 2 * STEP))
    turned = code.shuffle(words, words, [k // 2 + k % 2 * STEP for k in range(2 * STEP)])
    return code.builder.bitcast(turned, code.vector)


@word(places("v", "vv"))
def paired(code: Code, u: ir.Value, v: ir.Value) -> ir.Value:
    """Word j: u_j and v_j, rounded."""
    return _paired(code, u, v)


@word(places("-", "aiivv"))
def store_words(
    code: Code, p: ir.Value, i: ir.Value, parts: ir.Value, u: ir.Value, v: ir.Value
) -> None:
    """Word j of p[i:i + 16]: u_j and v_j, rounded; of three parts, TILES words from each other."""
    build = code.builder
    with build.if_else(build.icmp_signed("==", parts, I64(1))) as (one, three):
        with one:
            code.store(_paired(code, u, v), p, i)
        with three:
            for part in three_parts(code, u, v):
                code.store(part, p, i)
                i = build.add(i, I64(TILES))


@compiled
def words(k):
    """Words of k numbers, made up to whole tiles."""
    return (k + SIDE - 1) // SIDE * STEP


@compiled
def words_along(a, ld, rows, columns, parts, p, ldp, ahead):
    """Row i of p: the words of a[i, :32], i < 16, of which so many rows and columns are there;
    zeros after them, no row without."""
    if columns >= SIDE:
        for i in range(rows):
            u, v = load(a, i * ld), load(a, i * ld + STEP)
            prefetch(a, i * ld + ahead)
            prefetch(a, i * ld + STEP + ahead)
            store_words(p, i * ldp, parts, u, v)
    else:
        for i in range(rows):
            u, v = load_some(a, i * ld, columns, 0), load_some(a, i * ld + STEP, columns - STEP, 0)
            store_words(p, i * ldp, parts, u, v)


@compiled
def words_across(a, ld, rows, columns, parts, p, ldp):
    """Row i of p: the words of (a[i, j], a[16 + i, j]), i, j < 16, of which so many rows and
    columns are there; zeros else."""
    if rows >= SIDE and columns >= STEP:
        for i in range(STEP):
            u, v = load(a, i * ld), load(a, (i + STEP) * ld)
            prefetch(a, (i + SIDE) * ld)
            prefetch(a, (i + STEP + SIDE) * ld)
            store_words(p, i * ldp, parts, u, v)
    else:
        for i in range(STEP):
            u = load_some(a, i * ld, columns if i < rows else 0, 0)
            v = load_some(a, (i + STEP) * ld, columns if i + STEP < rows else 0, 0)
            store_words(p, i * ldp, parts, u, v)


def packed_words(k: int, n: int) -> int:
    """Those of b (k, n), of one part."""
    return -(-k // SIDE) * SIDE // 2 * -(-n // SIDE) * SIDE


@compiled
def strides(parts, width):
    """Of a's words: from row to row of a block, from step to step."""
    return (width, STEP) if parts == 1 else (STEP, parts * TILES)


@compiled
def pack_rows(a, ld, m, k, parts, p):
    """a from its rows."""
    width, whole = words(k), k // SIDE
    to_row, to_step = strides(parts, width)
    for i in range(m):
        row, to = at(a, i * ld), at(p, i // SIDE * SIDE * parts * width + i % SIDE * to_row)
        words_along(row, SIDE, whole, SIDE, parts, to, to_step, SIDE * ld)
        if whole * STEP < width:
            row, to = at(row, whole * SIDE), at(to, whole * to_step)
            words_along(row, SIDE, 1, k - whole * SIDE, parts, to, to_step, 0)


@compiled
def pack_columns(at_, ld, m, k, parts, p, turned):
    """a from a^T (k, m); of as many rows as whole vectors have."""
    width = words(k)
    to_row, to_step = strides(parts, width)
    for i in range(0, m, STEP):
        for part in range(0, k, SIDE):
            words_across(at(at_, part * ld + i), ld, k - part, m - i, parts, turned, STEP)
            to = i // SIDE * SIDE * parts * width + i % SIDE * to_row + part // SIDE * to_step
            for j in range(parts):
                transpose(turned, j * TILES, STEP, p, to + j * TILES, to_row)


@compiled
def pack_strips(b, ld, k, n, parts, p):
    """b from its rows."""
    size = parts * words(k)
    for j in range(0, n, SIDE):
        for part in range(0, k, SIDE):
            for v in range(j, j + SIDE, STEP):
                to = at(p, j * size + part // SIDE * parts * TILES + v - j)
                words_across(at(b, part * ld + v), ld, k - part, n - v, parts, to, SIDE)


@compiled
def pack_strips_transposed(bt, ld, k, n, parts, p, turned):
    """b from b^T (n, k); zeros in the last strip's other columns."""
    size = parts * words(k)
    for j in range(0, n, SIDE):
        for v in range(j, j + SIDE, STEP):
            for part in range(0, k, SIDE):
                rows, source = max(0, min(n - v, STEP)), at(bt, v * ld + part)
                words_along(source, ld, rows, k - part, parts, turned, STEP, SIDE)
                zeros = at(turned, rows * STEP)
                words_along(source, ld, STEP - rows, 0, parts, zeros, STEP, 0)
                to = j * size + part // SIDE * parts * TILES + v - j
                for i in range(parts):
                    transpose(turned, i * TILES, STEP, p, to + i * TILES, SIDE)
