"""The plan is what is taken, it is enough for every operation, and nothing in it overlaps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gpu_microgpt.activations import MAX_VIEWS, Activations, plan
from gpu_microgpt.arena import ALIGN, array_bytes, carve
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.data.batch import Batch
from gpu_microgpt.dims import Dims
from gpu_microgpt.kv_cache import KVCache
from gpu_microgpt.model import GPT
from tests.model_cases import losses_and_grads, make_batch, make_model

SIZES = [(Dims(1, 1, 1, 1, 3), 1), (Dims(2, 3, 9, 7, 5), 33), (Dims(3, 2, 8, 16, 700), 31)]
sizes = pytest.mark.parametrize(("dims", "rows"), SIZES)
training = pytest.mark.parametrize("training", [True, False])


class RecordingBackend(NumpyBackend):
    """Remembers what memory was asked for."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.asked: list[tuple[tuple[int, ...], str]] = []

    def empty(self, shape, dtype):
        self.asked.append((shape, np.dtype(dtype).name))
        return super().empty(shape, dtype)

    def zeros(self, shape, dtype):
        self.asked.append((shape, np.dtype(dtype).name))
        return super().zeros(shape, dtype)


def arrays_of(memory: Activations) -> list[np.ndarray]:
    """Each array of the arena once, whole."""
    rows = memory.rows(memory.capacity)
    plain = vars(rows) | {"logits": None}  # a view of padded_logits
    found = [x for x in plain.values() if isinstance(x, np.ndarray)]
    for layer in rows.layers if memory.training else rows.layers[:1]:
        found += vars(layer).values()
    return found


@training
@sizes
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_plan_is_what_is_taken(dims, rows, dtype, training):
    backend = RecordingBackend(dtype)
    memory = Activations(dims, rows, backend, training)
    planned = plan(dims, rows, backend, training)
    assert memory.nbytes == sum(size for *_, size in planned)
    assert backend.asked == [((memory.nbytes,), "uint8")]
    shapes = sorted(shape for name, shape, *_ in planned if name != "workspace")
    assert sorted(x.shape for x in arrays_of(memory)) == shapes
    assert {x.dtype for x in arrays_of(memory) if x.size} == {backend.dtype}
    assert planned[-1][3] == backend.workspace_bytes(dims, rows)


def test_plan_names_each_array_once():
    names = [name for name, *_ in plan(Dims(2, 1, 4, 3, 5), 7, NumpyBackend(), True)]
    assert len(names) == len(set(names)) == 6 + 2 * 9 + 4 + 1
    kept = ["norm1", "rstd1", "qkv", "att", "lse", "norm2", "rstd2", "hidden", "mask"]
    assert [n for n in names if n.startswith("layer1.")] == [f"layer1.{n}" for n in kept]
    small = {name for name, *_ in plan(Dims(2, 1, 4, 3, 5), 7, NumpyBackend(), False)}
    assert len(small) == 6 + 9 + 1
    assert not small & {"dx", "dbranch", "dqkv", "dhidden", "layer1.att"}


@training
@sizes
def test_arrays_do_not_overlap_and_are_aligned(dims, rows, training):
    memory = Activations(dims, rows, NumpyBackend("fp32"), training)
    workspace = memory.ops.workspace
    spans = sorted(
        (x.__array_interface__["data"][0], x.nbytes) for x in [workspace, *arrays_of(memory)]
    )
    first = spans[0][0]
    assert first == workspace.__array_interface__["data"][0]
    for (start, size), (following, _) in pairwise(spans):
        assert start + size <= following
    assert all((start - first) % ALIGN == 0 for start, _ in spans)
    assert spans[-1][0] + spans[-1][1] <= first + memory.nbytes


def test_layers_keep_their_own_in_training_and_share_otherwise():
    dims = Dims(3, 1, 4, 3, 5)
    for train, count in ((True, 3), (False, 1)):
        rows = Activations(dims, 7, NumpyBackend("fp32"), train).rows(5)
        assert len(rows.layers) == 3
        assert len({s.qkv.__array_interface__["data"][0] for s in rows.layers}) == count
        assert (rows.dx is None) == (not train)


@sizes
def test_rows_are_the_first_of_everything(dims, rows):
    memory = Activations(dims, rows, NumpyBackend("fp32"))
    whole = memory.rows(rows)
    for count in {1, rows // 2 + 1, rows}:
        part = memory.rows(count)
        assert part is memory.rows(count)
        for name in ("x0", "rstd0", "x_mid", "x", "logits", "losses", "dx", "dqkv", "dhidden"):
            view, full = getattr(part, name), getattr(whole, name)
            assert view.shape == (count, *full.shape[1:])
            assert view.__array_interface__["data"] == full.__array_interface__["data"]


def test_more_rows_than_planned_are_refused():
    memory = Activations(Dims(1, 1, 4, 3, 5), 7, NumpyBackend("fp32"))
    with pytest.raises(ValueError, match="got 8 rows, wanted at most 7"):
        memory.rows(8)


def test_views_of_old_row_counts_are_forgotten():
    memory = Activations(Dims(1, 1, 1, 1, 3), MAX_VIEWS + 50, NumpyBackend("fp32"))
    for count in range(1, MAX_VIEWS + 51):
        assert memory.rows(count).x.shape == (count, 1)
    assert len(memory._rows) == MAX_VIEWS
    assert memory.rows(1).x.shape == (1, 1)


def test_carve_refuses_what_does_not_fit():
    block = np.empty(ALIGN + 12, np.uint8)
    first, second = carve(block, np.float32, [(1, 3), (3,)])
    assert (first.shape, second.shape) == ((1, 3), (3,))
    assert second.__array_interface__["data"][0] - block.__array_interface__["data"][0] == ALIGN
    with pytest.raises(MemoryError, match="got 76 bytes, wanted 80"):
        carve(block, np.float32, [(1, 3), (4,)])


@pytest.mark.parametrize(("shape", "size"), [((1,), 64), ((16,), 64), ((17,), 128), ((3, 0), 0)])
def test_bytes_are_rounded_up(shape, size):
    assert array_bytes(shape, 4) == size


# L H C T V and lengths: extreme vocabularies, tables around the one-hot limit, long and short
# sequences, widths of a head from 4 to 128, arrays that are cut into blocks
ODD = [
    (Dims(1, 1, 4, 1, 60_000), [1] * 9),
    (Dims(1, 2, 8, 4, 60_000), [4, 1]),
    *((Dims(1, 1, 4, 3, v), [3, 2, 2]) for v in (2, 3, 511, 512, 513)),
    *((Dims(1, 1, 4, t, 3), [t, 1]) for t in (63, 64, 65, 129, 300, 513)),
    *((Dims(1, 300 // d + 1, (300 // d + 1) * d, 65, 27), [65, 5, 5]) for d in (4, 31, 64, 128)),
    (Dims(1, 1, 128, 300, 66), [300] * 7),
    (Dims(1, 1, 1, 300, 3), [300] * 30),
    (Dims(1, 40, 40, 300, 27), [300, 300]),
    (Dims(1, 4, 64, 70, 27), [1] * 500 + [64] * 40 + [65] * 40 + [70]),
    (Dims(1, 1, 4, 1, 27), [1] * 10_000),
    (Dims(1, 1, 64, 1, 512), [1] * 60),
    (Dims(1, 1, 128, 2100, 3), [2100]),
    (Dims(1, 1, 4, 4200, 3), [4200]),
]
ODD_IDS = [f"H{d.n_head} C{d.n_embd} T{d.block_size} V{d.vocab_size}" for d, _ in ODD]


def pass_everything(
    dims: Dims, lengths: list[int], dtype: str, capacity: int | None = None
) -> None:
    """Forward, backward, prefill, decode and sample with exactly the planned memory."""
    backend, model = make_model(dims, dtype)
    batch = make_batch(lengths, dims.vocab_size)
    memory = Activations(dims, capacity or len(batch.tokens), backend)
    with backend:
        _, grads = losses_and_grads(model, backend, [batch, batch], memory)
        assert np.isfinite(grads.flat).all()
        generate_everything(model, backend, batch, lengths)


def generate_everything(
    model: GPT, backend: NumpyBackend, batch: Batch, lengths: list[int]
) -> None:
    rows, dims = len(batch.tokens), model.dims
    small = Activations(dims, rows, backend, training=False)
    sequences = np.arange(len(lengths), dtype=np.int32).repeat(np.sort(lengths))
    cache = KVCache(dims, len(lengths), backend)
    logits = model.prefill(small, batch, cache, sequences)
    assert np.isfinite(logits).all()
    cache.lengths[...] = np.sort(lengths) - 1
    tokens = np.zeros(len(lengths), np.int32)
    assert np.isfinite(model.decode(small, tokens, cache)).all()
    small.ops.sample(tokens, small.rows(len(tokens)).logits, np.full(len(tokens), 0.5), 1.0, 2, 0.9)


@pytest.mark.parametrize(("dims", "lengths"), ODD, ids=ODD_IDS)
def test_workspace_is_enough_at_odd_sizes(dims, lengths):
    pass_everything(dims, lengths, "fp32")


@pytest.mark.parametrize("seed", range(40))
def test_workspace_is_enough_at_random_sizes(seed):
    draw = np.random.default_rng(seed)
    heads, block_size = int(draw.integers(1, 5)), int(draw.choice([1, 2, 17, 64, 90, 140]))
    width, vocab = int(draw.choice([1, 4, 9, 32])), int(draw.choice([2, 27, 100, 520, 2000]))
    dims = Dims(1, heads, heads * width, block_size, vocab)
    lengths = draw.integers(1, block_size + 1, int(draw.integers(1, 12))).tolist()
    spare = int(draw.integers(0, 2)) * int(draw.integers(1, 200))
    pass_everything(dims, lengths, str(draw.choice(["fp32", "fp64"])), sum(lengths) + spare)


def test_a_plan_that_is_too_small_is_noticed(monkeypatch):
    monkeypatch.setattr(NumpyBackend, "workspace_bytes", lambda *_: 64)
    with pytest.raises(MemoryError, match="arena: got 64 bytes"):
        pass_everything(Dims(1, 2, 8, 5, 7), [5, 3], "fp32")
