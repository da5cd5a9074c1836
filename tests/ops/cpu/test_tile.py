"""The product of tiles: every shape of tile, every edge, every mode, at the edge of memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.guard_page import up_to_the_edge
from tests.op_cases import assert_close, normal

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.ops.cpu.code import VECTOR_BYTES
from gpu_microgpt.ops.cpu.compile import compiled
from gpu_microgpt.ops.cpu.dots import product_of_few
from gpu_microgpt.ops.cpu.tile import (
    ADD,
    KEEP,
    RELU,
    STORE,
    STRIP,
    pack,
    product,
    product_packing,
)
from gpu_microgpt.ops.cpu.vector import at

MODES = [STORE, ADD, RELU, KEEP]
FORMS = ["rows", "packed", "packing", "packing transposed", "few"]
M, N, K = [1, 5, 6, 7, 13, 24, 25], [1, 15, 16, 17, 31, 48, 53, 64, 66, 130], [1, 2, 16, 33]


@compiled
def as_rows(mode, m, n, k, a, as0, as1, b, c, r):
    product(mode, m, n, k, at(a, 0), as0, as1, at(b, 0), n, at(c, 0), n, at(r, 0), n)


@compiled
def as_packed(mode, m, n, k, a, as0, as1, b, bs0, bs1, c, r, panels):
    pack(at(b, 0), bs0, bs1, k, n, at(panels, 0))
    product(mode, m, n, k, at(a, 0), as0, as1, at(panels, 0), 0, at(c, 0), n, at(r, 0), n)


@compiled
def as_packing(mode, m, n, k, a, as0, as1, b, bs0, bs1, c, r, panel):
    product_packing(mode, m, n, k, at(a, 0), as0, as1, at(b, 0), bs0, bs1, at(c, 0), n,
                    at(r, 0), n, at(panel, 0))  # fmt: skip


@compiled
def as_few(mode, m, n, k, a, bt, c, r):
    product_of_few(mode, m, n, k, at(a, 0), at(bt, 0), at(c, 0), at(r, 0), n)


def multiplied(form, mode, a, b, r, transposed=False):
    """c = a b by `mode` with r, every array at the edge of memory; a lies transposed or not."""
    (m, k), n, dtype = a.shape, b.shape[1], a.dtype
    lanes = VECTOR_BYTES // dtype.itemsize
    up = -(-n // lanes) * lanes
    c, r = up_to_the_edge(np.full((m, n), np.nan, dtype)), up_to_the_edge(r)
    lies = up_to_the_edge(np.ascontiguousarray(a.T if transposed else a))
    as0, as1 = (1, m) if transposed else (k, 1)
    turned = "transposed" in form or form == "few"
    b = up_to_the_edge(np.ascontiguousarray(b.T if turned else b))
    bs0, bs1 = (1, k) if turned else (n, 1)
    panel = up_to_the_edge(np.full((k, min(up, STRIP * lanes)), np.nan, dtype))
    panels = up_to_the_edge(np.full((k, up), np.nan, dtype))
    if form == "rows":
        as_rows(mode, m, n, k, lies, as0, as1, b, c, r)
    elif form == "packed":
        as_packed(mode, m, n, k, lies, as0, as1, b, bs0, bs1, c, r, panels)
    elif form == "few":
        as_few(mode, m, n, k, lies, b, c, r)
    else:
        as_packing(mode, m, n, k, lies, as0, as1, b, bs0, bs1, c, r, panel)
    return c


def expected(mode, a, b, r):
    product = (a[:, :, None].astype(float) * b).sum(1)
    return {
        STORE: product,
        ADD: product + r,
        RELU: np.maximum(product, 0),
        KEEP: np.where(r > 0, product, 0),
    }[mode]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_every_size(dtype, form, mode):
    lanes = VECTOR_BYTES // np.dtype(dtype).itemsize
    for m in M:
        for n in N:
            for k in K:
                width = -(-n // lanes) * lanes if form == "rows" else n
                a, b = normal(dtype, m, k), normal(dtype, k, width, seed=1)
                r = normal(dtype, m, width, seed=2)
                got = multiplied(form, mode, a, b, r, transposed=form != "few" and m % 2 == 0)
                assert_close(got, expected(mode, a, b, r), size=max(k**0.5, 1) * 6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_reach_their_row_and_no_other(dtype, form, bad):
    a, b = normal(dtype, 7, 20), np.abs(normal(dtype, 20, 64, seed=1))
    a[3, 11] = bad
    for mode in (STORE, ADD, RELU):
        c = multiplied(form, mode, a, b, np.ones((7, 64), dtype))
        reached = np.isnan(c) if np.isnan(bad) else c == bad
        assert reached[3].all()
        assert np.isfinite(c[[0, 1, 2, 4, 5, 6]]).all()


def test_a_sum_may_be_added_to_where_it_lies(dtype):
    a, b, c = normal(dtype, 7, 9), normal(dtype, 9, 64, seed=1), normal(dtype, 7, 64, seed=2)
    wanted = expected(ADD, a, b, c)
    as_rows(ADD, 7, 64, 9, a, 9, 1, b, c, c)
    assert_close(c, wanted, size=20)


def test_same_bits_whatever_the_form(dtype):
    """Of all but `few`, whose sums run another way."""
    a, b, r = normal(dtype, 13, 33), normal(dtype, 33, 64, seed=1), normal(dtype, 13, 64, seed=2)
    bits = {multiplied(form, ADD, a, b, r).tobytes() for form in FORMS if form != "few"}
    assert len(bits) == 1
