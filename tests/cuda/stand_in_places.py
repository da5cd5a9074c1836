"""Places in the stand-in GPU's stream: events, and copies to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.cuda.guarded import POISON, GuardedArray, flat_bytes

if TYPE_CHECKING:
    from tests.cuda.stand_in import StandInGpu


class Place:
    """A place in the stream."""

    def __init__(self, gpu: StandInGpu) -> None:
        self._gpu, self.at, self._asked = gpu, gpu.place(), not gpu.late

    def done(self) -> bool:
        """Under `late` not when asked for the first time, unless something later is done."""
        self._gpu.not_captured("asking what is done")
        if self._asked:
            self._gpu.reached = max(self._gpu.reached, self.at)
        self._asked = True
        return self._gpu.reached >= self.at

    def _arrive(self) -> None:
        gpu = self._gpu
        gpu.not_captured("waiting")
        if gpu.reached < self.at:
            gpu.counts["waits"] += 1
            gpu.reached = self.at


class Event(Place):
    def __init__(self, gpu: StandInGpu) -> None:
        super().__init__(gpu)
        self._ms = gpu.clock

    def wait(self) -> None:
        self._arrive()

    def ms_since(self, earlier: Event) -> float:
        earlier._arrive()
        self._arrive()
        return self._ms - earlier._ms


class Pinned:
    """A buffer of the host's, and the place of the last download into it."""

    def __init__(self, nbytes: int) -> None:
        self.bytes, self.owner = np.empty(nbytes, np.uint8), 0


class Download(Place):
    """A copy of `array` as it is now, in `pinned`."""

    def __init__(self, gpu: StandInGpu, pinned: Pinned, array: GuardedArray) -> None:
        super().__init__(gpu)
        self._pinned, self._now = pinned, flat_bytes(array).copy()
        self._host = pinned.bytes.view(array.dtype).reshape(array.shape)
        pinned.owner = self.at
        pinned.bytes[:] = POISON if gpu.late else self._now

    def wait(self) -> np.ndarray:
        """Raises AssertionError where the same array was downloaded twice more."""
        self._arrive()
        fresh = self._pinned.owner == self.at
        assert fresh, "download: the same array was downloaded twice more since"
        self._pinned.bytes[:] = self._now
        return self._host
