"""Which backend it is, and what is said where it cannot be the one asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpu_microgpt.backend import choose, usable
from gpu_microgpt.config import Config
from gpu_microgpt.errors import BackendError, ConfigError
from tests.backend import fake_cupy

CUDA13 = "pip install 'gpu-microgpt[cuda13]', or [cuda12] with a driver older than 580"


@pytest.fixture
def fake(monkeypatch):
    """A machine with two GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake_cupy.install(monkeypatch)


def config(*overrides: str) -> Config:
    return Config.load("names", overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(BackendError) as error:
        choose(config(*overrides))
    line = str(error.value)
    assert "\n" not in line
    return line


def test_on_a_gpu(fake):
    for overrides, dtype, why in (
        (["backend=cupy"], "bf16", ""),
        (["backend=cupy", "dtype=tf32"], "tf32", ""),
        (["backend=auto"], "bf16", " (auto)"),
        (["backend=auto", "dtype=fp32", "rng=microgpt", "data.val_fraction=0"], "fp32", " (auto)"),
    ):
        backend = choose(config(*overrides))
        assert backend.name == "cupy"
        assert backend.describe().startswith("NVIDIA H200 (sm_90, 1.0 GiB), driver 13.0, CuPy 14.2")
        assert backend.describe().endswith(f", {dtype}{why}")


def test_the_device_is_the_one_asked_for(fake):
    gpu = choose(config("backend=cupy", "device=1")).gpu
    assert fake_cupy.streams[gpu.stream].device == 1
    for count, wanted in (2, "0 to 1"), (1, "0"):
        fake.devices = count
        for backend in ("cupy", "auto"):
            with pytest.raises(ConfigError, match=f"device: got 2, wanted {wanted}, the GPUs that"):
                choose(config(f"backend={backend}", "device=2"))
    with pytest.raises(ConfigError, match="device: got -1, wanted integer >= 0"):
        config("device=-1")


def test_numpy_is_numpy(fake):
    for overrides in (["backend=numpy"], ["backend=numpy", "dtype=fp64"], ["dtype=fp64"]):
        assert choose(config(*overrides)).name == "numpy"
    assert not fake.log
    assert "(auto: fp64 is for numpy)" in choose(config("dtype=fp64")).describe()
    assert "auto" not in choose(config("backend=numpy")).describe()
    assert refusal("backend=numpy", "dtype=tf32").startswith("dtype: got tf32; backend numpy runs")


def broken(monkeypatch, fake, how: str) -> None:
    """Take something away."""
    if how == "no CuPy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    elif how == "no driver":
        monkeypatch.setattr(usable, "_loads", lambda library: library != usable.DRIVER)
    elif how == "old CuPy":
        sys.modules["cupy"].__version__ = "13.6.0"
    elif how == "no GPU":
        fake.failing["getDeviceCount"] = 100
    elif how == "none":
        fake.devices = 0
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    elif how == "old driver":
        fake.failing["getDeviceCount"], fake.driver = 35, 12040
    elif how == "older driver":
        fake.failing["getDeviceCount"], fake.driver, fake.built = 35, 11080, 12090
    elif how == "no start":
        fake.failing["getDeviceCount"] = 802
    elif how == "no ml_dtypes":
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    elif how == "no NVRTC":
        sys.modules["cupy.cuda.nvrtc"].getVersion = _no_library
    elif how == "no cuBLASLt":
        monkeypatch.setattr("gpu_microgpt.backend.cupy.CublasLt", _no_cublaslt)
    elif how == "old GPU":
        fake.properties |= {"name": b"Tesla V100", "major": 7}


def _no_library():
    raise RuntimeError("CuPy failed to load libnvrtc.so.13: OSError: cannot open\nmore")


def _no_cublaslt():
    raise BackendError("cuBLASLt cannot be loaded (not found): pip install it")


LINES = {
    "no CuPy": ("CuPy is not installed", CUDA13),
    "no driver": ("there is no NVIDIA driver", f"{usable.DRIVER} cannot be loaded; install NVIDIA's"
                  " driver, or use backend=numpy"),
    "old CuPy": ("CuPy 13.6.0 is too old", f"wanted 14.0; {CUDA13}"),
    "no GPU": ("no NVIDIA GPU is seen", "see whether nvidia-smi lists one, or use backend=numpy"),
    "none": ("no NVIDIA GPU is seen with CUDA_VISIBLE_DEVICES=-1", "see whether nvidia-smi"),
    "old driver": ("the driver knows CUDA 12.4, CuPy wants 13.2", "install a newer NVIDIA driver, "
                   "or pip uninstall cupy-cuda13x and pip install 'gpu-microgpt[cuda12]'"),
    "older driver": ("the driver knows CUDA 11.8, CuPy wants 12.9",
                     "install a newer NVIDIA driver"),
    "no start": ("CUDA does not start (cudaErrorSystemNotReady: system not yet initialized)",
                 "see whether nvidia-smi works"),
    "no ml_dtypes": ("ml_dtypes is not installed", CUDA13),
    "no NVRTC": ("CUDA's compiler NVRTC cannot be loaded (CuPy failed to load libnvrtc.so.13: "
                 "OSError: cannot open)", "pip install 'gpu-microgpt[cuda13]'"),
    "no cuBLASLt": ("cuBLASLt cannot be loaded (not found)", "pip install it"),
    "old GPU": ("Tesla V100: got sm_70, wanted sm_75 (Turing) or newer", ""),
}  # fmt: skip


@pytest.mark.parametrize("how", LINES)
def test_what_is_missing_is_one_line(monkeypatch, fake, how):
    why, remedy = LINES[how]
    broken(monkeypatch, fake, how)
    line = refusal("backend=cupy")
    assert line.startswith(f"{why}: {remedy}" if remedy else why)
    backend = choose(config())
    assert backend.name == "numpy"
    assert f" (auto: {why}" in backend.describe()
    for dtype, says in (
        ("tf32", "dtype: got tf32, which only backend cupy runs, and it cannot: "),
        ("bf16 kernels=reference", "dtype: got bf16, which needs compiled kernels: "),
    ):
        line = refusal(*f"dtype={dtype}".split())
        assert line.startswith(says)
        assert why in line
        assert remedy in line


def test_cupy_that_cannot_be_imported(monkeypatch, fake, tmp_path):
    monkeypatch.delitem(sys.modules, "cupy")
    (tmp_path / "cupy.py").write_text("raise ImportError('numpy is\\n too old')")
    monkeypatch.syspath_prepend(tmp_path)
    line = refusal("backend=cupy")
    assert line == f"CuPy cannot be imported: numpy is too old: {CUDA13}"
    assert "(auto: CuPy cannot be imported)" in choose(config()).describe()


def test_the_wheels_number_is_the_installed_ones(monkeypatch, fake):
    broken(monkeypatch, fake, "older driver")
    assert "pip" not in refusal("backend=cupy")  # no wheel of ours is old enough


def test_models_and_dtypes_it_does_not_run(fake):
    odd = ["model.n_embd=24", "model.n_head=4"]
    line = (
        "backend cupy: model.n_head: got 4, heads of 6 channels; wanted a multiple of 4 up to 128"
    )
    assert refusal("backend=cupy", *odd) == f"{line}; or backend=numpy"
    assert f"(auto: {line}" in choose(config(*odd)).describe()
    assert line in refusal("dtype=tf32", *odd)
    assert refusal("backend=cupy", "dtype=fp64").startswith("dtype: got fp64; backend cupy runs")
    fake.properties |= {"major": 7, "minor": 5}
    assert refusal("backend=cupy", "dtype=bf16") == (
        "dtype: got bf16; NVIDIA H200 (sm_75) runs fp32 only: dtype=fp32"
    )
    assert choose(config()).describe().endswith(", fp32 (auto)")
    assert "runs fp32 only" in refusal("dtype=tf32")


def test_a_gpu_that_fails_to_open_is_not_usable(fake):
    fake.failing["setDevice(1)"] = 2
    assert refusal("backend=cupy", "device=1").startswith("GPU 1 cannot be used: the GPU is out of")
    assert "(auto: GPU 1 cannot be used" in choose(config("device=1")).describe()


PLAIN = """
import sys
import gpu_microgpt
from gpu_microgpt.backend import choose, usable
from gpu_microgpt.config import Config
usable._loads = lambda library: False
for backend in "numpy", "auto":
    print(choose(Config.load("names", [f"backend={backend}"])).name)
assert not [name for name in sys.modules if name.partition(".")[0] == "cupy"]
"""


def test_the_cpu_imports_no_cupy():
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["numpy", "numpy"]


def test_a_library_is_found_or_not():
    assert not usable._loads("libno-such-library.so.1")
