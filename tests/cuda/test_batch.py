from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from gpu_microgpt.config import Config
from gpu_microgpt.data import Corpus, Dataset
from gpu_microgpt.data.batch import gather
from gpu_microgpt.ops.cuda.batch import DeviceSplit
from tests.cuda.machine import Machine, bf16
from tests.run_helpers import words

FAR = 4_000_000_000  # epochs: as far as they are counted in 32 bits
SEEDS = (7, 0xFEDCBA9876543210)


def split_of(mode, samples, *, block_size=8, batch_size=4, **changes):
    """A split of so many samples: words of 1 to 9 letters, or full windows of running text."""
    values = {
        "seed": changes.pop("seed", 7),
        "rng": changes.pop("rng", "philox"),
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": block_size},
        "data": {"source": "given", "mode": mode, "val_fraction": 0.0},
        "train": {"steps": 10, "batch_size": batch_size},
        "optimizer": {"lr": 0.01},
    }
    for key, value in changes.items():
        section = "train" if key == "grad_accum" else "data"
        values[section][key] = value
    text = "\n".join(words(samples)) + "\n"
    if mode == "stream":
        text = (text * (block_size + 1))[: samples * block_size + min(2, block_size)]
    digest = hashlib.sha256(text.encode()).hexdigest()
    corpus = Corpus(text, "given", Path("given.txt"), digest, "given")
    split = Dataset.build(Config.from_dict(values), corpus, log=lambda line: None).train
    assert split.samples == samples
    return split


def check(machine, split, counters, dtype=np.float32):
    """The batches of these counters are those of the host, bit for bit, and padded."""
    device = DeviceSplit.of(split, machine.array)
    ops = machine.ops(dtype)
    rows, size = device.capacity, device.batch_size
    accumulated = split.config.train.grad_accum
    for counter in counters:
        out = [machine.blank(n, np.int32) for n in (rows, rows, rows, size + 1, 1)]
        device.batch(ops, *out, machine.array(np.array([counter])))
        tokens, targets, positions, offsets, count = map(machine.host, out)
        wanted = split.batch(*divmod(counter, accumulated))
        assert_rows((tokens, targets, positions), wanted, where := f"counter {counter}")
        assert offsets.tolist() == wanted.layout.offsets.tolist(), where
        assert count.tolist() == [wanted.num_targets], where


def assert_rows(rows, wanted, where):
    """tokens, targets and positions are those of the host's batch, and padded."""
    real = len(wanted.tokens)
    for got, want, rest in zip(
        rows, (wanted.tokens, wanted.targets, wanted.positions), (0, -1, 0), strict=True
    ):
        assert np.array_equal(got[:real], want), where
        assert (got[real:] == rest).all(), where


def check_gather(machine, split, items):
    """Samples of one's own choice, in the order given, at most B of them; the others are empty."""
    device = DeviceSplit.of(split, machine.array)
    lengths = split.lengths[items]
    assert (np.diff(lengths) >= 0).all()  # the host's batch is in the same order then
    wanted = gather(split.flat, split.starts[items], lengths)
    sources = np.zeros(1 + device.batch_size, np.int64)
    sources[1 : 1 + len(items)] = split.starts[items]
    offsets = np.full(2 + device.batch_size, len(wanted.tokens), np.int32)
    offsets[1 : 2 + len(items)] = wanted.layout.offsets
    places = [machine.array(a)[1:] for a in (sources, offsets)]  # aligned for one number only
    out = [machine.blank(device.capacity, np.int32) for _ in range(3)]
    device.gather(machine.ops(np.float32), *out, *places)
    assert_rows([machine.host(a) for a in out], wanted, f"items {items}")


def small(machine: Machine) -> None:
    for mode in ("documents", "stream"):
        check(machine, split_of(mode, 33, batch_size=5, block_size=5), (0, 6))
        check(machine, split_of(mode, 33, batch_size=5, order="random"), (7,))
    check(machine, split_of("documents", 3, batch_size=10), (1,))
    check(machine, split_of("documents", 11, rng="microgpt"), (2,))
    check_gather(machine, split_of("documents", 33, batch_size=5), [3, 12])


def test_small(machine):
    small(machine)


@pytest.mark.parametrize("order", ["epochs", "random"])
@pytest.mark.parametrize("mode", ["documents", "stream"])
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 33, 1000])
def test_equals_the_host(one, samples, mode, order):
    """Batches across epochs, batches of many epochs, and both ways to compute a shuffle."""
    for batch_size, seed in zip((4, 7), SEEDS, strict=True):
        split = split_of(mode, samples, batch_size=batch_size, order=order, seed=seed)
        last = samples // batch_size  # the batch that crosses into the second epoch
        far = FAR * samples // batch_size
        check(one, split, sorted({0, 1, last, last + 1, 2 * last + 1, far}))


@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_more_samples_than_the_table_is_made_for(one, mode):
    """Past 4^9 samples the round function is not tabulated."""
    split = split_of("stream", 4**9 + 1, batch_size=6, block_size=1)
    if mode == "documents":  # as many documents, each of a length of its own choice
        split.windows = False
        split.lengths = 1 + np.arange(split.samples) % 3
        split.starts = np.minimum(split.starts, len(split.flat) - 4)
        split.config = split_of("documents", 1, batch_size=6, block_size=3).config
    check(one, split, (0, split.samples // 6, FAR * split.samples // 6))


@pytest.mark.parametrize("batch_size", [1, 2, 511, 600, 1100])
def test_any_batch_size(one, batch_size):
    """Also more sequences than threads, and a sort padded to a power of two."""
    for order in ("epochs", "random"):
        check(one, split_of("documents", 1000, batch_size=batch_size, order=order), (3,))


def test_micro_batches(one):
    split = split_of("documents", 33, batch_size=5, grad_accum=3)
    check(one, split, range(9), bf16)


def test_the_order_of_microgpt(one):
    for batch_size in (1, 4, 70):
        split = split_of("documents", 33, rng="microgpt", batch_size=batch_size)
        check(one, split, (0, 8, 33, 1000))


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_gathers_given_samples(machine, mode, count):
    """A full batch, and fewer than that."""
    split = split_of(mode, 33)
    check_gather(machine, split, np.argsort(split.lengths, kind="stable")[-count:])


def test_a_batch_of_nothing_is_padding(machine):
    split = split_of("documents", 33)
    split.flat = split.flat[:0]  # not one token is read
    device = DeviceSplit.of(split, machine.array)
    out = [machine.blank(device.capacity, np.int32) for _ in range(3)]
    places = [machine.array(np.zeros(n, t)) for n, t in ((4, np.int64), (5, np.int32))]
    device.gather(machine.ops(np.float32), *out, *places)
    for got, rest in zip(out, (0, -1, 0), strict=True):
        assert (machine.host(got) == rest).all()


@pytest.mark.parametrize("batch_size", [4, 70])
def test_gathers_every_batch_of_an_evaluation(one, batch_size):
    """The last of which has fewer sequences, and in running text a shorter window."""
    for mode in ("documents", "stream"):
        split = split_of(mode, 33, batch_size=batch_size)
        for first in range(0, len(split.starts), batch_size):
            items = np.arange(first, min(first + batch_size, len(split.starts)))
            check_gather(one, split, items[np.argsort(split.lengths[items], kind="stable")])


@pytest.mark.parametrize("block_size", [1, 31, 300])
def test_any_context(one, block_size):
    check(one, split_of("stream", 33, block_size=block_size), (0, 8))


def test_wrong_arguments_are_named(machine):
    device = DeviceSplit.of(split_of("documents", 33), machine.array)
    ops, blank = machine.ops(np.float32), machine.blank
    rows, one = blank(device.capacity, np.int32), blank(1, np.int32)
    counter, edges = machine.array(np.zeros(1, np.int64)), blank(5, np.int32)
    with pytest.raises(ValueError, match=r"batch: targets: got int32 \(31,\), wanted int32 \(32,"):
        device.batch(ops, rows, rows[:31], rows, edges, one, counter)
    with pytest.raises(ValueError, match=r"batch: counter: got int32 \(1,\), wanted int64 \(1,\)"):
        device.batch(ops, rows, rows, rows, edges, one, one)
    with pytest.raises(ValueError, match=r"batch: offsets: got int32 \(4,\), wanted int32 \(5,\)"):
        device.batch(ops, rows, rows, rows, edges[:4], one, counter)
    with pytest.raises(ValueError, match=r"batch: sources: got int64 \(1,\), wanted int64 \(4,\)"):
        device.gather(ops, rows, rows, rows, counter, edges)
    with pytest.raises(ValueError, match="batch: batch_size: got 4097, wanted less than 4097"):
        DeviceSplit.of(split_of("documents", 33, batch_size=4097), machine.array)
