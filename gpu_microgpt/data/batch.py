"""A ragged batch: whole sequences end to end in flat rows, nothing padded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..types import Array


@dataclass(frozen=True, slots=True)
class Run:
    """`count` neighbouring sequences of equal `length` rows; the first starts at row `row`."""

    row: int
    count: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Which rows belong together: sequence s is rows `offsets[s]:offsets[s + 1]`."""

    offsets: Array  # (S + 1,) int32
    runs: tuple[Run, ...]  # the same on the host: maximal runs of equal-length sequences

    @property
    def longest(self) -> int:
        """Rows of the longest sequence, known to the host."""
        return max(run.length for run in self.runs)

    @classmethod
    def of(cls, lengths: np.ndarray) -> Layout:
        """Layout of sequences of these lengths, (S,) integers, in this order."""
        offsets, runs = [0], []
        row, count, run_length = 0, 0, -1
        for length in lengths.tolist():
            if length != run_length and count:
                runs.append(Run(row, count, run_length))
                row, count = offsets[-1], 0
            run_length = length
            count += 1
            offsets.append(offsets[-1] + length)
        runs.append(Run(row, count, run_length))
        return cls(np.array(offsets, np.int32), tuple(runs))


@dataclass(frozen=True)
class Batch:
    """N real positions of S sequences, on the host or on a device.

    `positions` restart at 0 in every sequence; a target of -1 is not scored.
    """

    tokens: Array  # (N,) int32
    targets: Array  # (N,) int32
    positions: Array  # (N,) int32
    layout: Layout
    num_targets: int  # targets >= 0, on the host

    def to(self, move: Callable[[np.ndarray], Array]) -> Batch:
        """The batch with its arrays moved to a device by `move`."""
        layout = Layout(move(self.layout.offsets), self.layout.runs)
        tokens, targets = move(self.tokens), move(self.targets)
        return Batch(tokens, targets, move(self.positions), layout, self.num_targets)

    def split(self, parts: int) -> list[Batch]:
        """Cut a host batch into views of whole sequences, as even in rows as such cuts allow.

        Returns min(parts, S) batches in row order, each with at least one sequence.
        """
        edges = self.layout.offsets.tolist()
        num_rows, num_sequences = edges[-1], len(edges) - 1
        parts = min(parts, num_sequences)
        if parts <= 1:
            return [self]
        cuts = [0]
        for part in range(1, parts):
            wanted = part * num_rows / parts
            after = bisect_left(edges, wanted)
            cut = after - (wanted - edges[after - 1] < edges[after] - wanted)
            # leave a sequence for this part and for each part behind the cut
            cuts.append(min(max(cut, cuts[-1] + 1), num_sequences - (parts - part)))
        cuts.append(num_sequences)
        return [self._view(first, last) for first, last in pairwise(cuts)]

    def _view(self, first: int, last: int) -> Batch:
        """Sequences [first, last) as a batch of their own."""
        offsets = self.layout.offsets[first : last + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        targets = self.targets[rows]
        all_scored = self.num_targets == len(self.targets)
        num_targets = len(targets) if all_scored else int(np.count_nonzero(targets >= 0))
        layout = Layout.of(offsets[1:] - offsets[:-1])
        return Batch(self.tokens[rows], targets, self.positions[rows], layout, num_targets)


def gather(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Batch:
    """Batch of the sequences `flat[start : start + length + 1]`, shortest first (stable).

    flat: (M,) integer tokens; starts, lengths: (S,) integers, lengths >= 1 rows. Row t of a
    sequence has input `flat[start + t]` and target `flat[start + t + 1]`.
    """
    order = lengths.argsort(kind="stable")
    starts, lengths = starts[order], lengths[order]
    layout = Layout.of(lengths)
    num_rows = int(layout.offsets[-1])
    rows = np.arange(num_rows, dtype=np.int64)
    positions = rows - layout.offsets[:-1].repeat(lengths)
    source = starts.repeat(lengths) + positions
    tokens = flat[source].astype(np.int32)
    targets = flat[source + 1].astype(np.int32)
    return Batch(tokens, targets, positions.astype(np.int32), layout, num_rows)


def pack(sequences: Sequence[np.ndarray]) -> Batch:
    """Batch of token sequences: inputs s[:-1], targets s[1:], shortest sequence first (stable).

    sequences: at least one, each (length >= 2,) integers. Raises ValueError otherwise.
    """
    if not sequences or min(map(len, sequences)) < 2:
        raise ValueError("pack: wants one or more sequences of at least 2 tokens")
    sizes = np.array([len(sequence) for sequence in sequences])
    return gather(np.concatenate(sequences), sizes.cumsum() - sizes, sizes - 1)
