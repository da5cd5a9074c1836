"""What a run tells: console, metrics, sample texts, histograms, pictures of attention."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .backend import Backend
from .errors import DivergedError
from .metrics import Metrics
from .profile import Profile
from .progress import Progress
from .run_folder import RunFolder
from .snapshot import Scores
from .text_model import join_texts

Numbers = np.ndarray[Any, Any]
RECENT = 50  # steps the closing mean of the training loss goes over
LARGEST = 5  # rows of a profile that are told
PICTURE = 256  # pixels an attention map has at least


class Report:
    """Turns what was measured into lines, points and files.

    Speed is that of the steps alone: no evaluation, no sampling.
    """

    def __init__(
        self, metrics: Metrics, progress: Progress, folder: RunFolder, backend: Backend
    ) -> None:
        """Write to these of a run on this backend."""
        self.backend = backend
        self.metrics, self.progress, self.folder = metrics, progress, folder
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.loss = math.nan  # of the last step recorded
        self._tokens = self._flops = self._milliseconds = 0.0
        self._steps = 0

    def count(self, steps: int, tokens: float, flops: float, milliseconds: float) -> None:
        """So many steps worked on so many tokens and floating-point operations, in that time each
        (0: not known, so that they do not count for the speed)."""
        if not milliseconds:
            return
        self._steps += steps
        self._tokens += tokens
        self._flops += flops
        self._milliseconds += steps * milliseconds

    def check(
        self, steps: Numbers, losses: Numbers, norms: Numbers, rate: Callable[[int], float],
        advice: Callable[[], str],
    ) -> None:  # fmt: skip
        """Take note of the losses of these steps, (n,) each. Raises DivergedError for the first
        where loss or norm is not finite."""
        for i in np.flatnonzero(~(np.isfinite(losses) & np.isfinite(norms)))[:1]:
            step = int(steps[i])
            raise DivergedError(
                f"step {step}: loss {losses[i]:g}, gradient norm {norms[i]:g} at learning rate "
                f"{rate(step):.3g}, wanted finite numbers: lower optimizer.lr or set "
                f"optimizer.grad_clip; {advice()}"
            )
        self.recent.extend(losses[-RECENT:].tolist())
        self.loss = self.recent[-1]

    def train(self, step: int, norm: float, rate: float) -> None:
        """Report training: the last loss checked, and the speed of the steps since the last report
        where it is known."""
        scalars = {"loss/train": self.loss, "lr": rate, "grad_norm": norm}
        speed = milliseconds = 0.0
        if self._milliseconds:
            seconds, milliseconds = self._milliseconds / 1e3, self._milliseconds / self._steps
            speed, flops = self._tokens / seconds, self._flops / seconds
            scalars |= {"tokens_per_second": speed, "ms_per_step": milliseconds}
            scalars |= self._hardware(flops)
        self.metrics.scalars(step, scalars)
        self.progress.update(step, self.loss, speed, milliseconds, rate)
        self._tokens = self._flops = self._milliseconds = 0.0
        self._steps = 0

    def _hardware(self, flops: float) -> dict[str, float]:
        """What `flops` a second are of the device, and how full its memory is."""
        scalars = {"gflops": flops / 1e9}
        peak, used = self.backend.peak_flops(), self.backend.memory_used()
        if peak is not None:
            scalars |= {"tflops": flops / 1e12, "share_of_peak": flops / peak}
        if used is not None:
            scalars["memory_mb"] = used / 1e6
        return scalars

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

    def end(self, step: int, scores: Scores) -> None:
        """Say what the run came to, `step` being its last."""
        held = ""
        if math.isfinite(scores.val):
            at = "" if scores.val_step == step else f" (step {scores.val_step})"
            held = f"; held-out loss {scores.val:.4f}{at}, lowest {scores.best:.4f}"
        mean, count = sum(self.recent) / len(self.recent), len(self.recent)
        done = f"training loss {self.loss:.4f}, mean of the last {count} steps {mean:.4f}"
        print(f"step {step}: {done}{held}")

    def profile(self, step: int, profile: Profile) -> None:
        """Keep where the time of steps went, and tell where most of it did."""
        if not profile.rows:
            self.progress.log(f"step {step}: no profile, as only one step was done; wanted two")
            return
        table = profile.markdown()
        self.metrics.text(step, "profile", table)
        path = self.folder.write_profile(table, profile.to_json())
        self.progress.log(f"step {step}: profile ({path})\n{profile.largest(LARGEST)}")

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
