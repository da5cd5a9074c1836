"""What the engine says of its steps: asked for in time, read when it has come, and reported."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from .config import Config
from .dims import Dims
from .engine import Engine, Figures
from .report import Report


class Readings:
    """Figures on their way. The device is never more than two log intervals behind what is read."""

    def __init__(
        self,
        engine: Engine,
        report: Report,
        config: Config,
        dims: Dims,
        start: int,
        total: int,
        rate: Callable[[int], float],
        advice: Callable[[], str],
    ) -> None:
        """Of the steps after `start`, up to `total`; `rate` gives a step's learning rate, `advice`
        what to do about a run that has diverged."""
        self.engine, self.report, self._total = engine, report, total
        self._rate, self._advice, self._dims = rate, advice, dims
        self._interval = config.train.log_interval
        self._sequences = config.train.batch_size * config.train.grad_accum
        self._asked = self._read = start
        self._waiting: deque[tuple[int, Figures]] = deque()  # asked for after these steps

    def ahead(self, step: int) -> int:
        """Steps from this one on until it is time to ask."""
        return min(self._interval - step % self._interval, self._asked + self.engine.ring - step)

    def after(self, step: int) -> None:
        """Ask where it is time, and report what has arrived; does not wait for this step.

        Raises DivergedError for a loss or a norm that is not finite.
        """
        if step % self._interval == 0 or step - self._asked == self.engine.ring:
            self._ask(step)
        self._take(wait=False)

    def flush(self, step: int) -> None:
        """Report every step so far; this waits for the device, which may then do other things."""
        if step > self._asked:
            self._ask(step)
        self._take(wait=True)
        self.engine.pause()

    def _ask(self, step: int) -> None:
        self._take(wait=True)
        self._waiting.append((step, self.engine.ask()))
        self._asked = step

    def _take(self, wait: bool) -> None:
        """Report the figures that have arrived, or wait for all of them."""
        while self._waiting and (wait or self._waiting[0][1].done()):
            step, figures = self._waiting.popleft()
            records, milliseconds = figures.records(), figures.ms_per_step()
            steps = np.arange(self._read + 1, step + 1)
            losses, norms, counts = records[steps % len(records)].T
            self.report.check(steps, losses, norms, self._rate, self._advice)
            flops = self._dims.train_flops(counts, counts / self._sequences)
            self.report.count(len(steps), counts.sum(), flops.sum(), milliseconds)
            # asked for at every interval, so that only the last step can end one
            if step % self._interval == 0 or step == self._total:
                self.report.train(step, float(norms[-1]), self._rate(step))
            self._read = step
