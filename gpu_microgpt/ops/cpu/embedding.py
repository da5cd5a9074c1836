"""Token and position embedding on the CPU: x = wte[tokens] + wpe[positions].

    dwte[i] = sum of dy[n] with tokens[n] = i,  dwpe[i] = sum of dy[n] with positions[n] = i

x, dy (N, C); wte, dwte (V, C); wpe, dwpe (T, C); tokens, positions (N,) int32, in any order. Both
ways row after row. The backward adds row n to its two rows of the tables as n goes up, which is a
fixed order without sorting: a thread has gradients of its own. dy is read once; the tables' rows
stay in L1 or L2.
"""

from __future__ import annotations

from typing import Any

from ...types import Array
from ..reference.context import Context
from .compile import compiled
from .rows import add_row, fill_row
from .vector import at


@compiled
def embedding_rows(
    x: Any, tokens: Any, positions: Any, wte: Any, wpe: Any, rows: Any, channels: Any
) -> None:
    """The rows of `embedding`; tokens and positions are arrays, the others places."""
    for n in range(rows):
        token, position = at(wte, tokens[n] * channels), at(wpe, positions[n] * channels)
        add_row(at(x, n * channels), token, position, channels)


@compiled
def embedding_backward_rows(
    dwte: Any, dwpe: Any, dy: Any, tokens: Any, positions: Any, rows: Any, channels: Any
) -> None:
    """Add the rows of dy to those of the tables; tokens, positions arrays, the others places."""
    for n in range(rows):
        row = at(dy, n * channels)
        token, position = at(dwte, tokens[n] * channels), at(dwpe, positions[n] * channels)
        add_row(token, token, row, channels)
        add_row(position, position, row, channels)


@compiled
def _embedding(x: Any, tokens: Any, positions: Any, wte: Any, wpe: Any) -> None:
    embedding_rows(at(x, 0), tokens, positions, at(wte, 0), at(wpe, 0), *x.shape)


@compiled
def _embedding_backward(
    dwte: Any, dwpe: Any, dy: Any, tokens: Any, positions: Any, add: Any
) -> None:
    to, by = at(dwte, 0), at(dwpe, 0)
    if not add:
        fill_row(to, 0, dwte.size)
        fill_row(by, 0, dwpe.size)
    embedding_backward_rows(to, by, at(dy, 0), tokens, positions, *dy.shape)


def embedding(
    self: Context, x: Array, tokens: Array, positions: Array, wte: Array, wpe: Array
) -> None:
    """Look up both tables and add. Ids are in range by construction."""
    _embedding(x, tokens, positions, wte, wpe)


def embedding_backward(
    self: Context, dwte: Array, dwpe: Array, dy: Array, tokens: Array, positions: Array, add: bool
) -> None:
    """Sum the rows of dy that each table row went to."""
    _embedding_backward(dwte, dwpe, dy, tokens, positions, add)
