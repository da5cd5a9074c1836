"""Whole training steps in one compiled call: batches, forward, backward, records, update.

Programs (instructions.py) say what is done to a batch and to the weights; here they are played, for
every piece of a shard's part of every micro-batch, and step after step. One shard does any number
of steps in one call; of several, each has its own call for a step, on its own thread.
"""

from __future__ import annotations

from typing import Any

from .batch import first_of_part, gather, sort_by_length
from .compile import compiled
from .play import play
from .rows import fill_row
from .vector import at


@compiled
def pass_over(
    like: Any, first_pass: Any, other_passes: Any, text: Any, starts: Any, lengths: Any, share: Any,
    ids: Any, sorting: Any,
) -> Any:  # fmt: skip
    """Play a program for every piece of a shard's share of batches; returns how many it had.

    first_pass: for the first piece, other_passes: for the others. text (M,) uint16; starts, lengths
    (batches, B) int64. share: which shard, of how many, in how many pieces each. ids: tokens,
    targets, positions (rows,), offsets (B + 1,) int32; sorting: order (B,), edges (B + 1,), counts
    (T + 1,) int64; both scratch.
    """
    shard, shards, pieces = share
    tokens, targets, positions, offsets = ids
    order, edges, counts = sorting
    batches, size = starts.shape
    parts = min(shards * pieces, size)
    played = 0
    for batch in range(batches):
        sort_by_length(lengths[batch], order[:size], edges[: size + 1], counts)
        first = 0
        for part in range(parts):
            last = first_of_part(edges[: size + 1], part + 1, parts)
            if part % shards == shard:
                rows = gather(
                    text, starts[batch], lengths[batch], order, first, last, tokens, targets,
                    positions, offsets,
                )  # fmt: skip
                play(like, other_passes if played else first_pass, rows, last - first)
                played += 1
            first = last
    return played


@compiled
def train_shard(
    first_pass: Any, other_passes: Any, text: Any, starts: Any, lengths: Any, share: Any, ids: Any,
    sorting: Any, grads: Any, scale: Any, loss: Any,
) -> None:  # fmt: skip
    """A shard's share of a step: its losses' sum and its gradients of the mean loss.

    other_passes add to the gradients of first_pass. starts, lengths: of the micro-batches; grads
    (P,); scale (1,) and loss (1,) float64.
    """
    scale[0], loss[0] = 1 / lengths.sum(), 0
    played = pass_over(
        grads, first_pass, other_passes, text, starts, lengths, share, ids, sorting
    )  # fmt: skip
    if not played:
        fill_row(at(grads, 0), 0, len(grads))


@compiled
def score_shard(
    like: Any, score: Any, text: Any, starts: Any, lengths: Any, share: Any, ids: Any, sorting: Any,
    loss: Any,
) -> None:  # fmt: skip
    """The sum of losses over a shard's share of batches; score: a program that adds to it."""
    loss[0] = 0
    pass_over(like, score, score, text, starts, lengths, share, ids, sorting)


@compiled
def train_steps(
    first_pass: Any, other_passes: Any, update: Any, text: Any, starts: Any, lengths: Any,
    share: Any, ids: Any, sorting: Any, grads: Any, scale: Any, loss: Any, norm: Any, scalars: Any,
    rates: Any, records: Any, step: Any,
) -> None:  # fmt: skip
    """As many steps of a single shard as there are rates, from number `step` on.

    update: the program of the update, which reads scalars (4,) and writes norm (1,), both float64;
    rates (steps, 3): what scalars begin with in each step; starts, lengths (steps, micro-batches,
    B); records (ring, 3) as `Step` has them. The rest as above.
    """
    for k in range(len(rates)):
        train_shard(
            first_pass, other_passes, text, starts[k], lengths[k], share, ids, sorting, grads,
            scale, loss,
        )  # fmt: skip
        scalars[:3] = rates[k]
        play(grads, update, 0, 0)
        record = records[(step + k) % len(records)]
        record[2] = lengths[k].sum()
        record[0], record[1] = loss[0] / record[2], norm[0]
