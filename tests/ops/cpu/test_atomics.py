"""Threads in compiled code wait for one another, however few cores they have."""

from __future__ import annotations

import threading

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.ops.cpu.atomics import ABANDONED, CAME, WIDTH, barrier, load_word
from gpu_microgpt.ops.cpu.compile import compiled

TIMES = 2_000


@compiled
def count_together(words, counts, thread, times, behind):
    """Each counts its own up, and looks at all between two barriers: behind[thread] says how often
    another was not as far. With `times` 0 one barrier, nothing else."""
    for k in range(times):
        counts[thread, 0] = k
        barrier(words, thread)
        for other in range(len(counts)):
            if load_word(counts, other * WIDTH) != k:
                behind[thread] += 1
        barrier(words, thread)
    if times == 0:
        barrier(words, thread)


def on_threads(count, times, words):
    counts, behind = np.zeros((count, WIDTH), np.int64), np.zeros(count, np.int64)
    threads = [
        threading.Thread(target=count_together, args=(words, counts, i, times, behind))
        for i in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return behind


@pytest.mark.parametrize("count", [1, 2, 7])
def test_nobody_goes_on_before_all_have_come(count):
    words = np.zeros((count, WIDTH), np.int64)
    for call in (1, 2):  # the second goes on from where the words are
        assert not on_threads(count, TIMES // count, words).any()
        assert (words[:, CAME] == 2 * call * (TIMES // count)).all()


def test_a_thread_alone_waits():
    words = np.zeros((2, WIDTH), np.int64)
    counts, behind = np.zeros((2, WIDTH), np.int64), np.zeros(2, np.int64)
    args = (words, counts, 0, 0, behind)
    count_together(words[:1].copy(), counts, 0, 0, behind)  # compiled, and alone not kept
    thread = threading.Thread(target=count_together, args=args)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    come_now(words)
    thread.join(60)
    assert not thread.is_alive()


def test_nobody_waits_for_what_is_abandoned():
    words = np.zeros((2, WIDTH), np.int64)
    thread = threading.Thread(target=come_now, args=(words,))
    thread.start()
    words[0, ABANDONED] = 1
    thread.join(60)
    assert not thread.is_alive()
    assert words[:, CAME].tolist() == [0, 1]


@compiled
def come_now(words):
    barrier(words, 1)
