"""AMX: eight registers of 16 x 16 words each, and the product of two of them added to a third.

Four hold the sums of a block of 32 x 32, two the tiles of a that come next, two those of b; a step
of 32 numbers takes four loads and four products. Which registers is fixed in the instructions; how
large they are is set by `tiles_open` before the first use on a thread, `tiles_close` gives them
back. a, b, c: places of words and sums as bf16.py packs them.

Linux lets a process use AMX only after it has asked: `permitted`.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

from llvmlite import ir

from .bf16 import SIDE, STEP, TILES, strides
from .code import FEATURES, I64, Code, places, word
from .compile import compiled
from .dots import finished
from .tile import ADD, KEEP, RELU, STORE
from .vector import at, keep, lanes, load, load_some, prefetch, store, store_some, vmax

HAS_AMX = "+amx-bf16" in FEATURES and "+amx-tile" in FEATURES
I8 = ir.IntType(8)
ARCH_PRCTL, REQUEST, TILE_DATA = 158, 0x1023, 18  # Linux on x86-64: ARCH_REQ_XCOMP_PERM
AMX_UNIT = "AMX"
MORE = 4  # beside a mode
A, B = (4, 5), (6, 7)  # registers; the sums are 0 to 3


def bf16_unit() -> str:
    """What multiplies bfloat16 here: AMX_UNIT, or AVX512_BF16 and why it is not AMX; "" if
    nothing."""
    if "+avx512bf16" not in FEATURES:
        return ""
    if not HAS_AMX:
        return "AVX512_BF16"
    return AMX_UNIT if permitted() else "AVX512_BF16; the system lets no process use AMX"


@cache
def permitted() -> bool:
    """Ask Linux, once, to let this process use AMX."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return int(syscall(ARCH_PRCTL, ctypes.c_long(REQUEST), ctypes.c_long(TILE_DATA))) == 0


def _tile(code: Code, name: str, *values: ir.Value | int) -> None:
    """One instruction, written only where it exists; the numbers are registers."""
    if HAS_AMX:
        arguments = [I8(v) if isinstance(v, int) else v for v in values]
        code.call(f"llvm.x86.{name}", ir.VoidType(), arguments)


def _bytes(code: Code, words: ir.Value) -> ir.Value:
    return code.builder.mul(words, I64(4))


@word(places("-", "a"))
def tiles_open(code: Code, scratch: ir.Value) -> None:
    """All eight registers 16 rows of 64 bytes. scratch: 16 words, of which nothing is kept."""
    rows, row_bytes, palette = [16] * 8, [64, 0] * 8, [1]
    text = [*palette, *[0] * 15, *row_bytes, *[0] * 16, *rows, *[0] * 8]
    kind = ir.VectorType(I8, 64)
    target = code.builder.bitcast(scratch, kind.as_pointer())
    code.builder.store(ir.Constant(kind, text), target, align=4)
    _tile(code, "ldtilecfg", code.builder.bitcast(scratch, I8.as_pointer()))


@word(places("-", "a"))
def tiles_close(code: Code, scratch: ir.Value) -> None:
    """Give the registers back."""
    _tile(code, "tilerelease")


def _corners(code: Code, c: ir.Value, ldc: ir.Value) -> list[tuple[int, ir.Value]]:
    """Registers of the sums, and where they belong in c."""
    below = code.builder.mul(ldc, I64(STEP))
    right = I64(STEP)
    starts = [I64(0), right, below, code.builder.add(below, right)]
    return [(k, code.at(c, start)) for k, start in enumerate(starts)]


@word(places("-", "a"))
def sums_zero(code: Code, c: ir.Value) -> None:
    """All four zero."""
    for k in range(4):
        _tile(code, "tilezero", k)


@word(places("-", "ai"))
def sums_load(code: Code, c: ir.Value, ldc: ir.Value) -> None:
    """A block of c, 32 x 32."""
    for k, corner in _corners(code, c, ldc):
        _tile(code, "tileloadd64", k, corner, _bytes(code, ldc))


@word(places("-", "ai"))
def sums_store(code: Code, c: ir.Value, ldc: ir.Value) -> None:
    """To a block of c, 32 x 32."""
    for k, corner in _corners(code, c, ldc):
        _tile(code, "tilestored64", k, corner, _bytes(code, ldc))


@word(places("-", "aia"))
def sums_add(code: Code, a: ir.Value, lda: ir.Value, b: ir.Value) -> None:
    """Of 32 rows of a, 16 words each, and of 16 rows of a strip of b."""
    _load_columns(code, b)
    _load_rows(code, a, lda)
    _multiply(code)


@word(places("-", "aa"))
def sums_add_small(code: Code, a: ir.Value, b: ir.Value) -> None:
    """Of a step of three parts: all products but that of the first two.

    In an order in which every product but the first loads one operand: 1 3, 1 2, 2 2, 2 1, 3 1.
    """
    for i, j in ((0, 2), (None, 1), (1, None), (None, 0), (2, None)):
        if j is not None:
            _load_columns(code, code.at(b, I64(j * TILES)))
        if i is not None:
            _load_rows(code, code.at(a, I64(i * TILES)), I64(STEP))
        _multiply(code)


def _load_columns(code: Code, b: ir.Value) -> None:
    for k, register in enumerate(B):
        _tile(code, "tileloadd64", register, code.at(b, I64(k * STEP)), I64(4 * SIDE))


def _load_rows(code: Code, a: ir.Value, lda: ir.Value) -> None:
    for k, register in enumerate(A):
        start = code.builder.mul(lda, I64(k * STEP))
        _tile(code, "tileloadd64", register, code.at(a, start), _bytes(code, lda))


def _multiply(code: Code) -> None:
    for i, row in enumerate(A):
        for j, column in enumerate(B):
            _tile(code, "tdpbf16ps", 2 * i + j, row, column)


@compiled
def amx_block(parts, mode, m, n, k, a, lda, b, c, ldc, r, ldr, stage):
    """A block of c by `mode`, of which m x n are there, from k words, whole tiles of them.

    By mode + MORE, the sum is what c has and the products.
    """
    whole, more = m >= SIDE and n >= SIDE, mode >= MORE
    mode %= MORE
    of_r = mode in (ADD, KEEP)
    adds = mode == ADD and parts == 1  # to r; small products would be lost in a large one
    if whole and (adds or more):
        sums_load(r if adds else c, ldr if adds else ldc)
    elif more:
        for i in range(min(m, SIDE)):
            for j in range(0, min(n, SIDE), lanes(c)):
                store(stage, i * SIDE + j, load_some(c, i * ldc + j, n - j, 0))
        sums_load(stage, SIDE)
    else:
        sums_zero(c)
    for i in range(min(m, SIDE)):
        for j in range(0, SIDE, lanes(c)):
            prefetch(c, i * ldc + j)
            if of_r:
                prefetch(r, i * ldr + j)
    to_row, to_step = strides(parts, lda)
    if parts > 1:
        for step in range(k // STEP):
            sums_add_small(at(a, step * to_step), at(b, step * parts * TILES))
    for step in range(k // STEP):
        sums_add(at(a, step * to_step), to_row, at(b, step * parts * TILES))
    if whole and (mode == STORE or adds):
        sums_store(c, ldc)
        return
    sums_store(stage, SIDE)
    for i in range(min(m, SIDE)):
        for j in range(0, min(n, SIDE), lanes(c)):
            s, to = load(stage, i * SIDE + j), i * ldc + j
            if whole:
                store(c, to, finished_whole(mode, s, r, i * ldr + j))
            else:
                store_some(c, to, finished(mode, s, r, i * ldr + j, n - j), n - j)


@compiled
def finished_whole(mode, s, r, i):
    """`finished`, of a vector that is all there."""
    if mode == ADD:
        return s + load(r, i)
    if mode == RELU:
        return vmax(0, s)
    if mode == KEEP:
        return keep(s, load(r, i))
    return s
