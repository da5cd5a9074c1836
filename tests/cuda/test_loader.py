"""Kernels onto a GPU: a stand-in for CuPy, whose names are looked for in the real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gpu_microgpt.errors import BackendError, DeviceError
from gpu_microgpt.ops.cuda import CudaOps, cache, loader
from gpu_microgpt.ops.cuda.cache import KernelCache
from gpu_microgpt.ops.cuda.compiler import Compiled
from gpu_microgpt.ops.cuda.device import KNOWN
from gpu_microgpt.ops.cuda.loader import CudaLoader, device_properties
from tests.backend.fake_cupy import CLOCK_KHZ, PROPERTIES, CUDARuntimeError


class Driver(ModuleType):
    """CUDA's driver with one GPU, and CuPy's names for it; notes what it is told."""

    CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
    cudaDevAttrClockRate = 13  # noqa: N815

    def __init__(self) -> None:
        super().__init__("cupy.cuda.driver")
        self.loaded: list[bytes] = []
        self.limits: list[tuple[int, int, int]] = []
        self.properties = dict(PROPERTIES)
        self.static = 0
        self.status = 0  # what loading and launching fail with

    def funcGetAttribute(self, attribute: int, function: int) -> int:  # noqa: N802
        assert attribute == 1
        return self.static

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:  # noqa: N802
        if value + self.static > self.properties["sharedMemPerBlockOptin"]:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.limits.append((function, attribute, value))

    def deviceGetAttribute(self, attribute: int, device: int) -> int:  # noqa: N802
        assert (attribute, device) == (13, 0)
        return CLOCK_KHZ

    def check(self) -> None:
        if self.status:
            raise CUDARuntimeError(self.status)

    def getDeviceProperties(self, device: int) -> dict[str, object]:  # noqa: N802
        if device:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        return self.properties


@pytest.fixture
def driver(monkeypatch):
    """The stand-in, in CuPy's place."""
    driver = Driver()

    class Function:
        def __init__(self, name: str) -> None:
            if name == "missing":
                raise RuntimeError("CUDA_ERROR_NOT_FOUND: named symbol not found")
            self.name, self.ptr, self.launches = name, hash(name), []

        def __call__(self, grid, block, args, shared_mem=0):
            driver.check()
            self.launches.append((grid, block, args, shared_mem))

    class Module:
        def load(self, cubin: bytes) -> None:
            driver.check()
            driver.loaded.append(cubin)

        def get_function(self, name: str) -> Function:
            return Function(name)

    cuda = ModuleType("cupy.cuda")
    cuda.driver = cuda.runtime = driver
    cuda.function = ModuleType("cupy.cuda.function")
    cuda.function.Module = Module
    for module in (ModuleType("cupy"), cuda, cuda.function):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return driver


@pytest.fixture
def compiled(monkeypatch):
    """Programs that were compiled."""
    monkeypatch.setattr(cache, "compiler_release", lambda: "13.5.37")
    return []


@pytest.fixture
def kernels(driver, compiled, tmp_path):
    """Makes a loader, as at a start."""

    def compile(program):
        compiled.append(program)
        return Compiled(f"cubin of {program}".encode(), "")

    return lambda arch="sm_90": CudaLoader(KNOWN[arch], KernelCache(tmp_path, compile))


def test_a_file_is_compiled_and_loaded_once(kernels, compiled, driver):
    loader = kernels()
    for name in ("relu", "relu_backward", "relu"):
        assert loader.function("relu", name, ("REAL_BF16=1",)).name == name
    assert [str(program) for program in compiled] == ["relu.cu REAL_BF16=1 for sm_90"]
    assert driver.loaded == [b"cubin of relu.cu REAL_BF16=1 for sm_90"]
    loader.function("relu", "relu", ("REAL_BF16=0",))
    assert len(compiled) == len(driver.loaded) == 2


def test_a_second_start_compiles_nothing(kernels, compiled, driver):
    kernels().function("relu", "relu", ("REAL_BF16=1",))
    kernels().function("relu", "relu", ("REAL_BF16=1",))
    assert len(compiled) == 1
    assert driver.loaded[0] == driver.loaded[1]


def test_the_devices_own_architecture_is_compiled_for(kernels, compiled):
    kernels("sm_75").function("relu", "relu", ())
    assert compiled[0].arch == "sm_75"
    assert compiled[0].source == (loader.kernels_folder() / "relu.cu").read_text("utf-8")
    assert compiled[0].header == (loader.kernels_folder() / "device.cuh").read_text("utf-8")


def test_launchers_can_use_it(kernels, driver):
    ops = CudaOps(np.float32, KNOWN["sm_90"], kernels(), np.empty(0, np.uint8))
    kernel = ops.kernel("relu", "relu")
    kernel((3,), (256,), (np.int64(7),), shared_mem=0)
    assert kernel.function.launches == [((3,), (256,), (np.int64(7),), 0)]


def test_large_shared_memory_is_asked_for_and_never_taken_back(kernels, driver):
    loader = kernels()

    def ask(shared: int) -> list[int]:
        loader.function("relu", "relu", (), shared)
        return [value for _, attribute, value in driver.limits if attribute == 8]

    assert ask(0) == []
    assert ask(48 << 10) == []
    assert ask(100_000) == [100_000]
    assert ask(60_000) == [100_000]  # the same kernel is still launched with 100,000 elsewhere
    assert ask(200_000) == [100_000, 200_000]
    loader.function("relu", "relu_backward", (), 60_000)
    assert [value for *_, value in driver.limits] == [100_000, 200_000, 60_000]


def test_static_shared_memory_counts(kernels, driver):
    driver.static = 1024
    loader = kernels()
    loader.function("relu", "relu", (), 47 << 10)
    assert driver.limits == []
    loader.function("relu", "relu", (), 48 << 10)
    assert [value for *_, value in driver.limits] == [48 << 10]


def test_what_the_driver_refuses_is_one_line(kernels):
    with pytest.raises(
        BackendError, match=r"relu.cu: the driver refuses kernel missing .*NOT_FOUND"
    ):
        kernels().function("relu", "missing", ())
    with pytest.raises(
        BackendError, match=r"kernel relu with 999,999 bytes of shared memory on H200 \(sm_90\)"
    ):
        kernels().function("relu", "relu", (), 999_999)
    with pytest.raises(BackendError, match=r"nowhere.cu: cannot be read"):
        kernels().function("nowhere", "relu", ())


def test_a_failure_of_the_gpu_is_one_line(kernels, driver):
    loader = kernels()
    kernel = loader.function("relu", "relu", ())
    for status, wanted in (700, "failed .*; this process cannot"), (2, "is out of memory"):
        driver.status = status
        with pytest.raises(DeviceError, match=f"the GPU {wanted}"):
            kernel((1,), (1,), ())
        with pytest.raises(DeviceError, match=f"the GPU {wanted}"):
            loader.function("relu", "relu", ("REAL_BF16=1",))
    driver.status = 802
    with pytest.raises(DeviceError, match=r"the GPU refused \(launching relu: cudaErrorSystemNot"):
        kernel((1,), (1,), ())
    with pytest.raises(
        BackendError, match=r"the driver refuses kernel relu .*: cudaErrorSystemNot"
    ):
        loader.function("relu", "relu", ("REAL_BF16=1",))
    kernel.function = _broken
    with pytest.raises(RuntimeError, match="a fault of ours"):
        kernel((1,), (1,), ())


def _broken(*arguments):
    raise RuntimeError("a fault of ours")


def test_properties(driver):
    found, known = device_properties(), KNOWN["sm_90"]
    assert found.name == "NVIDIA H200"
    assert {**vars(found), "name": ""} == {**vars(known), "name": ""}
    with pytest.raises(BackendError, match=r"GPU 1 cannot be used: .*invalid device ordinal"):
        device_properties(1)
    driver.properties |= {"name": b"Tesla V100", "major": 7}
    with pytest.raises(BackendError, match=r"Tesla V100: got sm_70, wanted sm_75 .* or newer"):
        device_properties()


WITHOUT = """
import sys
sys.modules["cupy"] = None
from pathlib import Path
import gpu_microgpt.ops.cuda
from gpu_microgpt.errors import BackendError
from gpu_microgpt.ops.cuda import cache, compiler, loader, table
for call in (loader.device_properties, compiler.compiler_release):
    try:
        call()
    except BackendError as error:
        print(error)
"""


def test_without_cupy_everything_can_be_imported():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("CuPy cannot be imported (") for line in lines)
    assert all("pip install 'gpu-microgpt[cuda13]'" in line for line in lines)


def test_cupy_has_what_is_used():
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install -e '.[kernels-test]'")
    from cupy.cuda import driver, function, nvrtc, runtime

    wanted = {
        function.Module: ("load", "get_function"),
        driver: [name for name in vars(Driver) if name.startswith(("func", "CU_"))],
        nvrtc: ("getVersion", "getSupportedArchs", "createProgram", "compileProgram", "getCUBIN",
                "getProgramLog", "destroyProgram", "NVRTCError"),
        runtime: ("getDeviceProperties", "deviceGetAttribute"),
    }  # fmt: skip
    for owner, names in wanted.items():
        assert not [name for name in names if not hasattr(owner, name)]
    assert driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES == 1
    assert runtime.cudaDevAttrClockRate == 13
    assert driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8
    assert "int attribute, intptr_t f" in driver.funcGetAttribute.__doc__
    assert "intptr_t f, int attribute, int value" in driver.funcSetAttribute.__doc__
