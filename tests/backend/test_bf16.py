"""dtype bf16 on the CPU: where it runs, what it says, and how it is refused elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.arena import array_bytes
from gpu_microgpt.backend import choose
from gpu_microgpt.backend import numpy as numpy_backend
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.config import Config
from gpu_microgpt.dims import Dims
from gpu_microgpt.errors import BackendError
from tests.backend import fake_cupy
from tests.bf16_cases import every_unit, needs_bf16

REASON = "AVX512_BF16; the system lets no process use AMX"
needs_numba = pytest.mark.skipif(not numpy_backend._compiles("auto"), reason="needs Numba")


def chosen(*overrides: str) -> NumpyBackend:
    backend = choose(Config.load("names", ["dtype=bf16", *overrides]))
    assert isinstance(backend, NumpyBackend)
    return backend


def refusal(*overrides: str) -> str:
    with pytest.raises(BackendError) as error:
        chosen(*overrides)
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.fixture
def here(monkeypatch):
    """Say what the CPU has."""

    def has(unit: str) -> None:
        monkeypatch.setattr("gpu_microgpt.ops.cpu.bf16_unit", lambda: unit)

    return has


@needs_numba
@pytest.mark.parametrize(
    ("unit", "kind"), [("AMX", "AmxOps"), ("AVX512_BF16", "DotOps"), (REASON, "DotOps")]
)
def test_what_computes_is_said(here, unit, kind):
    here(unit)
    backend = chosen("backend=numpy")
    assert f", bfloat16 products ({unit}), sums in float32, " in backend.describe()
    assert backend.dtype == backend.master == np.float32
    assert type(backend.ops(np.zeros(64, "u1"))).__name__ == kind


@needs_numba
def test_auto_is_numpy_where_there_is_no_gpu(here, monkeypatch):
    fake_cupy.install(monkeypatch).failing["getDeviceCount"] = 100
    here("AMX")
    assert "(auto: no NVIDIA GPU is seen" in chosen().describe()
    here("")
    line = refusal()
    assert line.startswith("dtype: got bf16, wanted a CPU with AMX or AVX512_BF16")
    assert "; and backend cupy cannot run: no NVIDIA GPU is seen" in line


@needs_numba
def test_small_models_are_cut_into_smaller_pieces(here):
    here("AMX")
    narrow, plain = chosen("backend=numpy", "threads=2"), NumpyBackend("fp32", 2)
    small, large = 32 * 256 * 5e6, 32 * 256 * 6e7
    assert (narrow.split(32, 256, small), narrow.split(32, 256, large)) == ((2, 16), (2, 4))
    assert plain.split(32, 256, small) == plain.split(32, 256, large) == (2, 4)


@needs_numba
def test_auto_dtype_stays_float32(here):
    here("AMX")
    assert (
        ", float32 (products on AMX" in choose(Config.load("names", ["backend=numpy"])).describe()
    )
    here("")
    assert ", float32, " in choose(Config.load("names", ["backend=numpy"])).describe()


@needs_numba
def test_a_cpu_without_it_is_refused(here):
    here("")
    assert refusal("backend=numpy") == (
        "dtype: got bf16, wanted a CPU with AMX or AVX512_BF16, which this one has not: dtype=fp32"
    )


def test_plain_numpy_is_refused(monkeypatch):
    line = "dtype: got bf16, which needs compiled kernels: {}, or dtype=fp32"
    assert refusal("backend=numpy", "kernels=reference") == line.format("kernels=compiled")
    monkeypatch.setattr(numpy_backend, "find_spec", lambda name: None)
    assert refusal("backend=numpy") == line.format(numpy_backend.INSTALL)


@needs_numba
@pytest.mark.parametrize(
    ("features", "asked", "unit"),
    [
        ({"+avx512bf16"}, None, "AVX512_BF16"), ({"+avx512f"}, None, ""),
        ({"+avx512bf16", "+amx-bf16", "+amx-tile"}, True, "AMX"),
        ({"+avx512bf16", "+amx-bf16", "+amx-tile"}, False, REASON),
    ],
)  # fmt: skip
def test_the_unit_is_what_cpu_and_system_allow(monkeypatch, features, asked, unit):
    from gpu_microgpt.ops.cpu import amx

    monkeypatch.setattr(amx, "FEATURES", features)
    monkeypatch.setattr(amx, "HAS_AMX", {"+amx-bf16", "+amx-tile"} <= features)
    monkeypatch.setattr(amx, "permitted", lambda: asked)
    assert amx.bf16_unit() == unit


@needs_numba
def test_only_linux_is_asked(monkeypatch):
    from gpu_microgpt.ops.cpu import amx

    for system, machine in (("win32", "AMD64"), ("darwin", "x86_64"), ("linux", "aarch64")):
        monkeypatch.setattr(amx.sys, "platform", system)
        monkeypatch.setattr(amx.platform, "machine", lambda machine=machine: machine)
        assert not amx.permitted.__wrapped__()


@needs_bf16
@every_unit
def test_memory_is_planned(here, unit):
    """Every product and attention fits the workspace, which it may fill."""
    from gpu_microgpt.ops.cpu import AmxOps
    from gpu_microgpt.ops.cpu.bf16_linear import bf16_scratch

    here(unit)
    backend = chosen("backend=numpy")
    for c, v, t in ((4, 3, 8), (20, 1000, 8), (128, 66, 8), (16, 3, 300)):
        planned = backend.workspace_bytes(Dims(1, 1, c, t, v), 2 * t)
        wanted = [bf16_scratch(*w, 4) for w in ((3 * c, c), (4 * c, c), (c, 4 * c), (v, c))]
        for shapes in (*wanted, AmxOps.attention_scratch(c, 1, t)):
            assert sum(array_bytes(shape, 4) for shape in shapes) <= planned
