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
from .compile import compiled
from .instructions import EMBEDDING, EMBEDDING_BACKWARD, Instructions
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
def embedding_backward_tables(
    dwte: Any, dwpe: Any, dy: Any, tokens: Any, positions: Any, rows: Any, channels: Any,
    vocab: Any, longest: Any, add: Any,
) -> None:  # fmt: skip
    """The whole of `embedding_backward`."""
    if not add:
        fill_row(dwte, 0, vocab * channels)
        fill_row(dwpe, 0, longest * channels)
    embedding_backward_rows(dwte, dwpe, dy, tokens, positions, rows, channels)


def embedding(
    self: Instructions, x: Array, tokens: Array, positions: Array, wte: Array, wpe: Array
) -> None:
    """Look up both tables and add. Ids are in range by construction."""
    self.do(EMBEDDING, len(x), x, wte, wpe, tokens, positions, x.shape[1])


def embedding_backward(
    self: Instructions,
    dwte: Array,
    dwpe: Array,
    dy: Array,
    tokens: Array,
    positions: Array,
    add: bool,
) -> None:
    """Sum the rows of dy that each table row went to."""
    sizes = (dy.shape[1], len(dwte), len(dwpe))
    self.do(EMBEDDING_BACKWARD, len(dy), dwte, dwpe, dy, tokens, positions, *sizes, add)
