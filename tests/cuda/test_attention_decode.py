from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.arena import array_bytes
from gpu_microgpt.ops.cuda.attention_decode import attention_decode_scratch, cut
from gpu_microgpt.ops.cuda.device import KNOWN
from gpu_microgpt.ops.reference import ReferenceOps
from tests.cuda.machine import DTYPES, Machine, assert_twice_plain, normal, twice, wide
from tests.cuda_on_cpu.loader import EmulatedLoader


@dataclass(frozen=True)
class Case:
    """A cache filled up to and with position lengths[s], NaN behind, and a query a sequence."""

    lengths: np.ndarray
    qkv: np.ndarray  # (S, 3C)
    keys: np.ndarray  # (S, H, T, D)
    values: np.ndarray

    @classmethod
    def of(
        cls, name: str, lengths: list[int], heads: int, size: int, head_dim: int, scale: float = 1.0
    ) -> Case:
        dtype, shape = DTYPES[name], (len(lengths), heads, size, head_dim)
        qkv = normal(dtype, len(lengths), 3 * heads * head_dim, scale=scale)
        keys, values = normal(dtype, *shape, seed=1), normal(dtype, *shape, seed=2)
        for s, length in enumerate(lengths):
            keys[s, :, length + 1 :], values[s, :, length + 1 :] = np.nan, np.nan
        return cls(np.array(lengths, np.int32), qkv, keys, values)


def attend(case: Case, stored: Any) -> np.ndarray:
    """y (S, C) in float64; `stored` rounds scores and probabilities."""
    y = np.zeros(case.keys.shape[:2] + case.keys.shape[3:])
    q = wide(case.qkv).reshape(len(y), 3, *y.shape[1:])[:, 0, :, None] / np.sqrt(y.shape[2])
    for s, length in enumerate(case.lengths.tolist()):
        if length >= 0:
            keys, values = (wide(x)[s, :, : length + 1] for x in (case.keys, case.values))
            p = stored(q[s] @ keys.swapaxes(1, 2))
            p = np.exp(p - p.max(2, keepdims=True))
            y[s] = (stored(p / p.sum(2, keepdims=True)) @ values)[:, 0]
    return stored(y.reshape(len(y), -1))


def by_numpy(case: Case) -> np.ndarray:
    """y of a plain version: for float32 the reference."""
    dtype = case.qkv.dtype
    if dtype != np.float32:
        return attend(case, lambda x: wide(x.astype(np.float32).astype(dtype)))
    y, keys, values = np.zeros_like(case.qkv[:, ::3]), case.keys.copy(), case.values.copy()
    keys[np.isnan(keys)], values[np.isnan(values)] = 0, 0
    lengths, ops = np.maximum(case.lengths, 0), ReferenceOps(np, np.empty(1 << 20, np.uint8))
    ops.attention_decode(y, case.qkv, keys, values, lengths)
    y[case.lengths < 0] = 0
    return y


def check(machine: Machine, case: Case, kernels: int = 1) -> None:
    """By the 2x rule, through so many kernels."""
    dtype = case.qkv.dtype
    shapes = attention_decode_scratch(machine.device, case.keys.shape, dtype.itemsize)
    assert len(shapes) == 2 * (kernels - 1)
    ops = machine.ops(dtype, sum(-(-4 * int(np.prod(s)) // 64) * 64 for s in shapes))
    arrays = [machine.array(x) for x in (case.qkv, case.keys, case.values, case.lengths)]

    def run():
        y = machine.blank((len(case.qkv), case.qkv.shape[1] // 3), dtype)
        ops.attention_decode(y, *arrays)
        return (y,)

    (y,) = twice(machine, run)
    assert_twice_plain(y, by_numpy(case), attend(case, lambda x: x))


def check_cache(machine: Machine, name: str, heads: int, head_dim: int) -> None:
    """Each row at its place, the rest untouched; not the row of no sequence."""
    dtype, size = DTYPES[name], 9
    sequences, positions = np.array([[2, 0, -1, 2, 1], [8, 0, 3, 5, 4]], np.int32)
    qkv = normal(dtype, len(sequences), 3 * heads * head_dim)
    keys, values = (machine.array(np.full((3, heads, size, head_dim), 7, dtype)) for _ in "kv")
    machine.ops(dtype).cache_kv(keys, values, *map(machine.array, (qkv, sequences, positions)))
    for part, cache in ((1, keys), (2, values)):
        expected = np.full(cache.shape, 7, dtype)
        for n in range(len(qkv)):
            if sequences[n] >= 0:
                row = qkv[n].reshape(3, heads, head_dim)[part]
                expected[sequences[n], :, positions[n]] = row
        assert machine.host(cache).tobytes() == expected.tobytes()


def small(machine: Machine) -> None:
    """Every kernel."""
    for name in DTYPES:
        check_cache(machine, name, 2, 20)
        check(machine, Case.of(name, [70, 0, -1], 1, 72, 20))
    check(machine, Case.of("float32", [260, 3], 1, 1100, 20), kernels=2)


def test_small(machine):
    small(machine)


@pytest.mark.parametrize("head_dim", [4, 12, 64, 128])
def test_cache_keeps_rows_at_their_places(one, dtype, head_dim):
    check_cache(one, dtype, 5, head_dim)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        ("float32", 4),
        ("float32", 32),
        ("float32", 128),
        ("bfloat16", 4),
        ("bfloat16", 12),
        ("bfloat16", 64),
        ("bfloat16", 100),
        ("bfloat16", 128),
    ],
)
def test_lengths(dtype, head_dim):
    machine = Machine(EmulatedLoader("random"), KNOWN["sm_75"])
    check(machine, Case.of(dtype, [0], 1, 1, head_dim))
    check(machine, Case.of(dtype, [0, 3, 16, 6], 3, 17, head_dim))
    few = Machine(machine.loader, replace(machine.device, multiprocessors=1))
    check(few, Case.of(dtype, [31, 32, 0, 33, 511, 700], 2, 701, head_dim))
    check(few, Case.of(dtype, [40, 9], 2, 50, head_dim, scale=20.0))


@pytest.mark.parametrize("lengths", [[4095], [2000, 0, 129], [-1, 128, 127]], ids=str)
def test_long_caches_are_split(one, dtype, lengths):
    case = Case.of(dtype, lengths, 1, 4096, 64)
    check(one, case, kernels=2)


def test_plans():
    for device in KNOWN.values():
        for itemsize in (2, 4):
            assert cut(device, 4096, 1024, 64, itemsize).splits == 1  # enough without
            assert cut(device, 1, 256, 64, itemsize).splits <= 4  # too short to be split much
            assert cut(device, 12, 65536, 64, itemsize).splits >= device.multiprocessors // 12
    assert cut(KNOWN["sm_90"], 64, 16, 4, 4).block == 32


def test_wrong_arguments_are_named(machine):
    ops, ids = machine.ops(np.float32), machine.blank(3, np.int32)
    blank = {d: machine.blank((3, 2, 5, d), np.float32) for d in (4, 6, 132)}
    qkv, y = machine.blank((3, 24), np.float32), machine.blank((3, 8), np.float32)
    for head_dim in (6, 132):
        wrong = blank[head_dim]
        with pytest.raises(ValueError, match=r"attention_decode: keys: got .*multiple of 4 up to"):
            ops.attention_decode(y, qkv, wrong, wrong, ids)
    with pytest.raises(ValueError, match=r"cache_kv: values: got float32 \(3, 2, 5, 6\), wanted"):
        ops.cache_kv(blank[4], blank[6], qkv, ids, ids)
    with pytest.raises(ValueError, match=r"cache_kv: positions: got int32 \(2,\), wanted"):
        ops.cache_kv(blank[4], blank[4], qkv, ids, ids[:2])
    with pytest.raises(ValueError, match=r"attention_decode: keys: got 3 sequences, wanted 2"):
        ops.attention_decode(y[:2], qkv[:2], blank[4], blank[4], ids[:2])
    with pytest.raises(ValueError, match=r"attention_decode: y: got float32 \(3, 7\), wanted"):
        ops.attention_decode(y[:, :7], qkv, blank[4], blank[4], ids)


def test_nan_shows_whether_keys_are_split_or_not():
    for sequences, arch in ((64, "sm_75"), (1, "sm_90")):
        machine = Machine(EmulatedLoader("fifo"), KNOWN[arch])
        keys = normal(np.float32, sequences, 1, 512, 32)
        keys[:, :, 3] = np.nan
        qkv, lengths = normal(np.float32, sequences, 96), np.full(sequences, 400, np.int32)
        scratch = attention_decode_scratch(machine.device, keys.shape, 4)
        assert bool(scratch) == (sequences == 1)
        ops = machine.ops(np.float32, sum(array_bytes(shape, 4) for shape in scratch))
        y = machine.blank((sequences, 32), np.float32)
        arrays = (machine.array(a) for a in (qkv, keys, keys, lengths))
        ops.attention_decode(y, *arrays)
        assert np.isnan(machine.host(y)).all()
