"""The threads that write a text together: memory and a task for each helper of ops/cpu/team.py.

A team is open while a compiled call writes tokens. No helper works or waits outside of that: each
returns when the call ends, or within a millisecond where it hears nothing; so texts may be
abandoned anywhere.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from .backend.numpy import NumpyBackend
from .dims import Dims
from .ops.cpu.instructions import Program
from .ops.cpu.team import WIDTH, close_team, help_out, open_team

PART_BYTES = 1_000_000  # of weights a thread is to have at least: less gains nothing


class Team:
    """`words` and `results`: what compiled functions want of it."""

    def __init__(
        self, backend: NumpyBackend, program: Program, dims: Dims, sequences: int
    ) -> None:
        """Take memory for the helpers of a program that decodes for so many sequences."""
        self._backend, self._program, self._sequences = backend, program, sequences
        helpers = members(dims, backend) - 1
        self.words = backend.zeros((1 + helpers, WIDTH), "i8")
        largest = sequences * max(4 * dims.n_embd, dims.vocab_size)
        self.results = backend.zeros((helpers, largest), backend.dtype)
        room = backend.workspace_bytes(dims, sequences) // backend.dtype.itemsize
        self._scratch = [backend.zeros((room,), backend.dtype) for _ in range(helpers)]
        self._tasks: list[Future[None] | None] = [None] * helpers

    def __enter__(self) -> Team:
        """Open it. A helper of the last time that has not returned yet needs no new task."""
        open_team(self._program.code, self.words)
        for i, task in enumerate(self._tasks):
            if task is None or task.done():
                self._tasks[i] = self._backend.start(partial(self._help, 1 + i))
        return self

    def __exit__(self, *_: object) -> None:
        """Close it, which the call has done if there was one."""
        close_team(self.words)

    def _help(self, helper: int) -> None:
        """On another thread."""
        program, scratch = self._program, self._scratch[helper - 1]
        help_out(
            program.like, program.code, self._sequences, self.words, helper, self.results, scratch
        )


def members(dims: Dims, backend: NumpyBackend) -> int:
    """How many threads gain by writing together: each has PART_BYTES of a token's weights."""
    weights: Any = dims.vocab_size * dims.n_embd + 12 * dims.n_embd**2 * dims.n_layer
    parts = int(weights * np.dtype(backend.dtype).itemsize // PART_BYTES)
    return max(1, min(backend.threads, parts))
