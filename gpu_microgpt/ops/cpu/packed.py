"""Weights rounded to bfloat16 once for many plays of a program.

A token needs every weight once: reading them in float32 and rounding them each time would take
longer than the products. They are as they were at the last `pack`: whoever plays the program says
when they may have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...types import Array
from .bf16 import STAGE, packed_words
from .bf16_linear import pack_weights
from .compile import compiled
from .instructions import AMX, DOTS, MULTIPLY, Program
from .vector import at, place

WEIGHTS, OUTPUTS, INPUTS, UNIT, PACKED = 3, 7, 8, 9, 10  # in an instruction that multiplies


class PackedWeights:
    """Those of a program's products of bfloat16 with a fixed number of rows."""

    def __init__(self, program: Program, rows: int, zeros: Callable[..., Array]) -> None:
        """Take memory by zeros(shape, dtype), and let the program, which is recorded but has not
        been played, read it. Nothing is packed yet."""
        self._rows = rows
        table = []
        for row in program.rows:
            if row[0] == MULTIPLY and row[UNIT] in (DOTS, AMX):
                outputs, inputs = row[OUTPUTS], row[INPUTS]
                packed = zeros((packed_words(inputs, outputs),), program.like.dtype)
                program.arrays.append(packed)
                address = packed.ctypes.data
                table.append((row[WEIGHTS], address, outputs, inputs, row[UNIT]))
                row[WEIGHTS] = address
                row[PACKED] = True
        self._stage = zeros((STAGE,), program.like.dtype)
        self._table = np.array(table, np.int64).reshape(-1, 5)

    def pack(self) -> None:
        """Round the weights as they are now."""
        if len(self._table):
            _pack_all(self._stage, self._table, self._rows)


@compiled
def _pack_all(stage: Any, table: Any, rows: Any) -> None:
    for i in range(len(table)):
        weights, packed = place(stage, table[i, 0]), place(stage, table[i, 1])
        outputs, inputs, unit = table[i, 2], table[i, 3], table[i, 4]
        pack_weights(unit, rows, weights, outputs, inputs, at(packed, 0), at(stage, 0))
