"""What holds for all tests: some cannot be imported on some systems, most are the CPU's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpu_microgpt.backend.usable import NoGpuError

# CUDA kernels on the CPU: made of Linux's memory mapping and g++'s fibers
collect_ignore = ["cuda", "cuda_on_cpu"] if sys.platform == "win32" else []

WITH_GPUS = {"cuda", "backend"}  # folders whose tests say themselves where they run


@pytest.fixture(autouse=True)
def backend_auto_is_numpy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of the machine that tests run on is not to change what others of them compute."""
    if WITH_GPUS & set(Path(str(request.path)).relative_to(Path(__file__).parent).parts):
        return

    def hidden(device_id: int) -> None:
        raise NoGpuError("this test is the CPU's", "see tests/conftest.py")

    monkeypatch.setattr("gpu_microgpt.backend.cupy.open_gpu", hidden)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes it starts
