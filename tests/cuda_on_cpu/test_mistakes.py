"""What no GPU forgives is found, and said where: kernels of mistakes.cu."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda_on_cpu.build import HERE, SANITIZER
from tests.cuda_on_cpu.conftest import SCHEDULES, emulated
from tests.cuda_on_cpu.launch import KernelError

pytestmark = pytest.mark.skipif(bool(SANITIZER), reason="the emulator's own checks are tested")

SOURCE = (HERE / "mistakes.cu").read_text("utf-8").splitlines()


def run(name, grid, block, *args, **how):
    emulated("mistakes", name, (grid,), (block,), args, **how)


def said(name, grid, block, *args, **how) -> str:
    with pytest.raises(KernelError) as raised:
        run(name, grid, block, *args, **how)
    return str(raised.value)


def line(text: str, nth: int = 0) -> int:
    """Number of the nth line of mistakes.cu that contains the text."""
    return [i for i, found in enumerate(SOURCE, 1) if text in found][nth]


def ints(n: int) -> np.ndarray:
    return np.zeros(n, np.int32)


def floats(n: int) -> np.ndarray:
    return np.zeros(n, np.float32)


# ---------------------------------------------------------------------------------------- memory
def test_write_behind_an_array():
    message = said("write_at", 1, 1, floats(8), np.int32(8))
    assert message.startswith("write_at: block (0,0,0) thread (0,0,0): invalid memory access at 0x")
    assert f"[mistakes.cu:{line('write_at')}]" in message


def test_write_before_an_array():
    assert "wrote outside an array" in said("write_at", 1, 1, floats(8), np.int32(-3))
    assert "invalid memory access" in said(
        "write_at", 1, 1, floats(8), np.int32(-3), guard="before"
    )


def test_write_between_an_array_and_the_guard_page():
    x = np.zeros(16, np.uint8)[:4].view(np.float32)  # 12 bytes are left, as it must stay aligned
    assert "wrote outside an array" in said("write_at", 1, 1, x, np.int32(1))
    assert "invalid memory access" in said("write_at", 1, 1, x, np.int32(4))


def test_read_beside_an_array():
    out, x = floats(1), np.ones(8, np.float32)
    assert "invalid memory access" in said("read_at", 1, 1, out, x, np.int32(8))
    assert "invalid memory access" in said("read_at", 1, 1, out, x, np.int32(-1), guard="before")
    run("read_at", 1, 1, out, x, np.int32(-1))  # nothing faults here, but it is no number
    assert np.isnan(out[0])


def test_misaligned_access():
    message = said("misaligned", 1, 1, floats(4), floats(8), np.int32(1))
    assert "undefined behaviour" in message
    assert f"[mistakes.cu:{line('const float4*>(x + i)')}]" in message


def test_misaligned_asynchronous_copy():
    message = said("misaligned_copy", 1, 1, floats(4), floats(8), np.int32(1))
    assert f"cp_async line {line('cp_async_16(&s')}: source is not 16-byte aligned" in message


def test_asynchronous_copy_to_elsewhere():
    message = said("copy_to_global", 1, 1, floats(4), floats(4))
    assert "not inside this block's shared memory" in message


@pytest.mark.parametrize("i", [8, -1])
def test_outside_static_shared_memory(i):
    assert "undefined behaviour" in said("static_shared_at", 1, 1, floats(1), np.int32(i))


@pytest.mark.parametrize("i", [9, -1])
def test_outside_dynamic_shared_memory(i):
    """36 bytes, followed by what alignment leaves, then by a guard page."""
    message = said("dynamic_shared_at", 1, 1, floats(1), np.int32(i), shared_mem=36)
    assert "wrote outside its 36 bytes of dynamic shared memory" in message
    message = said("dynamic_shared_at", 1, 1, floats(1), np.int32(32), shared_mem=36)
    assert "invalid memory access" in message


def test_shared_memory_nobody_asked_for():
    assert "invalid memory access" in said("dynamic_shared_at", 1, 1, floats(1), np.int32(0))


def test_shared_memory_nobody_set():
    out = floats(2)
    run("unset_shared", 1, 1, out, shared_mem=32)
    assert np.isnan(out).all()


def test_local_nobody_set():
    out = floats(1)
    run("unset_local", 1, 1, out, np.int32(2))
    assert abs(out[0]) > 1e30


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
@pytest.mark.parametrize("resident", [False, True])
def test_shared_memory_of_another_block(order, seed, resident):
    out, how = floats(8), {"order": order, "seed": seed, "resident": resident}
    run("leaked_shared", 4, 1, out, np.float32(1), shared_mem=4, **how)
    assert (out[:2] == 1).all()
    assert np.isnan(out[2:]).all()


def test_integer_overflow():
    message = said("overflow", 1, 1, ints(1), np.int32(3000))
    assert "undefined behaviour" in message
    assert f"mistakes.cu:{line('i * 1000000')}" in message


# --------------------------------------------------------------------------- barriers and waiting
def test_one_barrier_on_two_lines():
    first, second = line("__syncthreads();"), line("__syncthreads();", 1)
    message = said("barrier_of_some", 1, 64, ints(2))
    assert "thread (32,0,0): divergent __syncthreads" in message
    assert f"this thread is at line {second}, another waits at line {first}" in message


def test_exit_before_a_barrier():
    x = ints(64)
    assert "after 24 threads of the block exited" in said("early_exit", 1, 64, x, order="lifo")
    assert "thread exits while others wait" in said("early_exit", 1, 64, x)
    run("early_exit", 1, 64, x, strict=1)  # a GPU would go on
    assert x.sum() == 40


def test_more_barriers_than_others():
    message = said("unequal_barriers", 1, 64, ints(1))
    assert "after 32 threads of the block exited" in message
    assert "deadlock" not in message


def test_lanes_that_are_not_there():
    at = f"__shfl_sync line {line('if (threadIdx.x < 20)')}"
    message = said("absent_lanes", 1, 32, ints(32), order="lifo")
    assert f"{at}: mask ffffffff names exited or missing lanes (alive 000fffff)" in message
    message = said("absent_lanes", 1, 32, ints(32))
    assert "from block 0 thread 0: __shfl_sync" in message
    assert "from block 0 thread 20: exited" in message
    assert "missing lanes (alive 000003ff)" in said("mask_without_caller", 1, 10, ints(32))


def test_mask_without_the_caller():
    message = said("mask_without_caller", 1, 32, ints(32))
    assert "mask 0000ffff does not name the calling lane 16" in message


def test_lanes_at_different_operations():
    message = said("different_operations", 1, 32, ints(32))
    assert "divergent warp" in message
    assert "__any_sync line" in message
    assert "__shfl_sync line" in message


def test_waiting_for_no_one():
    message = said("waits_for_no_one", 1, 32, np.zeros(1, np.uint32))
    assert "livelock: every thread spins in __nanosleep" in message


def test_waiting_for_a_block_that_is_not_resident():
    assert "livelock" in said("waits_for_later_block", 2, 32, np.zeros(1, np.uint32))
    run("waits_for_later_block", 2, 32, np.zeros(1, np.uint32), resident=True)


def test_endless_loop():
    message = said("endless", 1, 1, np.ones(1, np.float32), seconds=1)
    assert "still running after 1 seconds" in message
    assert f"mistakes.cu:{line('x[0] < 1e30f')}" in message


# ------------------------------------------------------------------------------------------ races
def wrong_results(name, threads, out, want, *args) -> list[str]:
    """The schedules in which a kernel computes something else."""
    wrong = []
    for order, seed in SCHEDULES:
        out[...] = -1
        run(name, 1, threads, out, *args, order=order, seed=seed)
        if not np.array_equal(out, want):
            wrong.append(f"{order}{seed}")
    return wrong


def test_missing_syncwarp():
    x = np.arange(32, dtype=np.int32)
    assert len(wrong_results("no_syncwarp", 32, ints(32), x[::-1], x)) == len(SCHEDULES)


def test_missing_syncthreads():
    x = np.arange(64, dtype=np.int32)
    wrong = wrong_results("no_syncthreads", 64, ints(64), x[::-1], x)
    assert {"fifo0", "lifo0"} <= set(wrong)


def test_missing_second_barrier():
    x = np.arange(128, dtype=np.int32).reshape(2, 64)
    wrong = wrong_results("no_second_barrier", 64, np.zeros_like(x), x[:, ::-1], x)
    assert set(wrong) & {"fifo0", "lifo0"}
    assert any(name.startswith("random") for name in wrong)


def test_missing_wait_for_a_copy():
    x = np.arange(128, dtype=np.int32)
    wrong = wrong_results("no_copy_wait", 32, ints(128), x, x)
    assert wrong == ["fifo0", "random0", "random1", "random2"]  # lifo copies at once


def test_copy_never_waited_for():
    message = said("copy_left_behind", 1, 32, ints(128), ints(128))
    assert "thread exits with cp.async copies not waited for" in message


# -------------------------------------------------------------------------------- going on after
def test_the_process_survives():
    x = floats(8)
    for _ in range(3):
        said("write_at", 2, 32, x, np.int32(8))
        said("absent_lanes", 1, 32, ints(32))
        run("write_at", 1, 1, x, np.int32(7))
        assert x[7] == 1
