from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.config import ModelConfig
from gpu_microgpt.dims import Dims
from gpu_microgpt.params import ALIGN, Params, Weights, initial_weights, table

SIZES = [Dims(1, 1, 1, 1, 3), Dims(2, 3, 6, 5, 7), Dims(1, 4, 16, 16, 27), Dims(3, 2, 8, 64, 65)]
sizes = pytest.mark.parametrize("dims", SIZES)


def numbered(dims: Dims) -> dict[str, np.ndarray]:
    """Weights that count up, in the table's order."""
    return initial_weights(dims, np.arange(dims.num_params) + 1.0, False)


def test_names_and_shapes_are_microgpts_in_its_order():
    assert table(Dims(2, 2, 4, 5, 7)) == [
        ("wte", (7, 4)),
        ("wpe", (5, 4)),
        ("lm_head", (7, 4)),
        *(
            (f"layer{i}.{name}", shape)
            for i in range(2)
            for name, shape in (
                ("attn_wq", (4, 4)),
                ("attn_wk", (4, 4)),
                ("attn_wv", (4, 4)),
                ("attn_wo", (4, 4)),
                ("mlp_fc1", (16, 4)),
                ("mlp_fc2", (4, 16)),
            )
        ),
    ]


@pytest.mark.parametrize(
    ("dims", "count"), [(Dims(1, 4, 16, 16, 27), 4_192), (Dims(4, 4, 128, 256, 66), 836_096)]
)
def test_counts_that_must_hold(dims, count):
    assert dims.num_params == count


@sizes
def test_count_is_the_tables(dims):
    assert dims.num_params == sum(rows * columns for _, (rows, columns) in table(dims))


def test_dims_of_a_config():
    model = ModelConfig(n_layer=2, n_head=3, n_embd=12, block_size=5)
    assert Dims.of(model, 7) == Dims(2, 3, 12, 5, 7)
    assert Dims.of(model, 7).head_dim == 4


def test_training_work_is_counted_by_hand():
    """L 1, H 1, C 2, V 3, one sequence of 4 rows: every multiply-add of forward is 2, backward
    costs twice that; attention is 4 x 4 pairs, of which half are seen, for q k and for p v."""
    matrices = 4 * (3 * 2 + 12 * 2 * 2)
    attention = 2 * (4 * 4 / 2) * 2
    assert Dims(1, 1, 2, 4, 3).train_flops(4, 4) == 3 * 2 * (matrices + attention)


@sizes
def test_views_share_the_flat_buffer_and_do_not_overlap(dims):
    params = Params(dims, NumpyBackend("fp64"))
    assert params.flat.ndim == 1
    assert not params.flat.any()
    assert list(params.named) == [name for name, _ in table(dims)]
    for name, shape in table(dims):
        view = params.named[name]
        assert view.shape == shape
        assert view.flags.c_contiguous
        assert np.shares_memory(view, params.flat)
        view += 1
    assert params.flat.max() == 1
    assert params.flat.sum() == dims.num_params


@sizes
def test_weights_start_on_a_boundary(dims):
    params = Params(dims, NumpyBackend("fp32"))
    start = params.flat.__array_interface__["data"][0]
    assert len(params.flat) % ALIGN == 0
    own = [params.wte, params.wpe, params.lm_head]
    own += [w for layer in params.layers for w in vars(layer).values()]
    for view in own:
        assert (view.__array_interface__["data"][0] - start) % (ALIGN * 4) == 0
        assert np.shares_memory(view, params.flat)


@sizes
def test_the_models_views_are_the_named_ones(dims):
    backend = NumpyBackend("fp64")
    params = Params(dims, backend)
    params.load(numbered(dims), backend)
    for name in ("wte", "wpe", "lm_head"):
        assert np.array_equal(getattr(params, name), params.named[name])
    for i, layer in enumerate(params.layers):
        for name in ("attn_wo", "mlp_fc1", "mlp_fc2"):
            assert np.array_equal(getattr(layer, name), params.named[f"layer{i}.{name}"])
        stacked = [params.named[f"layer{i}.attn_{name}"] for name in ("wq", "wk", "wv")]
        assert np.array_equal(layer.attn_wqkv, np.concatenate(stacked))
        layer.attn_wqkv[...] = -1
        assert all((part == -1).all() for part in stacked)


@sizes
def test_load_and_to_host_go_round(dims):
    backend = NumpyBackend("fp64")
    params, weights = Params(dims, backend), numbered(dims)
    params.load(weights, backend)
    copies = params.to_host(backend, "m.")
    assert list(copies) == [f"m.{name}" for name in weights]
    for name, weight in weights.items():
        assert np.array_equal(copies[f"m.{name}"], weight)
        assert not np.shares_memory(copies[f"m.{name}"], params.flat)
        assert not np.shares_memory(params.flat, weight)


def test_load_refuses_another_shape():
    backend, dims = NumpyBackend("fp64"), SIZES[1]
    weights = numbered(dims)
    weights["wpe"] = weights["wpe"][:-1]
    with pytest.raises(ValueError, match="broadcast"):
        Params(dims, backend).load(weights, backend)


def test_load_refuses_a_missing_name():
    backend, dims = NumpyBackend("fp64"), SIZES[1]
    weights = numbered(dims)
    del weights["layer1.mlp_fc2"]
    with pytest.raises(KeyError, match=r"layer1\.mlp_fc2"):
        Params(dims, backend).load(weights, backend)


class PaddedBackend(NumpyBackend):
    """Keeps weights in float64, multiplies in float32, and pads the vocabulary, as a GPU might."""

    def __init__(self) -> None:
        super().__init__("fp32")
        self.master = np.dtype(np.float64)

    def pad_vocab(self, vocab_size: int) -> int:
        return -(-vocab_size // 8) * 8


@sizes
def test_lm_head_is_padded_with_rows_of_zeros(dims):
    backend = PaddedBackend()
    params = Params(dims, backend)
    params.load(numbered(dims), backend)
    rows = backend.pad_vocab(dims.vocab_size)
    assert rows > dims.vocab_size
    assert params.lm_head.shape == (rows, dims.n_embd)
    assert np.array_equal(params.lm_head[: dims.vocab_size], params.named["lm_head"])
    assert not params.lm_head[dims.vocab_size :].any()
    assert params.flat.sum() == sum(w.sum() for w in numbered(dims).values())  # nothing overlaps


@sizes
def test_weights_are_kept_and_multiplied_in_dtypes_of_their_own(dims):
    backend = PaddedBackend()
    weights = Weights(dims, backend)
    exact = {name: w + 2.0**-40 for name, w in numbered(dims).items()}
    weights.load(exact, backend)
    assert weights.compute is weights.copy
    assert weights.flat.shape == weights.compute.flat.shape
    for name, w in exact.items():
        assert np.array_equal(weights.named[name], w)
        assert weights.compute.named[name].dtype == np.float32
        assert np.array_equal(weights.compute.named[name], w.astype(np.float32))
    same = Weights(dims, NumpyBackend("fp32"))
    assert same.compute is same
    assert same.copy is None


@sizes
def test_draws_are_cut_in_order(dims):
    draws = np.arange(dims.num_params) + 1.0
    weights = initial_weights(dims, draws, False)
    assert np.array_equal(np.concatenate([w.ravel() for w in weights.values()]), draws)


def test_residual_writers_can_start_smaller():
    dims = Dims(8, 1, 2, 3, 5)
    plain, scaled = (initial_weights(dims, np.ones(dims.num_params), s) for s in (False, True))
    for name, weight in scaled.items():
        expected = 0.25 if name.endswith(("attn_wo", "mlp_fc2")) else 1.0
        assert (weight == expected).all()
        assert (plain[name] == 1).all()
