"""Whole training steps in one compiled call: batches, forward, backward, records, update.

Programs (instructions.py) say what is done to a batch and to the weights; here they are played, for
every piece of a shard's part of every micro-batch, and step after step. Any number of steps is one
call of each shard, on a thread of its own.
"""

from __future__ import annotations

from typing import Any

from .atomics import barrier
from .batch import first_of_part, gather, sort_by_length
from .compile import compiled
from .play import play
from .rows import add_row, fill_row
from .vector import at, doubles, place


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
    first_pass: Any, other_passes: Any, measure: Any, apply: Any, text: Any, starts: Any,
    lengths: Any, share: Any, ids: Any, sorting: Any, grads: Any, scale: Any, loss: Any, sums: Any,
    words: Any, scalars: Any, norm: Any, rates: Any, records: Any, step: Any,
) -> None:  # fmt: skip
    """As many steps as there are rates, from number `step` on; each shard has a call of its own,
    all at the same time, with barriers where one needs what the others did.

    measure: the program of the norm, which writes norm (1,) and scalars[3], float64; apply: that of
    the update of the shard's part of the weights, which reads scalars (4,). rates (steps, 3): what
    scalars begin with in each step; starts, lengths (steps, micro-batches, B); records (ring, 3) as
    `Step` has them; sums (shards, 2) int64: addresses of every shard's gradients and loss. words:
    see atomics.py. The rest as above.
    """
    shard, shards, _ = share
    part = (len(grads) + shards - 1) // shards
    first, last = min(shard * part, len(grads)), min((shard + 1) * part, len(grads))
    for k in range(len(rates)):
        train_shard(
            first_pass, other_passes, text, starts[k], lengths[k], share, ids, sorting, grads,
            scale, loss,
        )  # fmt: skip
        barrier(words, shard)
        total = at(place(grads, sums[0, 0]), first)
        for other in range(1, shards):
            add_row(total, total, at(place(grads, sums[other, 0]), first), last - first)
        barrier(words, shard)
        if shard == 0:
            scalars[:3] = rates[k]
            play(grads, measure, 0, 0)
            _record(records[(step + k) % len(records)], sums, lengths[k].sum(), norm[0])
        barrier(words, shard)
        play(grads, apply, 0, 0)
        barrier(words, shard)


@compiled
def _record(record: Any, sums: Any, count: Any, norm: Any) -> None:
    """A step's mean loss over the shards, its norm and number of targets."""
    loss = doubles(sums[0, 1])[0]
    for other in range(1, len(sums)):
        loss += doubles(sums[other, 1])[0]
    record[0], record[1], record[2] = loss / count, norm, count
