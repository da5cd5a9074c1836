"""Threads for tasks that are done beside this thread at the same moment, or not worth doing.

A thread that is woken may be put on the core of the one that woke it, where it waits until that one
sleeps: for tasks of some milliseconds that is for good. So, where the system lets us (Linux), it is
first kept off that core.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress


class Beside:
    """One such thread, which is made with its first task."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._thread = 0  # the system's number of it
        self._pool = ThreadPoolExecutor(1, "beside", initializer=self._begin)

    def start(self, task: Callable[[], None]) -> Future[None]:
        """Do the task behind those given before, on another core than this one."""
        if self._thread:
            _keep_off_this_core(self._thread)
        return self._pool.submit(task)

    def stop(self) -> None:
        """Wait for the tasks, and end the thread."""
        self._pool.shutdown()

    def _begin(self) -> None:
        self._thread = threading.get_native_id()


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_off_this_core(thread: int) -> None:
    """Let a thread run on all cores that this one may run on, but for the one it runs on now."""
    if _core_now is None:
        return
    with suppress(OSError):  # the system may refuse: then it chooses itself
        others = os.sched_getaffinity(0) - {_core_now()}
        if others:
            os.sched_setaffinity(thread, others)


def _c_function(name: str) -> Callable[[], int] | None:
    """Of the C library, where there is such a one, and threads may be bound to cores."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


_core_now = _c_function("sched_getcpu")
