"""Instructions in parts, which several threads may do at once: outputs of a product, heads of
attention over a cache.

A part of a result is computed by the same code whoever does it, and each number in it by the same
operations in the same order: results do not depend on how many parts there are. Which part is what
follows from its number alone, so that whoever takes the same parts of every token finds their
weights and keys in its cache.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import overload

from . import bf16_linear, split_linear
from .amx import bf16_unit
from .attention_decode import decode
from .bf16 import words
from .compile import OPTIONS, compiled
from .instructions import ATTENTION_DECODE, FULL, MULTIPLY, SPLIT
from .linear import multiply
from .rows import copy_row
from .vector import at, ints, longs, place

OUTPUTS = 32  # outputs of a product are divided between multiples of this, whole vectors


@compiled
def instruction(program: Any, i: Any) -> Any:
    """Instruction i of a program, (count, WIDTH) int64, as the place of its numbers: a view of the
    row would take as long as a small instruction, as references to arrays are counted."""
    return longs(program.ctypes.data + i * program.strides[0])


@compiled
def can_be_shared(a: Any) -> Any:
    """Whether instruction a has parts."""
    return a[0] == MULTIPLY or a[0] == ATTENTION_DECODE


@compiled
def scratch_of(like: Any, a: Any) -> Any:
    """The place of scratch that instruction a brings along."""
    return place(like, a[5] if a[0] == MULTIPLY else a[6])


@compiled
def first_of(a: Any, rows: Any, part: Any, parts: Any) -> Any:
    """With which output of a product, or which of all sequences' heads, a part begins."""
    size, step = (a[7], OUTPUTS) if a[0] == MULTIPLY else (rows * a[7], 1)
    return min(size, (size + step - 1) // step * part // parts * step)


@compiled
def play_part(like: Any, a: Any, rows: Any, part: Any, parts: Any, y: Any, scratch: Any) -> None:
    """Do this part, of so many, of instruction a; its result goes where it belongs in an array of
    the result's shape at y. scratch: as much as the instruction wants."""
    first, last = first_of(a, rows, part, parts), first_of(a, rows, part + 1, parts)
    q, r, s = place(like, a[2]), place(like, a[3]), place(like, a[4])
    if a[0] == ATTENTION_DECODE:
        decode(y, q, r, s, ints(a[5]), scratch, first, last, a[7], a[8], a[9])
        return
    mode, outputs, inputs = a[6], a[7], a[8]
    to, residual, count = at(y, first), at(s, first), last - first
    if a[9] == FULL:
        w = at(r, first * inputs)
        multiply(mode, rows, count, inputs, to, q, w, residual, scratch, outputs)
    else:
        _unit_multiply(a, rows, first, count, to, q, r, residual, scratch)


@compiled
def bring_part(like: Any, a: Any, rows: Any, part: Any, parts: Any, y: Any) -> None:
    """Copy a part that was done at y to where instruction a wants it."""
    first, last = first_of(a, rows, part, parts), first_of(a, rows, part + 1, parts)
    to = place(like, a[1])
    if a[0] == ATTENTION_DECODE:
        width = a[9]
        copy_row(at(to, first * width), at(y, first * width), (last - first) * width)
        return
    for row in range(rows):
        copy_row(at(to, row * a[7] + first), at(y, row * a[7] + first), last - first)


def _unit_multiply(
    a: Any, rows: Any, first: Any, count: Any, y: Any, x: Any, w: Any, r: Any, panel: Any
) -> None:
    """Products on units of bfloat16: nothing where there are none, or for other floats."""


@overload(_unit_multiply, jit_options=OPTIONS, strict=False)
def _choose_unit_multiply(
    a: Any, rows: Any, first: Any, count: Any, y: Any, x: Any, w: Any, r: Any, panel: Any
) -> Any:
    if x.dtype == types.float32 and bf16_unit():
        return lambda a, rows, first, count, y, x, w, r, panel: _multiply_on_unit(
            a, rows, first, count, y, x, w, r, panel
        )
    return lambda a, rows, first, count, y, x, w, r, panel: None


@compiled
def _multiply_on_unit(
    a: Any, rows: Any, first: Any, count: Any, y: Any, x: Any, w: Any, r: Any, panel: Any
) -> None:
    """So many outputs from `first` on, on the instruction's unit, its weights packed or not."""
    mode, outputs, inputs, unit = a[6], a[7], a[8], a[9]
    if unit == SPLIT:
        some = at(w, first * inputs)
        split_linear.multiply(mode, rows, count, inputs, y, x, some, r, panel, outputs)
    elif a[10]:
        packed = at(w, first * words(inputs))
        bf16_linear.multiply_packed(
            unit, mode, rows, count, inputs, y, x, packed, r, panel, outputs
        )
    else:
        some = at(w, first * inputs)
        bf16_linear.multiply(unit, mode, rows, count, inputs, y, x, some, r, panel, outputs)
