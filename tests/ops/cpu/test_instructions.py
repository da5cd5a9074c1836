"""Operations recorded in programs: not done before they are played, their arrays kept till then."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.ops.cpu import CompiledOps
from gpu_microgpt.ops.cpu.instructions import CLIP_SCALE, RELU, WIDTH
from gpu_microgpt.ops.cpu.play import play


@pytest.fixture
def ops() -> CompiledOps:
    return CompiledOps(np, np.zeros(1 << 12, np.uint8), np.dtype("f4"))


def test_what_is_recorded_is_done_when_it_is_played(ops):
    x, y = np.array([[1, -2, 3]], "f4"), np.zeros((1, 3), "f4")
    with ops.recording() as program:
        ops.relu(y, x)
    assert (y == 0).all()
    x *= 2
    play(program.like, program.code, 1, 0)
    assert y.tolist() == [[2, 0, 6]]
    ops.relu(y, np.full((1, 3), 7, "f4"))  # at once again
    assert (y == 7).all()
    assert program.code.shape == (1, WIDTH)
    assert program.code[0, 0] == RELU


def test_rows_are_those_of_the_call(ops):
    x, y = np.ones((4, 3), "f4"), np.zeros((4, 3), "f4")
    with ops.recording() as program:
        ops.relu(y, x)
    play(program.like, program.code, 2, 0)
    assert y.sum(axis=1).tolist() == [3, 3, 0, 0]


def test_a_program_keeps_the_memory_it_names(ops):
    total, losses = np.zeros(1), np.ones(3, "f4")
    with ops.recording() as program:
        ops.add_losses(total, losses)
    memory = weakref.ref(losses)
    del losses
    gc.collect()
    assert memory() is not None
    play(program.like, program.code, 3, 0)
    assert total[0] == 3
    del program
    gc.collect()
    assert memory() is None


def test_a_recording_that_fails_is_over(ops):
    with pytest.raises(KeyError), ops.recording():
        raise KeyError
    y = np.zeros((1, 3), "f4")
    ops.relu(y, np.ones((1, 3), "f4"))
    assert (y == 1).all()


WRONG = {
    "gaps": np.ones((3, 4), "f4")[:, :3],
    "transposed": np.ones((3, 3), "f4").T,
    "int64": np.ones((3, 3), "i8"),
    "float16": np.ones((3, 3), "f2"),
    "float64": np.ones((3, 3), "f8"),
    "int32": np.ones((3, 3), "i4"),
}


@pytest.mark.parametrize("x", WRONG.values(), ids=WRONG)
def test_arrays_that_compiled_code_would_misread_are_refused(ops, x):
    y = np.zeros((3, 3), "f4")
    with pytest.raises(ValueError, match=r"relu: got .*wanted float32"):
        ops.relu(y, x)
    with pytest.raises(ValueError, match=r"relu: got .*wanted float32"), ops.recording():
        ops.relu(y, x)


def test_each_array_has_its_own_dtype(ops):
    losses, logits, targets = np.zeros(2, "f4"), np.zeros((2, 3), "f4"), np.zeros(2, "i4")
    with pytest.raises(ValueError, match=r"cross-entropy: got float32 .*wanted int32"):
        ops.cross_entropy(losses, logits, targets.astype("f4"))
    with pytest.raises(ValueError, match=r"add losses: got float32 .*wanted float64"):
        ops.add_losses(np.zeros(1, "f4"), losses)
    ops.cross_entropy(losses, logits, targets)
    np.testing.assert_allclose(losses, np.log(3), rtol=1e-6)


def test_numbers_are_of_the_kind_that_is_wanted(ops):
    """A factor of NumPy's type too; and what is left out is not made up."""
    scale, norm, x = np.zeros(1), np.full(1, 2.0), np.ones((2, 3), "f4")
    ops.do(CLIP_SCALE, 0, scale, norm, np.float32(0.5))
    assert scale[0] == 0.25
    with pytest.raises(TypeError, match="integer"):
        ops.do(RELU, 2, x, x, 3.0)
    with pytest.raises(TypeError, match="relu: got int, wanted an array of float32"):
        ops.do(RELU, 2, x, 3, 3)
    for wrong in ((x, x), (x, x, 3, 3)):
        with pytest.raises(ValueError, match="argument"):
            ops.do(RELU, 2, *wrong)
