"""The plan that is printed is what a run takes, on either backend."""

from __future__ import annotations

import pytest

from gpu_microgpt import memory_plan
from gpu_microgpt.activations import Activations
from gpu_microgpt.backend.cuda import CudaBackend
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.config import Config
from gpu_microgpt.data.corpus import load_corpus
from gpu_microgpt.data.dataset import Dataset, Split
from gpu_microgpt.dims import Dims
from gpu_microgpt.engine import make_engine
from gpu_microgpt.errors import BackendError
from gpu_microgpt.memory_plan import entries
from gpu_microgpt.model import GPT
from gpu_microgpt.params import Weights
from gpu_microgpt.text_model import make_generator
from tests.run_helpers import settings

TEXT = 12_345


def planned(config: Config, dims: Dims, backend) -> dict[str, int]:
    return {name: size for name, _, size in entries(config, dims, backend, TEXT)}


def test_the_hosts_plan_counts_copies_and_no_text():
    config = Config.load("shakespeare", ["threads=2"])
    dims = Dims.of(config.model, 65)
    plan = planned(config, dims, NumpyBackend("fp32", 2))
    assert plan["copies to save"] == 3 * plan["moments m, v"]
    assert plan["moments m, v"] == 2 * plan["weights"]
    assert plan["gradients"] == 2 * plan["weights"]  # a set a shard
    assert not plan.keys() & {"text", "cuBLASLt", "bfloat16 weights", "mask"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_gpus_plan_is_what_the_engine_takes(accumulated, dtype, tmp_path):
    pytest.importorskip("ml_dtypes")
    stand_in = pytest.importorskip("tests.cuda.stand_in")
    gpu = stand_in.StandInGpu()
    backend = CudaBackend(gpu, dtype)
    big = ["model.n_embd=64", "model.block_size=64", f"train.grad_accum={accumulated}"]
    config = settings(tmp_path, *big)
    dims = Dims.of(config.model, 300)
    plan = planned(config, dims, backend)
    assert plan["text"] == TEXT
    positions = config.train.batch_size * dims.block_size  # of one micro-batch at a time
    assert plan["batch"] == memory_plan.BATCH_BYTES * positions
    half = plan["weights"] // 2
    assert plan.get("bfloat16 weights") == (half if dtype == "bf16" else None)
    total = sum(plan.values()) - TEXT
    split = split_of(config)
    engine = make_engine(GPT(Weights(dims, backend)), config, backend, split, 10)
    assert engine.ring == 2  # kept until here
    assert 0.97 * total < gpu.heap.used - split.nbytes < 1.03 * total


def split_of(config: Config) -> Split:
    """The training split of a config's own text."""
    corpus = load_corpus(config.data, log=lambda line: None)
    return Dataset.build(config, corpus, log=lambda line: None).train


def test_the_largest_batch_that_fits_is_named():
    config = Config.load("shakespeare", ["train.batch_size=512", "threads=1"])
    dims = Dims.of(config.model, 65)
    backend = NumpyBackend("fp32", 1)
    limit = int((sum(planned(config, dims, backend).values()) - 1e6) / 0.9)
    backend.memory = lambda: limit  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"lower train\.batch_size to (\d+) ") as failure:
        memory_plan.check(config, dims, backend, TEXT)
    fits = int(str(failure.value).split("batch_size to ")[1].split()[0])
    for size, ok in ((fits, True), (fits + 1, False)):
        other = Config.load("shakespeare", [f"train.batch_size={size}", "threads=1"])
        assert (sum(planned(other, dims, backend).values()) <= 0.9 * limit) == ok


def test_activations_take_what_the_plan_says():
    config = Config.load("names")
    dims = Dims.of(config.model, 27)
    backend = NumpyBackend("fp32", 1)
    plan = planned(config, dims, backend)
    fixed = {"weights", "moments m, v", "gradients", "copies to save", "batch", "sample texts"}
    rows = config.train.batch_size * dims.block_size
    taken = Activations(dims, rows, backend).nbytes
    assert sum(size for name, size in plan.items() if name not in fixed) == taken


def test_other_backends_may_take_memory_for_themselves():
    backend = NumpyBackend("fp32", 1)
    backend.reserved = lambda: [("a library", 77)]  # type: ignore[method-assign]
    config = Config.load("names")
    assert planned(config, Dims.of(config.model, 27), backend)["a library"] == 77


@pytest.mark.parametrize("place", ["host", "gpu"])
def test_sample_texts_take_what_is_planned(place, tmp_path):
    config = settings(tmp_path, "sample.num=40", "model.block_size=64", "model.n_embd=32")
    dims = Dims.of(config.model, 30)
    stand_in = pytest.importorskip("tests.cuda.stand_in")
    gpu = stand_in.StandInGpu()
    backend = CudaBackend(gpu, "bf16") if place == "gpu" else NumpyBackend("fp32", 1)
    size = planned(config, dims, backend)["sample texts"]
    backend.ops(backend.empty((64,), "u1"))  # takes cuBLASLt's workspace
    before = gpu.heap.used
    writer = make_generator(GPT(Weights(dims, backend)), backend, 32)
    cache = 2 * writer.cache.keys.nbytes
    assert cache + writer.memory.nbytes == size
    if place == "gpu":
        taken = gpu.heap.used - before
        assert size < taken < size + 6 * 2 * writer.memory.dims.num_params + 60_000
    none = settings(tmp_path, "sample.num=0")
    assert planned(none, dims, backend)["sample texts"] == 0
