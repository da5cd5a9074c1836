"""The same model and step in JAX, to be measured against; needs `jax` installed.

On the CPU, jitted, buffers donated; step by step, or many steps in one `lax.scan`. Shapes are fixed
as XLA wants them: documents are padded to block_size. With bf16, weights stay float32 and are
rounded where they enter a product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .bench_rows import SCAN
from .bench_setting import Setting, fused, padded
from .config import OptimizerConfig
from .dims import Dims
from .errors import UserError

# XLA takes its threads from the environment
ONE_THREAD = {"NPROC": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}


def import_jax() -> Any:
    """JAX. Raises UserError where it is not installed."""
    try:
        import jax
    except ImportError:
        raise UserError('jax is not installed: pip install "gpu_microgpt[bench]"') from None
    return jax


class JaxTrainee:
    """Forward, backward, clipping, Adam; batches lie ready, SCAN in a block."""

    def __init__(self, setting: Setting, scan: bool) -> None:
        """Take weights and batches. Raises UserError without JAX."""
        jax = import_jax()
        block_size = setting.dims.block_size if setting.config.data.mode == "documents" else 0
        pairs = [padded(batch, block_size) for batch in setting.batches]
        self.positions = float(np.mean([tokens.size for tokens, _ in pairs]))
        self._batches = [jax.device_put((t.astype(np.int32), y.astype(np.int32))) for t, y in pairs]
        self._scan, self._rate = scan, setting.rate
        if scan:
            blocks = (self._batches[i : i + SCAN] for i in range(0, len(pairs), SCAN))
            self._batches = [tuple(map(jax.numpy.stack, zip(*b, strict=True))) for b in blocks]
        named = fused(setting.weights, setting.dims)
        tables = ("wte", "wpe")  # the others enter as (in, out), as JAX has them
        weights = {n: jax.device_put(a if n in tables else a.T.copy()) for n, a in named.items()}
        zeros = partial(jax.tree.map, jax.numpy.zeros_like, weights)
        self._state = (weights, zeros(), zeros())
        train = partial(_train, jax, setting.dims, setting.config.optimizer, setting.row.narrow)
        self._step = jax.jit(partial(jax.lax.scan, train) if scan else train, donate_argnums=0)
        how = f"{SCAN} steps in one scan" if scan else "step by step"
        threads = setting.config.threads
        held = "1 thread" if threads == 1 else "all threads"
        precision = "bfloat16 products" if setting.row.narrow else "float32"
        self.name = f"JAX {jax.__version__} jit, {how}, {precision}, {held}"

    def steps(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """As a Trainee's; in a scan, first - 1 is a multiple of SCAN."""
        numbers = range(first, first + count)
        rates = np.array([self._rate(step) for step in numbers], np.float32)
        if self._scan:
            tokens, targets = self._batches[(first - 1) // SCAN % len(self._batches)]
            at = np.arange(first, first + count, dtype=np.int32)
            given = (tokens[:count], targets[:count]) if count < SCAN else (tokens, targets)
            self._state, losses = self._step(self._state, (*given, rates, at))
            return np.asarray(losses, np.float64)
        losses = []
        for step, rate in zip(numbers, rates, strict=True):
            batch = self._batches[(step - 1) % len(self._batches)]
            self._state, loss = self._step(self._state, (*batch, rate, np.int32(step)))
            losses.append(loss)
        return np.array([float(loss) for loss in losses])


def _train(
    jax: Any, dims: Dims, optimizer: OptimizerConfig, narrow: bool, state: Any, given: Any
) -> Any:
    """One step: (weights, m, v) and (tokens, targets, rate, step from 1) to the next and the
    loss."""
    numpy, tree = jax.numpy, jax.tree
    weights, m, v = state
    tokens, targets, rate, step = given
    loss, grads = jax.value_and_grad(partial(_loss, jax, dims, narrow))(weights, tokens, targets)
    if optimizer.grad_clip:
        norm = numpy.sqrt(sum(numpy.vdot(g, g) for g in tree.leaves(grads)))
        scale = numpy.minimum(1.0, optimizer.grad_clip / (norm + 1e-6))
        grads = tree.map(lambda g: g * scale, grads)
    b1, b2 = optimizer.betas
    time = step.astype(numpy.float32)
    m = tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
    v = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)

    def updated(w: Any, m: Any, v: Any) -> Any:
        root = numpy.sqrt(v / (1 - b2**time)) + optimizer.eps
        kept = w * (1 - rate * optimizer.weight_decay)
        return kept - rate / (1 - b1**time) * m / root

    return (tree.map(updated, weights, m, v), m, v), loss


def _loss(jax: Any, dims: Dims, narrow: bool, weights: Any, tokens: Any, targets: Any) -> Any:
    """Mean cross-entropy in nats over targets >= 0; tokens, targets (S, T) int32."""
    numpy = jax.numpy
    wide, kind = numpy.float32, numpy.bfloat16 if narrow else numpy.float32
    size, length = tokens.shape
    weights = {n: w if n in ("wte", "wpe") else w.astype(kind) for n, w in weights.items()}

    def norm(x: Any) -> Any:
        return x * jax.lax.rsqrt(numpy.mean(x * x, -1, keepdims=True) + 1e-5)

    def linear(x: Any, name: str) -> Any:
        return x.astype(kind) @ weights[name]

    x = norm(weights["wte"][tokens] + weights["wpe"][:length])
    causal = numpy.tril(numpy.ones((length, length), bool))
    for i in range(dims.n_layer):
        qkv = linear(norm(x), f"{i}.wqkv").reshape(size, length, 3, dims.n_head, dims.head_dim)
        q, k, v = (qkv[:, :, j] for j in range(3))
        scores = numpy.einsum("sthd,suhd->shtu", q, k) * dims.head_dim**-0.5
        p = jax.nn.softmax(numpy.where(causal, scores.astype(wide), -numpy.inf), -1)
        y = numpy.einsum("shtu,suhd->sthd", p.astype(kind), v)
        x = x + linear(y.reshape(size, length, dims.n_embd), f"{i}.attn_wo").astype(wide)
        hidden = jax.nn.relu(linear(norm(x), f"{i}.mlp_fc1"))
        x = x + linear(hidden, f"{i}.mlp_fc2").astype(wide)
    logits = linear(x, "lm_head").astype(wide)
    inside = targets >= 0
    aim = numpy.maximum(targets, 0)[..., None]
    picked = numpy.take_along_axis(jax.nn.log_softmax(logits), aim, -1)[..., 0]
    return -numpy.sum(picked * inside) / numpy.sum(inside)
