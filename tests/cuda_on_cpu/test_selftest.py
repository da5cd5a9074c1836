"""The functions kernels are built of, each against its definition. See selftest.cu."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gpu_microgpt.errors import BackendError
from gpu_microgpt.ops.cuda.compiler import HEADER, Program, compile_program
from gpu_microgpt.rng import philox_block
from tests.cuda_on_cpu.build import HERE, KERNELS

bf16 = ml_dtypes.bfloat16
LANES = np.arange(32)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).integers(low, high, shape)


@pytest.mark.parametrize("defines", [("REAL_BF16=0",), ("REAL_BF16=1", "WIDTH=128")])
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_the_same_file_compiles_for_a_gpu(arch, defines):
    source, header = (HERE / "selftest.cu").read_text(), (KERNELS / HEADER).read_text()
    try:
        compile_program(Program("selftest.cu", source, header, arch, defines))
    except BackendError as error:
        if "does not compile" in str(error):
            raise
        pytest.skip(str(error))


# ------------------------------------------------------------------------------ warps and blocks
def shuffle_source(kind: str, by: int, width: int) -> list[int]:
    """The lane each lane reads, as the PTX manual computes it for shfl.sync."""
    segment = 32 - width
    clamp = 0 if kind == "up" else 31
    sources = []
    for lane in range(32):
        low = lane & segment
        high = low | (clamp & ~segment)
        source, defined = {
            "up": (lane - by, lane - by >= high),
            "down": (lane + by, lane + by <= high),
            "xor": (lane ^ by, lane ^ by <= high),
            "indexed": (low | (lane * by & 31 & ~segment), True),
        }[kind]
        sources.append(source if defined else lane)
    return sources


@pytest.mark.parametrize("width", [4, 8, 32])
@pytest.mark.parametrize("by", [1, 3, 5, 9])
def test_shuffles_and_votes(run, by, width):
    v = integers(0, 100, 32).astype(np.int32)
    out = np.zeros((9, 32), np.int32)
    run("shuffles", (1,), (32,), (out, v, np.int32(by), np.int32(width)))
    ballot = sum(int(bit) << lane for lane, bit in enumerate(v & 1))
    want = [
        *(v[shuffle_source(kind, by, width)] for kind in ("indexed", "up", "down", "xor")),
        np.full(32, ballot, np.uint32).view(np.int32),
        np.full(32, (v == by).any()),
        np.full(32, (v >= by).all()),
        np.where(LANES < 16, v[LANES ^ 1], v[LANES ^ 2]),
        2 * v[::-1] + 1,
    ]
    for row, expected in zip(out, want, strict=True):
        assert np.array_equal(row, expected)


def test_named_barriers_hand_over(run):
    rows = np.arange(128, dtype=np.int32).reshape(4, 32)
    out = np.full((4, 3, 32), -9, np.int32)
    run("hand_over", (1,), (128,), (out, rows))
    assert np.array_equal(out, rows[:, None, ::-1] + np.arange(1, 4)[:, None])


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_reductions(run, threads):
    x = integers(-1000, 1000, threads).astype(np.float32)  # sums are exact in any order
    out, sums = np.zeros((5, threads), np.float32), np.zeros(threads)
    run("reductions", (1,), (threads,), (out, sums, x))
    warps = x.reshape(-1, 32)
    assert np.array_equal(out[0], warps.sum(1).repeat(32))
    assert np.array_equal(out[1], warps.max(1).repeat(32))
    assert (out[2:] == [[x.sum()], [x.max()], [2 * x.sum()]]).all()
    assert (sums == x.sum()).all()


def test_maximum_of_minus_infinities(run):
    x = np.full(64, -np.inf, np.float32)
    out, sums = np.zeros((5, 64), np.float32), np.zeros(64)
    run("reductions", (1,), (64,), (out, sums, x))
    assert (out == -np.inf).all()


def test_indices_in_three_dimensions(run):
    out = np.full(3 * 2 * 4 * 5 * 2 * 3, -1, np.int32)
    run("indices", (4, 2, 3), (3, 2, 5), (out,))
    assert np.array_equal(out, np.arange(out.size))


# ------------------------------------------------------------------------------- between blocks
def test_blocks_wait_for_each_other(run):
    total, turn = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    seen = np.zeros(7, np.uint32)
    run("in_turn", (7,), (64,), (total, seen, turn), resident=True)
    assert np.array_equal(seen, np.cumsum(range(7)))
    assert (total[0], turn[0]) == (28, 7)


@pytest.mark.parametrize("resident", [False, True])
def test_the_last_block_sees_all_others(run, resident):
    out, arrived, parts = (np.zeros(n, np.uint32) for n in (1, 1, 9))
    run("last_block", (9,), (32,), (out, parts, arrived), resident=resident)
    assert out[0] == 45


# ---------------------------------------------------------------------------------------- numbers
def test_bf16_rounds_to_nearest_even(run):
    """Every bf16, the middle of every two, what lies beside it, infinities, NaNs."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:: 1 << 3] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    edges = np.array([0x7F7F0000, 0x7F7F8000, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0xFF800000,
                      0xFFC00000, 0x80000000, 0x00007FFF, 0x00018000], np.uint32)  # fmt: skip
    x = np.concatenate([(upper[:, None] | low).ravel(), edges]).view(np.float32)
    bits, pairs = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint32)
    wide = np.zeros((x.size, 2), np.float32)
    run("bf16_numbers", (1,), (256,), (bits, pairs, wide, x, np.int32(x.size)))
    with np.errstate(invalid="ignore"):
        want = np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(bf16).view(np.uint16))
    assert np.array_equal(bits, want)
    assert np.array_equal(pairs, want | want[::-1].astype(np.uint32) << 16)
    widened = (want.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(wide, np.stack([widened, widened[::-1]], 1), equal_nan=True)


@pytest.mark.parametrize("real", [np.float32, bf16])
def test_packs(run, real):
    x = np.random.default_rng(0).standard_normal(136).astype(real)
    y, wide = np.zeros(136, real), np.zeros(136, np.float32)
    run("packs", (1,), (32,), (y, wide, x, np.int32(136)), (f"REAL_BF16={int(real is bf16)}",))
    assert y.tobytes() == x.tobytes()
    assert np.array_equal(wide, x.astype(np.float32))


def test_words(run):
    words = [0, 1, 0x80000000, 0xFFFFFFFF, 0xD2511F53, 2, 0x00FF0000, 6]
    a, b = np.array(words, np.uint32), np.array(words[::-1], np.uint32)
    out = np.zeros((8, 5), np.uint32)
    run("integers", (1,), (8,), (out, a, b))
    for row, x, y in zip(out.tolist(), a.tolist(), b.tolist(), strict=True):
        first = (x & -x).bit_length()
        assert row == [x * y >> 32, x.bit_count(), 32 - x.bit_length(), first, abs(x - y)]
    x = np.array([1.5, -0.0, np.inf, 1e-30], np.float32)
    y = np.zeros(4, np.float32)
    run("float_bits", (1,), (4,), (y, x))
    assert np.array_equal(y, x)


def test_doubles(run):
    """Two units in the last place, as the CUDA manual has it; of a cosine, of 1."""
    angles, cosines = [0, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1], [4, 3, 2, 1, 0, -1, -4]
    x, y = np.array(angles), np.array([0, 1, 2, 3, 7, 40, 1 << 31], float)
    out = np.full((2, 7), np.nan)
    run("doubles", (1,), (7,), (out, x, y))
    wanted = np.sign(cosines) * np.sqrt(np.abs(cosines)) / 2
    assert np.abs(out[0] - wanted).max() < 5e-16
    assert out[1] == pytest.approx([float(a) ** b for a, b in zip(x, y, strict=True)], rel=5e-16)


def test_philox_is_that_of_the_package(run):
    counters = integers(0, 1 << 32, 64, 4).astype(np.uint32)
    counters[0], counters[1] = 0, 0xFFFFFFFF
    for key in ((0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (123456789, 0xDEADBEEF)):
        out = np.zeros_like(counters)
        run("random_words", (1,), (64,), (out, counters, *map(np.uint32, key)))
        assert np.array_equal(out, philox_block(counters, key))


# ----------------------------------------------------------------- asynchronous copies, matrices
def test_copies_end_in_zeros(run):
    x = integers(1, 256, 64, 16).astype(np.uint8)
    sizes = integers(0, 17, 64).astype(np.int32)
    sizes[:3] = 16, 0, 4
    out = np.zeros((64, 16), np.uint8)
    run("copies", (1,), (32,), (out, x, sizes))
    want = np.where(np.arange(16) < sizes[:, None], x, 0)
    assert np.array_equal(out[:32], want[:32][::-1])
    assert np.array_equal(out[32:], want[32:][::-1])


def layout(threads: list[tuple[int, int]], values: list[tuple[int, int]]) -> np.ndarray:
    """(32, values): index of a lane's value in a matrix stored column after column, given
    (extent, stride) of each digit of the lane's and of the value's number, smallest first: how
    CUTLASS writes down which lane of an instruction holds what."""

    def offset(number: int, digits: list[tuple[int, int]]) -> int:
        total = 0
        for extent, stride in digits:
            number, digit = divmod(number, extent)
            total += digit * stride
        return total

    count = int(np.prod([extent for extent, _ in values]))
    rows = range(32), range(count)
    return np.array([[offset(t, threads) + offset(v, values) for v in rows[1]] for t in rows[0]])


# MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>: A is (M, K), B (N, K), C (M, N).
LAYOUT_A = layout([(4, 32), (8, 1)], [(2, 16), (2, 8), (2, 128)])
LAYOUT_B = layout([(4, 16), (8, 1)], [(2, 8), (2, 64)])
LAYOUT_C = layout([(4, 32), (8, 1)], [(2, 16), (2, 8)])


def test_product_of_matrices(run):
    a = integers(-8, 9, 16, 16).astype(bf16)  # sums are exact in any order
    b = integers(-8, 9, 8, 16).astype(bf16)
    c = integers(-99, 99, 16, 8).astype(np.float32)
    registers_a, registers_b = a.ravel("F")[LAYOUT_A], b.ravel("F")[LAYOUT_B]
    d = c.ravel("F")[LAYOUT_C]
    run("products", (1,), (32,), (d, registers_a.view(np.uint32), registers_b.view(np.uint32)))
    got = np.full(128, np.nan, np.float32)
    got[LAYOUT_C] = d
    want = a.astype(np.float32) @ b.astype(np.float32).T + c
    assert np.array_equal(got.reshape(16, 8, order="F"), want)


def test_loaded_matrices(run):
    """Lane l gets elements 2 (l % 4) and the next of row l / 4 of each."""
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((2, 32, 4), np.uint32)
    run("matrices", (1,), (32,), (out, x))
    for got, matrices in zip(out, (x, x.transpose(0, 2, 1)), strict=True):
        pairs = matrices.reshape(4, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4, 2)
        assert np.array_equal(got.view(np.uint16).reshape(32, 4, 2), pairs)


@pytest.mark.parametrize("valid", [0, 5, 16])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_tiles_and_fragments(run, width, valid):
    a, b = (integers(-4, 5, 16, width, seed=s).astype(bf16) for s in (1, 2))
    c = integers(-4, 5, width, width).astype(bf16)
    by_rows, by_columns = (np.full((16, 16), np.nan, np.float32) for _ in range(2))
    shared = 2 * width * (32 + width)
    args = (by_rows, by_columns, a, b, c, np.int32(valid))
    run("tiles", (1,), (32,), args, ("REAL_BF16=1", f"WIDTH={width}"), shared_mem=shared)
    left = np.where(np.arange(16)[:, None] < valid, a.astype(np.float32), 0)
    assert np.array_equal(by_rows, left @ b.astype(np.float32).T)
    assert np.array_equal(by_columns, left @ c.astype(np.float32)[:, :16])


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_swizzle(run, width):
    """A permutation of the tile's chunks, and the rows ldmatrix reads at once in eight banks."""
    chunks = width // 8
    places = np.full((8, chunks), -1, np.int32)
    run("banks", (1,), (128,), (places,), ("REAL_BF16=1", f"WIDTH={width}"))
    assert sorted(places.ravel()) == list(range(8 * chunks))
    assert (np.sort(places % 8, axis=0) == np.arange(8)[:, None]).all()
