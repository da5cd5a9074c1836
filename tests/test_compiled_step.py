"""Steps played by compiled calls are the steps done operation by operation, to the bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.backend import choose
from gpu_microgpt.compiled_step import LOOKS, CompiledEngine, _seconds_each
from gpu_microgpt.config import Config
from gpu_microgpt.data.batch import gather
from gpu_microgpt.data.corpus import load_corpus
from gpu_microgpt.data.dataset import Dataset
from gpu_microgpt.dims import Dims
from gpu_microgpt.host_step import HostEngine
from gpu_microgpt.model import GPT
from gpu_microgpt.ops.cpu.batch import first_of_part, sort_by_length
from gpu_microgpt.ops.cpu.batch import gather as compiled_gather
from gpu_microgpt.params import Weights, initial_weights
from gpu_microgpt.profile import PROFILED_STEPS
from gpu_microgpt.rng import Stream, normal
from tests.run_helpers import settings, write_text

STEPS = 23  # more than an epoch of 80 words, and no multiple of what is done together


def make(kind: type, folder: Path, *overrides: str) -> HostEngine:
    """An engine of this kind for a tiny run."""
    config: Config = settings(folder, "kernels=compiled", "train.log_interval=10", *overrides)
    backend = choose(config)
    dataset = Dataset.build(config, load_corpus(config.data, log=print), log=lambda line: None)
    dims = Dims.of(config.model, dataset.tokenizer.vocab_size)
    model = GPT(Weights(dims, backend))
    draws = 0.1 * normal(1, Stream.INIT, dims.num_params)
    model.params.load(initial_weights(dims, draws, False), backend)
    engine = kind(model, config, backend, dataset.train, STEPS)
    assert isinstance(engine, HostEngine)
    return engine


def train(engine: HostEngine, first: int = 1, last: int = STEPS) -> np.ndarray:
    """Records of all steps, (last - first + 1, 3)."""
    records = []
    with engine.backend:
        while first <= last:
            count = min(engine.stride, engine.ring, last + 1 - first)
            engine.train(first, count)
            ring = engine.ask().records()
            records += [ring[s % len(ring)].copy() for s in range(first, first + count)]
            first += count
    return np.array(records)


def state(engine: HostEngine) -> dict[str, bytes]:
    o = engine.optimizer
    arrays = {"weights": o.params.flat, "m": o.m.flat, "v": o.v.flat, "norm": o.norm}
    arrays |= engine.gradients()
    return {name: array.tobytes() for name, array in arrays.items()}


KINDS = {
    "documents": (),
    "fp64": ("dtype=fp64",),
    "accumulated": ("train.grad_accum=3",),
    "stream": ("data.mode=stream",),
    "anywhere": ("data.mode=stream", "data.order=random", "train.grad_accum=2"),
    "drawn": ("data.order=random",),
    "microgpt": ("rng=microgpt", "dtype=fp64", "train.batch_size=1", "data.val_fraction=0"),
    "no clipping": ("optimizer.grad_clip=0", "optimizer.name=adamw", "optimizer.weight_decay=0.1"),
    "one position": ("model.block_size=1",),
    "odd sizes": ("model.n_embd=18", "model.n_head=3", "train.batch_size=7"),
    "two threads": ("threads=2",),
    "two threads, accumulated": ("threads=2", "train.grad_accum=2", "train.batch_size=5"),
    "more threads than sequences": ("threads=3", "train.batch_size=2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_one_by_one(kind, tmp_path, monkeypatch):
    if "threads" in kind:
        monkeypatch.setattr("gpu_microgpt.backend.numpy.SHARD_FLOPS", 0.0)
    write_text(tmp_path)
    played, done = (make(e, tmp_path, *KINDS[kind]) for e in (CompiledEngine, HostEngine))
    threads = played.backend.threads
    assert len(played.step.shards.shards) == min(threads, played.config.train.batch_size)
    ours, theirs = train(played), train(done)
    assert ours.shape == (STEPS, 3)
    assert np.isfinite(ours).all()
    assert ours.tobytes() == theirs.tobytes()
    assert state(played) == state(done)


@pytest.mark.parametrize(("threads", "pieces"), [(1, 4), (2, 2)])
def test_pieces(threads, pieces, tmp_path, monkeypatch):
    """A batch of more rows than are worked on at a time is cut the same way."""
    monkeypatch.setattr("gpu_microgpt.backend.numpy.SHARD_FLOPS", 0.0)
    monkeypatch.setattr("gpu_microgpt.backend.numpy.PIECE_ROWS", 24)
    write_text(tmp_path)
    args = ("train.batch_size=11", f"threads={threads}")
    played, done = (make(e, tmp_path, *args) for e in (CompiledEngine, HostEngine))
    assert len(played.step.shards.shards) == threads
    assert played.step.shards.pieces == pieces
    assert train(played).tobytes() == train(done).tobytes()
    assert state(played) == state(done)


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize(
    "kind",
    ["documents", "fp64", "stream", "odd sizes", "two threads", "more threads than sequences"],
)
def test_the_same_held_out_loss(kind, limit, tmp_path, monkeypatch):
    """But for the order in which batches are added up."""
    if "threads" in kind:
        monkeypatch.setattr("gpu_microgpt.backend.numpy.SHARD_FLOPS", 0.0)
    monkeypatch.setattr("gpu_microgpt.backend.numpy.PIECE_ROWS", 16)
    write_text(tmp_path)
    played, done = (make(e, tmp_path, *KINDS[kind]) for e in (CompiledEngine, HostEngine))
    with played.backend, done.backend:
        ours, theirs = (e.mean_loss(e._split, limit) for e in (played, done))
        assert ours == pytest.approx(theirs, rel=1e-14)
        assert played.mean_loss(played._split, limit) == ours
        played.train(1)
        done.train(1)  # which the loss is asked of then
        ours, theirs = (e.mean_loss(e._split, limit) for e in (played, done))
        assert ours == pytest.approx(theirs, rel=1e-14)


def test_a_held_out_loss_takes_many_calls_where_batches_are_large(tmp_path, monkeypatch):
    """So that Ctrl-C, which is heard between calls, need not wait for all of a long text."""
    write_text(tmp_path)
    engines = []
    for flops in (1e9, 1.0):
        monkeypatch.setattr("gpu_microgpt.compiled_step.CALL_FLOPS", flops)
        engines.append(make(CompiledEngine, tmp_path))
    calls = []
    for engine in engines:
        run = engine.backend.run

        def counting(tasks, run=run, engine=engine):
            calls.append(engine)
            run(tasks)

        monkeypatch.setattr(engine.backend, "run", counting)
    losses = [engine.mean_loss(engine._split) for engine in engines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-14)
    batches = len(list(engines[0]._split.items()))
    assert batches > 2
    assert [calls.count(engine) for engine in engines] == [2, batches]


@pytest.mark.parametrize(
    ("override", "got"),
    [("train.batch_size=9", "got 9 sequences of up to 8 rows, wanted at most 4 of 8"),
     ("model.block_size=9", "got 4 sequences of up to 9 rows, wanted at most 4 of 8")],
)  # fmt: skip
def test_batches_that_do_not_fit_are_refused(override, got, tmp_path):
    """Compiled code would write behind its memory."""
    write_text(tmp_path)
    engine, other = make(CompiledEngine, tmp_path), make(CompiledEngine, tmp_path, override)
    with pytest.raises(ValueError, match=got):
        engine.mean_loss(other._split)
    engine._split = other._split
    with pytest.raises(ValueError, match=got):
        engine.train(1)


def test_a_shard_without_sequences_adds_nothing(tmp_path, monkeypatch):
    """Two shards, batches of one sequence: the second's gradients are zero, not the last step's."""
    monkeypatch.setattr("gpu_microgpt.backend.numpy.SHARD_FLOPS", 0.0)
    monkeypatch.setattr("gpu_microgpt.backend.numpy.NumpyBackend.split", lambda self, *args: (2, 1))
    write_text(tmp_path)
    args = ("train.batch_size=1", "threads=2")
    played, done = (make(e, tmp_path, *args) for e in (CompiledEngine, HostEngine))
    played.step.shards.shards[1].grads.flat.fill(7)
    assert train(played).tobytes() == train(done).tobytes()
    assert state(played) == state(done)


def test_one_and_two_threads_agree(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu_microgpt.backend.numpy.SHARD_FLOPS", 0.0)
    write_text(tmp_path)
    runs = [make(CompiledEngine, tmp_path, f"threads={n}", "optimizer.lr=1e-3") for n in (1, 2)]
    losses = [train(run)[:, 0] for run in runs]
    assert not np.array_equal(*losses) or not np.array_equal(*(state(r)["m"] for r in runs))
    assert np.abs(losses[0] - losses[1]).max() < 1e-6


def test_small_steps_are_done_together(tmp_path, monkeypatch):
    """As many as CALL_FLOPS, but no more than their records are kept."""
    write_text(tmp_path)
    engine = make(CompiledEngine, tmp_path)
    assert engine.stride == engine.ring == 10
    assert make(CompiledEngine, tmp_path, "train.log_interval=2").stride == 2
    monkeypatch.setattr("gpu_microgpt.compiled_step.CALL_FLOPS", 1.0)
    assert make(CompiledEngine, tmp_path).stride == 1
    one_by_one = make(HostEngine, tmp_path)
    with engine.backend, one_by_one.backend:
        engine.train(1, 7)
        figures = engine.ask()
        assert figures.steps == 7
        assert figures.ms_per_step() > 0
        assert engine.ask().steps == 0
        one_by_one.train(1, 7)
    assert figures.records().tobytes() == one_by_one.ask().records().tobytes()
    assert state(engine) == state(one_by_one)


def test_what_looks_at_a_step(tmp_path):
    write_text(tmp_path)
    played, timed, done = (
        make(kind, tmp_path) for kind in (CompiledEngine, CompiledEngine, HostEngine)
    )
    for engine in (played, timed, done):
        with engine.backend:
            engine.train(1)
    ours, theirs = played.gradients(), done.gradients()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert timed.instruction_times(1e-3)["adamw"] > 0  # spoils the weights, but after the step
    assert timed.ask().records().tobytes() == done.ask().records().tobytes()


def test_profiled_steps_are_done_one_by_one(tmp_path):
    write_text(tmp_path)
    engine, plain = (make(CompiledEngine, tmp_path, f"profile={p}") for p in ("true", "false"))
    assert plain.stride == 10
    for step in range(1, PROFILED_STEPS + 1):
        assert engine.stride == 1
        assert train(engine, step, step).tobytes() == train(plain, step, step).tobytes()
    assert engine.stride == 10
    assert train(engine, PROFILED_STEPS + 1).tobytes() == train(plain, PROFILED_STEPS + 1).tobytes()
    assert state(engine) == state(plain)


def test_where_the_time_goes(tmp_path, monkeypatch):
    """Every instruction of a step is timed; pieces count as often as they are played."""
    monkeypatch.setattr(
        "gpu_microgpt.compiled_step._seconds_each", lambda again, seconds: again(2) or 1
    )
    monkeypatch.setattr("gpu_microgpt.backend.numpy.PIECE_ROWS", 16)
    write_text(tmp_path)
    engine = make(CompiledEngine, tmp_path, "optimizer.grad_clip=1")
    assert train(engine, 1, 2).shape == (2, 3)
    times, pieces, layers = engine.instruction_times(1.0), engine.step.shards.pieces, 2
    assert pieces == 2
    assert times["linear"] == pieces * (4 * layers + 1) == times["linear backward"]
    assert times["attention"] == times["attention backward"] == pieces * layers
    assert times["adamw"] == times["global norm"] == times["clip scale"] == 1
    assert make(HostEngine, tmp_path).instruction_times(1.0) == {}


def test_a_time_is_the_median_of_long_enough_looks(monkeypatch):
    asked, now = [], [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("gpu_microgpt.compiled_step.time", clock)

    def again(count: int) -> None:
        asked.append(count)
        now[0] += 1e-4 * count * (1 + (len(asked) % 5 == 0))  # one look in five is disturbed

    assert _seconds_each(again, 0.02) == pytest.approx(1e-4)
    assert asked[-1] > asked[0] == 1
    assert asked.count(asked[-1]) == LOOKS


@pytest.mark.parametrize("longest", [1, 2, 16])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [8, 9, 30])
def test_batches_are_those_of_the_host(parts, size, longest):
    draw = np.random.default_rng(size)
    text = draw.integers(0, 50, 400).astype(np.uint16)
    lengths = np.where(draw.random(size) < 0.5, draw.integers(1, longest + 1, size), longest)
    starts = draw.integers(0, 380, size)
    order, edges, counts = (np.full(n, -1) for n in (size, size + 1, 17))
    sort_by_length(lengths, order, edges, counts)
    first = 0
    for part, wanted in enumerate(gather(text, starts, lengths).split(parts)):
        last = first_of_part(edges, part + 1, parts)
        tokens, targets, positions, offsets = (np.full(600, -1, np.int32) for _ in range(4))
        rows = compiled_gather(
            text, starts, lengths, order, first, last, tokens, targets, positions, offsets
        )
        assert rows == len(wanted.tokens)
        assert tokens[:rows].tolist() == wanted.tokens.tolist()
        assert targets[:rows].tolist() == wanted.targets.tolist()
        assert positions[:rows].tolist() == wanted.positions.tolist()
        assert offsets[: last - first + 1].tolist() == wanted.layout.offsets.tolist()
        assert (tokens[rows:] == -1).all()
        first = last
    assert first == size
