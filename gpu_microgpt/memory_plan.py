"""What a run will hold in memory, said before it is taken."""

from __future__ import annotations

from itertools import groupby

from . import activations, params
from .arena import Shape
from .backend import Backend
from .config import Config
from .dims import Dims
from .errors import BackendError
from .kv_cache import TOGETHER, prefill_rows
from .step import ShardPlan

SHARE = 0.9  # of the device's memory that a run may plan on

BATCH_BYTES = 40  # a position of a batch while it is gathered: three int32, three or four int64

Entry = tuple[str, str, int]  # what, how many of which shape, bytes


def entries(config: Config, dims: Dims, backend: Backend, text: int) -> list[Entry]:
    """The plan: weights, moments, gradients, then the activations, layers taken together.

    text: bytes of the tokens that a GPU keeps.
    """
    cut = ShardPlan.of(config, dims, backend)
    shards, rows = cut.shards, cut.rows
    size = backend.master.itemsize
    _, flat = params.layout(dims, backend.pad_vocab(dims.vocab_size))
    plan = [
        ("weights", f"{flat:,}", flat * size),
        ("moments m, v", f"2 x {flat:,}", 2 * flat * size),
        ("gradients", f"{shards} x {flat:,}", shards * flat * size),
    ]
    if backend.dtype != backend.master:
        plan.append((f"{backend.dtype} weights", f"{flat:,}", flat * backend.dtype.itemsize))
    if backend.is_host:  # else it is not the device's memory: arrays, then their bytes
        plan.append(("copies to save", f"6 x {flat:,}", 6 * flat * size))
    positions = config.train.batch_size * dims.block_size
    positions *= config.train.grad_accum if backend.is_host else 1  # a GPU draws one at a time
    plan.append(("batch", f"{positions:,}", positions * BATCH_BYTES))
    if not backend.is_host:
        plan.append(("text", "", text))
    plan += [(name, "", reserved) for name, reserved in backend.reserved()]
    plan.append(_samples(config, dims, backend))
    fixed = len(plan)
    arrays = [entry for entry in activations.plan(dims, rows, backend, training=True) if entry[3]]

    def kind(entry: activations.Entry) -> tuple[str, Shape]:
        return entry[0].rpartition(".")[2], entry[1]

    for (name, shape), same in groupby(sorted(arrays, key=kind), key=kind):
        group = list(same)
        count = shards * len(group)
        plan.append((name, f"{count} x {shape}", shards * sum(size for *_, size in group)))
    return plan[:fixed] + sorted(plan[fixed:], key=lambda entry: -entry[2])


def _samples(config: Config, dims: Dims, backend: Backend) -> Entry:
    """The KV cache and the activations of the texts that a run writes side by side."""
    texts = min(config.sample.num, TOGETHER)
    cache = 2 * dims.n_layer * texts * dims.block_size * dims.n_embd * backend.dtype.itemsize
    if not texts:
        return "sample texts", "0", 0
    rows = max(dims.block_size, texts)
    rows = rows if backend.is_host else prefill_rows(dims.block_size, texts)
    arrays = activations.plan(dims, rows, backend, training=False, sequences=texts)
    return "sample texts", f"{texts}", cache + sum(size for *_, size in arrays)


def check(config: Config, dims: Dims, backend: Backend, text: int = 0) -> str:
    """Return the plan as lines. Raises BackendError where the device's memory cannot hold it."""
    plan = entries(config, dims, backend, text)
    total, limit = sum(size for *_, size in plan), backend.memory()
    if limit is not None and total > SHARE * limit:
        raise BackendError(_too_large(config, dims, backend, text, total, limit))
    cut = ShardPlan.of(config, dims, backend)
    parts = f"{cut.shards} x {cut.pieces} parts of up to {cut.rows:,} rows"
    lines = [f"memory: {_mb(total)}, the batch in {parts} (shards x pieces)"]
    lines += [f"  {name:<14} {shape:<24} {_mb(size):>10}" for name, shape, size in plan]
    return "\n".join(lines)


def _too_large(
    config: Config, dims: Dims, backend: Backend, text: int, total: int, limit: int
) -> str:
    """One line, with the largest batch that would fit."""

    def fits(batch_size: int) -> bool:
        smaller = Config.from_dict(config.to_dict(), [f"train.batch_size={batch_size}"])
        return sum(size for *_, size in entries(smaller, dims, backend, text)) <= SHARE * limit

    low, high = 0, config.train.batch_size  # fits(low) and not fits(high), once low > 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    advice = f"lower train.batch_size to {low} (and raise train.grad_accum)" if low else (
        "choose a smaller model or a shorter model.block_size"
    )  # fmt: skip
    return f"memory: got a plan of {_mb(total)}, wanted at most {_mb(int(SHARE * limit))}: {advice}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
