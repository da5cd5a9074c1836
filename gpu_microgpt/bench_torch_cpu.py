"""PyTorch on the CPU as it is installed: the training step, eager or compiled; writing text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .bench_setting import Setting, fused
from .bench_torch import Form, TorchStep, import_torch, loss_of
from .config import OptimizerConfig

HEAT = 1.0  # of the softmax that is drawn from


class TorchTrainee:
    """Forward, backward, clipping, fused Adam on the CPU.

    Eager on batches padded to their longest sequence. Compiled, shapes are fixed: padded to
    block_size; with `whole` the update, too, is in the one graph, which pays for small models.
    """

    def __init__(self, setting: Setting, compiled: bool, whole: bool = False) -> None:
        """Take weights and batches. Raises UserError without PyTorch."""
        torch = self._torch = import_torch()
        set_threads(torch, setting.config.threads)
        narrow, length = setting.row.narrow, setting.dims.block_size if compiled else 0
        form = Form(compiled=compiled, block_size=length, autocast=narrow)
        optimizer, self._rate = setting.config.optimizer, setting.rate
        step = TorchStep(setting.dims, optimizer, setting.weights, setting.batches, form)
        self._step: Any = TorchGraph(step, optimizer) if whole else step
        self.positions = float(np.mean([tokens.numel() for tokens, _ in step.batches]))
        graph = "whole step in one compiled graph" if whole else "forward and backward compiled"
        precision = "bfloat16 autocast" if narrow else "float32"
        self.name = (
            f"PyTorch {torch.__version__}, {graph if compiled else 'eager'}, {precision}, "
            f"{_threads(torch.get_num_threads())}"
        )

    def steps(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """As a Trainee's."""
        losses = []
        for step in range(first, first + count):
            self._step.set_rate(self._rate(step))
            self._step.run(step - 1)
            losses.append(self._step.figures()[0])
        return np.array(losses)


class TorchGraph:
    """A step's work as one graph: loss, gradients by torch.func, clipping, Adam in place."""

    def __init__(self, step: TorchStep, optimizer: OptimizerConfig) -> None:
        """Go on with the weights and batches of `step`, which is not used itself any more."""
        torch = self._torch = import_torch()
        self._batches, self._dims, self._optimizer = step.batches, step.dims, optimizer
        self._weights = {name: weight.detach() for name, weight in step.masters.items()}
        self._m, self._v = (
            {name: torch.zeros_like(w) for name, w in self._weights.items()} for _ in range(2)
        )
        self._compiled = torch.compile(self._work, fullgraph=True, dynamic=False)
        self._narrow, self._rate, self._done = step.form.autocast, 0.0, 0
        self._loss: Any = torch.tensor(np.nan)

    def set_rate(self, rate: float) -> None:
        """Of the next step."""
        self._rate = rate

    def run(self, number: int) -> None:
        """Do a step on batch `number`, modulo their count."""
        self._done += 1
        b1, b2 = self._optimizer.betas
        tensor, done = self._torch.tensor, self._done
        scalars = [tensor(x) for x in (self._rate, 1 - b1**done, 1 - b2**done)]
        batch = self._batches[number % len(self._batches)]
        with self._torch.no_grad():
            self._loss = self._compiled(self._weights, self._m, self._v, *batch, *scalars)

    def figures(self) -> tuple[float, float]:
        """As a TorchStep's; the norm is not given."""
        return float(self._loss), float("nan")

    def _work(
        self, weights: Any, m: Any, v: Any, tokens: Any, targets: Any, rate: Any, c1: Any, c2: Any
    ) -> Any:
        torch, config = self._torch, self._optimizer
        b1, b2 = config.betas

        def loss(weights: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=self._narrow):
                return loss_of(torch, self._dims, weights, tokens, targets)

        grads, value = torch.func.grad_and_value(loss)(weights)
        if config.grad_clip:
            norm = torch.sqrt(sum((g * g).sum() for g in grads.values()))
            scale = torch.clamp(config.grad_clip / (norm + 1e-6), max=1.0)
            grads = {name: g * scale for name, g in grads.items()}
        for name, g in grads.items():
            m[name].lerp_(g, 1 - b1)
            v[name].mul_(b2).addcmul_(g, g, value=1 - b2)
            weights[name].mul_(1 - rate * config.weight_decay)
            weights[name].sub_(rate / c1 * m[name] / ((v[name] / c2).sqrt() + config.eps))
        return value


class TorchWriter:
    """One position a call over a KV cache, in plain PyTorch: what a careful user would write."""

    def __init__(self, setting: Setting) -> None:
        """Take the weights."""
        torch = self._torch = import_torch()
        self.dims = dims = setting.dims
        self.weights = {n: torch.from_numpy(a) for n, a in fused(setting.weights, dims).items()}
        shape = (dims.n_layer, 1, dims.n_head, dims.block_size, dims.head_dim)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def write(self, first: int, count: int, heat: float = HEAT) -> list[int]:
        """Continue token `first` by so many, up to block_size - 1; heat 0: always the likeliest."""
        torch, tokens = self._torch, [first]
        with torch.inference_mode():
            token = torch.tensor([first])
            for position in range(count):
                logits = self._logits(token, position)
                if heat:
                    token = torch.multinomial(torch.softmax(logits[0] / heat, -1), 1)
                else:
                    token = logits[0].argmax(-1, keepdim=True)
                tokens.append(int(token))
        return tokens

    def _logits(self, token: Any, position: int) -> Any:
        """(1, V - 1) of what follows the token at this position; BOS, the last, is not drawn."""
        functional, dims, weights = self._torch.nn.functional, self.dims, self.weights

        def norm(x: Any) -> Any:
            return functional.rms_norm(x, (dims.n_embd,), eps=1e-5)

        x = norm(weights["wte"][token] + weights["wpe"][position])
        for i in range(dims.n_layer):
            qkv = functional.linear(norm(x), weights[f"{i}.wqkv"])
            q, k, v = qkv.view(1, 3, dims.n_head, 1, dims.head_dim).unbind(1)
            keys, values = self.keys[i], self.values[i]
            keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
            y = functional.scaled_dot_product_attention(
                q, keys[:, :, : position + 1], values[:, :, : position + 1]
            )
            x = x + functional.linear(y.reshape(1, dims.n_embd), weights[f"{i}.attn_wo"])
            hidden = functional.relu(functional.linear(norm(x), weights[f"{i}.mlp_fc1"]))
            x = x + functional.linear(hidden, weights[f"{i}.mlp_fc2"])
        return functional.linear(x, weights["lm_head"])[:, :-1]


def measure_writing(
    setting: Setting,
    first: int,
    length: int,
    seconds: float,
    timed: Callable[..., list[float]],
) -> dict[str, Any]:
    """Time texts of `length` tokens behind `first`, on one thread and on all; the better counts.

    `timed(run, seconds)` gives the seconds of each call.
    """
    torch, best = import_torch(), (sys.float_info.max, 0)
    writer = TorchWriter(setting)
    set_threads(torch, setting.config.threads)
    most = torch.get_num_threads()
    start = time.time()
    greedy = writer.write(first, length, 0.0)[1:]
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        taken = timed(lambda: writer.write(first, length), seconds / 2)
        best = min(best, (float(np.median(taken)), threads))
    name = f"PyTorch {torch.__version__} eager, float32, KV cache, {_threads(best[1])} (the better)"
    return {"tokens_per_second": length / best[0], "tokens": greedy, "engine": name,
            "first_at": start}  # fmt: skip


def set_threads(torch: Any, threads: int) -> None:
    """Hold PyTorch to so many; 0: as many as it takes by itself."""
    if threads:
        torch.set_num_threads(threads)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"
