"""The whole model: its gradient, what a position may see, and what may have no influence."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gpu_microgpt.activations import Activations
from gpu_microgpt.data.batch import Batch, pack
from gpu_microgpt.dims import Dims
from tests.gradcheck import check_gradients
from tests.model_cases import (
    CASES,
    full_logits,
    ignoring,
    losses_and_grads,
    make_batch,
    make_model,
    poison,
    sequence,
)

cases = pytest.mark.parametrize("case", CASES)


def setting(case, dtype="fp64"):
    """Backend, model and micro-batches of a case."""
    dims, micro = CASES[case]
    backend, model = make_model(dims, dtype)
    return backend, model, [make_batch(lengths, dims.vocab_size) for lengths in micro]


def passes(case, dtype="fp64"):
    """Losses and gradient of a case."""
    backend, model, batches = setting(case, dtype)
    return losses_and_grads(model, backend, batches)


@cases
def test_gradient_of_the_whole_loss(case):
    backend, model, batches = setting(case)
    if case == "odd heads":
        batches = [ignoring(batches[0], [0, 4, 9])]
    memories = [Activations(model.dims, len(batch.tokens), backend) for batch in batches]
    count = sum(batch.num_targets for batch in batches)

    def loss():
        total = 0.0
        for memory, batch in zip(memories, batches, strict=True):
            model.forward(memory, batch)
            total += float(model.loss(memory, batch).sum())
        return total / count

    def hidden_signs():
        rows = [m.rows(len(b.tokens)) for m, b in zip(memories, batches, strict=True)]
        return np.concatenate([s.hidden.ravel() > 0 for row in rows for s in row.layers])

    _, grads = losses_and_grads(model, backend, batches)
    check_gradients(loss, model.params.named, grads.named, step=2e-5, rtol=2e-8, kinks=hidden_signs)


@cases
def test_float32_follows_float64(case):
    expected_losses, expected = passes(case)
    losses, grads = passes(case, "fp32")
    for ours, wide in zip(losses, expected_losses, strict=True):
        assert np.abs(ours - wide).max() < 1e-5
    for name, wide in expected.named.items():
        size = max(np.abs(wide).max(), 1e-3)
        assert np.abs(grads.named[name] - wide).max() < 2e-5 * size, name


@cases
def test_backward_returns_the_losses_of_forward(case):
    backend, model, batches = setting(case)
    losses, _ = losses_and_grads(model, backend, batches)
    memory = Activations(model.dims, 400, backend, training=False)
    for batch, given in zip(batches, losses, strict=True):
        logits = model.forward(memory, batch)
        before = logits.tobytes()
        assert np.array_equal(model.loss(memory, batch), given)
        assert logits.tobytes() == before


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize(("length", "at"), [(6, 3), (6, 5), (129, 63), (129, 64), (129, 128)])
def test_a_token_changes_no_logits_before_it(dtype, length, at):
    backend, model = make_model(Dims(2, 3, 9, length, 5), dtype)
    tokens = make_batch([length], 5).tokens
    changed = tokens.copy()
    changed[at] = (changed[at] + 1) % 5
    before, after = (full_logits(model, backend, t) for t in (tokens, changed))
    assert before[:at].tobytes() == after[:at].tobytes()
    assert (before[at:] != after[at:]).any(1).all()


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_documents_do_not_see_each_other(dtype):
    backend, model, (batch,) = setting("odd heads", dtype)
    memory = Activations(model.dims, len(batch.tokens), backend)
    offsets = batch.layout.offsets.tolist()
    base = np.array(model.forward(memory, batch))
    for s in range(len(offsets) - 1):
        rows = slice(offsets[s], offsets[s + 1])
        tokens = batch.tokens.copy()
        tokens[rows] = (tokens[rows] + 1) % model.dims.vocab_size
        changed = Batch(tokens, batch.targets, batch.positions, batch.layout, batch.num_targets)
        moved = (np.array(model.forward(memory, changed)) != base).any(1)
        assert moved[rows].all()
        moved[rows] = False
        assert not moved.any()
        alone = full_logits(model, backend, batch.tokens[rows])
        assert np.abs(alone - base[rows]).max() < (1e-5 if dtype == "fp32" else 1e-13)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@cases
def test_memory_beyond_the_batch_has_no_influence(case, dtype):
    backend, model, batches = setting(case, dtype)
    memory = Activations(model.dims, 300, backend)
    results = []
    for dirty in (False, True):
        if dirty:
            poison(memory)
        losses, grads = losses_and_grads(model, backend, batches, memory)
        results.append([*(x.tobytes() for x in losses), grads.flat.tobytes()])
        assert np.isfinite(grads.flat).all()
    assert results[0] == results[1]


def test_a_larger_batch_before_leaves_no_trace():
    backend, model, (batch,) = setting("odd heads", "fp32")
    memory = Activations(model.dims, 60, backend)
    first = losses_and_grads(model, backend, [batch], memory)[1].flat.tobytes()
    losses_and_grads(model, backend, [make_batch([7] * 8, 5)], memory)
    assert losses_and_grads(model, backend, [batch], memory)[1].flat.tobytes() == first


def test_what_is_ignored_has_no_gradient():
    """Rows with target -1 after the last scored one: their tokens change nothing at all."""
    backend, model, (batch,) = setting("odd heads")
    last = batch.layout.offsets[-2:]  # the longest sequence, of 7 rows
    tail = range(last[1] - 3, last[1])
    results = []
    for change in (0, 1, 2):
        tokens = batch.tokens.copy()
        tokens[tail] = (tokens[tail] + change) % model.dims.vocab_size
        changed = Batch(tokens, batch.targets, batch.positions, batch.layout, batch.num_targets)
        (losses,), grads = losses_and_grads(model, backend, [ignoring(changed, tail)])
        assert not losses[tail].any()
        results.append((losses.tobytes(), grads.flat.tobytes()))
    assert results[0] == results[1] == results[2]


def test_ignored_padding_equals_ragged_rows():
    """The ragged batch and the same batch padded to one length give the same gradient."""
    backend, model, (batch,) = setting("odd heads")
    _, ragged = losses_and_grads(model, backend, [batch])
    pieces, ignored = [], []
    for s, (start, stop) in enumerate(pairwise(batch.layout.offsets.tolist())):
        row = [*batch.tokens[start:stop], batch.targets[stop - 1]]
        pieces.append(np.array(row + [0] * (8 - len(row))))
        ignored += range(s * 7 + stop - start, s * 7 + 7)
    padded = ignoring(pack(pieces), ignored)
    assert padded.num_targets == batch.num_targets
    (losses,), grads = losses_and_grads(model, backend, [padded])
    assert not losses[ignored].any()
    assert np.abs(grads.flat - ragged.flat).max() < 1e-15


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_same_bits_twice(dtype):
    first, second = (passes("micro-batches", dtype) for _ in range(2))
    assert first[1].flat.tobytes() == second[1].flat.tobytes()


def test_a_batch_beyond_the_memory_is_refused():
    backend, model, _ = setting("one position")
    memory = Activations(model.dims, 3, backend)
    with pytest.raises(ValueError, match="got 4 rows, wanted at most 3"):
        model.forward(memory, sequence([0, 0, 0, 0]))
