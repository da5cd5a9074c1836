"""The cached loop against one that reads the whole window again for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.activations import Activations
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.config import ModelConfig
from gpu_microgpt.data.batch import pack
from gpu_microgpt.dims import Dims
from gpu_microgpt.errors import UserError
from gpu_microgpt.generate import Generator, PhiloxUniforms, Sampling
from gpu_microgpt.model import GPT
from gpu_microgpt.params import Weights

V = 11
BOS = V - 1
Ids = np.ndarray[Any, Any]


def make(block_size: int, dtype: str = "fp64", n_layer: int = 2) -> tuple[GPT, NumpyBackend]:
    """A model with large random weights: every position and token matters to every logit.

    lm_head is smaller, so that every token has its chance.
    """
    shape = ModelConfig(n_layer=n_layer, n_head=2, n_embd=8, block_size=block_size)
    dims, backend = Dims.of(shape, V), NumpyBackend(dtype, threads=1)
    params = Weights(dims, backend)
    draw = np.random.default_rng(block_size)
    for array in params.named.values():
        array[...] = draw.normal(size=array.shape, scale=0.7)
    params.lm_head *= 0.05
    return GPT(params), backend


def full_logits(model: GPT, backend: NumpyBackend, window: Sequence[int]) -> Ids:
    """Logits (V,) after a window, by the plain forward pass."""
    memory = Activations(model.dims, len(window), backend)
    logits: Ids = model.forward(memory, pack([np.array([*window, 0])]))[-1].astype(np.float64)
    return logits


def slow(
    model: GPT, backend: NumpyBackend, context: Ids, sampling: Sampling, draws: Ids
) -> tuple[list[int], list[Ids]]:
    """Tokens and logits of one text; the window slides by dropping its older half."""
    size = model.dims.block_size
    window, tokens, all_logits = context.tolist()[-size:], [], []
    for position in range(sampling.max_tokens):
        logits = full_logits(model, backend, window)
        all_logits.append(logits.copy())
        if sampling.never is not None:
            logits[sampling.never] = -np.inf
        token = choose(logits, sampling, draws[position])
        tokens.append(token)
        if token == sampling.stop:
            break
        if len(window) == size:
            window = window[-(size // 2) :] if size > 1 else []
        window.append(token)
    return tokens, all_logits


def choose(logits: Ids, sampling: Sampling, draw: float) -> int:
    """Temperature, top-k and top-p by sorting, token after token."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[: sampling.top_k or None]
    mass, nucleus = 0.0, []
    for i in kept:
        if mass >= sampling.top_p * p[kept].sum():
            break
        nucleus.append(i)
        mass += p[i]
    below, total = 0.0, p[nucleus].sum()
    for i in sorted(nucleus):
        below += p[i]
        if draw * total < below:
            return i
    return max(nucleus)


def contexts(lengths: Sequence[int], seed: int = 0) -> list[Ids]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, V, n).astype(np.int32) for n in lengths]


def columns(steps: list[Ids]) -> list[list[int]]:
    """Each text's tokens, from what `run` yields."""
    return [column[column >= 0].tolist() for column in np.array(steps).T]


SAMPLINGS = [
    Sampling(24, temperature=0),
    Sampling(24),
    Sampling(24, stop=BOS),
    Sampling(24, never=BOS),
    Sampling(24, temperature=0, never=BOS),
    Sampling(24, temperature=1.7, top_k=3),
    Sampling(24, temperature=0.6, top_p=0.7, stop=BOS),
    Sampling(24, top_k=6, top_p=0.5, never=BOS),
    Sampling(1),
]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_same_texts_as_the_slow_loop(block_size: int, sampling: Sampling) -> None:
    """Also past block_size, with prompts of any length, all side by side."""
    model, backend = make(block_size)
    given = contexts([1, 3, block_size, 20, block_size + 1, 1])
    numbers = range(10, 16)
    uniforms = PhiloxUniforms(7, numbers)
    with backend:
        got = columns(list(Generator(model, backend, 6).run(given, sampling, uniforms)))
        draws = np.array([uniforms(i) for i in range(sampling.max_tokens)])
        wanted = [slow(model, backend, c, sampling, draws[:, i])[0] for i, c in enumerate(given)]
    assert got == wanted
    if sampling.never is not None:
        assert BOS not in np.concatenate(wanted)
    elif sampling.stop is not None:
        assert all(BOS not in tokens[:-1] for tokens in got)
    else:
        assert {len(tokens) for tokens in got} == {sampling.max_tokens}


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp64", 1e-13)])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_logits_of_the_cache(
    block_size: int, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every logit of the cached decode is the full forward's."""
    model, backend = make(block_size, dtype)
    decode, seen = GPT.decode, []

    def watch(self: GPT, *args: Any) -> Any:
        logits = decode(self, *args)
        seen.append(np.array(logits, np.float64))
        return logits

    monkeypatch.setattr(GPT, "decode", watch)
    given, sampling = contexts([1, 5, block_size]), Sampling(20)
    uniforms = PhiloxUniforms(1, range(3))
    with backend:
        tokens = columns(list(Generator(model, backend, 3).run(given, sampling, uniforms)))
        for i, context in enumerate(given):
            draws = np.array([uniforms(position)[i] for position in range(20)])
            same, logits = slow(model, backend, context, sampling, draws)
            assert tokens[i] == same
            for cached, full in zip(seen, logits[1:], strict=True):
                assert np.abs(cached[i] - full).max() <= tolerance * max(1, np.abs(full).max())


def test_a_token_costs_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read once; past block_size each token is read twice at most."""
    model, backend = make(8)
    rows: list[int] = []
    forward = GPT._forward

    def count(self: GPT, memory: Any, tokens: Any, *args: Any) -> Any:
        rows.append(len(tokens))
        return forward(self, memory, tokens, *args)

    monkeypatch.setattr(GPT, "_forward", count)
    with backend:
        uniforms = PhiloxUniforms(0, range(2))
        list(Generator(model, backend, 2).run(contexts([4, 2]), Sampling(5), uniforms))
        assert rows == [6, 2, 2, 2, 2]
        rows.clear()
        list(Generator(model, backend, 1).run(contexts([1]), Sampling(400), PhiloxUniforms(0, [0])))
    assert sum(rows) <= 2 * 400


@pytest.mark.parametrize("sequences", [1, 5, 40])
def test_prompts_are_read_within_the_memory(sequences: int) -> None:
    """More prompt tokens than rows of memory: read in parts, in whatever order they fit."""
    model, backend = make(8)
    given = contexts([1 + (5 * i) % 12 for i in range(sequences)])
    sampling, uniforms = Sampling(12, stop=BOS), PhiloxUniforms(2, range(sequences))
    with backend:
        together = columns(
            list(Generator(model, backend, sequences).run(given, sampling, uniforms))
        )
        for i, context in enumerate(given):
            alone = Generator(model, backend, 1).run([context], sampling, PhiloxUniforms(2, [i]))
            assert columns(list(alone)) == [together[i]]


def test_a_generator_can_be_used_again() -> None:
    """What an earlier text left in the cache does not show."""
    model, backend = make(4)
    uniforms = PhiloxUniforms(0, range(2))
    with backend:
        once = Generator(model, backend, 2)
        first = columns(list(once.run(contexts([3, 2]), Sampling(9), uniforms)))
        list(once.run(contexts([4, 4], seed=1), Sampling(3), uniforms))
        assert columns(list(once.run(contexts([3, 2]), Sampling(9), uniforms))) == first


def test_ended_texts_are_marked_and_all_ended_is_the_end() -> None:
    model, backend = make(8)
    count = 12
    with backend:
        steps = list(
            Generator(model, backend, count).run(
                contexts([1] * count),
                Sampling(500, 5.0, stop=BOS),
                PhiloxUniforms(0, range(count)),
            )
        )
    assert len(steps) < 500
    table = np.array(steps)
    for column in table.T:
        end = column.tolist().index(BOS)
        assert (column[:end] >= 0).all()
        assert (column[end + 1 :] == -1).all()
    assert (table[-1] == BOS).any()


def test_uniforms_depend_on_seed_and_number_only() -> None:
    one, other = PhiloxUniforms(3, [4, 9]), PhiloxUniforms(3, [9])
    for position in (0, 1, 255, 256, 1000):
        assert one(position)[1] == other(position)[0]
    draws = np.array([one(position) for position in range(600)])
    assert len(np.unique(draws)) == draws.size
    assert 0.4 < draws.mean() < 0.6
    assert PhiloxUniforms(5, [4])(0) != one(0)[0]


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": -3}, {"temperature": -1.0}, {"top_k": -2}, {"top_p": -0.1}]
)
def test_impossible_sampling(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(UserError, match=f"^{name}: got {wrong[name]}, wanted "):
        Sampling(**({"max_tokens": 5} | wrong))
