"""The whole step: shards, micro-batches, the update, and what it costs in memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.config import Config, OptimizerConfig
from gpu_microgpt.data.batch import Batch, pack
from gpu_microgpt.data.corpus import load_corpus
from gpu_microgpt.data.dataset import Dataset
from gpu_microgpt.dims import Dims
from gpu_microgpt.host_step import HostEngine
from gpu_microgpt.optim import Optimizer
from gpu_microgpt.params import Params
from gpu_microgpt.step import Shard, ShardPlan, Shards, Step
from tests.model_cases import ignoring, losses_and_grads, make_batch, make_model
from tests.run_helpers import settings

DIMS = Dims(2, 3, 9, 12, 7)
ADAM = OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1, grad_clip=0.5)
RAGGED = [[1, 12, 3, 3], [5, 7, 12], [2, 2, 2, 2, 9], [12, 12]]  # lengths, a step each
dtypes = pytest.mark.parametrize("dtype", ["fp32", "fp64"])


def make_step(
    dims=DIMS, dtype="fp64", shards=1, pieces=1, capacity=100, optimizer=ADAM, ring=8, std=0.4
) -> Step:
    backend, model = make_model(dims, dtype, std)
    parts = [Shard(model, capacity, backend, Params(dims, backend)) for _ in range(shards)]
    optimizer_ = Optimizer(optimizer, model.params, backend)
    return Step(model, optimizer_, Shards(parts, pieces, backend), backend, ring)


def batches_of(steps=RAGGED, vocab=7) -> list[list[Batch]]:
    """One micro-batch a step."""
    return [[make_batch(lengths, vocab, seed=i)] for i, lengths in enumerate(steps)]


def train(step: Step, batches: list[list[Batch]], rate=0.01) -> Step:
    with step.backend:
        for number, micro in enumerate(batches, start=1):
            step.train(micro, rate, number)
    return step


def state(step: Step) -> tuple[bytes, ...]:
    o = step.optimizer
    arrays = (step.model.params.flat, o.m.flat, o.v.flat, step.grads.flat, step.records)
    return tuple(x.tobytes() for x in arrays)


def assert_nearly(a: Step, b: Step, tolerance: float) -> None:
    """Equal but for the order of sums: gradients, records and weights."""
    pairs = {
        "gradients": (a.grads.flat, b.grads.flat),
        "weights": (a.model.params.flat, b.model.params.flat),
        "records": (a.records, b.records),
    }
    for name, (x, y) in pairs.items():
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name


@dtypes
def test_one_step_is_forward_backward_update(dtype):
    batch = make_batch([1, 12, 3, 3], 7)
    step = train(make_step(dtype=dtype), [[batch]], rate=0.03)
    backend, model = make_model(DIMS, dtype)
    with backend:
        (losses,), grads = losses_and_grads(model, backend, [batch])
        optimizer = Optimizer(ADAM, model.params, backend)
        optimizer.update([step.shards.shards[0].memory.ops], grads, 0.03, 1)
    assert step.model.params.flat.tobytes() == model.params.flat.tobytes()
    loss, norm, count = step.records[1]
    assert count == 19
    assert loss == pytest.approx(losses.sum(dtype=float) / 19, rel=1e-14)
    assert norm == optimizer.norm[0] > ADAM.grad_clip
    assert np.array_equal(step.grads.flat, grads.flat)  # as they were before clipping


@pytest.mark.parametrize(("shards", "pieces"), [(2, 1), (3, 1), (1, 2), (2, 2), (3, 5)])
def test_shards_and_pieces_are_one_batch(shards, pieces):
    one = train(make_step(), batches_of())
    several = train(make_step(shards=shards, pieces=pieces), batches_of())
    # 1e-11: Adam divides by the root of small gradients, and what differs grows with every step
    assert_nearly(several, one, 1e-11)


def test_more_shards_than_sequences():
    """A shard without a sequence must not hand in the gradients of its last batch."""
    batches = batches_of([[3, 5, 12], [12], [4]])
    assert_nearly(train(make_step(shards=3), batches), train(make_step(), batches), 1e-11)


@pytest.mark.parametrize(
    ("kernels", "flops", "shards"),
    [("reference", 4.9e8, 1), ("reference", 5e8, 8), ("compiled", 2.9e7, 1), ("compiled", 5e7, 3),
     ("compiled", 5e8, 8)],
)  # fmt: skip
def test_how_many_threads_a_step_is_worth(kernels, flops, shards):
    if kernels == "compiled":
        pytest.importorskip("numba", reason="the compiled operations need Numba")
    backend = NumpyBackend(threads=8, kernels=kernels)
    assert backend.split(16, 16, flops) == (shards, 1)
    assert backend.split(2, 16, flops)[0] == min(2, shards)


def plan_for(size: int, length: int, shards: int, pieces: int) -> ShardPlan:
    """The plan for a batch of `size` sequences of up to `length`, cut as said."""

    class Cutter(NumpyBackend):
        def split(self, batch_size, block_size, flops):
            assert (batch_size, block_size) == (size, length)
            assert flops > 0
            return shards, pieces

    config = Config.load("names", [f"train.batch_size={size}", f"model.block_size={length}"])
    plan = ShardPlan.of(config, Dims.of(config.model, 27), Cutter())
    assert (plan.shards, plan.pieces) == (shards, pieces)
    assert plan.rows <= size * length
    return plan


def test_a_piece_may_be_larger_than_its_share():
    plan = plan_for(size=10, length=18, shards=5, pieces=1)
    batch = make_batch([10, 15, 15, 15, 17, 17, 17, 17, 18, 18], 27)
    assert 2 * 18 < max(len(piece.tokens) for piece in batch.split(5)) <= plan.rows
    assert plan_for(size=10, length=18, shards=1, pieces=1).rows == 10 * 18


@pytest.mark.parametrize("seed", range(30))
def test_every_piece_fits_its_plan(seed):
    """Whatever the lengths: also fewer sequences than configured, as at the end of a split."""
    draw = np.random.default_rng(seed)
    length, size = int(draw.integers(1, 40)), int(draw.integers(1, 40))
    plan = plan_for(size, length, int(draw.integers(1, size + 1)), int(draw.integers(1, 6)))
    for _ in range(20):
        count = size if draw.random() < 0.7 else int(draw.integers(1, size + 1))
        lengths = draw.choice([1, length, int(draw.integers(1, length + 1))], count)
        batch = make_batch(lengths, 27)
        pieces = batch.split(plan.shards * plan.pieces)
        assert max(len(piece.tokens) for piece in pieces) <= plan.rows


def test_build_takes_what_the_config_says():
    overrides = ["model.n_embd=8", "model.n_head=2", "dtype=fp64", "train.log_interval=5"]
    config = Config.load("names", overrides)
    backend, model = make_model(Dims.of(config.model, 27))
    step = Step.build(model, config, backend)
    plan = ShardPlan.of(config, model.dims, backend)
    assert len(step.shards.shards) == plan.shards
    assert step.shards.pieces == plan.pieces
    assert {shard.memory.capacity for shard in step.shards.shards} == {plan.rows}
    assert step.records.shape == (5, 3)
    assert step.optimizer.config == config.optimizer
    assert step.optimizer.params is model.params


def test_mean_loss_weighs_every_target_alike():
    step = make_step()
    batches = [make_batch([12, 12], 7), ignoring(make_batch([3, 1], 7), [0])]

    class Two:
        def batches(self, limit):
            return iter(batches[: limit or 2])

    with step.backend:
        sums = [step.shards.evaluate(batch) for batch in batches]
        assert step.shards.mean_loss(Two()) == pytest.approx(sum(sums) / 27, rel=1e-14)
        assert step.shards.mean_loss(Two(), 1) == pytest.approx(sums[0] / 24, rel=1e-14)


@pytest.mark.parametrize("shards", [1, 2])
def test_micro_batches_are_one_batch(shards):
    micro = [make_batch(lengths, 7, seed=i) for i, lengths in enumerate(RAGGED)]
    micro[1] = ignoring(micro[1], [0, 3, 20])
    rows = np.concatenate([b.tokens for b in micro]), np.concatenate([b.targets for b in micro])
    lengths = np.concatenate([np.diff(b.layout.offsets) for b in micro])
    ends = lengths.cumsum()
    whole = pack([np.append(rows[0][e - n : e], 0) for n, e in zip(lengths, ends, strict=True)])
    order = lengths.argsort(kind="stable")
    targets = np.concatenate([rows[1][ends[s] - lengths[s] : ends[s]] for s in order])
    count = int((targets >= 0).sum())
    large = Batch(whole.tokens, targets, whole.positions, whole.layout, count)
    accumulated, at_once = (
        train(make_step(shards=shards), [given, given]) for given in (micro, [large])
    )
    assert count == sum(b.num_targets for b in micro) == len(targets) - 3
    assert_nearly(accumulated, at_once, 1e-11)


@pytest.mark.parametrize(("shards", "pieces"), [(1, 1), (2, 1), (3, 1), (2, 3)])
@dtypes
def test_the_same_run_gives_the_same_bits(dtype, shards, pieces):
    batches = [[*a, *b] for a, b in zip(batches_of(), batches_of()[::-1], strict=True)]
    first, second = (
        train(make_step(dtype=dtype, shards=shards, pieces=pieces), batches) for _ in range(2)
    )
    assert state(first) == state(second)


def test_records_are_a_ring():
    step = make_step(ring=3)
    seen = {}
    with step.backend:
        for number, micro in enumerate(batches_of(), start=1):
            step.train(micro, 0.01, number)
            seen[number] = step.records[number % 3].tolist()
    assert step.records.tolist() == [seen[3], seen[4], seen[2]]
    assert len({tuple(record) for record in seen.values()}) == 4


@pytest.mark.parametrize(("shards", "pieces"), [(1, 1), (2, 1), (4, 1), (1, 3)])
def test_evaluation_sums_the_losses_and_changes_nothing(shards, pieces):
    step = train(make_step(shards=shards, pieces=pieces), batches_of())
    before = state(step)
    batch = ignoring(make_batch([2, 5, 12], 7), [1, 4])
    backend, model = make_model(DIMS)
    model.params.flat[...] = step.model.params.flat
    (losses,), _ = losses_and_grads(model, backend, [batch])
    with step.backend:
        assert step.shards.evaluate(batch) == pytest.approx(losses.sum(), rel=1e-14)
    assert state(step) == before


def test_an_error_in_any_shard_is_raised():
    step = make_step(shards=2, capacity=12)
    with step.backend, pytest.raises(ValueError, match="got 24 rows, wanted at most 12"):
        step.train([make_batch([12, 12, 12], 7)], 0.01, 1)


def windows() -> list[list[Batch]]:
    return [[make_batch([128] * 12, 65, seed=i)] for i in range(4)]


def documents() -> list[list[Batch]]:
    """Ragged, of another number of rows every step, and two micro-batches each."""
    draw = np.random.default_rng(0)
    return [[make_batch(draw.integers(70, 129, 16), 27, seed=i) for _ in "ab"] for i in range(4)]


@pytest.mark.parametrize(("shards", "pieces"), [(1, 1), (2, 1), (1, 4)])
@pytest.mark.parametrize("mode", [windows, documents])
def test_a_step_allocates_nothing_large(mode, shards, pieces):
    """No array of the size of a shard's part of the batch, (N, C) or more. NumPy itself buffers
    ~100 kB a thread where shapes are broadcast, whatever the batch."""
    *warm_up, last = mode()
    limit = 130_000 * shards
    assert min(len(batch.tokens) for batch in last) // shards * 128 * 4 > 1.3 * limit
    step = make_step(Dims(2, 4, 128, 128, 65), "fp32", shards, pieces, capacity=2048, std=0.05)
    train(step, warm_up)
    with step.backend:
        step.train(last, 1e-3, 8)  # starts the threads of this context
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            step.train(last, 1e-3, 9)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak - before < limit


@pytest.mark.parametrize("lengths", [[12, 12, 12, 12], [1, 3, 7, 12, 12]], ids=["even", "ragged"])
def test_one_batch_is_learnt_by_heart(lengths):
    draw = np.random.default_rng(0)
    dims = Dims(1, 2, 32, 12, 27)
    texts = [np.append(i, draw.integers(0, 27, n)) for i, n in enumerate(lengths)]
    config = OptimizerConfig(lr=0.01, betas=(0.9, 0.99))
    step = make_step(dims, "fp32", optimizer=config, std=0.05)
    train(step, [[pack(texts)]] * 120)
    first, last = step.records[1 % 8], step.records[120 % 8]
    assert last[0] < 0.05
    assert np.isfinite(first).all()


def test_the_hosts_clock_runs_while_steps_are_done(tmp_path, monkeypatch):
    """From figures to figures; what is done between steps is not timed."""
    config = settings(tmp_path, "backend=numpy")
    corpus = load_corpus(config.data, log=lambda line: None)
    dataset = Dataset.build(config, corpus, log=lambda line: None)
    backend, model = make_model(Dims.of(config.model, dataset.tokenizer.vocab_size))
    engine = HostEngine(model, config, backend, dataset.train, 12)
    ticks = iter([0.0, 2.0, 10.0, 14.0, 100.0, 107.0])  # before and after each step
    monkeypatch.setattr("gpu_microgpt.host_step.time.perf_counter", lambda: next(ticks))
    with backend:
        engine.train(1)
        engine.train(2)
        assert engine.ask().ms_per_step() == 3000
        assert engine.ask().ms_per_step() == 0
        engine.pause()
        engine.train(3)
        assert engine.ask().ms_per_step() == 7000
