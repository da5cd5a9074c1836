from __future__ import annotations

import sys
from typing import Any

import pytest

from gpu_microgpt.backend.cupy import open_gpu
from tests.backend import fake_cupy


def _gpu_is_there() -> bool:
    """Whether CuPy is installed and finds a GPU."""
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.cuda.is_available())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> fake_cupy.Fake:
    """A stand-in for CuPy."""
    return fake_cupy.install(monkeypatch)


@pytest.fixture
def only(fake: fake_cupy.Fake) -> Any:
    """A GPU of the stand-in's."""
    return open_gpu(0)


REAL = ["gpu"] if _gpu_is_there() else []
ENGINES = (
    ["engine", "late engine"] if sys.platform == "linux" else []
)  # what the engine's tests use


@pytest.fixture(params=["stand-in", *REAL])
def gpu(request: pytest.FixtureRequest) -> Any:
    """The same, and a real one where there is one."""
    return open_gpu(0) if request.param == "gpu" else request.getfixturevalue("only")


@pytest.fixture(params=["stand-in", *ENGINES, *REAL])
def any_gpu(request: pytest.FixtureRequest) -> Any:
    """And the other stand-in, whose faults are AssertionErrors: they must not differ."""
    if "engine" in request.param:
        from tests.cuda.stand_in import StandInGpu

        return StandInGpu(late=request.param == "late engine")
    return open_gpu(0) if request.param == "gpu" else request.getfixturevalue("only")
