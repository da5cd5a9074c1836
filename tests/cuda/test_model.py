"""The whole model, unchanged, over the launchers: every kernel takes what the others leave."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.activations import Activations
from gpu_microgpt.config import OptimizerConfig
from gpu_microgpt.data.batch import Batch
from gpu_microgpt.dims import Dims
from gpu_microgpt.kv_cache import KVCache
from gpu_microgpt.ops.cuda import CudaOps, workspace_bytes
from gpu_microgpt.ops.cuda.linear import relu_mask_bytes
from gpu_microgpt.optim import Optimizer
from tests.cuda.machine import Machine, assert_twice_plain
from tests.cuda_on_cpu.loader import EmulatedLoader
from tests.model_cases import losses_and_grads, make_batch, make_model, sequence

# names-sized, with documents of one letter and up; head dims and lengths of the general path
CASES = {
    "names": (Dims(1, 4, 16, 16, 27), [[1, 3, 3, 7, 16], [2, 9]]),
    "two layers": (Dims(2, 3, 36, 40, 11), [[1, 33, 40]]),
}


def memory_with_kernels(dims: Dims, rows: int, machine: Machine, training: bool = True):
    backend, _ = make_model(dims, "fp32")
    backend.relu_mask_bytes = relu_mask_bytes  # as on a GPU; all else is NumPy's
    memory = Activations(dims, rows, backend, training)
    size = workspace_bytes(dims, rows, machine.device, 4, 0 if training else 1)
    scratch, gemm = np.full(size, 0xFF, np.uint8), machine.gemm("fp32")
    memory.ops = CudaOps(np.float32, machine.device, machine.loader, scratch, gemm)
    return memory


@pytest.fixture(params=["fifo", "random"])
def emulated(request: pytest.FixtureRequest) -> Machine:
    return Machine(EmulatedLoader(request.param))


def run(dtype: str, case: str, machine: Machine | None = None):
    """Losses and gradients of a case: with the kernels on `machine`, else the reference's."""
    dims, micro = CASES[case]
    batches = [make_batch(lengths, dims.vocab_size) for lengths in micro]
    backend, model = make_model(dims, dtype, std=0.1)
    rows = max(len(batch.tokens) for batch in batches)
    memory = memory_with_kernels(dims, rows, machine) if machine else None
    losses, grads = losses_and_grads(model, backend, batches, memory)
    return np.concatenate(losses), grads.named


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_references(emulated, case):
    losses, grads = run("fp32", case, emulated)
    plain_losses, plain = run("fp32", case)
    true_losses, truth = run("fp64", case)
    assert_twice_plain(losses, plain_losses, true_losses)
    for name, gradient in grads.items():
        assert_twice_plain(gradient, plain[name], truth[name])


def updated(dtype: str, machine: Machine | None = None) -> np.ndarray:
    """The weights (P,) after three steps of AdamW with clipping."""
    dims, micro = CASES["names"]
    batches = [make_batch(lengths, dims.vocab_size) for lengths in micro]
    rows = max(len(batch.tokens) for batch in batches)
    config = OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.1, grad_clip=0.01)
    backend, model = make_model(dims, dtype, std=0.1)
    memory = Activations(dims, rows, backend)
    if machine:
        memory = memory_with_kernels(dims, rows, machine)
    optimizer = Optimizer(config, model.params, backend)
    for step in (1, 2, 3):
        _, grads = losses_and_grads(model, backend, batches, memory)
        optimizer.update([memory.ops], grads, 1e-2, step)
        assert 0 < float(optimizer.scalars[3]) < 1  # clipped
    return model.params.flat


def test_updates_are_the_references(emulated):
    assert_twice_plain(updated("fp32", emulated), updated("fp32"), updated("fp64"))


def test_cached_decoding_gives_the_logits_of_the_whole_text(emulated):
    dims = CASES["two layers"][0]
    backend, model = make_model(dims, "fp32")
    tokens = np.random.default_rng(0).integers(0, dims.vocab_size, 12).tolist()
    cache = KVCache(dims, 1, backend)
    memory = memory_with_kernels(dims, len(tokens), emulated, training=False)
    read: Batch = sequence(tokens[:7])
    owners = np.zeros(7, np.int32)
    logits = [np.array(model.prefill(memory, read, cache, owners))]
    cache.lengths[:] = 7
    for token in tokens[7:]:
        logits.append(np.array(model.decode(memory, np.array([token], np.int32), cache)))
        cache.lengths += 1
    wide_backend, wide_model = make_model(dims, "fp64")
    plain = Activations(dims, len(tokens), wide_backend, training=False)
    expected = wide_model.forward(plain, sequence(tokens))
    assert np.abs(np.concatenate(logits) - expected).max() < 1e-5 * np.abs(expected).max()
