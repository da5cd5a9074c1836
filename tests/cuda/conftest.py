from __future__ import annotations

import pytest

from tests.cuda.machine import DTYPES, Gpu, Machine, gpu_is_there
from tests.cuda.stand_in import StandInGpu, install
from tests.cuda.stand_in_cases import started
from tests.cuda_on_cpu.build import SANITIZER
from tests.cuda_on_cpu.loader import EmulatedLoader

SCHEDULES = {
    "": [("fifo", 0, False), ("lifo", 0, False), ("random", 0, False), ("random", 1, False)],
    "address": [("fifo", 0, False)],
    "thread": [("random", 0, True)],  # all blocks side by side: finds races between them
}[SANITIZER]
GPU = ("gpu", 0, False)
if gpu_is_there() and not SANITIZER:
    SCHEDULES = [*SCHEDULES, GPU]


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s[0]}{s[1] or ''}")
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == GPU:
        return Gpu()
    order, seed, resident = request.param
    return Machine(EmulatedLoader(order, seed, resident))


@pytest.fixture(params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["lifo", *(["gpu"] if GPU in SCHEDULES else [])])
def one(request: pytest.FixtureRequest) -> Machine:
    """One schedule, for what takes long; and the GPU."""
    return Gpu() if request.param == "gpu" else Machine(EmulatedLoader(request.param))


@pytest.fixture(params=["stand-in", *(["gpu"] if gpu_is_there() else [])])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where `backend=cupy` computes."""
    if request.param == "stand-in":
        install(monkeypatch, guarded=False)
    return str(request.param)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[StandInGpu]:
    """`backend=cupy` computes on stand-ins: those opened so far."""
    return install(monkeypatch, guarded=False)


@pytest.fixture
def gpu() -> StandInGpu:
    """A GPU on the CPU, active in this thread."""
    return started()
