"""Each fault of mutations.py, put into a copy of the kernels, makes the kernel's tests fail."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.cuda.machine import DTYPES, Machine
from tests.cuda.mutations import MUTATIONS, Mutation
from tests.cuda.sanitized import small
from tests.cuda.test_sanitizers import sanitized
from tests.cuda_on_cpu.build import KERNELS, SANITIZER, CompileError
from tests.cuda_on_cpu.launch import KernelError
from tests.cuda_on_cpu.loader import EmulatedLoader

pytestmark = pytest.mark.skipif(bool(SANITIZER), reason="runs its own sanitizers")

SCHEDULES = [("fifo", 0), ("lifo", 0), ("random", 0), ("random", 1)]
BY_SCHEDULE = [m for m in MUTATIONS if m.mode != "thread"]
BY_THREADS = [m for m in MUTATIONS if m.mode == "thread"]


def name(mutation: Mutation) -> str:
    return f"{mutation.stem}: {mutation.fault}"


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of the kernels with the fault."""
    kernels = folder / "kernels"
    shutil.copytree(KERNELS, kernels)
    path = kernels / (mutation.file or f"{mutation.stem}.cu")
    source = path.read_text("utf-8")
    assert source.count(mutation.old) == 1, f"{path.name} has not once: {mutation.old}"
    path.write_text(source.replace(mutation.old, mutation.new), "utf-8")
    return kernels


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Leaves the mutation's dtype alone in what tests of kernels go through."""
    mutation = request.getfixturevalue("mutation")
    for other in set(DTYPES) - {mutation.dtype} if mutation.dtype else ():
        monkeypatch.delitem(DTYPES, other)


def failing(stem: str, folder: Path) -> Iterator[tuple[str, int]]:
    """The schedules in which the kernel's tests fail."""
    for order, seed in SCHEDULES:
        try:
            small(stem)(Machine(EmulatedLoader(order, seed, folder=folder)))
        except CompileError:
            raise
        except (AssertionError, KernelError):
            yield order, seed


@cache
def passes(stem: str, order: str, seed: int, dtypes: tuple[str, ...]) -> bool:
    """Whether the tests pass with the kernel as it is; dtypes are those left by `only`."""
    small(stem)(Machine(EmulatedLoader(order, seed)))
    return True


@pytest.mark.parametrize("mutation", BY_SCHEDULE, ids=name)
def test_a_schedule_shows_it(mutation, only, tmp_path):
    caught = next(failing(mutation.stem, mutated(mutation, tmp_path)), None)
    assert caught, f"passes with this fault: {mutation}"
    assert passes(mutation.stem, *caught, tuple(DTYPES))


@pytest.mark.parametrize("mutation", BY_THREADS, ids=name)
def test_thread_sanitizer_shows_it(mutation, tmp_path):
    """That it passes without the fault: test_sanitizers.py."""
    folder = str(mutated(mutation, tmp_path))
    done = sanitized("thread", tmp_path / "log", mutation.stem, "--kernels", folder)
    assert done.returncode == 1, done.stdout
    assert "data race" in done.stdout
