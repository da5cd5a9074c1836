"""From a run in memory to its checkpoint and back: weights, moments, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Backend
from .checkpoint import State
from .data.corpus import Corpus
from .errors import DivergedError
from .optim import Optimizer


@dataclass
class Scores:
    """Losses in nats a token that outlive a session; not finite where not measured yet."""

    train: float = math.nan  # of the last step
    val: float = math.inf  # the last held-out loss,
    val_step: int = -1  # of the weights after this step
    best: float = math.inf  # the lowest held-out loss

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Scores:
        """Read back what `to_meta` wrote."""
        saved = meta["scores"]
        val, best = (math.inf if saved[k] is None else saved[k] for k in ("val", "best"))
        return cls(saved["train"], val, saved["val_step"], best)

    def to_meta(self, step: int) -> dict[str, Any]:
        """As JSON, and `val_loss`, which ranks checkpoints, where it is of these very weights."""
        saved = {
            "train": self.train,
            "val": _finite(self.val),
            "val_step": self.val_step,
            "best": _finite(self.best),
        }
        return {"scores": saved, "val_loss": self.val if self.val_step == step else None}


def take(step: int, optimizer: Optimizer, backend: Backend, meta: dict[str, Any]) -> State:
    """Copy weights and moments to the host.

    Raises DivergedError where a weight is not finite: the loss, taken before the update, could not
    show that yet.
    """
    weights = optimizer.params.to_host(backend)
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise DivergedError(f"step {step}: {name} is no longer finite")
    moments = optimizer.m.to_host(backend, "m.") | optimizer.v.to_host(backend, "v.")
    return State(step, weights, moments, meta)


def restore(state: State, optimizer: Optimizer, backend: Backend) -> None:
    """Copy weights and moments back."""
    optimizer.params.load(state.weights, backend)
    for moment, prefix in ((optimizer.m, "m."), (optimizer.v, "v.")):
        named = {name: state.moments[prefix + name] for name in state.weights}
        moment.load(named, backend)


def corpus_record(corpus: Corpus) -> dict[str, str]:
    """What a checkpoint keeps of the corpus really used."""
    return {"name": corpus.name, "requested": corpus.requested, "sha256": corpus.sha256}


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
