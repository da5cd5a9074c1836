"""The same model and step in PyTorch, to be measured against; needs `torch` installed.

On the CPU in float32 or under autocast, eager or compiled (bench_torch_cpu.py). On a GPU in
bfloat16 as its fast training scripts have it: weights in bfloat16 beside float32 ones that a fused,
capturable AdamW updates, the vocabulary padded so that products have whole tiles, batches on the
device beforehand; eager, compiled, or compiled with the whole step (forward, backward, clipping,
update) in one CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .bench_setting import fused, padded
from .config import OptimizerConfig
from .data.batch import Batch
from .dims import Dims
from .errors import UserError

WARM_UP = 3  # steps before a capture, as PyTorch advises; as many are looked at

Weights = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Form:
    """How the step is done."""

    device: str = "cpu"
    compiled: bool = False
    narrow: bool = False  # bfloat16 beside float32 weights, and padded rows
    pad_vocab: int = 0  # rows of lm_head; 0: as many as there are tokens
    block_size: int = 0  # that sequences are padded to; 0: the longest of the batch
    autocast: bool = False  # matrix products in bfloat16, on the CPU


class TorchStep:
    """A model in training on batches of its own, always the same ones in turn."""

    def __init__(
        self,
        dims: Dims,
        optimizer: OptimizerConfig,
        weights: Weights,
        batches: Sequence[Batch],
        form: Form = Form(),
    ) -> None:
        """Copy everything to the device; `weights` by microgpt's names. Raises UserError without
        torch."""
        torch = self._torch = import_torch()
        self.dims, self.form, self._clip = dims, form, optimizer.grad_clip
        arrays = _padded_vocab(fused(weights, dims), form.pad_vocab)
        self.masters = {
            name: torch.nn.Parameter(torch.from_numpy(array).to(form.device))
            for name, array in arrays.items()
        }
        self.weights = self.masters
        if form.narrow:
            self.weights = {
                name: torch.nn.Parameter(w.detach().bfloat16()) for name, w in self.masters.items()
            }
            for master in self.masters.values():
                master.grad = torch.zeros_like(master)
        self._loss_of: Callable[[Any, Any], Any] = self._loss
        if form.compiled:
            self._loss_of = torch.compile(self._loss, fullgraph=True, dynamic=False)
        extra = {"capturable": True} if form.device.startswith("cuda") else {}
        kind = torch.optim.AdamW if optimizer.name == "adamw" else torch.optim.Adam
        self.update = kind(
            self.masters.values(), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
            weight_decay=optimizer.weight_decay, fused=True, **extra,
        )  # fmt: skip
        self.batches = [
            tuple(torch.from_numpy(a).to(form.device) for a in padded(batch, form.block_size))
            for batch in batches
        ]
        self._graph: Any = None
        self._figures: tuple[Any, Any] = (math.nan, math.nan)

    def run(self, number: int) -> None:
        """Enqueue a step on batch `number`, modulo their count."""
        self._figures = self._work(self._batch(number), self._clip)

    def run_checked(self, number: int) -> tuple[float, float]:
        """The same; loss and gradient norm, also where nothing is clipped."""
        self._figures = self._work(self._batch(number), self._clip or math.inf)
        return self.figures()

    def figures(self) -> tuple[float, float]:
        """Loss and gradient norm of the last step; waits. The norm is NaN where it is not wanted
        for clipping."""
        loss, norm = self._figures
        return float(loss), float(norm)

    def set_rate(self, rate: float) -> None:
        """Of the next steps, where they are not captured."""
        for group in self.update.param_groups:
            group["lr"] = rate

    def capture(self, first: int) -> None:
        """Put the step into a CUDA graph, behind a warm-up on the batches from `first` on."""
        torch = self._torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for number in range(first, first + WARM_UP):
                self.run(number)
        torch.cuda.current_stream().wait_stream(side)
        self._static = tuple(a.clone() for a in self.batches[0])
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._captured = self._work(self._static, self._clip)

    def replay(self, number: int) -> None:
        """Enqueue the captured step on batch `number`."""
        for static, array in zip(self._static, self._batch(number), strict=True):
            static.copy_(array)
        self._graph.replay()
        self._figures = self._captured

    def _batch(self, number: int) -> tuple[Any, ...]:
        """Tokens and targets."""
        return self.batches[number % len(self.batches)]

    def _work(self, batch: tuple[Any, ...], clip: float) -> tuple[Any, Any]:
        """Forward, backward, clipping, update; loss and norm on the device."""
        torch, norm = self._torch, math.nan
        for weight in self.weights.values():
            weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.form.autocast):
            loss = self._loss_of(*batch)
        loss.backward()
        masters, weights = list(self.masters.values()), list(self.weights.values())
        if self.form.narrow:
            torch._foreach_copy_([m.grad for m in masters], [w.grad for w in weights])
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(masters, clip)
        self.update.step()
        if self.form.narrow:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        return loss.detach(), norm

    def _loss(self, tokens: Any, targets: Any) -> Any:
        return loss_of(self._torch, self.dims, self.weights, tokens, targets)


def loss_of(torch: Any, dims: Dims, weights: Mapping[str, Any], tokens: Any, targets: Any) -> Any:
    """Mean cross-entropy in nats over targets that are not -1; tokens, targets (S, T) int64."""
    functional = torch.nn.functional
    size, length = tokens.shape

    def norm(x: Any) -> Any:
        return functional.rms_norm(x, (dims.n_embd,), eps=1e-5)

    x = norm(functional.embedding(tokens, weights["wte"]) + weights["wpe"][:length])
    for i in range(dims.n_layer):
        qkv = functional.linear(norm(x), weights[f"{i}.wqkv"])
        q, k, v = qkv.view(size, length, 3, dims.n_head, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(size, length, dims.n_embd)
        x = x + functional.linear(y, weights[f"{i}.attn_wo"])
        hidden = functional.relu(functional.linear(norm(x), weights[f"{i}.mlp_fc1"]))
        x = x + functional.linear(hidden, weights[f"{i}.mlp_fc2"])
    logits = functional.linear(x, weights["lm_head"]).flatten(0, 1)[:, : dims.vocab_size]
    return functional.cross_entropy(logits.float(), targets.reshape(-1), ignore_index=-1)


class GpuPeers:
    """PyTorch's step on a GPU in its three forms, each with weights and moments of its own but for
    the captured one, which goes on where the compiled one is: it is started right behind that."""

    TOGETHER = (("eager",), ("compile", "compile + graph"))  # to be started in this order

    def __init__(
        self, dims: Dims, optimizer: OptimizerConfig, weights: Weights, batches: Sequence[Batch],
        pad_vocab: int,
    ) -> None:  # fmt: skip
        """Nothing is done yet. `batches`: at least 3 `WARM_UP`. Raises UserError without torch."""
        self.torch = import_torch()
        form = Form("cuda", narrow=True, pad_vocab=pad_vocab, block_size=dims.block_size)
        self._made = partial(TorchStep, dims, optimizer, weights, batches)
        self._form = form
        self._compiled: TorchStep | None = None

    def describe(self) -> str:
        """One line."""
        torch = self.torch
        return (
            f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, bfloat16 weights beside "
            "float32 ones, fused AdamW; graph: the whole step in one CUDA graph"
        )

    def start(self, name: str) -> tuple[Callable[[int], None], dict[int, tuple[float, float]]]:
        """What does a step on a batch, and {step: (loss, gradient norm)} of some that it did."""
        if name == "eager":
            eager = self._made(self._form)
            return eager.run, _first(eager.run_checked, 0)
        if name == "compile":
            self._compiled = self._made(replace(self._form, compiled=True))
            return self._compiled.run, _first(self._compiled.run_checked, 0)
        if self._compiled is None:
            raise UserError("compile did not work")
        step = self._compiled
        step.capture(WARM_UP)

        def replayed(number: int) -> tuple[float, float]:
            step.replay(number)
            return step.figures()

        return step.replay, _first(replayed, 2 * WARM_UP)

    def release(self) -> None:
        """Give memory that is not in use back to the device, where it is much."""
        cuda = self.torch.cuda
        if cuda.memory_reserved() > cuda.get_device_properties(0).total_memory / 4:
            cuda.empty_cache()


def _first(run: Callable[[int], tuple[float, float]], at: int) -> dict[int, tuple[float, float]]:
    """Figures of `WARM_UP` steps, batches from `at` on."""
    return {number + 1: run(number) for number in range(at, at + WARM_UP)}


def milliseconds(run: Callable[[int], None], first: int, count: int) -> float:
    """Mean of steps `first` to `first + count` on the GPU, by its events."""
    cuda = import_torch().cuda
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    start.record()
    for number in range(first, first + count):
        run(number)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / count


def import_torch() -> Any:
    """PyTorch. Raises UserError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError('torch is not installed: pip install "gpu_microgpt[bench]"') from None
    return torch


def _padded_vocab(named: Weights, rows: int) -> Weights:
    """The same with rows of zeros below lm_head, up to so many."""
    head = named["lm_head"]
    more = np.zeros((max(0, rows - len(head)), head.shape[1]), head.dtype)
    return {**named, "lm_head": np.concatenate([head, more])}
