"""The stand-in GPU's arrays: what they forbid, and their memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_microgpt.errors import DeviceError
from tests.cuda.guarded import GuardedArray, peek, raw
from tests.cuda.stand_in_cases import SHAPE, filled, started

TOUCHES: dict[str, Callable[[Any], object]] = {
    "a ufunc": lambda x: np.add(x, 1),
    "a ufunc into it": lambda x: np.add(np.ones(SHAPE), 1, out=x),
    "a function": lambda x: np.concatenate([x, x]),
    "a sum": lambda x: x.sum(),
    "an operator": lambda x: x + 1,
    "an operator from the right": lambda x: np.float32(2) * x,
    "an operator in place": lambda x: x.__iadd__(1),
    "a host's array in place": lambda x: np.ones(SHAPE).__iadd__(x),
    "a comparison": lambda x: x == 1,
    "a truth": lambda x: bool(x),
    "a float": lambda x: float(x[0, 0]),
    "an int": lambda x: int(x[0, 0]),
    "an index": lambda x: [1, 2][x[0, 0]],
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "get": lambda x: x.get(),
    "fill": lambda x: x.fill(0),
    "astype": lambda x: x.astype(np.float64),
    "assignment": lambda x: x.__setitem__(0, 1),
    "assignment to a host's": lambda x: np.zeros(SHAPE).__setitem__(..., x),
    "np.array": lambda x: np.array(x),
    "np.asarray": lambda x: np.asarray(x),
    "np.array of rows": lambda x: np.array(list(x)),
    "a copy": lambda x: copy.deepcopy(x),
    "an index array": lambda x: x[np.array([1, 0])],
    "a mask": lambda x: x[x[0, 0] > 0],
    "reshape that copies": lambda x: x.T.reshape(-1),
    "in": lambda x: 1 in x,
}


@pytest.mark.parametrize("capturing", [False, True], ids=["", "capturing"])
@pytest.mark.parametrize("what", TOUCHES)
def test_nobody_else_touches_the_numbers(gpu, what, capturing):
    x = filled(gpu)
    run = gpu.capture if capturing else lambda work: work()
    with pytest.raises(AssertionError, match="device array float32"):
        run(lambda: TOUCHES[what](x))
    assert not gpu.capturing
    assert (peek(x) == 1).all()


def test_memoryview_is_refused(gpu):
    with pytest.raises(TypeError):
        memoryview(filled(gpu))


def test_views_are_free_and_of_one_type(gpu):
    x = gpu.empty((4, 6), np.float32)
    gpu.upload(x, np.arange(24, dtype=np.float32).reshape(4, 6))
    host, before = peek(x), gpu.counts.copy()
    views = {
        "row": (x[1], host[1]),
        "number": (x[1, 2], host[1, 2]),
        "columns": (x[:, 2:4], host[:, 2:4]),
        "steps": (x[::2, ..., None], host[::2, ..., None]),
        "flat": (x.reshape(-1)[3:9].reshape(2, 3), host.reshape(-1)[3:9].reshape(2, 3)),
        "bits": (x.view(np.uint32), host.view(np.uint32)),
        "bf16": (x.view(ml_dtypes.bfloat16), host.view(ml_dtypes.bfloat16)),
        "transposed": (x.T, host.T),
    }
    for name, (view, expected) in views.items():
        assert type(view) is GuardedArray, name
        assert np.array_equal(peek(view), expected), name
        for of in ("shape", "dtype", "strides", "ndim", "size", "nbytes", "itemsize"):
            assert getattr(view, of) == getattr(expected, of) or name == "number", (name, of)
        assert view.flags.c_contiguous == expected.flags.c_contiguous, name
    assert x[1].data.ptr == x.data.ptr + 24
    assert [row.shape for row in x] == [(6,)] * 4
    assert len(x) == 4
    assert gpu.counts == before


def test_new_memory_is_nan_and_aligned(gpu):
    x = gpu.empty((3, 5), np.float32)
    assert np.isnan(peek(x)).all()
    assert x.data.ptr % 256 == 0
    assert (peek(gpu.empty((3,), np.int32)) == -1).all()


def test_zero_and_copy(gpu):
    x, y = filled(gpu), gpu.empty(SHAPE, np.float32)
    gpu.copy(y, x)
    gpu.zero(x)
    assert (peek(y) == 1).all()
    assert (peek(x) == 0).all()
    with pytest.raises(AssertionError, match="contiguous"):
        gpu.zero(x[:, :2])
    with pytest.raises(AssertionError, match="other sizes"):
        gpu.copy(y, x[:2])
    with pytest.raises(AssertionError, match="overlap"):
        gpu.copy(x[1:], x[:-1])


def test_uploads_want_the_same_shape_and_dtype(gpu):
    x = gpu.empty(SHAPE, np.float32)
    for host in (np.zeros(SHAPE), np.zeros((8, 4), np.float32)):
        with pytest.raises(AssertionError, match="upload: device array"):
            gpu.upload(x, host)
    with pytest.raises(AssertionError, match="got GuardedArray"):
        gpu.upload(x, x)
    for call in (gpu.zero, gpu.download):
        with pytest.raises(AssertionError, match="got ndarray"):
            call(np.zeros(3))


# Memory


def test_memory_is_counted_and_freed(gpu):
    free, total = gpu.memory()
    x = gpu.empty((1000,), np.uint8)
    assert gpu.memory() == (free - 1024, total)
    view = x[10:20]
    bytes_of_it = raw(x)
    gpu.zero(x)
    del x
    assert gpu.memory()[0] == free - 1024
    assert (bytes_of_it == 0).all()
    del view
    assert (bytes_of_it == 0xFF).all()
    assert gpu.memory()[0] == free
    assert gpu.heap.peak == 1024


def test_full_memory_says_so():
    gpu = started(memory_bytes=4096)
    kept = gpu.empty((2048,), np.uint8)
    with pytest.raises(DeviceError, match=r"4,096 bytes, 2,048 .*train.batch_size"):
        gpu.empty((4096,), np.uint8)
    assert gpu.counts["allocations"] == 1
    del kept
    gpu.empty((4096,), np.uint8)
