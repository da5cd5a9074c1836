from __future__ import annotations

from importlib import import_module
from unittest.mock import patch

import numpy as np
import pytest

from gpu_microgpt.arena import array_bytes
from gpu_microgpt.ops.cuda import CudaOps
from tests.cuda.machine import DTYPES, Machine, assert_twice_plain, normal, twice, wide

launcher = import_module("gpu_microgpt.ops.cuda.embedding")  # not the function of this name

# rows, channels, vocabulary, block size: single numbers, packs; few ids, and so many that they are
# sorted in two passes; rows of fewer entries than a slice, of many slices; two warps to sort
SHAPES = [
    (1, 1, 3, 1), (7, 7, 3, 5), (31, 33, 27, 16), (33, 8, 66, 7), (100, 8, 600, 33),
    (40, 24, 5, 513), (1100, 16, 3, 9), (33, 8, 50257, 5),
]  # fmt: skip


def ids(rows: int, vocab: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of which one is in every other row and one, of four or more, in none; positions of
    packed sequences. The first and the last of each table occur, if there are rows enough."""
    tokens = np.random.default_rng(rows).integers(0, vocab, rows, np.int32)
    tokens[tokens == 1] = 0
    tokens[::2] = vocab // 2
    tokens[1:2], tokens[-1] = 0, vocab - 1
    positions = np.arange(rows, dtype=np.int32) % block_size
    positions[:1] = block_size - 1
    return tokens, positions


def whole(dtype: np.dtype, *shape: int) -> np.ndarray:
    """Small whole numbers: sums of any order are exact."""
    return np.random.default_rng(shape).integers(-9, 10, shape).astype(np.float32).astype(dtype)


def planned_ops(machine: Machine, dtype: np.dtype, *sizes: int) -> CudaOps:
    """With the scratch memory planned for (rows, channels, vocab, block_size)."""
    shapes = launcher.embedding_scratch(*sizes)
    return machine.ops(dtype, sum(array_bytes(shape, 4) for shape in shapes))


def sums(dy: np.ndarray, index: np.ndarray, size: int, dtype: type, old: float = 0) -> np.ndarray:
    dw = np.full((size, dy.shape[1]), old, dtype)
    np.add.at(dw, index, dy.astype(dtype))
    return dw


def check_forward(machine: Machine, name: str, rows: int, channels: int) -> None:
    dtype = DTYPES[name]
    wte, wpe = normal(dtype, 11, channels), normal(dtype, 5, channels, seed=1)
    tokens, positions = ids(rows, 11, 5)
    given = [machine.array(a) for a in (tokens, positions, wte, wpe)]
    ops = machine.ops(dtype)

    def run():
        x = machine.blank((rows, channels), dtype)
        ops.embedding(x, *given)
        return (x,)

    (x,) = twice(machine, run)
    single = wte.astype(np.float32)[tokens] + wpe.astype(np.float32)[positions]
    assert np.array_equal(x, single.astype(dtype))


def check_backward(
    machine: Machine, name: str, rows: int, channels: int, vocab: int, block_size: int
) -> None:
    """Overwriting, then adding to that."""
    dtype = DTYPES[name]
    dy, index = whole(dtype, rows, channels), ids(rows, vocab, block_size)
    given = [machine.array(a) for a in (dy, *index)]
    ops = planned_ops(machine, dtype, rows, channels, vocab, block_size)

    def run():
        tables = [machine.blank((size, channels), np.float32) for size in (vocab, block_size)]
        ops.embedding_backward(*tables, *given, False)
        once = [machine.array(machine.host(table)) for table in tables]
        ops.embedding_backward(*tables, *given, True)
        return *once, *tables

    dwte, dwpe, dwte_twice, dwpe_twice = twice(machine, run)
    for dw, dw_twice, at in zip((dwte, dwpe), (dwte_twice, dwpe_twice), index, strict=True):
        assert np.array_equal(dw, sums(dy, at, len(dw), np.float64))
        assert np.array_equal(dw_twice, 2 * dw)


def small(machine: Machine) -> None:
    """Every kernel: runs within and across slices, ids without rows, one pass and two, two warps
    to sort."""
    for name in DTYPES:
        check_forward(machine, name, 5, 24)
        check_forward(machine, name, 5, 7)
        check_backward(machine, name, 40, 24, 5, 3)
        check_backward(machine, name, 40, 7, 4, 2)
    check_backward(machine, "float32", 1030, 4, 3, 2)
    with patch.object(launcher, "ONE_PASS", 2):
        check_backward(machine, "float32", 20, 8, 5, 3)


def test_small(machine):
    small(machine)


@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (7, 7), (33, 8), (300, 40), (2, 2064)])
def test_forward(machine, dtype, rows, channels):
    check_forward(machine, dtype, rows, channels)


@pytest.mark.parametrize(("rows", "channels", "vocab", "block_size"), SHAPES)
def test_backward_sums_each_ids_rows(machine, dtype, rows, channels, vocab, block_size):
    check_backward(machine, dtype, rows, channels, vocab, block_size)


def test_wide_rows(one, dtype):
    """More packs than a block has threads."""
    check_backward(one, dtype, 40, 2064, 4, 3)


@pytest.mark.parametrize("slices", [1, 60])
@pytest.mark.parametrize("channels", [1, 8])
def test_longer_slices(machine, monkeypatch, channels, slices):
    """As of many rows: slices of 64 and of 32, and the sort's one warp in several strides."""
    monkeypatch.setattr(launcher, "SLICES", slices)
    monkeypatch.setattr(launcher, "MAX_WARPS", 1)
    assert launcher._slice_rows(1500) == {1: 64, 60: 32}[slices]
    check_backward(machine, "float32", 1500, channels, 6, 4)


@pytest.mark.parametrize("blocks", [1, 3])
def test_any_grid(machine, monkeypatch, blocks):
    """Blocks stride over what they have to do."""
    kernel = CudaOps.kernel

    def on_so_many(*names, **constants):
        launch = kernel(*names, **constants)
        return lambda grid, *rest, **shared: launch((blocks, *grid[1:]), *rest, **shared)

    monkeypatch.setattr(CudaOps, "kernel", on_so_many)
    check_forward(machine, "float32", 300, 12)
    check_backward(machine, "float32", 300, 256, 5, 7)


def test_sums_are_no_worse_than_plain_ones(machine, dtype):
    rows, vocab, block_size = 2000, 3, 50
    dy, index = normal(DTYPES[dtype], rows, 8), ids(rows, vocab, block_size)
    ops = planned_ops(machine, DTYPES[dtype], rows, 8, vocab, block_size)

    def run():
        tables = [machine.blank((size, 8), np.float32) for size in (vocab, block_size)]
        ops.embedding_backward(*tables, *map(machine.array, (dy, *index)), False)
        return tables

    for dw, at in zip(twice(machine, run), index, strict=True):
        truth = sums(wide(dy), at, len(dw), np.float64)
        assert_twice_plain(dw, sums(dy, at, len(dw), np.float32), truth)


def test_same_bits_on_another_gpu(machine):
    dy, index = normal(np.float32, 700, 8), ids(700, 9, 40)

    def run(on: Machine) -> bytes:
        tables = [on.blank((size, 8), np.float32) for size in (9, 40)]
        ops = planned_ops(on, np.float32, 700, 8, 9, 40)
        ops.embedding_backward(*tables, *map(on.array, (dy, *index)), False)
        return b"".join(on.host(table).tobytes() for table in tables)

    assert run(machine) == run(machine.on("sm_75"))


@pytest.mark.parametrize(("vocab", "block_size"), [(5, 40), (700, 3)])
def test_the_sort_is_stable(machine, vocab, block_size):
    rows = 90
    tables, index = (vocab, block_size), ids(rows, vocab, block_size)
    ops = planned_ops(machine, np.float32, rows, 1, *tables)
    shapes = launcher.embedding_scratch(rows, 1, *tables)
    keys, order, starts, *between, _ = ops.scratch(np.int32, *shapes)
    launcher._sort(ops, (keys, order, starts), tuple(between), *map(machine.array, index), *tables)
    keys, order, starts = map(machine.host, (keys, order, starts))
    cut = np.split(starts, [vocab + 1])
    for k, o, s, at, size in zip(keys, order, cut, index, tables, strict=True):
        assert np.array_equal(o, np.argsort(at, kind="stable"))
        assert np.array_equal(k, np.sort(at))
        assert np.array_equal(s, np.searchsorted(k, np.arange(size + 1)))


@pytest.mark.parametrize("rows", [1, 512 * 16, 512 * 16 + 1, 512 * 32 + 1, 65536, 70000])
def test_fewer_rows_fit_the_scratch_planned_for_more(rows):
    *_, (_, planned, _, _) = launcher.embedding_scratch(rows, 1, 3, 1)
    fewer = np.unique(np.linspace(1, rows, 999).astype(int))
    assert max(-(-n // launcher._slice_rows(n)) for n in [*fewer.tolist(), rows]) <= planned


def test_no_rows(machine):
    ops = planned_ops(machine, np.float32, 0, 4, 3, 2)
    none, ids = machine.blank((0, 4), np.float32), machine.blank(0, np.int32)
    dwte, dwpe = machine.blank((3, 4), np.float32), machine.blank((2, 4), np.float32)
    ops.embedding(none, ids, ids, dwte, dwpe)
    ops.embedding_backward(dwte, dwpe, none, ids, ids, False)
    assert not machine.host(dwte).any()
    assert not machine.host(dwpe).any()


def test_wrong_arguments_are_named(machine):
    ops = planned_ops(machine, np.float32, 4, 8, 3, 2)
    x, ids = machine.blank((4, 8), np.float32), machine.blank(4, np.int32)
    with pytest.raises(ValueError, match=r"embedding: tokens: got int64 \(4,\), wanted int32 \(4,"):
        ops.embedding(x, ids.astype(np.int64), ids, x, x)
    with pytest.raises(ValueError, match=r"embedding: wpe: got float32 \(4, 6\), wanted .* \(4, 8"):
        ops.embedding(x, ids, ids, x, machine.blank((4, 6), np.float32))
    with pytest.raises(ValueError, match=r"embedding: x: got \(32,\), wanted rows of channels"):
        ops.embedding(x.reshape(-1), ids, ids, x, x)
    with pytest.raises(ValueError, match=r"embedding_backward: dwte: got float64 \(4, 8\), wanted"):
        ops.embedding_backward(x.astype(np.float64), x, x, ids, ids, False)
    with pytest.raises(ValueError, match=r"embedding_backward: positions: got int32 \(3,\), wante"):
        ops.embedding_backward(x, x, x, ids, ids[:3], False)
    with pytest.raises(MemoryError, match="wanted"):
        machine.ops(np.float32).embedding_backward(x, x, x, ids, ids, False)
