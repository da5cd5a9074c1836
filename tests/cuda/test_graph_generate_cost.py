"""What text written by captured graphs costs on the stand-in GPU, and what it has around it."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from gpu_microgpt.data.corpus import load_corpus
from gpu_microgpt.data.dataset import Dataset
from gpu_microgpt.data.tokenizer import CharTokenizer
from gpu_microgpt.generate import Generator, PhiloxUniforms, Sampling
from gpu_microgpt.graph_generate import BLOCK, FIRST_BLOCK, GraphGenerator
from gpu_microgpt.graph_step import GraphStep
from gpu_microgpt.text_model import TOGETHER, TextModel, make_generator
from tests import run_helpers
from tests.cuda.generate_cases import Pair, small_products
from tests.cuda.guarded import peek
from tests.cuda.stand_in import StandInGpu
from tests.cuda.stand_in_work import Graph
from tests.test_generate import BOS, contexts


@pytest.fixture(autouse=True)
def _products(monkeypatch: pytest.MonkeyPatch) -> None:
    small_products(monkeypatch)


def test_one_capture_then_replays() -> None:
    """Downloads are one a block; nothing is uploaded for a token."""
    pair = Pair(128, guarded=False)
    generator, total = pair.generator(3), 4 + 8 + 16 + 32 + 32 + 8
    args = ([c[:1] for c in contexts([1, 1, 1])], Sampling(total), PhiloxUniforms(1, range(3)))
    first = pair.counted(*args, generator)
    assert first["captures"] == 1
    assert first["replays"] == total - 1
    second = pair.counted(*args, generator)
    begin = {"uploads": 3, "zeros": 2}  # numbers, lengths, newest tokens; positions, ended
    assert second == {"replays": total, "downloads": 6, "waits": second["waits"]} | begin
    assert second["waits"] <= 6 + 1  # and one at the end
    fewer = pair.counted(args[0], Sampling(10), PhiloxUniforms(1, [7, 8, 9]), generator)
    assert (fewer["replays"], fewer["captures"], fewer["allocations"]) == (10, 0, 0)


def test_prompts_are_one_replay_and_a_slide_is_another() -> None:
    pair = Pair(16, guarded=False)
    generator = pair.generator(3)
    args = (contexts([9, 9, 9]), Sampling(24), PhiloxUniforms(1, range(3)))
    assert pair.counted(*args, generator)["captures"] == 2
    cost = pair.counted(*args, generator)
    assert cost["captures"] == cost["allocations"] == cost["launches"] == cost["gemms"] == 0
    slides = 2  # full after 8 tokens, and after 8 more
    assert cost["replays"] == 24 + 1 + slides
    assert cost["uploads"] == 3 + 4 + slides * 5
    assert cost["downloads"] == 4  # 4 + 4, 8, 8 tokens


def test_a_text_begins_to_come_at_once() -> None:
    """And never is more than a block enqueued beyond the one that is read."""
    pair = Pair(128, guarded=False)
    generator = pair.generator(1)
    args = (contexts([1]), Sampling(120), PhiloxUniforms(1, [0]))
    pair.on_gpu(*args, generator)
    with pair.backend:
        before, most = pair.gpu.counts["replays"], 0
        for i, _ in enumerate(generator.run(*args)):
            enqueued = pair.gpu.counts["replays"] - before
            assert i or enqueued == 3 * FIRST_BLOCK
            most = max(most, enqueued - i)
    assert most == 2 * BLOCK


def test_it_ends_soon_after_the_last_text() -> None:
    pair = Pair(256, guarded=False)
    generator = pair.generator(2)
    args = (contexts([1, 1]), Sampling(250, 3.0, stop=BOS), PhiloxUniforms(2, range(2)))
    wanted = max(map(len, pair.on_host(*args)))
    assert FIRST_BLOCK < wanted < 100
    pair.on_gpu(*args, generator)
    assert wanted <= pair.counted(*args, generator)["replays"] < wanted + 2 * BLOCK


def test_texts_that_ended_stay_within_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device goes on with them, at positions that exist."""
    pair = Pair(4)
    generator = pair.generator(6)
    args = (contexts([1, 2, 3, 4, 5, 6]), Sampling(60, 2.0, stop=BOS), PhiloxUniforms(8, range(6)))
    lengths = sorted(map(len, pair.on_host(*args)))
    assert lengths[0] < 10
    assert lengths[-1] > 50
    launch, seen = Graph.launch, []

    def watched(graph: Graph) -> None:
        launch(graph)
        seen.append(peek(generator.cache.lengths))

    monkeypatch.setattr(Graph, "launch", watched)
    assert sorted(map(len, pair.on_gpu(*args, generator))) == lengths
    assert 0 <= np.min(seen) < np.max(seen) == 4


def test_its_memory_is_free_at_once() -> None:
    """Nothing goes round in circles that only the garbage collector would find."""
    pair = Pair(4, guarded=False)
    args = (contexts([3]), Sampling(9), PhiloxUniforms(0, [0]))
    pair.on_gpu(*args)  # the backend's own workspace
    gc.collect()
    gc.disable()
    try:
        used = pair.gpu.heap.used
        pair.on_gpu(*args)
        assert pair.gpu.heap.used == used
    finally:
        gc.enable()


# With what is around it


def test_between_training_steps(tmp_path: Path) -> None:
    """Texts are of the weights as they are, and training does not notice."""
    config = run_helpers.settings(tmp_path, "model.init_std=0.4")
    dataset = Dataset.build(config, load_corpus(config.data, log=str), log=str)
    args = (contexts([1, 5]), Sampling(12), PhiloxUniforms(1, range(2)))
    losses = []
    for sampled in (False, True):
        pair = Pair(8)
        backend = pair.backend
        generator, texts = pair.generator(2), []
        with backend:
            step = GraphStep(pair.copy, config, backend, dataset.train, 6)
            for number in range(1, 7):
                step.train(number)
                if sampled:
                    texts.append(pair.on_gpu(*args, generator))
                    pair.model.params.load(pair.copy.params.to_host(backend), pair.host)
                    assert texts[-1] == pair.on_host(*args)
            losses.append(step.ask().records()[:7].copy())
    assert np.array_equal(*losses)
    assert texts[0] != texts[-1]


def text_models(tmp_path: Path, mode: str) -> tuple[TextModel, TextModel, StandInGpu]:
    config = run_helpers.settings(tmp_path, f"data.mode={mode}")
    pair, tokenizer = Pair(8, guarded=False), CharTokenizer(run_helpers.LETTERS + "\n,")
    assert tokenizer.vocab_size == pair.model.dims.vocab_size
    host = TextModel(pair.model, tokenizer, config, pair.host)
    return host, TextModel(pair.copy, tokenizer, config, pair.backend), pair.gpu


@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_text_model(tmp_path: Path, mode: str) -> None:
    host, model, gpu = text_models(tmp_path, mode)
    many = {"num_samples": TOGETHER + 3, "max_tokens": 4}
    prompts = ["", "abcdabcdabcd", "b"]
    for options in ({"seed": 3, "max_tokens": 20}, {"temperature": 0, "max_tokens": 9}, many):
        assert model.generate(prompts, **options) == host.generate(prompts, **options)
    options = {"num_samples": 3, "max_tokens": 12, "top_k": 4}
    before = gpu.counts["captures"]
    assert list(model.stream("ab", **options)) == list(host.stream("ab", **options))
    assert gpu.counts["captures"] == before + 2  # prompts, tokens: not for each sample
    assert list(model.stream("ba", **options)) == list(host.stream("ba", **options))
    assert gpu.counts["captures"] == before + 2


def test_streams_read_in_turn(tmp_path: Path) -> None:
    """Each has a generator of its own while it is read."""
    host, model, _ = text_models(tmp_path, "stream")
    options = {"num_samples": 2, "max_tokens": 20}
    wanted = [list(host.stream(prompt, **options)) for prompt in ("a", "b")]
    model.generate("c", max_tokens=2)  # whose generator is there to be used again
    streams = [model.stream(prompt, **options) for prompt in ("a", "b")]
    got = list(zip(*streams, strict=True))
    assert [list(pieces) for pieces in zip(*got, strict=True)] == wanted


def test_each_backend_has_its_generator() -> None:
    pair = Pair(4)
    with pair.host, pair.backend:
        assert type(make_generator(pair.model, pair.host, 2)) is Generator
        assert type(make_generator(pair.copy, pair.backend, 2)) is GraphGenerator
