from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.ops.cuda import CudaOps
from tests.cuda.machine import DTYPES, Machine, assert_twice_plain, normal, twice, wide

# a warp a row: single numbers, then packs, each but partly used, up to 256, 512, 768, 1024 channels
WARP_SHAPES = [(1, 1), (7, 7), (9, 33), (33, 8), (5, 136), (3, 264), (3, 768), (2, 1023), (2, 776)]
# a block a row: packs, up to 2048 and to 8192; single numbers
BLOCK_SHAPES = [(3, 1032), (2, 2056), (2, 1025), (1, 8192)]
EPS = 1e-5
VOCAB, BLOCK_SIZE = 11, 5


def norm(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rstd = 1 / np.sqrt((x * x).mean(1) + x.dtype.type(EPS))
    return x * rstd[:, None], rstd


def slope(dy: np.ndarray, y: np.ndarray, rstd: np.ndarray) -> np.ndarray:
    return rstd[:, None] * (dy - y * (dy * y).mean(1, keepdims=True))


def single(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def assert_norm(y: np.ndarray, rstd: np.ndarray, plain_x: np.ndarray, true_x: np.ndarray) -> None:
    """y and rstd of rows true_x, which a plain version would have as plain_x."""
    plain_y, plain_rstd = norm(single(plain_x))
    true_y, true_rstd = norm(true_x)
    assert_twice_plain(y, plain_y.astype(y.dtype), true_y)
    assert_twice_plain(rstd, plain_rstd, true_rstd)


def check_forward(machine: Machine, name: str, rows: int, channels: int, scale: float) -> None:
    dtype = DTYPES[name]
    x = normal(dtype, rows, channels, scale=scale)
    ops = machine.ops(dtype)

    def run():
        y, rstd = machine.blank(x.shape, dtype), machine.blank(rows, np.float32)
        ops.rmsnorm(y, rstd, machine.array(x))
        in_place, again = machine.array(x), machine.blank(rows, np.float32)
        ops.rmsnorm(in_place, again, in_place)
        return y, rstd, in_place, again

    y, rstd, in_place, again = twice(machine, run)
    assert_norm(y, rstd, x, wide(x))
    assert y.tobytes() == in_place.tobytes()
    assert rstd.tobytes() == again.tobytes()


def check_embedding(machine: Machine, name: str, rows: int, channels: int) -> None:
    dtype = DTYPES[name]
    wte, wpe = normal(dtype, VOCAB, channels), normal(dtype, BLOCK_SIZE, channels, seed=1)
    tokens = np.arange(rows, dtype=np.int32) * 7 % VOCAB
    positions = np.arange(rows, dtype=np.int32)[::-1].copy() % BLOCK_SIZE
    given = [machine.array(a) for a in (tokens, positions, wte, wpe)]
    ops = machine.ops(dtype)

    def run():
        y, rstd = machine.blank((rows, channels), dtype), machine.blank(rows, np.float32)
        ops.embedding_rmsnorm(y, rstd, *given)
        return y, rstd

    y, rstd = twice(machine, run)
    plain = (single(wte)[tokens] + single(wpe)[positions]).astype(dtype)
    assert_norm(y, rstd, plain, wide(wte)[tokens] + wide(wpe)[positions])


def check_add(machine: Machine, name: str, rows: int, channels: int) -> None:
    dtype = DTYPES[name]
    residual = normal(dtype, rows, channels)
    branch = normal(dtype, rows, channels, seed=1)
    total = (single(residual) + single(branch)).astype(dtype)
    ops = machine.ops(dtype)

    def run(over: str = ""):
        arrays = {"residual": machine.array(residual), "branch": machine.array(branch)}
        x = arrays[over] if over else machine.blank(total.shape, dtype)
        y, rstd = machine.blank(total.shape, dtype), machine.blank(rows, np.float32)
        ops.add_rmsnorm(x, y, rstd, **arrays)
        return x, y, rstd

    x, y, rstd = twice(machine, run)
    assert np.array_equal(x, total)
    assert_norm(y, rstd, total, wide(total))
    for over in ("residual", "branch"):
        for got, expected in zip(run(over), (x, y, rstd), strict=True):
            assert machine.host(got).tobytes() == expected.tobytes()


def check_backward(machine: Machine, name: str, rows: int, channels: int) -> None:
    dtype = DTYPES[name]
    x, dy = normal(dtype, rows, channels), normal(dtype, rows, channels, seed=1)
    before = normal(dtype, rows, channels, seed=2)
    y, rstd = norm(single(x))
    y, ops = y.astype(dtype), machine.ops(dtype)
    out, scale = machine.array(y), machine.array(rstd)

    def run():
        dx, added = machine.blank(x.shape, dtype), machine.array(before)
        in_place = machine.array(dy)
        ops.rmsnorm_backward(dx, machine.array(dy), out, scale)
        ops.rmsnorm_backward(in_place, in_place, out, scale)
        ops.rmsnorm_backward_add(added, machine.array(dy), out, scale)
        return dx, in_place, added

    dx, in_place, added = twice(machine, run)
    plain = slope(single(dy), single(y), rstd)
    truth = slope(wide(dy), wide(y), wide(rstd))
    assert_twice_plain(dx, plain.astype(dtype), truth)
    assert_twice_plain(added, (single(before) + plain).astype(dtype), wide(before) + truth)
    assert dx.tobytes() == in_place.tobytes()


def check(machine: Machine, name: str, rows: int, channels: int) -> None:
    """Every kernel of the stem once."""
    check_forward(machine, name, rows, channels, 1.0)
    check_embedding(machine, name, rows, channels)
    check_add(machine, name, rows, channels)
    check_backward(machine, name, rows, channels)


def small(machine: Machine) -> None:
    """Every kernel: a warp a row, more rows than warps; a block a row, two passes over it."""
    for name in DTYPES:
        check(machine, name, 5, 40)
        check(machine, name, 1, 1029)


def test_small(machine):
    small(machine)


@pytest.mark.parametrize(("rows", "channels"), WARP_SHAPES)
def test_a_warp_a_row(machine, dtype, rows, channels):
    check(machine, dtype, rows, channels)


@pytest.mark.parametrize(("rows", "channels"), BLOCK_SHAPES)
def test_a_block_a_row(one, dtype, rows, channels):
    check(one, dtype, rows, channels)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])  # eps alone, mostly eps, no eps to speak of
def test_of_any_size(machine, dtype, scale):
    check_forward(machine, dtype, 7, 24, scale)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("channels", [40, 1029])
def test_any_grid(machine, monkeypatch, dtype, blocks, channels):
    """Teams stride over the rows."""
    kernel = CudaOps.kernel

    def on_so_many(*names, **constants):
        launch = kernel(*names, **constants)
        return lambda grid, block, arguments: launch((blocks,), block, arguments)

    monkeypatch.setattr(CudaOps, "kernel", on_so_many)
    check(machine, dtype, 13, channels)


def test_the_fused_are_the_plain_one_after_the_other(machine):
    """Bit for bit, where sums are stored as they are."""
    x, branch = normal(np.float32, 6, 33), normal(np.float32, 6, 33, seed=1)
    ops, ids = machine.ops(np.float32), machine.array(np.arange(6, dtype=np.int32))
    given = machine.array(branch), machine.array(x)

    def outputs():
        return machine.blank(x.shape, np.float32), machine.blank(6, np.float32)

    plain, added, embedded = outputs(), outputs(), outputs()
    ops.rmsnorm(*plain, machine.array(x + branch))
    ops.add_rmsnorm(machine.blank(x.shape, np.float32), *added, *given)
    ops.embedding_rmsnorm(*embedded, ids, ids, *given)
    for wanted, *both in zip(plain, added, embedded, strict=True):
        for got in both:
            assert machine.host(got).tobytes() == machine.host(wanted).tobytes()


def test_no_rows(machine):
    ops, none = machine.ops(np.float32), machine.blank((0, 8), np.float32)
    ops.rmsnorm(none, machine.blank(0, np.float32), none)


def test_wrong_arguments_are_named(machine):
    ops = machine.ops(np.float32)
    x, rstd = machine.blank((4, 8), np.float32), machine.blank(4, np.float32)
    ids = machine.blank(4, np.int32)
    with pytest.raises(ValueError, match=r"rmsnorm: y: got float32 \(3, 8\), wanted float32 \(4,"):
        ops.rmsnorm(x[:3], rstd, x)
    with pytest.raises(ValueError, match=r"rmsnorm: rstd: got float64 \(4,\), wanted float32 \(4,"):
        ops.rmsnorm(x, rstd.astype(np.float64), x)
    with pytest.raises(ValueError, match=r"rmsnorm: x: got \(1, 8193\), wanted rows of 1 to 8192"):
        ops.rmsnorm(x, rstd, machine.blank((1, 8193), np.float32))
    with pytest.raises(ValueError, match=r"_add: dx: got float32 \(2, 8\), wanted float32 \(4,"):
        ops.rmsnorm_backward_add(x[:2], x, x, rstd)
    with pytest.raises(ValueError, match=r"rmsnorm_backward: y: got strides .* contiguous"):
        ops.rmsnorm_backward(x, x, machine.blank((8, 4), np.float32).T, rstd)
    with pytest.raises(ValueError, match=r"add_rmsnorm: residual: got float32 \(2, 8\)"):
        ops.add_rmsnorm(x, x, rstd, x, x[:2])
    with pytest.raises(ValueError, match=r"embedding_rmsnorm: positions: got int32 \(3,\), wanted"):
        ops.embedding_rmsnorm(x, rstd, ids, ids[:3], x, x)
    with pytest.raises(ValueError, match=r"embedding_rmsnorm: wpe: got float32 \(4, 6\), wanted"):
        ops.embedding_rmsnorm(x, rstd, ids, ids, x, machine.blank((4, 6), np.float32))
