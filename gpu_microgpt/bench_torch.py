"""The same model and step in PyTorch eager, to be measured against; needs `torch` installed."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from .bench_setting import BATCHES, Setting, timed
from .data.batch import Batch
from .errors import UserError


def measure_torch(setting: Setting, seconds: float) -> dict[str, Any]:
    """Time PyTorch's step on all cores; {"ms": median, "loss": of the first step, ...}."""
    try:
        import torch
    except ImportError:
        raise UserError('torch is not installed: pip install "gpu_microgpt[bench]"') from None
    from torch.nn import functional

    dims, optimizer = setting.dims, setting.config.optimizer
    weights = {
        name: torch.nn.Parameter(torch.from_numpy(array.astype(np.float32)))
        for name, array in _fused(setting).items()
    }
    kind = torch.optim.AdamW if optimizer.name == "adamw" else torch.optim.Adam
    update = kind(
        weights.values(), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )  # fmt: skip
    batches = [tuple(torch.from_numpy(a) for a in _padded(b)) for b in setting.batches]

    def norm(x: Any) -> Any:
        return functional.rms_norm(x, (dims.n_embd,), eps=1e-5)

    def loss_of(tokens: Any, targets: Any) -> Any:
        size, length = tokens.shape
        x = norm(weights["wte"][tokens] + weights["wpe"][:length])
        for i in range(dims.n_layer):
            qkv = functional.linear(norm(x), weights[f"{i}.wqkv"])
            q, k, v = qkv.view(size, length, 3, dims.n_head, -1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).reshape(size, length, dims.n_embd)
            x = x + functional.linear(y, weights[f"{i}.attn_wo"])
            hidden = functional.relu(functional.linear(norm(x), weights[f"{i}.mlp_fc1"]))
            x = x + functional.linear(hidden, weights[f"{i}.mlp_fc2"])
        logits = functional.linear(x, weights["lm_head"])
        return functional.cross_entropy(
            logits.view(-1, dims.vocab_size), targets.reshape(-1), ignore_index=-1
        )

    losses: list[float] = []

    def run(number: int) -> None:
        update.zero_grad()
        loss = loss_of(*batches[number % BATCHES])
        loss.backward()
        if optimizer.grad_clip:
            torch.nn.utils.clip_grad_norm_(weights.values(), optimizer.grad_clip)
        update.step()
        losses.append(float(loss.detach()))

    run(0)
    times = timed(run, seconds)
    return {
        "ms": 1e3 * statistics.median(times),
        "loss": losses[0],
        "engine": f"PyTorch {torch.__version__} eager, {torch.get_num_threads()} threads",
    }


def _fused(setting: Setting) -> dict[str, np.ndarray[Any, Any]]:
    """Our initial weights with q, k, v as one matrix, as a PyTorch user would have them."""
    named = setting.weights
    fused = {name: named[name] for name in ("wte", "wpe", "lm_head")}
    for i in range(setting.dims.n_layer):
        parts = [named[f"layer{i}.attn_{w}"] for w in ("wq", "wk", "wv")]
        fused[f"{i}.wqkv"] = np.concatenate(parts)
        for name in ("attn_wo", "mlp_fc1", "mlp_fc2"):
            fused[f"{i}.{name}"] = named[f"layer{i}.{name}"]
    return fused


def _padded(batch: Batch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens and targets (S, T) int64, padded to the batch's longest sequence; target -1 there."""
    offsets = batch.layout.offsets
    lengths = np.diff(offsets)
    tokens = np.zeros((len(lengths), lengths.max()), np.int64)
    targets = np.full(tokens.shape, -1, np.int64)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    tokens[inside], targets[inside] = batch.tokens, batch.targets
    return tokens, targets
