"""Times every operation by itself, on the arrays that a model's training step gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .activations import Activations
from .backend.cuda import CudaBackend
from .bench_gpu import TOTAL_STEPS, NotedPlans, milliseconds_of
from .bench_gpu_setting import GpuSetting
from .graph_step import DeviceBatch, cuda_ops
from .kv_cache import KVCache
from .model import GPT
from .ops.cuda import CudaOps
from .ops.cuda.batch import DeviceSplit
from .ops.cuda.gemm import GEMM_WORKSPACE, Gemm
from .ops.cuda.step import UpdatePlan
from .optim import Optimizer
from .params import Params, Weights
from .types import Array

SEQUENCES = 64  # of the KV cache
SCALARS = (1e-4, 0.1, 0.01, 1.0)  # of an early update


@dataclass(frozen=True)
class Timed:
    """An operation to be timed: it may be repeated. `moved`: arrays, or bytes, that are read or
    written once; one that is both is there twice."""

    name: str
    work: Callable[[], None]
    moved: tuple[Array | int, ...]
    flops: float = 0.0
    fused: str = ""  # name under which it was chosen whether it is done in one

    @property
    def nbytes(self) -> int:
        """Bytes read and written, each once."""
        return sum(x if isinstance(x, int) else int(x.nbytes) for x in self.moved)


class Operations:
    """A model in the middle of a step, and its operations one by one."""

    def __init__(self, setting: GpuSetting, backend: CudaBackend, plans: NotedPlans) -> None:
        """Take memory and do a step but for its update, which leaves numbers in all arrays.

        `plans`: from where operations that are measured have their algorithms.
        """
        self.config, self.dims, self.backend, self.plans = (
            setting.config, setting.dims, backend, plans,
        )  # fmt: skip
        gpu, dims, train = backend.gpu, setting.dims, setting.config.train
        self.rows = train.batch_size * dims.block_size
        self.model = GPT(Weights(dims, backend))
        self.model.params.load(setting.weights, backend)
        self.memory = Activations(dims, self.rows, backend, sequences=SEQUENCES)
        workspace = cuda_ops(self.memory).workspace
        space = backend.empty((GEMM_WORKSPACE,), np.uint8)
        gemm = Gemm(gpu.cublaslt, gpu.device, backend.mode, space, gpu, plans)
        self.ops = CudaOps(backend.dtype, gpu.device, gpu.loader, workspace, gemm)
        self.grads = Params(dims, backend)
        self.optimizer = Optimizer(self.config.optimizer, self.model.params, backend)
        gpu.upload(self.optimizer.scalars, np.array(SCALARS))
        self.text = DeviceSplit.of(setting.split, backend.from_host)
        self.batch = DeviceBatch(train.batch_size, dims.block_size, backend)
        self.counter = backend.zeros((1,), "i8")
        self.total = backend.zeros((1,), "f8")
        self.draw()
        self.model.forward(self.memory, self.batch.batch)
        self.model.backward(self.memory, self.batch.batch, self.grads, 1.0)

    def draw(self) -> None:
        """The batch that the counter says."""
        batch = self.batch
        self.text.batch(self.ops, *batch.rows, batch.offsets, batch.count, self.counter)

    def measure(self, launches: int, seconds: float) -> Iterator[dict[str, Any]]:
        """A row for each operation: microseconds, bytes, FLOPs, and how products are done."""
        parts = (
            self._forward, self._loss, self._backward_products, self._backward, self._update,
            self._softmax, self._next_token,
        )  # fmt: skip
        for part in parts:
            for timed in part():
                self.plans.take()
                ms = milliseconds_of(self.backend.gpu, timed.work, launches, seconds)
                row = {
                    "op": timed.name,
                    "us": 1e3 * ms,
                    "bytes": timed.nbytes,
                    "flops": timed.flops,
                }
                yield row | _how(timed, self.plans.take())

    def _product(self, name: str, y: Array, x: Array, w: Array) -> Timed:
        """y = x w^T."""
        return Timed(name, lambda: self.ops.linear(y, x, w), (y, x, w), product_flops(x, w))

    def _sum(self, name: str, y: Array, x: Array, w: Array, residual: Array) -> Timed:
        """y = residual + x w^T."""
        work = lambda: self.ops.linear_add(y, x, w, residual)  # noqa: E731
        return Timed(name, work, (y, x, w, residual), product_flops(x, w))

    def _forward(self) -> Iterator[Timed]:
        """In the order of the model."""
        ops, a, w = self.ops, self.memory.rows(self.rows), self.model.params.compute
        s, layer, layout = a.layers[0], w.layers[0], self.batch.batch.layout
        tokens, _, positions = self.batch.rows
        looked_up = min(a.x0.nbytes, w.wte.nbytes) + min(a.x0.nbytes, w.wpe.nbytes)
        ids = (tokens, positions, looked_up)
        yield Timed("batch", self.draw, (*self.batch.rows, 2 * self.rows))
        yield Timed(
            "embedding", lambda: ops.embedding(a.x, tokens, positions, w.wte, w.wpe), (a.x, *ids)
        )
        yield Timed(
            "embedding_rmsnorm",
            lambda: ops.embedding_rmsnorm(a.x0, a.rstd0, tokens, positions, w.wte, w.wpe),
            (a.x0, a.rstd0, *ids),
        )
        yield Timed(
            "rmsnorm", lambda: ops.rmsnorm(s.norm1, s.rstd1, a.x0), (s.norm1, s.rstd1, a.x0)
        )
        yield self._product("linear attn_wqkv", s.qkv, s.norm1, layer.attn_wqkv)
        yield Timed(
            "attention",
            lambda: ops.attention(s.att, s.lse, s.qkv, layout, self.dims.n_head),
            (s.att, s.lse, s.qkv),
            self._attention_flops(),
        )
        yield self._sum("linear_add attn_wo", a.x_mid, s.att, layer.attn_wo, a.x0)
        yield Timed(
            "add_rmsnorm",
            lambda: ops.add_rmsnorm(a.x, s.norm2, s.rstd2, a.dbranch, a.x_mid),
            (a.x, s.norm2, s.rstd2, a.dbranch, a.x_mid),
        )
        yield Timed(
            "linear_relu mlp_fc1",
            lambda: ops.linear_relu(s.hidden, s.mask, s.norm2, layer.mlp_fc1),
            (s.hidden, s.mask, s.norm2, layer.mlp_fc1),
            product_flops(s.norm2, layer.mlp_fc1),
            "linear_relu",
        )
        yield Timed("relu", lambda: ops.relu(a.dhidden, s.hidden), (a.dhidden, s.hidden))
        yield self._sum("linear_add mlp_fc2", a.x, s.hidden, layer.mlp_fc2, a.x_mid)
        yield self._product("linear lm_head", a.padded_logits, a.x, w.lm_head)

    def _loss(self) -> Iterator[Timed]:
        """The losses, and the gradient of the logits in their place."""
        ops, a, targets = self.ops, self.memory.rows(self.rows), self.batch.batch.targets
        logits = a.padded_logits
        yield Timed(
            "cross_entropy",
            lambda: ops.cross_entropy(a.losses, a.logits, targets),
            (a.losses, logits, targets),
        )
        yield Timed(
            "cross_entropy_backward",
            lambda: ops.cross_entropy_backward(a.logits, a.losses, a.logits, targets, 1.0),
            (logits, logits, a.losses, targets),
        )
        yield Timed("add_losses", lambda: ops.add_losses(self.total, a.losses), (a.losses,))

    def _backward_products(self) -> Iterator[Timed]:
        """Each both gradients: of the input and of the weights."""
        a, w, d = self.memory.rows(self.rows), self.model.params.compute, self.grads
        s, layer, to = a.layers[0], w.layers[0], d.layers[0]
        for name, dx, dw, dy, x, weight in (
            ("lm_head", a.dbranch, d.lm_head, a.padded_logits, a.x, w.lm_head),
            ("mlp_fc1", a.dbranch, to.mlp_fc1, a.dhidden, s.norm2, layer.mlp_fc1),
            ("attn_wo", a.dbranch, to.attn_wo, a.dx, s.att, layer.attn_wo),
            ("attn_wqkv", a.dbranch, to.attn_wqkv, a.dqkv, s.norm1, layer.attn_wqkv),
        ):
            arguments = (dx, dw, dy, x, weight, False)
            yield Timed(
                f"linear_backward {name}",
                lambda arguments=arguments: self.ops.linear_backward(*arguments),  # type: ignore
                (dx, dw, dy, dy, x, weight),
                2 * product_flops(x, weight),
            )
        yield Timed(
            "relu_linear_backward mlp_fc2",
            lambda: self.ops.relu_linear_backward(
                a.dhidden, to.mlp_fc2, a.dx, s.hidden, s.mask, layer.mlp_fc2, False
            ),
            (a.dhidden, to.mlp_fc2, a.dx, a.dx, s.hidden, s.mask, layer.mlp_fc2),
            2 * product_flops(s.hidden, layer.mlp_fc2),
            "relu_linear_backward",
        )

    def _backward(self) -> Iterator[Timed]:
        """The kernels between the products."""
        ops, a, d = self.ops, self.memory.rows(self.rows), self.grads
        s, layout, heads = a.layers[0], self.batch.batch.layout, self.dims.n_head
        tokens, _, positions = self.batch.rows
        yield Timed(
            "relu_backward",
            lambda: ops.relu_backward(a.dhidden, a.dhidden, s.hidden),
            (a.dhidden, a.dhidden, s.hidden),
        )
        yield Timed(
            "attention_backward",
            lambda: ops.attention_backward(a.dqkv, a.dbranch, s.att, s.lse, s.qkv, layout, heads),
            (a.dqkv, a.dbranch, s.att, s.lse, s.qkv),
            2.5 * self._attention_flops(),
        )
        yield Timed(
            "rmsnorm_backward_add",
            lambda: ops.rmsnorm_backward_add(a.dx, a.dbranch, s.norm2, s.rstd2),
            (a.dx, a.dx, a.dbranch, s.norm2, s.rstd2),
        )
        yield Timed(
            "rmsnorm_backward",
            lambda: ops.rmsnorm_backward(a.dbranch, a.dx, a.x0, a.rstd0),
            (a.dbranch, a.dx, a.x0, a.rstd0),
        )
        yield Timed(
            "embedding_backward",
            lambda: ops.embedding_backward(d.wte, d.wpe, a.dx, tokens, positions, False),
            (a.dx, a.dx, d.wte, d.wpe, tokens, positions),
        )

    def _update(self) -> Iterator[Timed]:
        """Over the flat buffers, and the step's bookkeeping."""
        ops, opt, params, grads = self.ops, self.optimizer, self.model.params, self.grads.flat
        targets, records = (self.backend.zeros(*x) for x in (((1,), "i8"), ((8, 3), "f8")))
        scale = self.backend.zeros((1,), "f8")
        plan, both = UpdatePlan.of(self.config, TOTAL_STEPS), (params.flat, opt.m.flat, opt.v.flat)
        copied = () if params.copy is None else (params.copy.flat,)
        yield Timed("global_norm", lambda: ops.global_norm(opt.norm, grads), (grads,))
        yield Timed("clip_scale", lambda: ops.clip_scale(scale, opt.norm, 1.0), (scale, opt.norm))
        yield Timed("adamw", lambda: opt.apply(ops, self.grads), (*both, *both, *copied, grads))
        yield Timed("advance", lambda: ops.advance(self.counter, targets, self.batch.count), (16,))
        yield Timed(
            "update_scalars",
            lambda: ops.update_scalars(
                opt.scalars, records, self.total, targets, opt.norm, self.counter, plan
            ),
            (opt.scalars,),
        )

    def _softmax(self) -> Iterator[Timed]:
        """Over half of the logits' rows, with the other half as a gradient."""
        ops, logits = self.ops, self.memory.rows(self.rows).padded_logits
        y, dy = logits[: self.rows // 2], logits[self.rows // 2 : self.rows // 2 * 2]
        yield Timed("softmax (half the rows)", lambda: ops.softmax(y, y), (y, y))
        yield Timed(
            "softmax_backward (half the rows)",
            lambda: ops.softmax_backward(dy, dy, y),
            (dy, dy, y),
        )

    def _next_token(self) -> Iterator[Timed]:
        """One token more for each sequence of a full KV cache."""
        ops, backend, dims = self.ops, self.backend, self.dims
        count = min(SEQUENCES, self.rows)
        cache = KVCache(replace(dims, n_layer=1), count, backend)
        last = backend.from_host(np.full(count, dims.block_size - 1, np.int32))
        a = self.memory.rows(count)
        s, logits, keys, values = a.layers[0], a.logits, cache.keys[0], cache.values[0]
        tokens, ended, lengths, positions = (backend.zeros((count,), "i4") for _ in range(4))
        out, uniforms = backend.zeros((32, count), "i4"), backend.zeros((count,), "f8")
        yield Timed(
            "cache_kv",
            lambda: ops.cache_kv(keys, values, s.qkv, cache.sequences, last),
            (s.qkv, 2 * s.qkv.nbytes // 3),
        )
        yield Timed(
            "attention_decode",
            lambda: ops.attention_decode(s.att, s.qkv, keys, values, last),
            (keys, values, s.att, s.qkv),
        )
        yield Timed("forbid", lambda: ops.forbid(logits, 0), (count * 2,))
        yield Timed(
            "sample", lambda: ops.sample(tokens, logits, uniforms, 0.8, 0, 1.0), (a.padded_logits,)
        )
        yield Timed(
            "sample_philox",
            lambda: ops.sample_philox(tokens, logits, 1, cache.sequences, positions, 0.8, 0, 1.0),
            (a.padded_logits,),
        )
        yield Timed(
            "emit",
            lambda: ops.emit(out, ended, tokens, lengths, positions, -1),
            (tokens, lengths, positions, ended),
        )

    def _attention_flops(self) -> float:
        """Of the forward pass, visible pairs only."""
        return 2.0 * self.rows * self.dims.n_embd * (self.dims.block_size + 1)


def product_flops(x: Array, w: Array) -> float:
    """Of x w^T."""
    rows, columns = map(int, x.shape)
    return 2.0 * rows * columns * int(w.shape[0])


def _how(timed: Timed, plans: dict[str, str]) -> dict[str, Any]:
    """Of products: the library's algorithms, as it describes them, and whether a relu is done with
    one of them."""
    if not plans:
        return {}
    chosen = [choice for name, choice in plans.items() if name.startswith("Product(")]
    how: dict[str, Any] = {"algorithms": chosen}
    if timed.fused:
        how["fused"] = any(plans[name] == "1" for name in plans if name.startswith(timed.fused))
    return how
