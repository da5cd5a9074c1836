"""The sizes of a model, and what follows from them: parameter count and work per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from .config import ModelConfig

Real = TypeVar("Real", float, np.ndarray[Any, Any])


@dataclass(frozen=True)
class Dims:
    """Sizes in the field's letters: L layers, H heads, C channels, T positions, V tokens."""

    n_layer: int  # L
    n_head: int  # H
    n_embd: int  # C
    block_size: int  # T, the longest sequence
    vocab_size: int  # V

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> Dims:
        """Join the configured sizes with the vocabulary the corpus gave."""
        return cls(model.n_layer, model.n_head, model.n_embd, model.block_size, vocab_size)

    @property
    def head_dim(self) -> int:
        """Channels of one head, D = C / H."""
        return self.n_embd // self.n_head

    @property
    def num_params(self) -> int:
        """Trainable numbers: wte, wpe, lm_head and 12 C^2 a layer."""
        c = self.n_embd
        return (2 * self.vocab_size + self.block_size) * c + 12 * c * c * self.n_layer

    def train_flops(self, rows: Real, length: Real) -> Real:
        """Floating-point operations of forward + backward over `rows` positions.

        A multiply-add counts as two; backward costs twice the forward. Attention is counted over
        the causal half only: `length` is the mean length of the sequences the rows come from.
        Nothing recomputed is counted. Of arrays it is an array.
        """
        matmul = self.vocab_size * self.n_embd + 12 * self.n_embd**2 * self.n_layer
        attention = length * self.n_embd * self.n_layer  # q.k and p.v, half of each
        flops: Real = 6.0 * rows * (matmul + attention)
        return flops
