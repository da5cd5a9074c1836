"""Settings: a YAML file plus `a.b=c` overrides become one frozen, validated `Config`.

Every mistake is a `ConfigError` of one line: where it stands, which key, what was got, what is
wanted, and for an unknown key the nearest known one (settings.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from .errors import ConfigError
from .settings import Settings, describe, read_yaml, require, validate, write_yaml

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class ModelConfig(Settings):
    """Shape and initialisation of the network; the vocabulary comes from the tokenizer."""

    n_layer: Count = Field(description="blocks, each attention and then an MLP")
    n_head: Count = Field(description="attention heads; must divide n_embd")
    n_embd: Count = Field(description="channels C of the residual stream; the MLP has 4C")
    block_size: Count = Field(description="context length T in tokens")
    init_std: Positive = Field(
        default=0.02, description="standard deviation of the initial weights"
    )
    scale_residual_init: bool = Field(
        default=False, description="attn_wo and mlp_fc2 start with init_std / sqrt(2 n_layer)"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.n_embd % self.n_head == 0,
            "a multiple of n_head",
            n_embd=self.n_embd,
            n_head=self.n_head,
        )
        return self


class DataConfig(Settings):
    """The text and how it is cut into samples."""

    source: Text = Field(description="names, shakespeare, stdlib, stdlib-words, a file or a URL")
    mode: Literal["documents", "stream"] = Field(
        default="stream", description="a line is a document, or fixed windows of running text"
    )
    fallback: Literal["stdlib", "stdlib-words"] | None = Field(
        default=None, description="offline corpus to go on with when a download fails; null: stop"
    )
    val_fraction: BelowOne = Field(default=0.1, description="share held out; 0: no evaluation")
    order: Literal["epochs", "random"] = Field(
        default="epochs", description="every sample once an epoch, shuffled, or drawn at random"
    )


class TrainConfig(Settings):
    """How long to train, on how much at a time, and what to do on the way."""

    steps: Count | None = Field(
        default=None, description="optimiser steps; give steps or epochs, not both"
    )
    epochs: Count | None = Field(default=None, description="passes over the training split")
    batch_size: Count = Field(description="samples (windows or documents) a micro-batch")
    grad_accum: Count = Field(
        default=1, description="micro-batches a step, their gradients averaged"
    )
    stop_at: Count | None = Field(
        default=None, description="save and end after this step, schedules as if it went on"
    )
    eval_interval: CountOrZero = Field(
        default=100, description="steps between evaluations; 0: only at the end"
    )
    eval_batches: CountOrZero = Field(
        default=0, description="batches an evaluation; 0: the whole split"
    )
    log_interval: Count = Field(default=10, description="steps between logged losses")
    sample_interval: CountOrZero = Field(
        default=0, description="steps between sample texts; 0: only at the end"
    )
    histogram_interval: CountOrZero = Field(
        default=0, description="steps between histograms and attention pictures; 0: never"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            (self.steps is None) != (self.epochs is None),
            "exactly one of the two (the other null)",
            steps=self.steps,
            epochs=self.epochs,
        )
        require(
            self.stop_at is None or self.steps is None or self.stop_at <= self.steps,
            "at most train.steps",
            stop_at=self.stop_at,
            steps=self.steps,
        )
        return self


class OptimizerConfig(Settings):
    """Adam, or AdamW with decoupled weight decay."""

    name: Literal["adam", "adamw"] = Field(
        default="adam", description="adamw: decoupled weight decay"
    )
    lr: Positive = Field(description="peak learning rate")
    betas: tuple[BelowOne, BelowOne] = Field(
        default=(0.9, 0.999), strict=False, description="decay of the running mean and mean square"
    )
    eps: Positive = Field(default=1e-8, description="added to the root of the mean square")
    weight_decay: NotNegative = Field(
        default=0.0, description="for adamw: share lost is lr * weight_decay"
    )
    grad_clip: NotNegative = Field(
        default=0.0, description="largest norm of the whole gradient; 0: off"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.name == "adamw" or self.weight_decay == 0,
            "0, or optimizer.name adamw, which decays weights",
            weight_decay=self.weight_decay,
            name=self.name,
        )
        return self


class ScheduleConfig(Settings):
    """Learning rate over the run: a linear warm-up, then the named shape."""

    name: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="shape after the warm-up"
    )
    warmup_fraction: Fraction = Field(default=0.0, description="share of the steps that warm up")
    min_lr: NotNegative = Field(default=0.0, description="where linear and cosine end")


class CheckpointConfig(Settings):
    """When to save and how many to keep."""

    interval: CountOrZero = Field(
        default=0, description="steps between checkpoints; 0: only at the end"
    )
    keep: Count = Field(default=3, description="newest checkpoints kept, besides the best")


class SampleConfig(Settings):
    """Texts written during and after training."""

    num: CountOrZero = Field(default=1, description="texts each time; 0: none")
    max_tokens: Count | None = Field(
        default=None, description="longest text; null: block_size (documents) or 500 (stream)"
    )
    temperature: NotNegative = Field(
        default=1.0, description="below 1 safer, above 1 wilder; 0: greedy"
    )
    top_k: CountOrZero = Field(default=0, description="draw from the k likeliest tokens; 0: off")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="draw from the likeliest tokens of this total probability; 1: off"
    )
    prompt: str = Field(default="", description="text to go on from")


class RunConfig(Settings):
    """Where the run is kept: DIR/NAME."""

    name: Text = Field(default="run", description="folder name; if not given, the file's own name")
    dir: Text = Field(default="runs", description="folder that holds the runs")

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.dir) / self.name

    @model_validator(mode="after")
    def _check(self) -> Self:
        plain = self.name not in (".", "..") and not set(self.name) & set("/\\:\0")
        require(plain, "a plain folder name (its place is run.dir)", name=self.name)
        return self


class Config(Settings):
    """All settings of a run."""

    backend: Literal["auto", "numpy", "cupy"] = Field(
        default="auto", description="cupy: an NVIDIA GPU; auto: that if usable, else numpy"
    )
    device: CountOrZero = Field(default=0, description="which GPU, where there are several")
    dtype: Literal["auto", "fp32", "fp64", "tf32", "bf16"] = Field(
        default="auto",
        description="precision of matrix products; numpy: fp32, fp64, with compiled kernels also "
        "bf16, where the CPU has it; cupy: bf16, tf32, fp32; auto: bf16 on a GPU that has it, "
        "else fp32",
    )
    kernels: Literal["auto", "reference", "compiled"] = Field(
        default="auto", description="on the CPU: plain NumPy, or compiled by Numba; auto: if there"
    )
    threads: CountOrZero = Field(default=0, description="CPU threads; 0: all cores")
    seed: int = Field(default=1337, ge=0, lt=2**64, description="fixes every random choice")
    rng: Literal["philox", "microgpt"] = Field(
        default="philox", description="microgpt: Python's random, drawn as microgpt.py does"
    )
    resume: Text | None = Field(
        default=None, description="auto, or a run or checkpoint folder to go on from"
    )
    profile: bool = Field(
        default=False,
        description="time the first 10 steps kernel by kernel (numpy: operation by operation) into "
        "RUN/profile.md; name steps and kernels in NVIDIA's profilers (NVTX)",
    )
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, got, wanted in (
            ("data.mode", self.data.mode, "documents"),
            ("data.order", self.data.order, "epochs"),
            ("data.val_fraction", self.data.val_fraction, 0),
        ):
            allowed = self.rng != "microgpt" or got == wanted
            require(allowed, f"{wanted} (or rng philox)", **{key: got, "rng": self.rng})
        require(
            self.schedule.min_lr <= self.optimizer.lr,
            "at most optimizer.lr",
            **{"schedule.min_lr": self.schedule.min_lr, "optimizer.lr": self.optimizer.lr},
        )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, or a shipped one by its plain name, e.g. `names`.

        `overrides` are "section.key=value", the value in YAML, text as it stands. A run that is
        not named is named after the file. Raises ConfigError.
        """
        file = _find(path)
        values = read_yaml(file)
        if values.get("run") is None:
            values["run"] = {}
        if isinstance(values["run"], dict):
            values["run"].setdefault("name", file.stem)
        return cls.from_dict(values, overrides, source=str(path))

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "settings"
    ) -> Self:
        """Validate nested settings; `source` says in errors where they came from."""
        return validate(cls, values, overrides, source)

    def to_dict(self) -> dict[str, Any]:
        """All settings, nested, ready for JSON."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """All settings as YAML that `load` reads back to an equal Config."""
        return write_yaml(self.to_dict())


def settings_help(width: int = 100) -> str:
    """Every setting: name, default, meaning, type; wrapped at `width` columns."""
    return describe(Config, width)


def shipped() -> dict[str, Path]:
    """The settings files that come with the package, by plain name."""
    package = Path(__file__).parent
    folders = (package / "_configs", package.parent / "configs")  # in a wheel, in a clone
    folder = next((f for f in folders if f.is_dir()), folders[0])
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _find(path: str | Path) -> Path:
    """The file meant by a path or by a shipped file's plain name."""
    known = shipped()
    if str(path) in known:
        return known[str(path)]
    if not Path(path).is_file():
        raise ConfigError(
            f"{path}: no such settings file; shipped ones go by plain name: {', '.join(known)}"
        )
    return Path(path)
