"""Kill a process that saves checkpoints, again and again, and look at what it leaves behind.

python -m tests.checkpoint_crash_driver FOLDER ROUNDS: prints one line of counts at the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from gpu_microgpt import checkpoint
from gpu_microgpt.checkpoint import State
from tests.checkpoint_helpers import assert_same, make_state, names, no_warning


def state_of(step: int) -> State:
    return make_state(step, val_loss=float(step * 7919 % 101), rows=10_000)


def save_forever(folder: Path, step: int, progress: int) -> None:
    """Save `step` (a second time, if it is there), step + 1, ...; report each one that is done."""
    while True:
        checkpoint.save(folder, state_of(step), keep=2)
        os.write(progress, b"%d\n" % step)
        step += 1


def run_and_kill(folder: Path, step: int, delay: float) -> list[int]:
    """The steps whose save was over before the kill."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(folder, step, writing)
    os.close(writing)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL  # the child itself never fails
    with open(reading, "rb") as progress:
        return [int(line) for line in progress]


def main(folder: Path, rounds: int) -> None:
    rng = random.Random(7)
    last, half_done = 1, 0
    checkpoint.save(folder, state_of(last), keep=2)
    for _ in range(rounds):
        done = run_and_kill(folder, last, rng.uniform(0.0, 0.04))
        half_done += any("." in name for name in names(folder))
        completed = max([last, *done])
        found = checkpoint.newest(folder, no_warning)
        assert found.step in (completed, completed + 1), (found.step, completed)
        assert_same(found, state_of(found.step))
        best = checkpoint.best(folder, no_warning)
        assert_same(best, state_of(best.step))
        assert best.meta["val_loss"] <= min(state_of(s).meta["val_loss"] for s in (last, *done))
        last = found.step
    print(f"{rounds} kills, {half_done} of them during a save, {last} steps saved")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
