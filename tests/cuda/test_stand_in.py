"""The stand-in GPU itself: what it forbids while capturing, records and repeats."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.backend import cuda, cupy
from gpu_microgpt.backend.cuda import CudaBackend
from gpu_microgpt.errors import DeviceError
from gpu_microgpt.ops.cuda import CudaOps
from tests.cuda.guarded import peek
from tests.cuda.stand_in import StandInGpu, install
from tests.cuda.stand_in_cases import SHAPE, filled, operations, started
from tests.cuda.stand_in_products import MemoryPlans
from tests.cuda_on_cpu.launch import KernelError


def test_a_replay_repeats_what_was_captured(gpu):
    ops = operations(gpu)
    x, y, z = (
        filled(gpu, -1),
        gpu.empty(SHAPE, np.float32),
        gpu.empty(SHAPE, np.float32),
    )

    def work():
        ops.relu(y, x)
        gpu.copy(z, y)
        gpu.zero(y)

    work()
    assert (peek(z) == 0).all()
    before = gpu.counts.copy()
    graph = gpu.capture(work)
    assert graph.names == ["relu", "copy", "zero"]
    assert gpu.counts - before == {"captures": 1}
    for value in (3, 4):
        gpu.upload(x, np.full(SHAPE, value, np.float32))
        assert (peek(z) != value).all()  # nothing was done yet
        graph.launch()
        assert (peek(z) == value).all()
        assert (peek(y) == 0).all()
    assert gpu.counts - before == {"captures": 1, "uploads": 2, "replays": 2}


def test_scalars_are_baked_in_and_views_are_not_kept(gpu):
    ops, x = operations(gpu), filled(gpu, -1)
    y = gpu.empty(SHAPE, np.float32)
    ops.relu(y, x)
    graph = gpu.capture(lambda: ops.relu(y.reshape(-1)[:8], x.reshape(-1)[:8]))
    gpu.upload(x, np.full(SHAPE, 5, np.float32))
    graph.launch()
    assert peek(y).reshape(-1).tolist() == [5] * 8 + [0] * 24


def test_freed_arrays_are_noticed(gpu):
    x = filled(gpu)
    graphs = [gpu.capture(partial(gpu.zero, a)) for a in (x, x[1:])]
    row = x[0]
    del x
    gc.collect()
    for graph in graphs:
        graph.launch()  # a view of it is left
    assert (peek(row) == 0).all()
    del row
    gc.collect()
    for graph in graphs:
        with pytest.raises(AssertionError, match="zero: an array was freed since the capture"):
            graph.launch()


def test_arrays_of_a_kernel_that_were_freed_are_noticed(gpu):
    ops, y = operations(gpu), gpu.empty(SHAPE, np.float32)
    x = filled(gpu)
    ops.relu(y, x)
    graph = gpu.capture(partial(ops.relu, y, x))
    graph.launch()
    del x
    gc.collect()
    with pytest.raises(AssertionError, match="relu: an array was freed"):
        graph.launch()


FORBIDDEN: dict[str, Callable[[StandInGpu, Any], object]] = {
    "an allocation": lambda gpu, x: gpu.empty((1,), np.int32),
    "an upload": lambda gpu, x: gpu.upload(x, np.zeros(SHAPE, np.float32)),
    "a download": lambda gpu, x: gpu.download(x),
    "an event": lambda gpu, x: gpu.event(),
    "a capture": lambda gpu, x: gpu.capture(lambda: None),
    "waiting": lambda gpu, x: gpu.wait(),
    "a replay": lambda gpu, x: gpu.capture_before.launch(),
    "kernel softmax_warp first asked for": lambda gpu, x: operations_before(gpu).softmax(x, x),
}


def operations_before(gpu: StandInGpu) -> CudaOps:
    """Without an allocation."""
    return CudaOps(np.float32, gpu.device, gpu.loader, gpu.scratch)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden_while_capturing(gpu, what):
    x = filled(gpu)
    gpu.capture_before = gpu.capture(lambda: None)
    gpu.scratch = gpu.empty((64,), np.uint8)
    with pytest.raises(AssertionError, match=f"{what}.*while capturing"):
        gpu.capture(lambda: FORBIDDEN[what](gpu, x))
    assert not gpu.capturing
    if not what.startswith(("a replay", "kernel")):
        FORBIDDEN[what](gpu, x)


@pytest.mark.parametrize("call", ["wait", "done"])
def test_what_comes_later_cannot_be_asked_while_capturing(gpu, call):
    x = filled(gpu)
    for later in (gpu.event(), gpu.download(x)):
        with pytest.raises(AssertionError, match="while capturing"):
            gpu.capture(getattr(later, call))
        getattr(later, call)()
    with pytest.raises(AssertionError, match="while capturing"):
        gpu.capture(lambda: gpu.event().ms_since(gpu.event()))


def test_a_failed_capture_leaves_nothing(gpu):
    x = filled(gpu)

    def fails():
        gpu.zero(x)
        raise KeyError

    with pytest.raises(KeyError):
        gpu.capture(fails)
    assert (peek(x) == 1).all()
    assert gpu.capture(lambda: None).names == []


def test_kernels_want_the_stream_of_this_gpu():
    gpu = StandInGpu()
    x, ops = filled(gpu), operations(gpu)
    with pytest.raises(AssertionError, match="relu: this GPU and its stream are not active"):
        ops.relu(x, x)
    gpu.capture(partial(ops.relu, x, x)).launch()
    gpu.activate()
    ops.relu(x, x)
    gpu.close()
    with pytest.raises(AssertionError, match="not active"):
        ops.relu(x, x)
    with pytest.raises(AssertionError, match="without activate"):
        gpu.close()


def test_another_thread_has_another_stream(gpu):
    x, ops = filled(gpu), operations(gpu)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(AssertionError, match="not active in this thread"):
            pool.submit(ops.relu, x, x).result()
        pool.submit(gpu.zero, x).result()


def test_kernels_take_device_arrays_and_numpy_scalars(gpu):
    x = filled(gpu)
    kernel = gpu.loader.function("relu", "relu", ("REAL_BF16=0",))
    kernel((1,), (256,), (x, x, np.int64(32)))
    for args in ((x, x, 32), (x, np.zeros(32, np.float32), np.int64(32))):
        with pytest.raises(AssertionError, match="wanted a device array or a NumPy scalar"):
            kernel((1,), (256,), args)
    with pytest.raises(AssertionError, match="asked for 49,152"):
        kernel((1,), (256,), (x, x, np.int64(32)), shared_mem=50_000)


def test_what_lies_between_rows_goes_with_them(gpu):
    padded = gpu.empty((3, 16), np.float32)
    gpu.zero(padded)
    losses, targets = gpu.empty((3,), np.float32), gpu.empty((3,), np.int32)
    gpu.zero(targets)
    logits = padded[:, :11]
    operations(gpu).cross_entropy_backward(logits, losses, logits, targets, 1.0)
    assert np.allclose(peek(losses), np.log(11))


@pytest.mark.parametrize("guarded", [True, False])
def test_guards_are_a_choice(guarded):
    gpu = started(guarded=guarded, order="fifo")
    x = filled(gpu, -2)
    operations(gpu).relu(x, x)
    assert (peek(x) == 0).all()
    kernel = gpu.loader.function("relu", "relu", ("REAL_BF16=0",))
    beyond = partial(kernel, (1,), (256,), (x[:2], x[:2], np.int64(32)))
    if guarded:
        with pytest.raises(KernelError, match="relu"):
            beyond()
    else:
        beyond()


def test_counts(gpu):
    ops, x = operations(gpu), filled(gpu)
    ops.relu(x, x)
    gpu.zero(x)
    gpu.download(x).wait()
    gpu.capture(lambda: ops.relu(x, x)).launch()
    with gpu.range("here"):
        gpu.wait()
    assert gpu.counts == {
        "allocations": 2, "uploads": 1, "launches": 1, "zeros": 1, "downloads": 1, "waits": 2,
        "captures": 1, "replays": 1,
    }  # fmt: skip


@pytest.mark.parametrize("error", [None, DeviceError("gone")])
def test_a_lost_device_stays_lost(gpu, error):
    ops, x = operations(gpu), filled(gpu)
    graph, event = gpu.capture(lambda: gpu.zero(x)), gpu.event()
    gpu.fail_after(3, error)
    ops.relu(x, x)
    graph.launch()
    gpu.zero(x)
    message = "gone" if error else "is lost"
    for call in (
        graph.launch, lambda: ops.relu(x, x), lambda: gpu.zero(x), lambda: gpu.download(x),
        lambda: gpu.upload(x, np.zeros(SHAPE, np.float32)), gpu.wait, gpu.memory, event.done,
        event.wait, gpu.close, lambda: gpu.empty((1,), np.uint8), lambda: gpu.capture(lambda: None),
    ):  # fmt: skip
        with pytest.raises(DeviceError, match=message):
            call()


def test_install_opens_stand_ins(monkeypatch):
    opened = install(monkeypatch, late=True, memory_bytes=1 << 20)
    gpu = cupy.open_gpu(0)
    assert opened == [gpu]
    assert gpu.late
    assert gpu.memory() == (1 << 20, 1 << 20)
    backend = CudaBackend(gpu, "fp32")
    assert backend.describe() == "stand-in for H200 (sm_90) on the CPU, fp32"
    assert type(cuda.PlanCache()) is MemoryPlans
    assert cuda.PlanCache() is cuda.PlanCache()


def test_plans_are_kept_by_machine_and_problem():
    plans = MemoryPlans()
    plans.put("machine", "problem", "choice")
    assert plans.get("machine", "problem") == "choice"
    assert plans.get("machine", "other") is plans.get("other", "problem") is None
