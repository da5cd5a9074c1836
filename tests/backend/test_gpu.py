"""What `backend/gpu.py` promises, of the GPU through CuPy: on a stand-in that does late what is
enqueued, and on a real one where there is one. And of the stand-in that the engine is tested on."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_microgpt.backend import pinned
from gpu_microgpt.backend.gpu import Gpu
from gpu_microgpt.errors import DeviceError

bf16 = np.dtype(ml_dtypes.bfloat16)
BIG = 3 * pinned.PIECE + 5  # bytes: more than one buffer, and some


def on_device(gpu: Gpu, host: np.ndarray) -> Any:
    array = gpu.empty(host.shape, host.dtype)
    gpu.upload(array, host)
    return array


def back(gpu: Gpu, array: Any) -> np.ndarray:
    return gpu.download(array).wait().copy()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (BIG,)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bf16], ids=lambda d: np.dtype(d).name)
def test_there_and_back(any_gpu, shape, dtype):
    host = np.random.default_rng(1).integers(0, 200, shape).astype(dtype)
    array = on_device(any_gpu, host)
    assert array.size == 0 or array.data.ptr % 256 == 0
    got = back(any_gpu, array)
    assert (got.dtype, got.shape) == (host.dtype, host.shape)
    assert got.tobytes() == host.tobytes()


def test_the_host_array_may_be_changed_at_once(any_gpu):
    for size in (3, BIG):
        host = np.arange(size, dtype=np.int64)
        array = on_device(any_gpu, host)
        host[...] = -1
        assert (back(any_gpu, array) == np.arange(size)).all()


def test_any_layout_is_uploaded(any_gpu):
    host = np.arange(24.0).reshape(4, 6)[:, ::2].T
    assert (back(any_gpu, on_device(any_gpu, host)) == host).all()


def test_parts_of_an_array(any_gpu):
    array = on_device(any_gpu, np.arange(12, dtype=np.int32).reshape(3, 4))
    any_gpu.upload(array[1], np.full(4, 7, np.int32))
    any_gpu.zero(array[2])
    assert back(any_gpu, array).tolist() == [[0, 1, 2, 3], [7] * 4, [0] * 4]
    assert back(any_gpu, array[1]).tolist() == [7] * 4


def test_all_happens_in_order(any_gpu):
    a, b = (on_device(any_gpu, np.full(4, x, np.float32)) for x in (1, 2))
    first = any_gpu.download(a)
    any_gpu.copy(a, b)
    second = any_gpu.download(a)
    any_gpu.zero(a)
    any_gpu.upload(b, np.full(4, 3, np.float32))
    assert first.wait().tolist() == [1] * 4
    assert second.wait().tolist() == [2] * 4
    assert back(any_gpu, a).tolist() == [0] * 4
    assert back(any_gpu, b).tolist() == [3] * 4


def test_a_download_outlasts_the_next_of_the_same_array(any_gpu):
    array = on_device(any_gpu, np.zeros(4))
    downloads = []
    for number in range(3):
        any_gpu.upload(array, np.full(4, number, np.float64))
        downloads.append(any_gpu.download(array))
        downloads[-1].wait()
        kept = [d.wait().tolist() for d in downloads[-2:]]
        assert kept == [[float(n)] * 4 for n in range(number + 1)][-2:]


def test_a_graph_repeats_what_was_recorded(any_gpu):
    a, b = (on_device(any_gpu, np.full(4, x, np.float32)) for x in (1, 2))
    with_zeros = any_gpu.empty((4,), np.float32)

    def work():
        assert any_gpu.capturing
        any_gpu.zero(with_zeros)
        any_gpu.copy(a, b)

    graph = any_gpu.capture(work)
    assert not any_gpu.capturing
    assert back(any_gpu, a).tolist() == [1] * 4
    for number in (5, 6):
        any_gpu.upload(b, np.full(4, number, np.float32))
        graph.launch()
        assert back(any_gpu, a).tolist() == [number] * 4
        assert back(any_gpu, with_zeros).tolist() == [0] * 4


def test_what_fails_while_captured_is_raised_and_the_stream_goes_on(any_gpu):
    array = on_device(any_gpu, np.ones(4))
    failure = ValueError("in the middle")

    def work():
        any_gpu.zero(array)
        raise failure

    with pytest.raises(ValueError, match="in the middle") as raised:
        any_gpu.capture(work)
    assert raised.value is failure
    assert not any_gpu.capturing
    assert back(any_gpu, array).tolist() == [1] * 4
    any_gpu.capture(lambda: any_gpu.zero(array)).launch()
    assert back(any_gpu, array).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("an allocation", lambda gpu, array: gpu.empty((1,), np.float32)),
        ("an upload", lambda gpu, array: gpu.upload(array, np.ones(4))),
        ("a download", lambda gpu, array: gpu.download(array)),
        ("an event", lambda gpu, array: gpu.event()),
        ("a wait", lambda gpu, array: gpu.wait()),
        ("a capture", lambda gpu, array: gpu.capture(lambda: None)),
    ],
)
def test_what_no_graph_holds_is_refused(gpu, name, call):
    array = gpu.empty((4,), np.float64)
    with pytest.raises(RuntimeError, match=f"got {name} while a graph is captured"):
        gpu.capture(lambda: call(gpu, array))


def test_events_tell_time(any_gpu):
    first = any_gpu.event()
    any_gpu.zero(any_gpu.empty((BIG,), np.uint8))
    last = any_gpu.event()
    assert last.ms_since(first) > 0
    assert first.done()
    assert last.done()


def test_misuse_is_one_line(gpu):
    array = gpu.empty((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"upload: got float64 \(4, 4\), wanted float32 \(4, 4\)"):
        gpu.upload(array, np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"upload: got float32 \(4,\), wanted float32 \(4, 4\)"):
        gpu.upload(array, np.ones(4, np.float32))
    with pytest.raises(ValueError, match="copy: got 16 bytes, wanted 64"):
        gpu.copy(array, array[0])
    for name, call in (
        ("zero", lambda x: gpu.zero(x)), ("download", lambda x: gpu.download(x)),
        ("copy", lambda x: gpu.copy(x, x)),
        ("upload", lambda x: gpu.upload(x, np.ones((4, 2), np.float32))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: got strides .* wanted a contiguous array"):
            call(array[:, :2])


def test_too_much_memory_is_one_line(gpu):
    free, total = gpu.memory()
    assert 0 < free <= total
    with pytest.raises(DeviceError, match="out of memory: wanted ") as error:
        gpu.empty((4 * total,), np.uint8)
    line = str(error.value)
    assert f"wanted {4 * total:,} bytes, " in line
    assert f" of {total:,} are free; lower train.batch_size" in line


def test_activation_is_nested(any_gpu):
    any_gpu.activate()
    any_gpu.activate()
    array = on_device(any_gpu, np.ones(4))
    any_gpu.close()
    any_gpu.zero(array)
    any_gpu.close()
    assert back(any_gpu, array).tolist() == [0] * 4
    with any_gpu.range("a name"):
        pass
