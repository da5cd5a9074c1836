"""The GPU through CuPy: what only a stand-in for CuPy shows."""

from __future__ import annotations

import gc
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gpu_microgpt.backend import pinned
from gpu_microgpt.backend.cupy import open_gpu
from gpu_microgpt.errors import BackendError, ConfigError, DeviceError
from tests.backend import fake_cupy
from tests.backend.test_gpu import BIG, back, on_device


def test_one_stream_that_waits_for_no_other(only, fake):
    assert fake_cupy.streams[only.stream].non_blocking
    assert len(fake_cupy.streams) == 2  # and the default one
    assert only.cublaslt == "cuBLASLt"


def test_who_it_is(only, fake):
    wanted = "NVIDIA H200 (sm_90, 1.0 GiB), driver 13.0, CuPy 14.2.0, CUDA runtime 13.2"
    assert only.describe() == wanted
    assert only.device.clock_hz == 1_980_000_000


def test_nothing_but_a_wait_waits(only, fake):
    a, b = only.empty((4,), np.float32), only.empty((4,), np.float32)
    for _ in range(pinned.PIECES):
        only.upload(a, np.zeros(4, np.float32))
    only.zero(a)
    only.copy(a, b)
    download = only.download(a)
    event = only.event()
    only.capture(lambda: only.zero(a)).launch()
    assert not download.done()
    assert not event.done()
    assert not {"eventSynchronize", "streamSynchronize"} & set(fake.log)
    event.wait()
    assert download.done()
    assert len(fake_cupy.streams[only.stream].pending) == 1  # the graph's
    only.wait()
    assert not fake_cupy.streams[only.stream].pending


def test_buffers_are_used_again(only, fake):
    array = only.empty((4,), np.int64)
    for number in range(3 * pinned.PIECES):
        only.upload(array, np.full(4, number))
    assert fake.log.count("hostAlloc") == pinned.PIECES
    assert fake.log.count("eventSynchronize") == 2 * pinned.PIECES
    assert back(only, array).tolist() == [3 * pinned.PIECES - 1] * 4
    fake.log.clear()
    for _ in range(100):
        only.download(array)
        only.upload(array, np.zeros(4, np.int64))
        only.wait()
    assert fake.log.count("hostAlloc") == 0


def test_buffers_of_downloads_are_not_kept_for_ever(only, fake):
    arrays = [on_device(only, np.full(1, n)) for n in range(pinned.ARRAYS + 3)]
    downloads = [only.download(array) for array in arrays]
    assert len(only._downloads._buffers) == pinned.ARRAYS
    assert fake.log.count("streamSynchronize") == 3  # a copy may be on its way into what goes
    assert [int(d.wait()[0]) for d in downloads] == list(range(pinned.ARRAYS + 3))


def test_large_downloads_are_of_the_callers_own(only, fake):
    array = on_device(only, np.arange(BIG, dtype=np.uint8))
    fake.log.clear()
    download = only.download(array)
    assert download.done()
    assert fake.log.count("hostAlloc") == 0
    assert (download.wait() == np.arange(BIG, dtype=np.uint8)).all()


def test_a_capture_is_this_threads_own(only, fake):
    collecting = []
    graph = only.capture(lambda: collecting.append(gc.isenabled()))
    assert collecting == [False]
    assert gc.isenabled()
    kinds = [call for call in fake.log if "capture" in call or "graph" in call]
    assert kinds == ["begin_capture(1)", "end_capture", "graphUpload"]
    graph.launch()
    assert fake.log[-1] == "graphLaunch"


def test_a_spoilt_capture_is_told(only, fake):
    fake.failing["end_capture"] = 901
    with pytest.raises(DeviceError, match=r"capturing a graph: cudaErrorStreamCaptureInvalidated"):
        only.capture(lambda: None)
    with pytest.raises(KeyError, match="the reason"):
        only.capture(lambda: {}["the reason"])
    assert not only.capturing
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("failing", "call"),
    [
        ("malloc", lambda gpu, array: gpu.empty((1,), np.float32)),
        ("memsetAsync", lambda gpu, array: gpu.zero(array)),
        ("memcpyAsync", lambda gpu, array: gpu.copy(array, array)),
        ("memcpyAsync", lambda gpu, array: gpu.upload(array, np.ones(4))),
        ("memcpyAsync", lambda gpu, array: gpu.download(array)),
        ("hostAlloc", lambda gpu, array: gpu.download(array)),
        ("eventSynchronize", lambda gpu, array: gpu.download(array).wait()),
        ("eventQuery", lambda gpu, array: gpu.download(array).done()),
        ("eventQuery", lambda gpu, array: gpu.event().done()),
        ("eventSynchronize", lambda gpu, array: gpu.event().wait()),
        ("eventSynchronize", lambda gpu, array: gpu.event().ms_since(gpu.event())),
        ("streamSynchronize", lambda gpu, array: gpu.wait()),
        ("memGetInfo", lambda gpu, array: gpu.memory()),
        ("begin_capture(1)", lambda gpu, array: gpu.capture(lambda: None)),
        ("graphUpload", lambda gpu, array: gpu.capture(lambda: None)),
        ("graphLaunch", lambda gpu, array: gpu.capture(lambda: None).launch()),
    ],
)  # fmt: skip
def test_a_failure_of_the_gpu_is_one_line(only, fake, failing, call):
    array = only.empty((4,), np.float64)
    for status, wanted in (
        (700, "the GPU failed .*IllegalAddress.*; this process cannot use it any more"),
        (2, "the GPU is out of memory .*: lower train.batch_size"),
        (802, "the GPU refused .*SystemNotReady"),
    ):
        fake.failing[failing] = status
        with pytest.raises(DeviceError, match=wanted) as error:
            call(only, array)
        assert "\n" not in str(error.value)
        assert not only.capturing


def test_other_errors_are_left_alone(only, fake, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(only, "_downloads", SimpleNamespace(start=broken))
    with pytest.raises(RuntimeError, match="a fault of ours") as error:
        only.download(only.empty((1,), np.float32))
    assert not isinstance(error.value, DeviceError)


def test_the_threads_own_gpu_and_stream_come_back(fake):
    gpu = open_gpu(1)
    before, mine = fake.streams[0], fake_cupy.Stream(fake)
    assert fake.device == 0
    gpu.wait()
    array = on_device(gpu, np.ones(4))
    gpu.zero(array)
    gpu.event()
    gpu.capture(lambda: gpu.copy(array, array))
    assert (fake.device, fake.streams[0], fake.streams[1].ptr) == (0, before, 0)
    mine.use()
    gpu.activate()
    assert (fake.device, fake.streams[1].ptr) == (1, gpu.stream)
    gpu.activate()
    gpu.close()
    assert (fake.device, fake.streams[1].ptr) == (1, gpu.stream)
    gpu.zero(array)
    gpu.close()
    assert (fake.device, fake.streams[0], fake.streams[1].ptr) == (0, mine, 0)
    assert not fake_cupy.streams[gpu.stream].pending  # close waits


def test_they_come_back_from_a_lost_gpu_too(fake):
    gpu = open_gpu(1)
    gpu.activate()
    fake.failing["streamSynchronize"] = 700
    with pytest.raises(DeviceError, match="cannot use it any more"):
        gpu.close()
    assert (fake.device, fake.streams[1].ptr) == (0, 0)


def test_memory_off_its_alignment_is_a_fault(only):
    only._pool.misaligned = 16
    with pytest.raises(RuntimeError, match="wanted a multiple of 256"):
        only.empty((4,), np.float32)


def test_ranges_are_nested(only, fake):
    def fails():
        with only.range("forward"):
            assert fake.ranges == ["step", "forward"]
            raise KeyError

    with only.range("step"):
        with pytest.raises(KeyError):
            fails()
        assert fake.ranges == ["step"]
    assert fake.ranges == []


def test_a_gpu_that_others_hold_cannot_be_opened(fake):
    fake.failing["setDevice(1)"] = 2
    with pytest.raises(BackendError, match="GPU 1 cannot be used: the GPU is out of memory"):
        open_gpu(1)
    with pytest.raises(ConfigError, match="device: got 2, wanted 0 to 1"):
        open_gpu(2)


REAL = """
import ml_dtypes, numpy as np
import cupy
from cupy.cuda import memory, nvrtc, nvtx, runtime

def test(wanted):
    for name, names in wanted.items():
        owner = cupy
        for part in name.split(".")[1:]:
            owner = getattr(owner, part)
        missing = [n for n in names if not hasattr(owner, n)]
        assert not missing, (name, missing)
    assert runtime.streamCaptureModeThreadLocal == 1
    assert runtime.cudaDevAttrClockRate == 13
    for error in 35, 100, 700:
        assert runtime.CUDARuntimeError(error).status == error
    kinds = runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost, runtime.memcpyDeviceToDevice
    assert kinds == (1, 2, 3)
    assert "dst, intptr_t src, size_t size, int kind, intptr_t str" in runtime.memcpyAsync.__doc__
    assert "ptr, int value, size_t size, intptr_t stream" in runtime.memsetAsync.__doc__
    host, bf16 = np.zeros(256, np.uint8), np.dtype(ml_dtypes.bfloat16)
    at = memory.MemoryPointer(memory.UnownedMemory(host.ctypes.data, 256, host, 0), 0)
    assert cupy.ndarray((4, 8), bf16, memptr=at).strides == (16, 2)
    part = cupy.ndarray((256,), np.uint8, memptr=at)[64:128].view(bf16).reshape(4, 8)
    assert (part.dtype, part.data.ptr) == (bf16, host.ctypes.data + 64)
    assert part.flags.c_contiguous and not part[:, :2].flags.c_contiguous
"""


def test_cupy_has_what_is_used(fake):
    wanted = {
        name: [n for n in vars(module) if n[0] != "_"] for name, module in fake.modules().items()
    } | {
        "cupy.cuda.Stream": ["use", "synchronize", "begin_capture", "end_capture"],
        "cupy.cuda.Event": ["record", "synchronize"],
        "cupy.cuda.MemoryPool": ["malloc", "free_bytes"],
        "cupy.cuda.Graph": ["launch", "upload"],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", f"{REAL}\ntest({wanted})"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named 'cupy'" in done.stderr:
        pytest.skip("CuPy is not installed: pip install -e '.[kernels-test]'")
    assert done.returncode == 0, done.stderr
