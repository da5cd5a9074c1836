"""What the CPU's benchmark measures: a row is a shipped config, what differs from it, and what of
it is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import UserError

Kind = Literal["train", "generate", "loss", "start", "compile", "memory"]

# peers by the name to ask for, and what is then measured
PEERS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "torch-compile": ("torch-compile",),
    "jax": ("jax", "jax-scan"),
    "jax-scan": ("jax-scan",),
}
SCAN = 64  # steps in one call, where a step is so short that the calls show
LOSS = 2.0  # nats a token: what the mean training loss of the last MEAN steps is to get below
MEAN = 100
# found by a search of which docs/benchmarks/LOG.md tells: on all names, just beyond three epochs
FAST_NAMES = (
    "model.n_embd=64", "model.init_std=0.1", "train.batch_size=32", "train.steps=3104",
    "optimizer.lr=4e-3", "schedule.warmup_fraction=0.03", "data.val_fraction=0",
)  # fmt: skip
# a constant rate that nothing diverges at: the subnormal numbers that follow slow products down
STEADY = (
    "optimizer.lr=1e-4", "schedule.name=constant", "schedule.warmup_fraction=0",
    "schedule.min_lr=0",
)  # fmt: skip
ENDLESS = (*STEADY, "train.steps=1000000")


@dataclass(frozen=True)
class Row:
    """One line of the tables."""

    kind: Kind
    title: str
    config: str
    differs: tuple[str, ...] = ()
    unit: str = "ms/step"
    threads: int = 0  # of every engine; 0: all cores
    together: int = 1  # steps between two looks at the clock

    @property
    def narrow(self) -> bool:
        """Whether matrix products take bfloat16."""
        return "dtype=bf16" in self.differs

    @property
    def more_is_better(self) -> bool:
        """Whether the figure is a speed."""
        return self.unit.endswith("/s")

    def overrides(self) -> list[str]:
        """Settings beside the config's, the same for every engine."""
        same = ["backend=numpy", f"threads={self.threads}", f"train.log_interval={self.together}"]
        return [*(ENDLESS if self.kind in ("train", "generate") else ()), *same, *self.differs]

    def measures(self, engine: str) -> bool:
        """Whether there is something to measure of a peer."""
        if self.kind in ("train", "loss"):
            return self.together == SCAN or engine != "jax-scan"
        allowed = {"generate": ("torch",), "memory": ("torch", "jax"), "start": ("torch", "jax")}
        return engine == "ours" or engine in allowed.get(self.kind, ())


def _names(width: int, size: int = 16) -> Row:
    differs = (f"model.n_embd={width}", f"train.batch_size={size}")
    title = f"names, C {width}, batch {size}"
    return Row("train", title, "names", differs, "us/sample", threads=1, together=SCAN)


def _large(title: str, config: str, *differs: str, together: int = 1) -> dict[str, Row]:
    """The name's row, and the same in bf16."""
    name = title.partition(":")[0]
    text = title.partition(": ")[2]
    narrow = (*differs, "dtype=bf16")
    return {
        name: Row("train", text, config, differs, together=together),
        f"{name}-bf16": Row("train", f"{text}, bf16", config, narrow, together=together),
    }


NANOGPT = ("model.block_size=64", "train.batch_size=12")
ROWS: dict[str, Row] = {
    **{f"names-d{width}": _names(width) for width in (16, 32, 64, 128)},
    "names-d16-b1": _names(16, 1),
    **_large("nanogpt-cpu: nanoGPT's CPU demo, C 128, L 4, T 64, batch 12", "shakespeare",
             *NANOGPT, together=4),
    **_large("shakespeare: Shakespeare 836k, C 128, L 4, T 256, batch 32", "shakespeare"),
    **_large("baby-gpt: baby GPT, C 384, L 6, T 256, batch 64", "baby_gpt"),
    "generation": Row("generate", "writing text, Shakespeare 836k, one at a time", "shakespeare",
                      unit="tokens/s"),
    "time-to-loss": Row("loss", f"names to a training loss below {LOSS:g}", "names", FAST_NAMES,
                        "s", together=SCAN),
    "start": Row("start", "start of a run to its first step, kernels compiled before", "names",
                 unit="s"),
    "first-compile": Row("compile", "first runs ever, all kernels compiled", "names", unit="s"),
    "memory": Row("memory", "largest resident memory of a Shakespeare run", "shakespeare",
                  unit="MB"),
}  # fmt: skip


def chosen_rows(names: Sequence[str]) -> list[str]:
    """The rows with these names, all without any. Raises UserError."""
    for name in names:
        if name not in ROWS:
            raise UserError(f"{name}: no such row; wanted one of {', '.join(ROWS)}")
    return list(dict.fromkeys(names)) or list(ROWS)


def chosen_peers(names: Sequence[str]) -> list[str]:
    """What to measure for these peers. Raises UserError."""
    for name in names:
        if name not in PEERS:
            raise UserError(f"{name}: no such peer; wanted one of {', '.join(PEERS)}")
    return list(dict.fromkeys(engine for name in names for engine in PEERS[name]))
