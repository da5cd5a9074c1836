"""The threads that write a text together: memory and a task for each helper of ops/cpu/team.py.

Helpers stay from one compiled call to the next while a text is read without delay. Where the reader
takes his time, or the text ends or is abandoned, they return within a millisecond.
"""

from __future__ import annotations

import time
from functools import partial

from .backend.beside import usable_cores
from .backend.numpy import NumpyBackend
from .dims import Dims
from .ops.cpu.atomics import WIDTH
from .ops.cpu.instructions import Program
from .ops.cpu.team import DONE, GONE, LATE, close_team, help_out, missing

PART = 200_000  # weights a thread is to have at least: with less than two parts, one is as fast
OFTEN = 0.02  # seconds: if helpers come too late more often than once in these ...
REST = 8  # ... then so many calls are made without them: others want the cores


class Team:
    """`words` and `results`: what compiled functions want of it."""

    def __init__(self, backend: NumpyBackend, program: Program, dims: Dims, sequences: int) -> None:
        """Take memory for the helpers of a program that decodes for so many sequences."""
        self._backend, self._program, self._sequences = backend, program, sequences
        threads = min(backend.threads, usable_cores())
        helpers = members(dims, threads) - 1
        self.words = backend.zeros((1 + helpers, WIDTH), "i8")
        self.words[1:, DONE] = GONE
        largest = sequences * max(4 * dims.n_embd, dims.vocab_size)
        self.results = backend.zeros((helpers, largest), backend.dtype)
        room = backend.workspace_bytes(dims, sequences) // backend.dtype.itemsize
        self._start, self._late, self._rest = 0.0, 0, 0
        self._scratch = [backend.zeros((room,), backend.dtype) for _ in range(helpers)]

    def __enter__(self) -> Team:
        """Before a compiled call: send for the helpers that are not there, and wait for none."""
        if self._rest:
            self._rest -= 1
        else:
            for helper in range(1, len(self.words)):
                if missing(self._program.code, self.words, helper):
                    self._backend.start_beside(helper - 1, partial(self._help, helper))
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Behind it. Where others compute on these cores, helpers are let go for a while, as a
        second thread of ours would take time from the first."""
        seconds = time.perf_counter() - self._start
        late, self._late = self._late, int(self.words[0, LATE])
        if (self._late - late) * OFTEN > seconds:
            self._rest = REST
            self.close()

    def close(self) -> None:
        """Let all helpers return."""
        close_team(self.words)

    def _help(self, helper: int) -> None:
        """On another thread."""
        program, scratch = self._program, self._scratch[helper - 1]
        help_out(
            program.like, program.code, self._sequences, self.words, helper, self.results, scratch
        )


def members(dims: Dims, threads: int) -> int:
    """How many of the threads gain by writing together: PART of a token's weights for each."""
    weights = dims.vocab_size * dims.n_embd + 12 * dims.n_embd**2 * dims.n_layer
    return max(1, min(threads, weights // PART))
