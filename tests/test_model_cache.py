"""The KV cache: prompts once, then one position a token, equal to reading everything again."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.activations import Activations
from gpu_microgpt.data.batch import Batch, gather
from gpu_microgpt.dims import Dims
from gpu_microgpt.generate import Generator, Sampling
from gpu_microgpt.kv_cache import KVCache
from tests.model_cases import full_logits, make_model

DIMS = Dims(2, 3, 12, 130, 7)
PROMPTS = [5, 1, 64, 5, 65, 120]  # lengths, not sorted
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def random_texts(lengths, vocab=7, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab, n, np.int32) for n in lengths]


def prompt_batch(prompts):
    """The prompts end to end as given, and each row's place among them."""
    lengths = np.array([len(p) for p in prompts])
    flat = np.concatenate([*prompts, [0]]).astype(np.int32)
    batch = gather(flat, lengths.cumsum() - lengths, lengths)
    order = lengths.argsort(kind="stable")
    owners = order.repeat(lengths[order]).astype(np.int32)
    return batch, owners, order, lengths


@dtypes
def test_prefill_and_decode_are_the_full_forward(dtype):
    backend, model = make_model(DIMS, dtype)
    texts = random_texts([n + 9 for n in PROMPTS])
    batch, owners, order, lengths = prompt_batch([t[:-9] for t in texts])
    memory = Activations(DIMS, len(batch.tokens), backend, training=False)
    cache = KVCache(DIMS, len(texts), backend)
    expected = [full_logits(model, backend, t.tolist()) for t in texts]

    logits = model.prefill(memory, batch, cache, owners)
    assert cache.keys.dtype == logits.dtype == backend.dtype
    for row, s in zip(batch.layout.offsets[1:] - 1, order, strict=True):
        assert np.abs(logits[row] - expected[s][lengths[s] - 1]).max() < TOLERANCE[dtype]
    cache.lengths[...] = lengths
    for t in range(9):
        tokens = np.array([text[n + t] for text, n in zip(texts, lengths, strict=True)], np.int32)
        logits = model.decode(memory, tokens, cache)
        cache.lengths += 1
        for s, n in enumerate(lengths):
            assert np.abs(logits[s] - expected[s][n + t]).max() < TOLERANCE[dtype]
    assert cache.lengths.tolist() == [len(t) for t in texts]


@dtypes
def test_decode_from_nothing(dtype):
    backend, model = make_model(DIMS, dtype)
    texts = random_texts([20, 20])
    memory, cache = Activations(DIMS, 2, backend, training=False), KVCache(DIMS, 2, backend)
    expected = [full_logits(model, backend, t.tolist()) for t in texts]
    for t in range(20):
        logits = model.decode(memory, np.array([text[t] for text in texts], np.int32), cache)
        cache.lengths += 1
        for s in range(2):
            assert np.abs(logits[s] - expected[s][t]).max() < TOLERANCE[dtype]


def read_again(model, backend, context, count, keep):
    """Greedy tokens and their logits, every window read whole. A full window keeps its newer
    `keep` tokens."""
    window, tokens = list(context)[-model.dims.block_size :], []
    for _ in range(count):
        logits = full_logits(model, backend, window)[-1]
        tokens.append(int(logits.argmax()))
        if len(window) == model.dims.block_size:
            window = window[len(window) - keep :]
        window.append(tokens[-1])
    return tokens


@pytest.mark.parametrize(
    ("block_size", "lengths", "count"),
    [
        (8, [1, 8, 3, 7, 30], 30),
        (16, [5, 1, 4, 2, 9, 30, 1], 40),
        (1, [1, 4], 5),
        (2, [1, 2, 3], 7),
        (5, [4], 13),
    ],
)
def test_generator_writes_what_reading_everything_gives(block_size, lengths, count):
    dims = Dims(2, 3, 12, block_size, 7)
    backend, model = make_model(dims)
    contexts = random_texts(lengths)
    generator = Generator(model, backend, len(contexts))
    sampling = Sampling(max_tokens=count, temperature=0)
    drawn = list(generator.run(contexts, sampling, lambda _: np.zeros(len(contexts))))
    assert len(drawn) == count
    for s, context in enumerate(contexts):
        expected = read_again(model, backend, context.tolist(), count, block_size // 2)
        assert [int(tokens[s]) for tokens in drawn] == expected


def test_generator_can_run_again():
    backend, model = make_model(Dims(1, 2, 8, 6, 5))
    generator = Generator(model, backend, 2)
    sampling = Sampling(max_tokens=9, temperature=0)
    runs = [
        [t.tolist() for t in generator.run(contexts, sampling, lambda _: np.zeros(2))]
        for contexts in (random_texts([2, 3], 5), random_texts([6, 1], 5), random_texts([2, 3], 5))
    ]
    assert runs[0] == runs[2]


def test_a_text_ends_at_its_stop_and_the_rest_go_on():
    """A text's tokens do not depend on its neighbours, nor on when those end."""
    dims = Dims(1, 2, 8, 6, 5)
    backend, model = make_model(dims, std=0.2)
    contexts = random_texts([1, 4, 6, 2], 5)
    uniforms = np.random.default_rng(0).random((40, 4))

    def run(chosen, **settings):
        generator = Generator(model, backend, len(chosen))
        given = [contexts[i] for i in chosen]
        sampling = Sampling(max_tokens=40, **settings)
        rows = generator.run(given, sampling, lambda position: uniforms[position, chosen])
        return np.array(list(rows)).T.tolist()

    free, stopped = run(range(4)), run(range(4), stop=3)
    for text, whole, i in zip(stopped, free, range(4), strict=True):
        end = whole.index(3) + 1 if 3 in whole else len(whole)
        assert text[:end] == whole[:end]
        assert set(text[end:]) <= {-1}
        assert run([i]) == [whole]
    assert max(sum(t >= 0 for t in text) for text in stopped) == len(stopped[0])  # then it stops
    assert 3 not in np.array(run(range(4), never=3))


def test_cached_values_of_the_future_do_not_matter():
    """A cache full of what was there before gives the bits of a fresh one."""
    backend, model = make_model(DIMS, "fp32")
    tokens = np.array([1, 2], np.int32)
    memory, results = Activations(DIMS, 2, backend, training=False), []
    for junk in (0.0, 1e5):
        cache = KVCache(DIMS, 2, backend)
        cache.keys.fill(junk)
        cache.values.fill(junk)
        results.append([np.array(model.decode(memory, tokens, cache)).tobytes() for _ in range(3)])
    assert results[0] == results[1]


def test_batches_are_not_changed():
    backend, model = make_model(DIMS)
    batch, owners, _, lengths = prompt_batch(random_texts([3, 2]))
    before = Batch(*(np.array(x) for x in (batch.tokens, batch.targets, batch.positions)),
                   batch.layout, batch.num_targets)  # fmt: skip
    memory = Activations(DIMS, int(lengths.sum()), backend, training=False)
    model.prefill(memory, batch, KVCache(DIMS, 2, backend), owners)
    for name in ("tokens", "targets", "positions"):
        assert np.array_equal(getattr(batch, name), getattr(before, name))
