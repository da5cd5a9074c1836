"""Launchers of kernels/decode.cu: a token's bookkeeping, kept on the device."""

from __future__ import annotations

import numpy as np

from ...types import Array
from .arrays import row_stride
from .context import Context, Grid, ceil_div, rows_of

BLOCK = 128
WORD = 4  # bytes of an int32, which may start at any of them


def forbid(self: Context, logits: Array, token: int) -> None:
    """logits[:, token] = -inf, so that it is not sampled.

    logits (S, V), rows maybe further apart. Raises ValueError where V has no such token.
    """
    shape = rows_of("forbid", "logits", logits)
    if not 0 <= token < shape[1]:
        raise ValueError(f"forbid: token: got {token}, wanted 0 to {shape[1] - 1}")
    self.check_rows("forbid", logits=(logits, self.real, shape))
    self.kernel("decode", "forbid")(_grid(shape[0]), (BLOCK,), (
        logits, np.int32(shape[0]), np.int64(row_stride(logits)), np.int32(token),
    ))  # fmt: skip


def emit(
    self: Context, out: Array, ended: Array, tokens: Array, lengths: Array, positions: Array,
    stop: int,
) -> None:  # fmt: skip
    """Write each sequence's token down, or -1 where it had ended; `stop` ends it (-1: nothing).

    out (ring, S): row positions[s] % ring; ended, tokens, lengths (filled positions of a KV cache),
    positions (of the new text) (S,); lengths and positions grow by 1. All int32.
    """
    ring, size = rows_of("emit", "out", out)
    arrays = {"ended": ended, "tokens": tokens, "lengths": lengths, "positions": positions}
    self.check("emit", WORD, out=(out, "int32", (max(1, ring), size)))
    self.check("emit", WORD, **{k: (a, "int32", (size,)) for k, a in arrays.items()})
    self.kernel("decode", "emit")(_grid(size), (BLOCK,), (
        out, ended, lengths, positions, tokens, np.int32(ring), np.int32(size), np.int32(stop),
    ))  # fmt: skip


def _grid(size: int) -> Grid:
    return (max(1, ceil_div(size, BLOCK)),)
