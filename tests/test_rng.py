from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gpu_microgpt.rng import (
    MicrogptRandom,
    Stream,
    normal,
    permute,
    philox,
    philox_block,
    uniform,
)

# published with the paper's library: counter, key, result
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert tuple(philox_block(counter, key).tolist()) == expected
    repeated = philox_block(np.tile(counter, (2, 3, 1)), key)
    assert repeated.shape == (2, 3, 4)
    assert repeated.dtype == np.uint32
    assert (repeated == expected).all()


def test_philox_puts_every_argument_in_its_own_word():
    seed = 0x0123456789ABCDEF
    got = philox(seed, Stream.EVAL, [5 << 32 | 7], step=9)[0]
    assert (got == philox_block((7, 5, 9, Stream.EVAL), (0x89ABCDEF, 0x01234567))).all()
    draws = {
        tuple(philox(seed, stream, [index], step)[0].tolist())
        for seed in (0, 1, 1 << 32)
        for stream in Stream
        for index in (0, 1, 1 << 32)
        for step in (0, 1)
    }
    assert len(draws) == 3 * len(Stream) * 3 * 2


def test_uniform_is_open_and_even():
    draws = uniform(3, Stream.ORDER, np.arange(100_000))
    assert draws.dtype == np.float64
    assert 0 < draws.min() < draws.max() < 1
    share, _ = np.histogram(draws, 20, (0, 1))
    assert abs(share / 5000 - 1).max() < 0.06  # 4 standard deviations
    assert uniform(3, Stream.ORDER, 17) == draws[17]
    assert not np.isin(uniform(3, Stream.ORDER, np.arange(100), step=1), draws).any()


def test_uniform_at_the_ends_of_a_word(monkeypatch):
    ends = np.array([[0, 0, 0, 0], [0xFFFFFFFF, 0, 0, 0]], np.uint32)
    monkeypatch.setattr("gpu_microgpt.rng.philox", lambda *_: ends)
    assert uniform(0, Stream.INIT, [0, 1]).tolist() == [2.0**-33, 1 - 2.0**-33]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 262_145])
def test_normal_has_its_moments_and_one_prefix(count, monkeypatch):
    draws = normal(1337, Stream.INIT, count)
    assert draws.shape == (count,)
    assert (draws == normal(1337, Stream.INIT, 300_000)[:count]).all()
    if count > 1000:
        moments = [(draws**k).mean() for k in (1, 2, 3, 4)]
        assert np.allclose(moments, [0, 1, 0, 3], atol=0.06)
        lags = [np.corrcoef(draws[lag:], draws[:-lag])[0, 1] for lag in (1, 2, 3, 4)]
        assert np.abs(lags).max() < 0.01
        monkeypatch.setattr("gpu_microgpt.rng._NORMAL_CHUNK", 1000)
        assert (draws == normal(1337, Stream.INIT, count)).all()


def test_permute_is_a_bijection_of_every_size():
    for size in (*range(1, 70), 255, 256, 257, 1023, 1025, 32_033, 65_537):
        image = permute(np.arange(size), size, 1337, Stream.ORDER, 2)
        assert image.dtype == np.int64
        assert (np.sort(image) == np.arange(size)).all(), size


def test_permute_needs_no_other_index():
    whole = permute(np.arange(1000), 1000, 5, Stream.SPLIT)
    some = np.array([[3, 999], [500, 3]])
    assert (permute(some, 1000, 5, Stream.SPLIT) == whole[some]).all()
    assert some.tolist() == [[3, 999], [500, 3]]  # the argument is not written to
    assert permute(np.arange(0), 1000, 5, Stream.SPLIT).shape == (0,)


def test_permute_depends_on_seed_stream_and_epoch():
    cases = [(0, Stream.ORDER, 0), (1, Stream.ORDER, 0), (0, Stream.SPLIT, 0), (0, Stream.ORDER, 1)]
    images = [tuple(permute(np.arange(50), 50, *case)) for case in cases]
    assert len(set(images)) == 4


@pytest.mark.parametrize("index", [-1, 7])
def test_permute_refuses_an_index_outside(index):
    with pytest.raises(ValueError, match=r"indices in \[0, 7\)"):
        permute([index], 7, 0, Stream.ORDER)


def test_permute_small_orders_are_all_about_as_frequent():
    for size, orders in ((2, 2), (3, 6)):
        seen = Counter(
            tuple(permute(np.arange(size), size, 7, Stream.ORDER, e)) for e in range(3000)
        )
        assert len(seen) == orders
        assert all(abs(n * orders / 3000 - 1) < 0.2 for n in seen.values()), seen


def test_permute_sends_every_index_everywhere():
    size, epochs = 17, 2000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permute(np.arange(size), size, 7, Stream.ORDER, epoch)] += 1
    expected = epochs / size
    chi2 = ((counts - expected) ** 2 / expected).sum() / (size - 1) ** 2
    assert 0.7 < chi2 < 1.3  # 1 on average, standard deviation 0.09


def test_permute_leaves_no_order_behind():
    size = 32_033
    images = [permute(np.arange(size), size, 7, Stream.ORDER, epoch) for epoch in (0, 1)]
    for first, second in ((images[0], np.arange(size)), images, (images[0][1:], images[0][:-1])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / size**0.5
        assert (first == second).sum() < 10


# what microgpt.py drew with seed 42 on names.txt: its recorded run
FIRST_DOCS = "yuheng diondre xavien jori juanluis erandi phia samatha phoenix emmelynn"
FIRST_WEIGHTS = [
    -0.04273180935726127,
    0.07696138795865093,
    0.10844210106107166,
    0.03741680212434131,
    -0.0031437655498982994,
    -0.004425542236071316,
    0.09739277609170183,
    -0.11227107651933786,
]


def test_microgpt_random_is_the_recorded_one():
    drawn = MicrogptRandom(42, 32_033, 4192, 0.08)
    assert drawn.weights.shape == (4192,)
    assert drawn.weights[:8].tolist() == FIRST_WEIGHTS
    assert abs(drawn.weights.sum() - 4.289341802239117) < 1e-12
    assert sorted(drawn.order) == list(range(32_033))
    names = Path(os.environ.get("GPU_MICROGPT_DATA", ""), "names.txt")
    if not names.is_file():
        pytest.skip("GPU_MICROGPT_DATA holds no names.txt")
    docs = names.read_text().split()
    assert " ".join(docs[i] for i in drawn.order[:10]) == FIRST_DOCS


def test_microgpt_random_goes_on_as_microgpt_samples():
    python = random.Random(7)
    python.shuffle(list(range(5)))
    weights = [python.gauss(0, 0.5) for _ in range(3)]
    drawn = MicrogptRandom(7, 5, 3, 0.5)
    assert drawn.weights.tolist() == weights
    probabilities = [0.1, 0.5, 0.4]
    for _ in range(20):
        expected = python.choices(range(3), probabilities)[0]
        assert np.searchsorted(np.cumsum(probabilities), drawn.uniform(), "right") == expected
