"""Threads that work beside this one."""

from __future__ import annotations

import os
import threading

import pytest

from gpu_microgpt.backend.beside import Beside, usable_cores
from gpu_microgpt.backend.numpy import NumpyBackend


def test_tasks_are_done_in_turn_by_one_other_thread():
    done: list[tuple[int, int]] = []
    beside = Beside()
    for i in range(20):
        beside.start(lambda i=i: done.append((i, threading.get_ident())))
    beside.stop()
    assert [i for i, _ in done] == list(range(20))
    assert {thread for _, thread in done} != {threading.get_ident()}
    assert len({thread for _, thread in done}) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system lets nobody choose")
def test_another_core_than_this_one():
    ours = os.sched_getaffinity(0)
    if len(ours) < 2:
        pytest.skip("one core")
    found: list[set[int]] = []
    beside = Beside()
    beside.start(lambda: None)
    while not beside._thread:
        pass
    try:
        for core in sorted(ours)[:2]:
            os.sched_setaffinity(0, {core})
            beside.start(lambda: None)  # no other core is left: as it was
            os.sched_setaffinity(0, ours)
            beside.start(lambda: found.append(os.sched_getaffinity(0)))
    finally:
        os.sched_setaffinity(0, ours)
        beside.stop()
    assert all(len(cores) == len(ours) - 1 for cores in found)
    assert usable_cores() == len(ours)


def test_a_backend_stops_them():
    backend, threads = NumpyBackend("fp32", 2), []
    with backend:
        for number in (1, 0):
            backend.start_beside(number, lambda: threads.append(threading.current_thread()))
    assert len(threads) == 2
    assert not any(thread.is_alive() for thread in threads)
