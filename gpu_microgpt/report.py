"""What a run tells: console, metrics, sample texts, histograms, pictures of attention."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .errors import DivergedError
from .metrics import Metrics
from .progress import Progress
from .run_folder import RunFolder
from .text_model import join_texts

RECENT = 50  # steps the closing mean of the training loss goes over
PICTURE = 256  # pixels an attention map has at least


class Report:
    """Turns what was measured into lines, points and files.

    Speed counts the time between `begin_step` and `end_step` only: no evaluation, no sampling.
    """

    def __init__(self, metrics: Metrics, progress: Progress, folder: RunFolder) -> None:
        """Write to these."""
        self.metrics, self.progress, self.folder = metrics, progress, folder
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.loss = math.nan  # of the last step recorded
        self._seconds = self._flops = 0.0
        self._steps = self._tokens = 0
        self._since = time.perf_counter()

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._since = time.perf_counter()

    def end_step(self, tokens: int, flops: float) -> None:
        """Stop it; the step worked on so many tokens and floating-point operations."""
        self._seconds += time.perf_counter() - self._since
        self._steps += 1
        self._tokens += tokens
        self._flops += flops

    def check(
        self, step: int, loss: float, norm: float, rate: float, advice: Callable[[], str]
    ) -> None:
        """Take note of a step's loss. Raises DivergedError where loss or norm is not finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"step {step}: loss {loss:g}, gradient norm {norm:g} at learning rate {rate:.3g}, "
                f"wanted finite numbers: lower optimizer.lr or set optimizer.grad_clip; {advice()}"
            )
        self.loss = loss
        self.recent.append(loss)

    def train(self, step: int, norm: float, rate: float) -> None:
        """Report training: the last loss checked, and the speed since the last report."""
        seconds, steps = max(self._seconds, 1e-9), max(self._steps, 1)
        speed, milliseconds = self._tokens / seconds, 1e3 * seconds / steps
        self.metrics.scalars(
            step,
            {
                "loss/train": self.loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens_per_second": speed,
                "ms_per_step": milliseconds,
                "gflops": self._flops / seconds / 1e9,
            },
        )
        self.progress.update(step, self.loss, speed, milliseconds, rate)
        self._seconds = self._flops = 0.0
        self._steps = self._tokens = 0

    def evaluation(self, step: int, loss: float) -> None:
        """Report the held-out loss, in nats a token."""
        bits = loss / math.log(2)
        self.metrics.scalars(step, {"loss/val": loss, "bits_per_char/val": bits})
        self.progress.log(f"step {step}: held-out loss {loss:.4f} ({bits:.3f} bits a character)")

    def samples(self, step: int, texts: list[str]) -> None:
        """Report sample texts."""
        joined = join_texts(texts)
        self.metrics.text(step, "samples", joined)
        path = self.folder.write_sample(step, joined)
        self.progress.log(f"step {step}: samples ({path})\n{joined}")

    def histograms(
        self, step: int, arrays: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
    ) -> None:
        """Record distributions: {"weights": {name: array}, "gradients": ...}."""
        for kind, named in arrays.items():
            for name, array in named.items():
                self.metrics.histogram(step, f"{kind}/{name}", array)

    def attention(self, step: int, layer: int, qkv: np.ndarray[Any, Any], n_head: int) -> None:
        """Record a layer's attention over one sequence, qkv (T, 3C), heads side by side."""
        self.metrics.image(step, f"attention/layer{layer}", attention_picture(qkv, n_head))


def attention_picture(qkv: np.ndarray[Any, Any], n_head: int) -> np.ndarray[Any, Any]:
    """Probabilities of one sequence's queries (down) over keys (across), a square a head.

    qkv (T, 3C); returns uint8 (h, w), dark = likely, scaled up by whole pixels where small. The
    scale is the square root of the probability: the weak ones are many and would not show.
    """
    length = len(qkv)
    q, k, _ = qkv.astype(np.float64).reshape(length, 3, n_head, -1).transpose(1, 2, 0, 3)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    scores[:, ~np.tri(length, dtype=bool)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    grey = (255 * (1 - np.sqrt(p))).astype(np.uint8)
    zoom = max(1, -(-PICTURE // length))
    squares = np.kron(grey, np.ones((1, zoom, zoom), np.uint8))
    edge = np.full((n_head, zoom * length, 2), 128, np.uint8)
    return np.concatenate([*np.concatenate([squares, edge], axis=2)], axis=1)[:, :-2]
