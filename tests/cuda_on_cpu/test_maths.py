"""What GPUs do with less care than CPUs, on both: results beside the correctly rounded ones, as far
as the CUDA C++ Programming Guide allows, and subnormal numbers taken for zeros (-ftz=true)."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.cuda_on_cpu.build import HERE, KERNELS, SANITIZER, module
from tests.cuda_on_cpu.launch import KernelError

ULPS = {"rsqrtf": 2, "exp2f": 2, "expf": 2, "logf": 1, "inverse_root": 1}  # device.cuh has the last
INEXACT = re.compile(  # the names in the guide's tables, of float and double and fast ones
    r"\b(?:__)?(?:r?sqrt|r?cbrt|r?hypot|exp|exp2|exp10|expm1|log|log2|log10|log1p|pow|fdivide|tgamma"
    r"|lgamma|(?:sin|cos|sincos)(?:pi)?|tan|a(?:sin|cos|tan)h?|atan2|(?:sin|cos|tan)h|erfc?x?"
    r"|erfc?inv|normcdf(?:inv)?|(?:frcp|fsqrt|frsqrt|fdiv)_r[nduz])f?(?=\()"
)
THREADS, BLOCKS = 1024, 8
emulated = pytest.mark.skipif(bool(SANITIZER), reason="the emulator is tested without sanitizers")


def exact(x: np.ndarray) -> np.ndarray:
    """(5, n), rounded to float32: what kernel `inexact` of selftest.cu is after."""
    x = x.astype(np.float64)
    with np.errstate(all="ignore"):
        root, log = 1 / np.sqrt(np.abs(x)), np.log(np.abs(x))
        return np.stack([root, np.exp2(x), np.exp(x), log, root]).astype(np.float32)


def numbers() -> np.ndarray:
    return np.random.default_rng(0).uniform(-80, 80, THREADS * BLOCKS).astype(np.float32)


def emulate(name: str, *args: np.ndarray, blocks: int = 1) -> None:
    kernel = module(HERE / "selftest.cu", ("REAL_BF16=0",)).get_function(name)
    kernel((blocks,), (args[-1].size // blocks,), args)


def units(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How many float32 further from zero."""
    assert (np.signbit(got) == np.signbit(wanted)).all()
    return got.view(np.int32) - wanted.view(np.int32)


def test_errors_are_as_the_manual_bounds_them(run):
    x = numbers()
    out = np.full((len(ULPS), x.size), np.nan, np.float32)
    run("inexact", (BLOCKS,), (THREADS,), (out, x))
    for most, off in zip(ULPS.values(), units(out, exact(x)), strict=True):
        assert np.abs(off).max() <= most


@emulated
def test_the_emulation_makes_every_error_there_may_be():
    x = numbers()
    out, backwards = (np.full((len(ULPS), x.size), np.nan, np.float32) for _ in range(2))
    emulate("inexact", out, x, blocks=BLOCKS)
    for (name, most), off in zip(ULPS.items(), units(out, exact(x)), strict=True):
        assert set(off) == set(range(-most, most + 1)) or name == "inverse_root"
    assert np.abs(units(out, exact(x))[4]).mean() < 0.3  # refined: next to always right
    emulate("inexact", backwards, x[::-1].copy(), blocks=BLOCKS)
    assert np.array_equal(backwards[:, ::-1], out)  # whoever asks, and whenever


def test_results_that_are_certain(run):
    x = np.array([0, np.inf, -np.inf, 1, 200, -200, 1e-40, np.nan], np.float32)
    inf, nan = np.inf, np.nan
    out = np.full((len(ULPS), x.size), 7, np.float32)
    run("inexact", (1,), (x.size,), (out, x))
    assert np.array_equal(out[0, [0, 1, 2, 6, 7]], [inf, 0, 0, inf, nan], equal_nan=True)
    for row in out[1:3]:
        assert np.array_equal(
            row[[0, 1, 2, 4, 5, 6, 7]], [1, inf, 0, inf, 0, 1, nan], equal_nan=True
        )
    assert np.array_equal(
        out[3, [0, 1, 2, 3, 6, 7]], [-inf, inf, inf, 0, -inf, nan], equal_nan=True
    )


def test_subnormal_numbers_are_zeros_but_where_they_are_only_moved(run):
    tiny, less = np.float32(2**-126), np.float32(2**-130)
    x = np.array([tiny, less, -less, 2**-100, 3 * tiny, 2, less], np.float32)
    y = np.array([0.5, 2**20, 2**20, 2**-40, -2.5 * tiny, tiny, less], np.float32)
    out = np.full((5, x.size), np.nan, np.float32)
    run("small_numbers", (1,), (x.size,), (out, x, y))
    assert out[0].tolist() == [0, 0, 0, 0, 0, 2 * tiny, 0]
    sums = [0.5, 2**20, 2**20, 2**-40 + 2**-100, 0, 2, 0]
    assert out[1].tolist() == np.array(sums, np.float32).tolist()
    assert out[2].tolist() == [np.float32(1.5) * tiny, 0, 0, x[3], x[4], 2, 0]
    assert out[3].tolist() == [1, 0, 0, 1, 1, 1, 0]
    assert np.array_equal(out[4], x)


@emulated
def test_the_caller_keeps_its_subnormal_numbers():
    less = np.array([2**-130, 2**-140], np.float32)
    mistake = module(HERE / "mistakes.cu", ("REAL_BF16=0",)).get_function("write_at")
    with pytest.raises(KernelError):
        mistake((1,), (1,), (np.zeros(8, np.float32), np.int32(8)))  # where the guard page begins
    assert (less * np.float32(2**20) == np.array([2**-110, 2**-120])).all()
    assert (np.array([2**-100], np.float32) * np.float32(2**-30) == less[:1]).all()


def test_kernels_call_no_other_inexact_function():
    """Which the emulation would round better than a GPU does."""
    text = (HERE / "intrinsics.h").read_text("utf-8")
    emulated = set(re.findall(r"#define (\w+) emu::\1\b", text))
    assert emulated == {"rsqrtf", "exp2f", "expf", "logf", "cospi", "pow"}
    for source in KERNELS.glob("*.cu*"):
        called = set(INEXACT.findall(re.sub(r"//.*", "", source.read_text("utf-8"))))
        assert called <= emulated | {"sqrt", "sqrtf"}, source.name  # roots are exact
