"""How far a run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Shows the steps of a run on `stream`; use it as a context manager, or call `close`."""

    def __init__(self, total: int, initial: int = 0, stream: TextIO | None = None) -> None:
        """Begin at step `initial` of `total`.

        `stream` is the standard output unless given; whether it is a terminal decides between the
        bar and lines.
        """
        self._total = total
        self._stream = stream or sys.stdout
        self._lines = not _shows_bars(self._stream)
        self._bar = tqdm(
            total=total,
            initial=initial,
            disable=self._lines,
            file=self._stream,
            bar_format=_BAR,
            dynamic_ncols=True,
            smoothing=0.05,  # evaluations and samples interrupt the steps: look further back
        )

    def advance(self, step: int) -> None:
        """`step` steps are done: moves the bar, says nothing of the loss."""
        self._bar.update(step - self._bar.n)

    def update(
        self, step: int, loss: float, tokens_per_second: float, ms_per_step: float, lr: float
    ) -> None:
        """`step` steps are done: moves and labels the bar, or prints a line; every log interval.

        loss in nats a token; ms_per_step in milliseconds, 0 where it is not known yet.
        """
        speed = f"{tokens_per_second:,.0f} tokens/s"
        if self._lines:
            width = len(str(self._total))
            left = timedelta(seconds=round((self._total - step) * ms_per_step / 1000))
            line = f"step {step:{width}d}/{self._total}  loss {loss:.4f}  lr {lr:.2e}"
            known = f"  {speed}  {ms_per_step:.2f} ms/step  time left {left}"
            self.log(line + known if ms_per_step else line)
            return
        label = f"loss {loss:.4f}, {speed}" if ms_per_step else f"loss {loss:.4f}"
        self._bar.set_postfix_str(label, refresh=False)
        self.advance(step)

    def log(self, message: str) -> None:
        """Print `message` on lines of its own, above the bar."""
        tqdm.write(message, file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        """Leave the bar as it stands, at the latest step; again is harmless."""
        self._bar.close()

    def __enter__(self) -> Progress:
        """Nothing is done."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _shows_bars(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that knows its size; in containers and CI some have 0."""
    if not stream.isatty():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:  # not an operating system's terminal, so its own isatty is to be believed
        return True
