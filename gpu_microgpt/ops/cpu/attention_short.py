"""attention.py's passes (see there for the formulas) over short sequences with small heads.

Channels lie along the lanes: a vector of a row holds several heads, and nothing is transposed or
packed.

For D = 4 and 16 lanes a vector is four heads. A score is a product by lanes whose groups of D lanes
are added up crosswise, which leaves a head's score in all of its D lanes: as the factor of v, or of
q and k, is wanted there. Its exp is taken D times over; for such D that costs less than turning
scores round.

Forward: the vectors of a row; queries; keys. All scores of a sequence come first, then all exp,
which sums and y take up in registers, then the logs of all sums together: so less waits for the
largest score of a query, which all of its exp want.
Backward: the vectors of a row; keys; queries from the key on. dk and dv of a key stay in registers,
dq is added to in memory. lse, given one a head, is first spread over the lanes of all queries, and
the sum of p dp is taken as the sum of dy y.
"""

from __future__ import annotations

import math
from typing import Any

from .code import VECTOR_BYTES
from .compile import compiled
from .vector import (
    at,
    fma,
    lanes,
    load,
    load_some,
    splat,
    store,
    store_some,
    vexp,
    vlog,
    vmax,
)
from .vector_groups import gathered, group_sum, spread

LONGEST = 32  # rows of a sequence
LARGEST = 96  # D times its rows: beyond, measured, tiles of queries take less time


@compiled
def is_short(like: Any, rows: Any, channels: Any, n_head: Any) -> Any:
    """Whether a sequence of so many rows is for the functions here; like: a place."""
    width = channels // n_head
    return (
        rows <= min(LONGEST, LARGEST // width)
        and channels % lanes(like) == 0
        and lanes(like) % width == 0
        and width * n_head == channels
    )


def short_scratch(longest: int) -> int:
    """Numbers of scratch that sequences up to `longest` want at most: the scores and five vectors a
    row, and two more."""
    rows = min(longest, LONGEST)
    return VECTOR_BYTES // 4 * (rows * (rows + 1) // 2 + 5 * rows + 2)


@compiled
def attend_short(
    y: Any, lse: Any, qkv: Any, rows: Any, channels: Any, n_head: Any, scratch: Any
) -> None:
    """Forward for one sequence; all are places at its first row."""
    width = channels // n_head
    heads = lanes(y) // width
    tops, scores = scratch, at(scratch, rows * lanes(y))
    logs = at(scores, rows * (rows + 1) // 2 * lanes(y))
    sums = at(logs, (rows + 1) * lanes(y))
    for c in range(0, channels, lanes(y)):
        q = at(qkv, c)
        _scores(scores, tops, q, rows, channels, width)
        _results(at(y, c), logs, sums, scores, tops, at(q, 2 * channels), rows, channels, width)
        for i in range(0, rows * heads, lanes(y)):
            store(logs, i, load(logs, i) + vlog(load(sums, i)))
        for i in range(rows):
            store_some(lse, i * n_head + c // width, load(logs, i * heads), heads)


@compiled
def _scores(scores: Any, tops: Any, q: Any, rows: Any, channels: Any, width: Any) -> None:
    """Scores of one vector of all queries with the keys they see, one after the other, and each
    query's largest."""
    ld, scale, to = 3 * channels, 1 / math.sqrt(width), 0
    for i in range(rows):
        x = load(q, i * ld) * scale
        top = splat(x, -math.inf)
        for j in range(i + 1):
            score = group_sum(x * load(q, j * ld + channels), width)
            store(scores, to, score)
            to += lanes(q)
            top = vmax(top, score)
        store(tops, i * lanes(q), top)


@compiled
def _results(
    y: Any, logs: Any, sums: Any, scores: Any, tops: Any, v: Any, rows: Any, channels: Any,
    width: Any,
) -> None:  # fmt: skip
    """y; and of each head of each query, without gaps, the largest score and the sum of exp."""
    heads, start = lanes(y) // width, 0
    for i in range(rows):
        top = load(tops, i * lanes(y))
        total = result = splat(top, 0)
        for j in range(i + 1):
            e = vexp(load(scores, start) - top)
            start += lanes(y)
            total += e
            result = fma(e, load(v, j * 3 * channels), result)
        store(y, i * channels, result / total)
        store(logs, i * heads, gathered(top, width))  # what is too much, the next query covers
        store(sums, i * heads, gathered(total, width))


@compiled
def attend_short_backward(
    dqkv: Any, dy: Any, y: Any, lse: Any, qkv: Any, rows: Any, channels: Any, n_head: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """Backward for one sequence; all are places at its first row."""
    width = channels // n_head
    ld, scale, heads = 3 * channels, 1 / math.sqrt(width), lanes(y) // width
    logs = at(scratch, rows * lanes(y))
    for c in range(0, channels, lanes(y)):
        for i in range(rows):
            row = i * channels + c
            dot = group_sum(load(dy, row) * load(y, row), width) * scale
            store(scratch, i * lanes(y), dot)
            lows = load_some(lse, i * n_head + c // width, heads, 0)
            store(logs, i * lanes(y), spread(lows, width))
            store(dqkv, i * ld + c, splat(y, 0))
        for j in range(rows):
            to = j * ld + c
            _key(at(dqkv, to), at(dy, j * channels + c), at(logs, j * lanes(y)), at(qkv, to),
                 rows - j, channels, width, scale, at(scratch, j * lanes(y)))  # fmt: skip


@compiled
def _key(
    dq: Any, dy: Any, logs: Any, q: Any, rows: Any, channels: Any, width: Any, scale: Any,
    dots: Any,
) -> None:  # fmt: skip
    """dk and dv of one vector of a key, and its part of dq; places at its own row."""
    ld = 3 * channels
    k, v = load(q, channels), load(q, 2 * channels)
    dk = dv = splat(k, 0)
    for i in range(rows):
        x, g = load(q, i * ld), load(dy, i * channels)
        p = vexp(fma(group_sum(x * k, width), scale, -load(logs, i * lanes(dy))))
        dv = fma(p, g, dv)
        ds = p * fma(group_sum(g * v, width), scale, -load(dots, i * lanes(dy)))
        dk = fma(ds, x, dk)
        store(dq, i * ld, fma(ds, k, load(dq, i * ld)))
    store(dq, channels, dk)
    store(dq, 2 * channels, dv)
