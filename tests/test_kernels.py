"""Whose operations compute on the CPU: plain NumPy or the compiled ones, and that a run does not
care which."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpu_microgpt.backend import choose
from gpu_microgpt.backend import numpy as numpy_backend
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.checkpoint import load
from gpu_microgpt.config import Config
from gpu_microgpt.errors import BackendError
from tests.run_helpers import QUIET, assert_same_run, checkpoint, rows, train

KINDS = ("compiled", "reference")
compiled = pytest.mark.skipif(not numpy_backend._compiles("auto"), reason="needs Numba")


def losses(run: Path) -> np.ndarray:
    return np.array([row["loss/train"] for row in rows(run) if "loss/train" in row])


@pytest.fixture
def no_numba(monkeypatch):
    find = numpy_backend.find_spec
    monkeypatch.setattr(
        numpy_backend, "find_spec", lambda name: None if name == "numba" else find(name)
    )


def test_without_numba_it_is_numpy_with_a_hint(no_numba):
    backend = choose(Config.load("names"))
    assert type(backend.ops(np.zeros(64, "u1"))).__name__ == "ReferenceOps"
    assert "kernels: plain NumPy; pip install 'gpu-microgpt[fast]' compiles" in backend.describe()
    assert "pip" not in choose(Config.load("names", ["kernels=reference"])).describe()


def test_without_numba_compiled_is_refused(no_numba):
    with pytest.raises(BackendError, match=r"got compiled, but Numba is not installed: pip inst"):
        choose(Config.load("names", ["kernels=compiled"]))


@compiled
@pytest.mark.parametrize(
    ("asked", "got"),
    [("auto", ("CompiledOps", "SplitOps")), ("reference", ("ReferenceOps",))],
)
def test_it_is_the_one_asked_for(asked, got):
    backend = choose(Config.load("names", [f"kernels={asked}"]))
    assert type(backend.ops(np.zeros(64, "u1"))).__name__ in got


def test_plain_numpy_does_not_load_numba():
    code = "import gpu_microgpt as g, sys; from gpu_microgpt.backend import choose; "
    code += "b = choose(g.Config.load('names', ['kernels=reference'])); b.describe(); "
    code += "print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("dtype", ["u1", "i4", "f4", "f8"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000,)])
def test_memory_begins_where_a_cache_line_does(shape, dtype):
    backend = NumpyBackend()
    for array in (backend.empty(shape, dtype), backend.zeros(shape, dtype)):
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable
    assert not backend.zeros(shape, dtype).any()


@compiled
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize(
    "kind",
    [
        (), ("train.grad_accum=2", "threads=2"), ("data.mode=stream", "optimizer.grad_clip=0.1"),
        ("model.n_embd=18", "model.n_head=3"), ("model.block_size=1",),
    ],
)  # fmt: skip
def test_losses_and_weights_are_the_references(kind, dtype, tmp_path):
    args = (f"dtype={dtype}", *QUIET, "train.log_interval=1", "sample.num=0", *kind)
    runs = [train(tmp_path, *args, f"kernels={k}", f"run.name={k}") for k in KINDS]
    tolerance = 1e-4 if dtype == "fp32" else 1e-11
    assert np.abs(losses(runs[0]) - losses(runs[1])).max() < tolerance
    ours, theirs = (load(checkpoint(run, 12)).weights for run in runs)
    for name, array in theirs.items():
        assert np.abs(ours[name] - array).max() < tolerance, name


@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_a_resumed_run_has_the_same_bits(threads, tmp_path):
    every = ("kernels=compiled", f"threads={threads}", "checkpoint.interval=4")
    whole = train(tmp_path, *every, "run.name=whole")
    part = train(tmp_path, *every, "run.name=part", "train.stop_at=4")
    train(tmp_path, *every, "run.name=part", "resume=auto")
    assert_same_run(part, whole, 12)


@compiled
@pytest.mark.parametrize(("first", "second"), [KINDS, KINDS[::-1]])
def test_a_run_goes_on_with_the_other_kernels(first, second, tmp_path, capsys):
    args = (*QUIET, "train.log_interval=1", "sample.num=0")
    whole = train(tmp_path, *args, "kernels=reference", "run.name=whole")
    part = train(tmp_path, *args, f"kernels={first}", "run.name=part", "train.stop_at=5")
    capsys.readouterr()
    train(tmp_path, *args, f"kernels={second}", "run.name=part", "resume=auto")
    assert "settings changed" not in capsys.readouterr().out
    assert np.abs(losses(part) - losses(whole)).max() < 1e-4
