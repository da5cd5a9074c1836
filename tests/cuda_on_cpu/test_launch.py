"""The host's side of the emulator: arguments, copies, compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from tests.cuda_on_cpu import build, compiler
from tests.cuda_on_cpu.build import CompileError, EmulatedModule
from tests.cuda_on_cpu.sanitize import SANITIZER

pytestmark = pytest.mark.skipif(bool(SANITIZER), reason="the emulator is tested without sanitizers")

SOURCE = """
#include "device.cuh"
extern "C" __global__ void add(float* y, const float* a, const float* b, int n, float scale) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = a[i] + scale * (b ? b[i] : 1.0f);
}
extern "C" __global__ void __launch_bounds__(64) kinds(bf16* a, const uint64_t* b, double c,
                                                       unsigned char d, const void* e) {}
"""


@pytest.fixture
def kernels(tmp_path):
    path = tmp_path / "sums.cu"
    path.write_text(SOURCE)
    return EmulatedModule(path, ("REAL_BF16=0",))


def numbers(n: int, first: float = 0.0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.float32)


def add(kernels, y, a, b, **how):
    kernels.get_function("add")((1,), (32,), (y, a, b, np.int32(a.size), np.float32(2)), **how)


# -------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize("guard", ["after", "before", "heap", ""])
def test_results_come_back(kernels, guard):
    y, a, b = numbers(37), numbers(37), numbers(37, 5)
    add(kernels, y, a, b, guard=guard)
    assert np.array_equal(y, a + 2 * b)
    add(kernels, y, a, None, guard=guard)
    assert np.array_equal(y, a + 2)
    add(kernels, y, a, np.uintp(0), guard=guard)
    assert np.array_equal(y, a + 2)


@pytest.mark.parametrize("guard", ["after", "before", "heap"])
def test_arguments_may_be_one_array_or_overlap(kernels, guard):
    x, b = numbers(37), numbers(37)
    add(kernels, x, x, b, guard=guard)
    assert np.array_equal(x, 3 * b)
    whole = numbers(50)
    add(kernels, whole[:20], whole[10:30], whole[30:50], guard=guard)
    assert np.array_equal(whole[20:], numbers(30, 20))
    assert whole[0] == 10 + 2 * 30


def test_inputs_may_be_read_only_outputs_may_not(kernels):
    a = numbers(8)
    a.flags.writeable = False
    y = np.zeros(8, np.float32)
    add(kernels, y, a, a)
    assert np.array_equal(y, 3 * a)
    with pytest.raises(TypeError, match="add: argument 0: got a read-only array, wanted one the"):
        add(kernels, a, a, a)
    assert np.array_equal(a, numbers(8))


def test_empty_arrays(kernels):
    empty = np.zeros(0, np.float32)
    add(kernels, empty, empty, empty)


def test_wrong_arguments_are_named(kernels):
    kernel, x = kernels.get_function("add"), numbers(4)
    one, two = np.int32(1), np.float32(2)

    def refused(message, *args):
        with pytest.raises(TypeError, match=message):
            kernel((1,), (32,), args)

    refused("add: got 4 arguments, wanted 5", x, x, x, one)
    refused("argument 1: got float64, wanted float32", x, x.astype(float), x, one, two)
    refused("argument 2: got int, wanted an array", x, x, 7, one, two)
    refused("argument 3: got int64, wanted int32", x, x, x, 1, two)
    refused("argument 4: got float64, wanted float32", x, x, x, one, 2.0)
    refused("argument 4: got int32, wanted float32", x, x, x, one, one)
    refused(r"argument 3: got int32 \(1,\), wanted int32", x, x, x, np.ones(1, np.int32), two)


def test_signature(kernels):
    kernel = kernels.get_function("kinds")
    assert kernel.signature == ["Pb2", "pu8", "f8", "u1", "pv1"]
    words = np.zeros(2, np.uint64)
    kernel((1,), (1,), (np.zeros(2, ml_dtypes.bfloat16), words, np.float64(1), np.uint8(1), words))


def test_no_blocks_are_one_block_as_with_cupy(kernels):
    y, a = np.zeros(3, np.float32), numbers(3)
    kernels.get_function("add")((0,), (32,), (y, a, a, np.int32(3), np.float32(2)))
    assert np.array_equal(y, 3 * a)


@pytest.mark.parametrize(("grid", "block"), [((1,), (1025,)), ((1,), (32, 64))])
def test_impossible_launches(kernels, grid, block):
    args = (*[numbers(1)] * 3, np.int32(1), np.float32(1))
    with pytest.raises(build.KernelError, match="empty or too large"):
        kernels.get_function("add")(grid, block, args)
    with pytest.raises(build.KernelError, match="more dynamic shared memory than any GPU"):
        kernels.get_function("add")((1,), (32,), args, shared_mem=228 << 10)


# -------------------------------------------------------------------------------------- compiling
def test_compiler_errors_are_shown(tmp_path):
    path = tmp_path / "broken.cu"
    path.write_text('#include "device.cuh"\nextern "C" __global__ void k(int* x) { *x = nothing; }')
    with pytest.raises(CompileError, match=r"broken.cu:[\s\S]*‘?'?nothing"):
        EmulatedModule(path)


def test_unknown_kernel(kernels):
    with pytest.raises(AttributeError, match="emu_launch_nothing"):
        kernels.get_function("nothing")


def test_headers_beside_the_kernel_come_first(tmp_path):
    path = tmp_path / "k.cu"
    path.write_text('#include "device.cuh"\nextern "C" __global__ void k(int* x) { *x = ANSWER; }')
    text = (build.KERNELS / "device.cuh").read_text("utf-8")
    for answer in (42, 43):  # and a changed header means another library
        (tmp_path / "device.cuh").write_text(f"{text}\n#define ANSWER {answer}\n")
        x = np.zeros(1, np.int32)
        EmulatedModule(path).get_function("k")((1,), (1,), (x,))
        assert x[0] == answer


def test_processes_may_compile_the_same_file_at_once(tmp_path):
    compiler.require_compiler()
    path = tmp_path / "sums.cu"
    path.write_text(SOURCE)
    code = (
        "from pathlib import Path\nfrom tests.cuda_on_cpu.build import EmulatedModule\n"
        f"print(EmulatedModule(Path({str(path)!r})).get_function('add').name)"
    )
    environment = {**os.environ, "CUDA_ON_CPU_CACHE": str(tmp_path / "cache")}

    def compile_it(_: int) -> str:
        command = [sys.executable, "-c", code]
        root = build.KERNELS.parent
        return subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(compile_it, range(2))) == ["add", "add"]
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".so"]


def test_without_a_compiler_tests_are_skipped(tmp_path, monkeypatch):
    path = tmp_path / "sums.cu"
    path.write_text(SOURCE)
    monkeypatch.setattr(compiler, "COMPILER", "no-such-compiler")
    with pytest.raises(pytest.skip.Exception, match="no-such-compiler is missing"):
        EmulatedModule(path)


def test_a_cache_of_someone_else_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "sums.cu"
    path.write_text(SOURCE)
    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        EmulatedModule(path)
