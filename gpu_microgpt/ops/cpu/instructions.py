"""Operations as instructions: done at once, or recorded to be played later in one call.

A step of a small model is dozens of calls of a microsecond each, and Python's share of a call would
be most of it. So an operation becomes an instruction, a row of numbers: which operation, where its
arrays lie, sizes and factors. `Instructions.do` plays it at once or, while a `Program` is recorded,
adds it to that, and `play.py` runs a whole program in one compiled call. So model.py is written
once and recorded once, like a graph on a GPU.

What changes from batch to batch, the numbers of rows and of sequences, does not stand in
instructions but is given to `play`. Arrays must stay where they are; a program keeps them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from operator import index
from typing import Any

import numpy as np

from ...arena import Shape
from ...types import Array
from ..reference.context import Context

WIDTH = 16  # numbers of an instruction: which operation, and up to 15 of its own

# First those by rows, then products and attention, then the rest: play.py tells them apart by this.
# What each takes, in order, by letters: an array of the floats' dtype f, of int32 i, of float64 d;
# an integer n, a float64 x
TAKES = {
    "embedding": "fffiin", "embedding backward": "fffiinnnn", "rmsnorm": "fffn",
    "embedding rmsnorm": "ffffiin", "add rmsnorm": "fffffn", "rmsnorm backward": "ffffnn",
    "linear": "fffffnnnnn", "linear backward": "fffffffnnnnn", "relu": "ffn",
    "relu backward": "fffn", "attention": "fffinnfn", "attention backward": "ffffinnfnf",
    "cache kv": "fffiinnn", "attention decode": "ffffifnnn", "softmax": "ffn",
    "softmax backward": "fffn", "cross-entropy": "ffin", "cross-entropy backward": "fffidn",
    "add losses": "fd", "global norm": "fdn", "clip scale": "ddx", "adamw": "ffffdxxxxn",
    "sample": "fidixnxn",
}  # fmt: skip
NAMES = tuple(TAKES)
(
    EMBEDDING, EMBEDDING_BACKWARD, RMSNORM, EMBEDDING_RMSNORM, ADD_RMSNORM, RMSNORM_BACKWARD,
    MULTIPLY, GRADIENTS, RELU, RELU_BACKWARD, ATTENTION, ATTENTION_BACKWARD, CACHE_KV,
    ATTENTION_DECODE, SOFTMAX, SOFTMAX_BACKWARD, CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, ADD_LOSSES,
    GLOBAL_NORM, CLIP_SCALE, ADAMW, SAMPLE,
) = range(len(NAMES))  # fmt: skip
# What multiplies: as tile.py does, bfloat16 on one of two units, or float32 as split.py says
FULL, DOTS, AMX, SPLIT = range(4)


class Program:
    """Instructions in order, (count, WIDTH) int64, and what they are about."""

    def __init__(self, like: Array) -> None:
        """Nothing is recorded yet; like: any array of the floats' dtype."""
        self.like = like
        self.rows: list[list[int]] = []
        self.arrays: list[Any] = []  # kept, so that their memory is

    @cached_property
    def code(self) -> np.ndarray[Any, Any]:
        """The instructions as compiled functions take them, once all are recorded."""
        code = np.zeros((len(self.rows), WIDTH), np.int64)
        for row, numbers in zip(code, self.rows, strict=True):
            row[: len(numbers)] = numbers
        return code


class Instructions(Context):
    """What the compiled operations are methods of."""

    unit: int  # FULL, DOTS, AMX or SPLIT
    linear_scratch: Callable[[int, int, int], tuple[Shape, ...]]
    attention_scratch: Callable[[int, int, int], tuple[Shape, ...]]
    _play: Callable[..., None]  # play.play, which knows what every instruction does

    def __init__(self, xp: Any, workspace: Array, dtype: Any) -> None:
        """As a Context, for floats of this dtype."""
        super().__init__(xp, workspace)
        self._like = np.empty(0, dtype)
        self._dtypes = {"f": self._like.dtype, "i": np.dtype("i4"), "d": np.dtype("f8")}
        self._program: Program | None = None
        self._row = np.zeros((1, WIDTH), np.int64)

    def attention_unit(self, channels: int, n_head: int) -> int:
        """What multiplies in attention with such heads."""
        return FULL

    @contextmanager
    def recording(self) -> Iterator[Program]:
        """Operations inside are added to the program and not done."""
        self._program = program = Program(self._like)
        try:
            yield program
        finally:
            self._program = None

    def do(self, operation: int, rows: int, *numbers: Array | float, sequences: int = 0) -> None:
        """Do an operation over so many rows and sequences, or record it for any number of them.

        numbers: what it takes. Raises ValueError for an array of another dtype or with gaps, and
        for too few or too many of them; TypeError for what is no such number.
        """
        name = NAMES[operation]
        taken = zip(TAKES[name], numbers, strict=True)
        row = [operation, *(self._number(name, letter, x) for letter, x in taken)]
        if self._program is not None:
            self._program.rows.append(row)
            self._program.arrays += numbers
            return
        self._row[0, : len(row)] = row
        self._play(self._like, self._row, rows, sequences)

    def _number(self, name: str, letter: str, x: Any) -> int:
        """An array's address, an integer, or the bits of a float64."""
        if letter == "n":
            return index(x)
        if letter == "x":
            return int(struct.unpack("q", struct.pack("d", x))[0])
        wanted = self._dtypes[letter]
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}: got {type(x).__name__}, wanted an array of {wanted}")
        if not x.flags.c_contiguous or x.dtype != wanted:
            raise ValueError(
                f"{name}: got {x.dtype} {x.shape}, strides {x.strides}; wanted {wanted}, contiguous"
            )
        return int(x.__array_interface__["data"][0])
