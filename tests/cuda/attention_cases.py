"""Shared by the tests of the attention kernels: batches, a float64 truth, a plain version."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gpu_microgpt.data.batch import Layout
from tests.cuda.machine import DTYPES, Machine, normal, wide


@dataclass(frozen=True)
class Case:
    """A ragged batch of packed rows, with `padding` rows of no sequence behind them."""

    dtype: np.dtype
    lengths: list[int]
    n_head: int
    head_dim: int
    padding: int
    qkv: np.ndarray  # (N, 3C)
    dy: np.ndarray  # (N, C)

    @classmethod
    def of(
        cls, dtype: str, lengths: list[int], n_head: int, head_dim: int, padding: int = 0,
        scale: float = 1.0,
    ) -> Case:  # fmt: skip
        kind, rows, channels = DTYPES[dtype], sum(lengths) + padding, n_head * head_dim
        qkv = normal(kind, rows, 3 * channels, scale=scale)
        dy = normal(kind, rows, channels, seed=1)
        return cls(kind, lengths, n_head, head_dim, padding, qkv, dy)

    def layout(self, machine: Machine) -> Layout:
        """With the offsets on the device."""
        host = Layout.of(np.array(self.lengths))
        return Layout(machine.array(host.offsets), host.runs)


def attend(case: Case, stored: Any) -> tuple[np.ndarray, np.ndarray]:
    """y (N, C) and lse (N, H), one head after the other; `stored` rounds what memory would hold."""
    y = np.zeros(case.dy.shape)
    lse = np.zeros((len(y), case.n_head))
    for rows, columns, (q, k, v), h in _heads(case):
        p, lse[rows, h] = _probabilities(q, k, stored)
        y[rows, columns] = stored(p) @ v
    return stored(y), lse


def attend_backward(case: Case, stored: Any) -> np.ndarray:
    """dqkv (N, 3C) through the whole matrix of probabilities."""
    dqkv = np.zeros(case.qkv.shape).reshape(len(case.qkv), 3, case.n_head, case.head_dim)
    scale = case.head_dim**-0.5
    for rows, columns, (q, k, v), h in _heads(case):
        p, _ = _probabilities(q, k, stored)
        dy = wide(case.dy)[rows, columns]
        p = stored(p)
        dp = stored(dy @ v.T)
        ds = stored(p * (dp - (p * dp).sum(1, keepdims=True)))
        dqkv[rows, 0, h], dqkv[rows, 1, h] = scale * (ds @ k), scale * (ds.T @ q)
        dqkv[rows, 2, h] = p.T @ dy
    return stored(dqkv.reshape(case.qkv.shape))


def exact(x: np.ndarray) -> np.ndarray:
    """Float64 as it is."""
    return x


def rounded(case: Case) -> Any:
    """What storing in the case's dtype makes of numbers."""
    return lambda x: wide(x.astype(np.float32).astype(case.dtype))


def _heads(case: Case) -> Any:
    offsets = np.cumsum([0, *case.lengths])
    split = wide(case.qkv).reshape(len(case.qkv), 3, case.n_head, case.head_dim)
    for start, stop in pairwise(offsets.tolist()):
        for h in range(case.n_head):
            columns = slice(h * case.head_dim, (h + 1) * case.head_dim)
            yield slice(start, stop), columns, split[start:stop, :, h].transpose(1, 0, 2), h


def _probabilities(q: np.ndarray, k: np.ndarray, stored: Any) -> tuple[np.ndarray, np.ndarray]:
    scores = stored(q @ k.T / np.sqrt(q.shape[1]))
    scores[np.triu_indices(len(q), 1)] = -np.inf
    largest = scores.max(1, keepdims=True, initial=-np.inf)  # a sequence may be empty
    lse = np.log(np.exp(scores - largest).sum(1, keepdims=True)) + largest
    return np.exp(scores - lse), lse[:, 0]
