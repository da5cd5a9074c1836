"""Text written by captured graphs, on the stand-in GPU: the same as the host's loop writes."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.generate import PhiloxUniforms, Sampling, Uniforms
from tests.cuda.generate_cases import EVERY_LENGTH, Pair, small_products
from tests.cuda.guarded import POISON, GuardedArray, flat_bytes
from tests.test_generate import BOS, SAMPLINGS, columns, contexts


@pytest.fixture(autouse=True)
def _products(monkeypatch: pytest.MonkeyPatch) -> None:
    small_products(monkeypatch)


@pytest.mark.parametrize(
    ("block_size", "sampling"),
    [*((8, s) for s in SAMPLINGS), *((n, s) for n in (1, 2, 3) for s in SAMPLINGS[:3])],
    ids=str,
)
def test_same_texts_as_on_the_host(block_size: int, sampling: Sampling) -> None:
    """Also past block_size, with prompts of any length, all side by side."""
    pair = Pair(block_size, guarded=block_size == 3)
    given, uniforms = contexts(EVERY_LENGTH), PhiloxUniforms(7 << 33 | 5, range(10, 17))
    wanted = pair.on_host(given, sampling, uniforms)
    assert pair.on_gpu(given, sampling, uniforms) == wanted
    if sampling.stop is None:
        assert {len(tokens) for tokens in wanted} == {sampling.max_tokens}


@pytest.mark.parametrize("sequences", range(1, 7))
def test_any_number_of_texts(sequences: int) -> None:
    """Also where nothing is done before it is waited for."""
    pair = Pair(5, late=sequences % 2 == 0)
    given = contexts([1 + (5 * i) % 12 for i in range(sequences)])
    args = (given, Sampling(30, never=BOS), PhiloxUniforms(1, range(sequences)))
    assert pair.on_gpu(*args) == pair.on_host(*args)


@pytest.mark.parametrize("order", ["fifo", "random"])
def test_any_order_of_threads(order: str) -> None:
    pair = Pair(8, order=order)
    args = (contexts(EVERY_LENGTH), Sampling(20), PhiloxUniforms(1, range(7)))
    assert pair.on_gpu(*args) == pair.on_host(*args)


def test_prompts_that_do_not_fit_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows than tokens to read: in parts, each of the graph's shape."""
    monkeypatch.setattr("gpu_microgpt.kv_cache.PREFILL_ROWS", 1)
    pair = Pair(8)
    args = (contexts([30, 3, 7, 1, 2, 8, 2]), Sampling(20), PhiloxUniforms(4, range(7)))
    generator = pair.generator(7)
    assert generator.memory.capacity == 8
    assert pair.on_gpu(*args, generator) == pair.on_host(*args)
    once = (args[0], Sampling(1), args[2], generator)
    assert pair.counted(*once)["replays"] == 1 + 4  # 7 | 2 + 6 | 1 + 7 | 1 tokens to read


def test_bfloat16() -> None:
    """A text does not depend on its neighbours, nor on what was written before."""
    pair = Pair(8, "bf16")
    given, sampling = contexts(EVERY_LENGTH), Sampling(20, stop=BOS)
    together = pair.on_gpu(given, sampling, PhiloxUniforms(3, range(7)))
    alone = pair.generator(1)
    for i, context in enumerate(given):
        uniforms = PhiloxUniforms(3, [i])
        assert pair.on_gpu([context], sampling, uniforms, alone) == [together[i]]
    assert len({tuple(tokens) for tokens in together}) > 3


def test_what_was_in_memory_does_not_show() -> None:
    """Neither NaN nor earlier texts."""
    pair = Pair(8)
    generator = pair.generator(3)
    args = (contexts([1, 9, 4]), Sampling(25, stop=BOS), PhiloxUniforms(5, range(3)))
    wanted = pair.on_host(*args)
    ids = flat_bytes(generator.cache.sequences).tobytes()
    pair.on_gpu(contexts([8, 1, 1]), *args[1:], generator)
    parts = (generator, generator.cache, generator._prefill)
    arrays = [a for part in parts for a in vars(part).values() if isinstance(a, GuardedArray)]
    arrays += [*generator._prefill._places, *generator.memory._arrays.values()]
    assert len(arrays) > 20
    for array in arrays:
        flat_bytes(array).fill(POISON)
    flat_bytes(generator.memory.ops.workspace).fill(POISON)
    flat_bytes(generator.cache.sequences)[:] = np.frombuffer(ids, np.uint8)
    assert pair.on_gpu(*args, generator) == wanted


def test_settings_may_change_from_run_to_run() -> None:
    """A graph has the settings, the seed and who draws baked in."""
    pair = Pair(8, guarded=False)
    generator, given = pair.generator(2), contexts([3, 1])
    settings: dict[str, Any] = {"max_tokens": 12}
    changes = {"never": 2, "top_k": 4, "temperature": 3, "top_p": 0.5, "max_tokens": 9, "stop": 1}
    uniforms = PhiloxUniforms(1, range(2))
    draws = [uniforms, *[PhiloxUniforms(2, numbers) for numbers in (range(2), [5, 1])]]
    runs: list[tuple[Sampling, Uniforms]] = [(Sampling(12), draw) for draw in draws]
    runs += [(Sampling(12), lambda i: uniforms(i)), (Sampling(12), uniforms)]
    for change in changes.items():  # one at a time
        settings = dict([*settings.items(), change])
        runs.append((Sampling(**settings), uniforms))
    texts = []
    for sampling, draw in runs:
        args = (given, sampling, draw)
        texts.append(pair.on_gpu(*args, generator))
        assert texts[-1] == pair.on_host(*args)
    assert all(a != b for a, b in pairwise([texts[0], texts[2], *texts[4:]]))


def test_a_run_that_was_left_does_not_matter() -> None:
    pair = Pair(8, guarded=False)
    generator = pair.generator(2)
    args = (contexts([1, 5]), Sampling(20), PhiloxUniforms(1, range(2)))
    with pair.backend:
        left = generator.run(contexts([2, 2]), Sampling(20), PhiloxUniforms(3, range(2)))
        next(left)
        assert columns(list(generator.run(*args))) == pair.on_host(*args)
        left.close()


@pytest.mark.parametrize("lengths", [[1, 0], [2], [1, 1, 1], []])
def test_impossible_contexts(lengths: list[int]) -> None:
    pair = Pair(4)
    with pytest.raises(ValueError, match=r"^contexts: got lengths .*, wanted 2 of at least 1$"):
        pair.on_gpu(contexts(lengths), Sampling(3), PhiloxUniforms(0, [0, 1]), pair.generator(2))


# Numbers that the host draws


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_numbers_drawn_one_at_a_time(sequences: int, late: bool) -> None:
    """As from Python's one generator: asked for in order, and none that is not used."""
    pair = Pair(4, late=late, guarded=False)
    given, sampling = contexts([3, 1, 9][:sequences]), Sampling(60, 2.0, stop=3)
    generator, written = pair.generator(sequences), []
    for write in (pair.on_host, partial(pair.on_gpu, generator=generator)):
        numbers, asked = random.Random(6), list[int]()

        def draw(position: int, numbers=numbers, asked=asked) -> np.ndarray:
            asked.append(position)
            return np.array([numbers.random() for _ in range(sequences)])

        written.append(([write(given, sampling, draw) for _ in range(2)], asked))
    assert written[0] == written[1]
    assert len(written[0][1]) < 2 * 60
