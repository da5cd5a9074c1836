"""Text written by compiled calls is the text written token by token."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt import compiled_team
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.compiled_generate import CompiledGenerator
from gpu_microgpt.dims import Dims
from gpu_microgpt.generate import Generator, PhiloxUniforms, Sampling
from gpu_microgpt.model import GPT
from gpu_microgpt.ops.cpu import bf16_unit
from gpu_microgpt.ops.cpu.team import DONE, GONE, LATE
from gpu_microgpt.params import Weights, table

VOCAB = 7
dtypes = pytest.mark.parametrize("dtype", ["fp32", "fp64"])


def make_model(
    block_size: int, dtype: str = "fp32", threads: int = 1, channels: int = 12
) -> tuple[NumpyBackend, GPT]:
    """On the compiled operations."""
    dims = Dims(2, 3, channels, block_size, VOCAB)
    backend = NumpyBackend(dtype, threads, "", "compiled")
    params = Weights(dims, backend)
    draw = np.random.default_rng(5)
    weights = {name: draw.normal(0, 0.1, shape) for name, shape in table(dims)}
    params.load({name: w.astype(backend.dtype) for name, w in weights.items()}, backend)
    return backend, GPT(params)


def contexts_of(lengths: list[int]) -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [draw.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


def both(block_size, lengths, sampling, uniforms, dtype="fp32") -> list[list[list[int]]]:
    """Tokens by either generator, each run twice."""
    backend, model = make_model(block_size, dtype)
    runs = []
    for kind in (Generator, CompiledGenerator):
        generator = kind(model, backend, len(lengths))
        for _ in range(2):
            drawn = generator.run(contexts_of(lengths), sampling, uniforms())
            runs.append([tokens.tolist() for tokens in drawn])
    return runs


@dtypes
@pytest.mark.parametrize(
    ("block_size", "lengths", "count"),
    [(8, [1, 8, 3, 30], 50), (16, [5], 100), (1, [1, 4], 5), (2, [1, 2, 3], 7), (64, [2, 9], 1)],
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}, {"never": 2},
     {"stop": 4}],
    ids=str,
)  # fmt: skip
def test_the_same_tokens(block_size, lengths, count, settings, dtype):
    """Past full contexts, of several texts, until all have ended."""
    runs = both(
        block_size, lengths, Sampling(count, **settings),
        lambda: PhiloxUniforms(3, range(len(lengths))), dtype,
    )  # fmt: skip
    assert runs[0] == runs[1] == runs[2] == runs[3]
    tokens = np.array(runs[0])
    assert len(tokens) == count or "stop" in settings
    assert settings.get("never") not in tokens
    if "stop" in settings and count > 20:
        assert -1 in tokens or len(lengths) == 1
        assert len(tokens) < count  # all ended, and then it stopped


def test_draws_are_taken_one_by_one_from_a_generator_of_numbers():
    """Python's own random numbers: none is taken for a token that is not written."""
    sampling, taken = Sampling(40, stop=4), []

    def counting(position: int) -> np.ndarray:
        taken.append(position)
        return np.random.default_rng(position).random(2)

    runs = both(8, [3, 1], sampling, lambda: counting)
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert len(runs[0]) < 40
    assert taken == [*range(len(runs[0]))] * 4


def test_reading_can_begin_before_the_end():
    """The first tokens come after a few are drawn, not after all."""
    backend, model = make_model(8)
    asked = []

    class Watched(PhiloxUniforms):
        def __call__(self, position: int) -> np.ndarray:
            asked.append(position)
            return super().__call__(position)

    tokens = CompiledGenerator(model, backend, 1).run(
        contexts_of([2]), Sampling(500), Watched(0, [0])
    )
    next(tokens)
    assert len(asked) == 4
    assert len(list(tokens)) == 499
    assert sorted(set(asked)) == list(range(500))


@pytest.fixture
def teams(monkeypatch):
    """Small models and few cores have teams, too."""
    monkeypatch.setattr(compiled_team, "PART", 1)
    monkeypatch.setattr(compiled_team, "usable_cores", lambda: 8)


def until_alone(generator: CompiledGenerator) -> None:
    end = time.monotonic() + 60
    while not (generator._team.words[1:, DONE] == GONE).all():
        assert time.monotonic() < end
        time.sleep(1e-3)


@pytest.mark.usefixtures("teams")
@pytest.mark.parametrize("dtype", ["fp32", "fp64", *["bf16"] * (bf16_unit() != "")])
@pytest.mark.parametrize("lengths", [[5], [3, 1, 40], [2] * 14])
def test_the_same_tokens_by_any_number_of_threads(dtype, lengths):
    """One after another, past full contexts; more threads than cores too."""
    texts = []
    for threads in (1, 2, 3, 8):
        backend, model = make_model(32, dtype, threads, channels=36)
        generator = CompiledGenerator(model, backend, len(lengths))
        assert len(generator._team.words) == threads
        for _ in range(2):
            with backend:
                uniforms = PhiloxUniforms(3, range(len(lengths)))
                drawn = generator.run(contexts_of(lengths), Sampling(200, stop=4), uniforms)
                texts.append([tokens.tolist() for tokens in drawn])
        until_alone(generator)
    assert all(text == texts[0] for text in texts)


@pytest.mark.usefixtures("teams")
def test_texts_abandoned_half_way():
    """Closed, or only never read on, or broken off by their numbers: nobody is left waiting."""
    backend, model = make_model(32, threads=3)
    generator = CompiledGenerator(model, backend, 1)
    numbers = PhiloxUniforms(3, [0])

    def texts() -> list[list[int]]:
        tokens = generator.run(contexts_of([5]), Sampling(90), numbers)
        return [token.tolist() for token in tokens]

    def broken(position: int) -> np.ndarray:
        if position == 20:
            raise KeyboardInterrupt
        return numbers(position)

    wanted = texts()
    closed = generator.run(contexts_of([5]), Sampling(90), numbers)
    assert [token.tolist() for token in itertools.islice(closed, 40)] == wanted[:40]
    closed.close()
    until_alone(generator)
    with pytest.raises(KeyboardInterrupt):
        list(generator.run(contexts_of([5]), Sampling(90), broken))
    until_alone(generator)
    left = generator.run(contexts_of([5]), Sampling(90), numbers)
    assert [token.tolist() for token in itertools.islice(left, 40)] == wanted[:40]
    until_alone(generator)
    assert [token.tolist() for token in left] == wanted[40:]
    assert texts() == wanted


@pytest.mark.usefixtures("teams")
def test_helpers_work_and_rest():
    """They are sent for, but not for a while after one came too late."""
    backend, model = make_model(32, threads=2)
    team = CompiledGenerator(model, backend, 1)._team
    sent = []
    backend.start_beside = lambda number, task: sent.append(number)

    def call(late: int) -> None:
        with team:
            team.words[0, LATE] += late
        team.words[1, DONE] = GONE

    call(late=0)
    call(late=1)
    assert sent == [0, 0]
    for _ in range(compiled_team.REST):
        call(late=0)
    assert sent == [0, 0]
    with team:
        team.words[0, LATE] += 1
        time.sleep(compiled_team.OFTEN)  # which is seldom enough
    team.words[1, DONE] = GONE
    call(late=0)
    assert sent == [0] * 4


def test_small_models_are_written_by_one_thread():
    sizes = {(1, 4, 16): 1, (1, 4, 128): 1, (2, 4, 128): 2, (4, 4, 128): 3, (6, 6, 384): 16}
    for (layers, heads, channels), count in sizes.items():
        dims = Dims(layers, heads, channels, 256, 66)
        assert compiled_team.members(dims, 16) == count
        assert compiled_team.members(dims, 1) == 1


@pytest.mark.skipif(bf16_unit() == "", reason="this CPU has no products of bfloat16")
@pytest.mark.parametrize("sequences", [1, 14])
def test_a_text_is_written_with_the_weights_of_its_beginning(sequences):
    """Also where they are kept rounded: a run in training writes samples between its steps."""
    (backend, model), (_, other) = (make_model(32, "bf16", channels=36) for _ in range(2))
    generator = CompiledGenerator(model, backend, sequences)

    def tokens(generator: CompiledGenerator) -> list[list[int]]:
        uniforms = PhiloxUniforms(3, range(sequences))
        drawn = generator.run(contexts_of([2] * sequences), Sampling(40), uniforms)
        return [token.tolist() for token in drawn]

    before = tokens(generator)
    for params in (model.params, other.params):
        params.flat[...] *= -3
    after = tokens(generator)
    assert after == tokens(CompiledGenerator(other, backend, sequences)) != before
