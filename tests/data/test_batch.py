from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gpu_microgpt.data import Batch, Run, pack
from gpu_microgpt.data.batch import gather


def sequences(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 50, length + 1) for length in lengths]


def rows_of(batch: Batch):
    """Per sequence: (tokens, targets, positions) as lists."""
    edges = batch.layout.offsets.tolist()
    return [
        tuple(a[i:j].tolist() for a in (batch.tokens, batch.targets, batch.positions))
        for i, j in pairwise(edges)
    ]


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 3, 2, 1], [4, 4, 4], [1, 31, 33]])
def test_pack_keeps_each_sequence_whole_shortest_first(lengths):
    given = sequences(lengths)
    batch = pack(given)
    ordered = sorted(given, key=len)
    assert rows_of(batch) == [
        (s[:-1].tolist(), s[1:].tolist(), list(range(len(s) - 1))) for s in ordered
    ]
    assert batch.num_targets == sum(lengths)
    for array in (batch.tokens, batch.targets, batch.positions, batch.layout.offsets):
        assert array.dtype == np.int32


def test_runs_are_maximal():
    batch = pack(sequences([3, 1, 3, 2, 1]))
    assert batch.layout.runs == (Run(0, 2, 1), Run(2, 1, 2), Run(4, 2, 3))
    assert batch.layout.offsets.tolist() == [0, 1, 2, 4, 7, 10]


@pytest.mark.parametrize("given", [[], [np.array([1])], [np.array([1, 2]), np.array([], int)]])
def test_pack_refuses_what_has_no_target(given):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        pack(given)


def test_gather_reads_overlapping_pieces():
    flat = np.arange(100, 120, dtype=np.uint16)
    batch = gather(flat, np.array([10, 0, 9]), np.array([3, 2, 2]))
    assert batch.tokens.tolist() == [100, 101, 109, 110, 110, 111, 112]
    assert batch.targets.tolist() == [101, 102, 110, 111, 111, 112, 113]
    assert batch.positions.tolist() == [0, 1, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("lengths", [[1], [1, 1], [1, 100], [3, 1, 3, 2, 1, 7], [8] * 32, [1] * 7])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_split_loses_and_copies_nothing(lengths, parts):
    batch = pack(sequences(lengths))
    pieces = batch.split(parts)
    assert len(pieces) == min(parts, len(lengths))
    assert [row for piece in pieces for row in rows_of(piece)] == rows_of(batch)
    assert sum(piece.num_targets for piece in pieces) == batch.num_targets
    for piece in pieces:
        assert len(piece.layout.offsets) > 1
        for name in ("tokens", "targets", "positions"):
            assert np.shares_memory(getattr(piece, name), getattr(batch, name))
        covered = [run.row + i * run.length for run in piece.layout.runs for i in range(run.count)]
        assert covered == piece.layout.offsets[:-1].tolist()


@pytest.mark.parametrize(
    ("lengths", "parts", "rows"),
    [
        ([8] * 32, 2, [128, 128]),
        ([8] * 32, 3, [88, 80, 88]),
        ([1, 1, 1, 9], 2, [3, 9]),
        ([1, 2, 3, 4, 5, 6], 2, [10, 11]),
        ([1, 1, 100], 3, [1, 1, 100]),
        ([4, 5, 6], 2, [9, 6]),
    ],
)
def test_split_is_even(lengths, parts, rows):
    assert [len(piece.tokens) for piece in pack(sequences(lengths)).split(parts)] == rows


def test_split_counts_scored_targets_of_each_part():
    whole = pack(sequences([2, 2, 2]))
    targets = whole.targets.copy()
    targets[[0, 5]] = -1
    batch = Batch(whole.tokens, targets, whole.positions, whole.layout, 4)
    assert [piece.num_targets for piece in batch.split(3)] == [1, 2, 1]


def test_all_arrays_are_moved():
    batch = pack(sequences([3, 1, 4]))
    there = batch.to(np.negative)
    assert np.array_equal(there.tokens, -batch.tokens)
    assert np.array_equal(there.targets, -batch.targets)
    assert np.array_equal(there.positions, -batch.positions)
    assert np.array_equal(there.layout.offsets, -batch.layout.offsets)
    assert there.layout.runs == batch.layout.runs
    assert there.num_targets == batch.num_targets
