"""The CUDA backend over a GPU that is not there."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from gpu_microgpt.backend.cuda import CudaBackend, unsupported
from gpu_microgpt.backend.cupy import open_gpu
from gpu_microgpt.config import Config
from gpu_microgpt.dims import Dims
from gpu_microgpt.errors import BackendError, DeviceError
from gpu_microgpt.ops.cuda import workspace_bytes
from gpu_microgpt.ops.cuda.batch import GATHER_BLOCK, MAX_BATCH, MAX_ROWS
from gpu_microgpt.ops.cuda.context import WARP, ceil_div
from gpu_microgpt.ops.cuda.device import KNOWN
from gpu_microgpt.ops.cuda.gemm import GEMM_WORKSPACE
from gpu_microgpt.ops.cuda.rmsnorm import WARPS_BLOCK
from tests.backend import fake_cupy


@pytest.fixture
def gpu(only):
    return only


@pytest.mark.parametrize(
    ("dtype", "arch", "mode", "name"),
    [
        ("auto", "sm_90", "bf16", "bfloat16"),
        ("auto", "sm_75", "fp32", "float32"),
        ("bf16", "sm_80", "bf16", "bfloat16"),
        ("tf32", "sm_80", "tf32", "float32"),
        ("fp32", "sm_90", "fp32", "float32"),
        ("fp32", "sm_75", "fp32", "float32"),
    ],
)
def test_dtypes(gpu, dtype, arch, mode, name):
    gpu.device = KNOWN[arch]
    backend = CudaBackend(gpu, dtype)
    assert (backend.mode, backend.dtype.name, backend.master.name) == (mode, name, "float32")
    assert backend.describe().endswith(f", CUDA runtime 13.2, {mode}")
    assert CudaBackend(gpu, dtype, "auto").describe().endswith(f"{mode} (auto)")
    assert backend.peak_flops() == KNOWN[arch].peak_flops(mode)


def test_dtypes_that_it_does_not_run(gpu):
    with pytest.raises(BackendError, match=r"got fp64; backend cupy runs bf16, tf32, fp32 .*numpy"):
        CudaBackend(gpu, "fp64")
    gpu.device = KNOWN["sm_75"]
    for dtype in ("bf16", "tf32"):
        with pytest.raises(BackendError, match=rf"got {dtype}; Tesla T4 \(sm_75\) runs fp32 only"):
            CudaBackend(gpu, dtype)


def test_arrays_go_there_and_come_back(gpu):
    backend = CudaBackend(gpu)
    for host in (
        np.arange(24.0).reshape(4, 6)[:, ::2].T,
        np.arange(6, dtype=ml_dtypes.bfloat16),
        np.zeros((0, 3), np.int64),
    ):
        array = backend.from_host(host)
        got = backend.to_host(array)
        assert got.dtype == host.dtype
        assert got.tolist() == host.tolist()
    assert backend.to_host(backend.zeros((3, 2), np.int32)).tolist() == [[0, 0]] * 3
    array = backend.empty((2,), np.float32)
    backend.upload(array, np.ones(2, np.float32))
    assert backend.to_host(array).tolist() == [1, 1]


def test_what_came_back_is_the_callers_own(gpu):
    backend = CudaBackend(gpu)
    array = backend.from_host(np.zeros(3))
    kept = backend.to_host(array)
    for _ in range(3):
        backend.upload(array, np.ones(3))
        backend.to_host(array)
    assert kept.tolist() == [0] * 3


def test_operations_share_their_products(gpu, fake):
    backend = CudaBackend(gpu, "tf32")
    taken = fake.used
    first, second = (backend.ops(backend.empty((64,), np.uint8)) for _ in range(2))
    assert first.gemm is second.gemm
    assert first.gemm.mode == "tf32"
    assert first.real == "float32"
    assert CudaBackend(gpu).ops(backend.empty((64,), np.uint8)).real == "bfloat16"
    assert fake.used - taken == 3 * 64 + 2 * GEMM_WORKSPACE
    assert backend.reserved() == [("cuBLASLt", GEMM_WORKSPACE)]


def test_sizes(gpu):
    backend, dims = CudaBackend(gpu), Dims(2, 4, 64, 32, 66)
    assert [backend.pad_vocab(v) for v in (1, 8, 27, 66, 1023, 1024, 1025, 50_257)] == [
        8, 8, 32, 72, 1024, 1024, 1088, 50_304,
    ]  # fmt: skip
    wanted = workspace_bytes(dims, 100, gpu.device, 2, 3)
    planned = backend.workspace_bytes(dims, 100, 3)
    assert wanted % 256  # this one is rounded up
    assert planned % 256 == 0
    assert 0 < planned - wanted < 256
    assert backend.relu_mask_bytes(512) == 64
    assert backend.split(7, 100, 1e18) == (1, 1)
    done = []
    backend.run([lambda: done.append(1), lambda: done.append(2)])
    assert done == [1, 2]


def test_memory(gpu, fake):
    backend = CudaBackend(gpu)
    assert backend.memory() == fake_cupy.TOTAL
    backend.empty((1000,), np.uint8)
    assert backend.memory() == fake_cupy.TOTAL - 1000
    assert backend.memory_used() == 1000


def test_the_thread_has_its_gpu_inside(fake):
    gpu = open_gpu(1)
    with CudaBackend(gpu) as backend, backend:
        assert (fake.device, fake.streams[1].ptr) == (1, gpu.stream)
    assert (fake.device, fake.streams[1].ptr) == (0, 0)


def test_the_first_failure_is_the_one_that_is_told(gpu, fake):
    backend = CudaBackend(gpu)
    fake.failing["streamSynchronize"] = 700

    def lost_in_a_step():
        with backend:
            raise KeyError("first")

    def lost_at_the_end():
        with backend:
            pass

    with pytest.raises(KeyError, match="first"):
        lost_in_a_step()
    with pytest.raises(DeviceError, match="IllegalAddress"):
        lost_at_the_end()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], None),
        (["model.n_embd=24", "model.n_head=4"], "model.n_head: got 4, heads of 6 channels; wanted a"
         " multiple of 4 up to 128"),
        (["model.n_embd=1024", "model.n_head=4"], "got 4, heads of 256 channels"),
        (["model.n_embd=1024", "model.n_head=8"], None),
        (["model.n_embd=8192", "model.n_head=64"], None),
        (["model.n_embd=8320", "model.n_head=65"], "model.n_embd: got 8,320, wanted at most 8,192"),
        (["train.batch_size=4096"], None),
        (["train.batch_size=4097"], "train.batch_size: got 4,097, wanted at most 4,096"),
        (["model.block_size=1048576"], "model.block_size: got 1,048,576, wanted at most 1,048,575"),
        (["model.block_size=32768", "train.batch_size=4096"], "train.batch_size x "
         "model.block_size: got 134,217,728, wanted at most 134,217,727"),
    ],
)  # fmt: skip
def test_models_that_the_kernels_do_not_take(overrides, line):
    got = unsupported(Config.load("names", overrides))
    assert got == line if line is None else line in got


def test_threads_of_the_largest_batch_are_numbered_in_32_bits():
    threads = ceil_div((MAX_ROWS - 1) * WARP, WARPS_BLOCK) * WARPS_BLOCK
    assert threads <= 2**32  # rmsnorm's
    gathered = 2 * ceil_div(MAX_ROWS, GATHER_BLOCK) * GATHER_BLOCK + MAX_BATCH * GATHER_BLOCK
    assert gathered < 2**31  # batch_gather's last place behind the last row


def test_peaks_are_the_published_ones():
    published = {  # TFLOP/s: bfloat16, TF32 and float32
        "sm_75": (None, None, 8.1), "sm_80": (312, 156, 19.5), "sm_86": (71, 35.6, 35.6),
        "sm_89": (165.2, 82.6, 82.6), "sm_100": (2400, 1200, 74), "sm_120": (209.5, 104.8, 104.8),
    }  # fmt: skip
    for arch, wanted in published.items():
        for mode, peak in zip(("bf16", "tf32", "fp32"), wanted, strict=True):
            got = KNOWN[arch].peak_flops(mode)
            assert got is peak or got == pytest.approx(peak * 1e12, rel=0.02)
    h200 = replace(KNOWN["sm_90"], clock_hz=1_830_000_000)  # at which 989 are published
    assert h200.peak_flops("bf16") == pytest.approx(989.4e12, rel=1e-3)
    a6000 = replace(
        KNOWN["sm_86"], name="NVIDIA RTX A6000", multiprocessors=84, clock_hz=18 * 10**8
    )
    assert a6000.peak_flops("bf16") == pytest.approx(154.8e12, rel=1e-3)
    assert replace(h200, capability=(13, 0)).peak_flops("bf16") is None
