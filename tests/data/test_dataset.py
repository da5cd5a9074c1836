from __future__ import annotations

import hashlib
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gpu_microgpt.config import Config, DataConfig
from gpu_microgpt.data import Corpus, Dataset, load_corpus
from gpu_microgpt.data.dataset import Split
from gpu_microgpt.errors import DataError

WORDS = ["ab", "c", "abcabc", "bca", "cc", "a", "bbbb", "acb", "ba", "cab", "bb"]


def settings(mode="documents", block_size=8, batch_size=4, **changes):
    """A config; `changes` as data__order=..., seed=..."""
    values = {
        "seed": 7,
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": block_size},
        "data": {"source": "given", "mode": mode, "val_fraction": 0.0},
        "train": {"steps": 10, "batch_size": batch_size},
        "optimizer": {"lr": 0.01},
    }
    for key, value in changes.items():
        *section, name = key.split("__")
        (values[section[0]] if section else values)[name] = value
    return Config.from_dict(values)


def corpus(text):
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(text, "given", Path("given.txt"), digest, "given")


def build(config, text, log=pytest.fail, **more):
    return Dataset.build(config, corpus(text), log=log, **more)


def pieces(dataset, batch):
    """The text of each sequence with its last target, BOS as |."""
    bos = dataset.tokenizer.bos
    edges = batch.layout.offsets.tolist()
    texts = []
    for i, j in pairwise(edges):
        assert batch.positions[i:j].tolist() == list(range(j - i))
        assert (batch.tokens[i + 1 : j] == batch.targets[i : j - 1]).all()
        ids = [*batch.tokens[i:j].tolist(), int(batch.targets[j - 1])]
        texts.append("".join("|" if k == bos else dataset.tokenizer.decode([k]) for k in ids))
    return texts


def texts_of(dataset, batches):
    return [text for batch in batches for text in pieces(dataset, batch)]


# --- documents


def test_documents_have_bos_on_both_sides():
    dataset = build(settings(), "  ab \n\n\tc\nabcabc\n   \n")
    assert dataset.val is None
    assert dataset.tokenizer.characters == "abc"
    assert texts_of(dataset, dataset.train.batches()) == ["|c|", "|ab|", "|abcabc|"]
    assert dataset.train.num_targets == 2 + 3 + 7


def test_long_documents_are_cut_and_counted():
    lines = []
    dataset = build(settings(block_size=3), "abcabc\nab\nabc\n", log=lines.append)
    assert texts_of(dataset, dataset.train.batches()) == ["|abc", "|ab|", "|abc"]
    assert lines == ["2 of 3 documents are cut to block_size 3 tokens"]


def test_a_document_of_exactly_the_block_is_not_cut():
    dataset = build(settings(block_size=4), "abc")
    assert texts_of(dataset, dataset.train.batches()) == ["|abc|"]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_documents_are_split_once_and_for_all(fraction):
    config = settings(data__val_fraction=fraction)
    dataset = build(config, "\n".join(WORDS))
    held = texts_of(dataset, dataset.val.batches())
    kept = texts_of(dataset, dataset.train.batches())
    assert len(held) == round(fraction * len(WORDS))
    assert sorted(held + kept) == sorted(f"|{word}|" for word in WORDS)
    again = build(config, "\n".join(WORDS))
    assert texts_of(again, again.val.batches()) == held


def test_the_split_depends_on_the_seed():
    words = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    held = set()
    for seed in (1, 2, 3):
        dataset = build(settings(seed=seed, data__val_fraction=0.25), "\n".join(words))
        held.add(tuple(texts_of(dataset, dataset.val.batches())))
    assert len(held) == 3


@pytest.mark.parametrize(("lines", "fraction"), [(1, 0.1), (4, 0.1), (2, 0.9)])
def test_too_few_documents_to_split(lines, fraction):
    with pytest.raises(DataError, match=rf"given.txt: got {lines} documents, too few to hold out"):
        build(settings(data__val_fraction=fraction), "\n".join(WORDS[:lines]))


# --- epochs


@pytest.mark.parametrize("batch_size", [1, 4, 11, 25])
def test_each_epoch_holds_every_document_once(batch_size):
    dataset = build(settings(batch_size=batch_size), "\n".join(WORDS))
    drawn = []
    step = 0
    while len(drawn) < 3 * len(WORDS):
        batch = dataset.train.batch(step)
        assert len(batch.layout.offsets) == batch_size + 1
        drawn += pieces(dataset, batch)
        step += 1
    if len(WORDS) % batch_size == 0:  # sorting within a batch keeps it inside its epoch
        epochs = [drawn[i : i + len(WORDS)] for i in range(0, 3 * len(WORDS), len(WORDS))]
        assert all(sorted(epoch) == sorted(f"|{word}|" for word in WORDS) for epoch in epochs)
    counts = Counter(drawn)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert dataset.train.steps_per_epoch == -(-len(WORDS) // batch_size)


def test_epochs_differ_and_seeds_differ():
    orders = set()
    for seed in (1, 2):
        dataset = build(settings(batch_size=1, seed=seed), "\n".join(WORDS))
        for epoch in (0, 1):
            steps = range(epoch * len(WORDS), (epoch + 1) * len(WORDS))
            orders.add(tuple(pieces(dataset, dataset.train.batch(step))[0] for step in steps))
    assert len(orders) == 4


@pytest.mark.parametrize("order", ["epochs", "random"])
@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_a_batch_depends_on_its_step_alone(mode, order):
    config = settings(mode, data__order=order)
    text = "\n".join(WORDS)
    straight = build(config, text).train
    resumed = build(config, text).train
    wanted = [straight.batch(step).tokens.tolist() for step in range(12)]
    for step in (11, 3, 0, 7):
        assert resumed.batch(step).tokens.tolist() == wanted[step]
    assert len({tuple(tokens) for tokens in wanted}) > 6


def test_micro_batches_are_the_large_batch_cut_up():
    text = "\n".join(WORDS)
    large = build(settings(batch_size=12), text)
    small = build(settings(batch_size=4, train__grad_accum=3), text)
    assert small.train.steps_per_epoch == large.train.steps_per_epoch == 1
    for step in range(4):
        parts = [pieces(small, small.train.batch(step, micro)) for micro in range(3)]
        assert sorted(sum(parts, [])) == sorted(pieces(large, large.train.batch(step)))  # noqa: RUF017


def test_an_epoch_is_shuffled_once(monkeypatch):
    """Also where a step's micro-batches lie on both sides of an epoch's end."""
    shuffle, shuffled = Split._period, []

    def period(self, number, size):
        shuffled.append(number)
        return shuffle(self, number, size)

    monkeypatch.setattr(Split, "_period", period)
    split = build(settings(batch_size=3, train__grad_accum=4), "\n".join(WORDS)).train
    for step in range(4):  # 48 of 11 words
        for micro in range(4):
            split.batch(step, micro)
    assert shuffled == [0, 1, 2, 3, 4]


# --- stream


TEXT = "".join(chr(0x100 + i) for i in range(103))  # every character tells its place


def test_windows_overlap_by_one_and_the_last_is_shorter():
    dataset = build(settings("stream", block_size=10), TEXT)
    texts = texts_of(dataset, dataset.train.batches())
    assert sorted(texts) == [TEXT[i : i + 11] for i in range(0, 102, 10)]
    assert dataset.tokenizer.vocab_size == 104
    assert (dataset.train.samples, dataset.train.num_targets) == (10, 102)


def test_training_draws_full_windows_only():
    dataset = build(settings("stream", block_size=10, batch_size=5), TEXT)
    for epoch in (0, 1):
        texts = texts_of(dataset, (dataset.train.batch(2 * epoch + k) for k in (0, 1)))
        assert sorted(texts) == [TEXT[i : i + 11] for i in range(0, 100, 10)]


def test_the_end_of_the_stream_is_held_out():
    dataset = build(settings("stream", block_size=10, data__val_fraction=0.2), TEXT)
    held = texts_of(dataset, dataset.val.batches())
    kept = texts_of(dataset, dataset.train.batches())
    assert sorted(held) == [TEXT[82:93], TEXT[92:103]]
    assert max("".join(kept)) == TEXT[81]
    assert dataset.val.num_targets == 20


def test_a_held_out_part_shorter_than_a_window_is_scored():
    dataset = build(settings("stream", block_size=50, data__val_fraction=0.1), TEXT)
    assert texts_of(dataset, dataset.val.batches()) == [TEXT[93:]]


def test_random_offsets_reach_both_ends_and_everywhere_between():
    config = settings("stream", block_size=10, batch_size=500, data__order="random")
    dataset = build(config, TEXT)
    seen = Counter()
    for step in range(10):  # beyond one block of draws
        texts = pieces(dataset, dataset.train.batch(step))
        assert all(text in TEXT and len(text) == 11 for text in texts)
        seen.update(text[0] for text in texts)
    assert sorted(seen) == list(TEXT[:93])
    assert max(seen.values()) < 2 * min(seen.values())


def test_random_documents_come_from_the_training_split():
    config = settings(batch_size=200, data__order="random", data__val_fraction=0.3)
    dataset = build(config, "\n".join(WORDS))
    kept = set(texts_of(dataset, dataset.train.batches()))
    assert set(pieces(dataset, dataset.train.batch(0))) == kept


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_a_stream_shorter_than_a_window(fraction):
    config = settings("stream", block_size=10, data__val_fraction=fraction)
    enough = 11 if not fraction else 14
    assert build(config, TEXT[:enough]).train.samples == 1
    with pytest.raises(DataError) as caught:
        build(config, TEXT[: enough - 1])
    assert "given.txt: got 10 characters to train on" in str(caught.value)
    assert "block_size + 1 = 11" in str(caught.value)


def test_a_stream_too_short_to_hold_out():
    with pytest.raises(DataError, match="got 1 characters to hold out, wanted at least 2"):
        build(settings("stream", block_size=4, data__val_fraction=0.1), TEXT[:12])


# --- evaluation


@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_a_limited_evaluation_is_a_fixed_choice(mode):
    dataset = build(settings(mode, batch_size=2), "\n".join(WORDS))
    whole = texts_of(dataset, dataset.train.batches())
    few = [pieces(dataset, batch) for batch in dataset.train.batches(2)]
    assert few == [pieces(dataset, batch) for batch in dataset.train.batches(2)]
    assert [len(texts) for texts in few] == [2, 2]
    assert not Counter(sum(few, [])) - Counter(whole)  # noqa: RUF017
    assert texts_of(dataset, dataset.train.batches(1000)) == whole


def test_a_limited_evaluation_comes_from_all_over():
    dataset = build(settings("stream", block_size=1, batch_size=5), TEXT)
    places = [TEXT.index(text[0]) for text in texts_of(dataset, dataset.train.batches(4))]
    assert len(set(places)) == 20
    assert min(places) < 30
    assert max(places) > 72


def test_an_existing_tokenizer_is_kept():
    known = build(settings(), "abcdef").tokenizer
    dataset = build(settings("stream", block_size=2), "fed", tokenizer=known)
    assert dataset.tokenizer is known
    assert dataset.train.batch(0).tokens.tolist() == [5, 4] * 4
    with pytest.raises(DataError, match=r"given\.txt: .*outside the vocabulary: 'x' \(U\+0078\)"):
        build(settings(), "fax", tokenizer=known)


# --- microgpt.py


def test_microgpt_order_is_the_recorded_one():
    if not Path(os.environ.get("GPU_MICROGPT_DATA", ""), "names.txt").is_file():
        pytest.skip("GPU_MICROGPT_DATA holds no names.txt")
    names = load_corpus(DataConfig(source="names"), log=pytest.fail)
    config = settings(block_size=16, batch_size=1, rng="microgpt", seed=42)
    dataset = Dataset.build(config, names, log=pytest.fail)
    assert (dataset.train.samples, dataset.tokenizer.vocab_size) == (32_033, 27)
    drawn = [pieces(dataset, dataset.train.batch(step))[0] for step in range(10)]
    assert " ".join(drawn).replace("|", "") == (
        "yuheng diondre xavien jori juanluis erandi phia samatha phoenix emmelynn"
    )
    assert pieces(dataset, dataset.train.batch(32_033)) == ["|yuheng|"]


def test_shakespeare_as_microgpt_jl_counts_it():
    if not Path(os.environ.get("GPU_MICROGPT_DATA", ""), "shakespeare.txt").is_file():
        pytest.skip("GPU_MICROGPT_DATA holds no shakespeare.txt")
    text = load_corpus(DataConfig(source="shakespeare"), log=pytest.fail)
    dataset = Dataset.build(settings("stream", block_size=256, batch_size=32), text)
    assert dataset.tokenizer.vocab_size == 66
    assert dataset.train.samples == 4357
    batch = dataset.train.batch(0)
    assert batch.tokens.shape == (32 * 256,)
    assert np.asarray(batch.layout.offsets).tolist() == list(range(0, 32 * 256 + 1, 256))
