"""Shared by the tests of bfloat16 on the CPU: which units this one has, and rounding as NumPy has
it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest

UNITS = ("AMX", "AVX512_BF16")


@cache
def missing(unit: str = "") -> str:
    """Why this unit (or any) cannot be tested here; empty where it can."""
    if find_spec("numba") is None:
        return "needs Numba"
    from gpu_microgpt.ops import cpu

    here = cpu.bf16_unit()
    if unit == "AMX" and here != cpu.AMX_UNIT:
        return f"needs AMX, which Linux allows; here: {here or 'no bfloat16'}"
    return "" if here else "needs a CPU with AVX512_BF16"


needs_bf16 = pytest.mark.skipif(bool(missing()), reason=missing() or "-")
every_unit = pytest.mark.parametrize(
    "unit",
    [
        pytest.param(u, marks=pytest.mark.skipif(bool(missing(u)), reason=missing(u) or "-"))
        for u in UNITS
    ],
)


def rounded(array: np.ndarray) -> np.ndarray:
    """Through bfloat16, to nearest even; float32 again."""
    from ml_dtypes import bfloat16

    with np.errstate(invalid="ignore"):
        return array.astype(bfloat16).astype(np.float32)
