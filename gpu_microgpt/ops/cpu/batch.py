"""A step's batch, made where it is used: the sequences of a shard's piece, out of the text.

The same rows in the same order as `data.batch.gather` and `Batch.split` give: sequences sorted by
length, shortest first, equal ones as they came, and cut between sequences into parts as even in
rows as that allows. Starts and lengths are (B,) int64, a batch's; the work is a few operations a
sequence and one copy a token.
"""

from __future__ import annotations

from typing import Any

from .compile import compiled


@compiled
def sort_by_length(lengths: Any, order: Any, edges: Any, counts: Any) -> None:
    """order (B,): the sequences, shortest first; edges (B + 1,): the row each begins at.

    counts: scratch of more numbers than the longest length. A counting sort, which is stable.
    """
    size = len(lengths)
    counts[:] = 0
    for s in range(size):
        counts[lengths[s]] += 1
    before = 0
    for length in range(len(counts)):
        counts[length], before = before, before + counts[length]
    for s in range(size):
        place = counts[lengths[s]]
        order[place] = s
        counts[lengths[s]] = place + 1
    edges[0] = 0
    for i in range(size):
        edges[i + 1] = edges[i] + lengths[order[i]]


@compiled
def first_of_part(edges: Any, part: Any, parts: Any) -> Any:
    """The sequence that `part` of `parts` begins with, parts being at most as many as sequences.

    Nearest to an even share of the rows, but every part behind has a sequence; so has this one, as
    what lies behind a sequence longer than a share is as long.
    """
    size = len(edges) - 1
    if part == 0 or part == parts:
        return 0 if part == 0 else size
    rows = edges[size]
    after = 0
    while edges[after] * parts < part * rows:
        after += 1
    wanted = part * rows / parts
    cut = after - (1 if wanted - edges[after - 1] < edges[after] - wanted else 0)
    return min(cut, size - (parts - part))


@compiled
def gather(
    text: Any, starts: Any, lengths: Any, order: Any, first: Any, last: Any, tokens: Any,
    targets: Any, positions: Any, offsets: Any,
) -> Any:  # fmt: skip
    """Sequences order[first:last] end to end: tokens, targets, positions (N,) int32, offsets
    (last - first + 1,) int32 and more; returns N."""
    row = 0
    offsets[0] = 0
    for i in range(first, last):
        start, length = starts[order[i]], lengths[order[i]]
        for t in range(length):
            tokens[row + t] = text[start + t]
            targets[row + t] = text[start + t + 1]
            positions[row + t] = t
        row += length
        offsets[i - first + 1] = row
    return row
