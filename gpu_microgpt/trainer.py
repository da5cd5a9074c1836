"""The training loop: batches -> loss -> gradients -> update, and all that goes with it."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import numpy as np

from . import memory_plan
from .backend import Backend, choose
from .checkpoint import State
from .config import Config
from .data.batch import Batch, pack
from .data.corpus import Corpus, load_corpus
from .data.dataset import Dataset
from .data.tokenizer import CharTokenizer
from .dims import Dims
from .metrics import Metrics
from .model import GPT
from .params import Params, initial_weights
from .progress import Progress
from .report import Report
from .rng import MicrogptRandom, Stream, normal
from .run_folder import RunFolder, check_corpus, command
from .schedule import learning_rate
from .signals import StopSignals
from .step import Step, mean_loss
from .text_model import TextModel
from .version import __version__


class Trainer:
    """One run, from settings to a trained model in its folder."""

    def __init__(self, config: Config) -> None:
        """Take the settings; nothing is read, made or computed before `run`."""
        self.config = config
        self.folder = RunFolder(config)

    def run(self) -> int:
        """Train, and return the exit code: 0, or 130 and 143 after SIGINT and SIGTERM.

        Raises UserError (see errors.py) for everything a user can put right.
        """
        with ExitStack() as stack:
            # the bar's length is known later: until then its `log` alone is used
            state = self.folder.start(print)
            self.backend: Backend = stack.enter_context(choose(self.config))
            print(f"backend: {self.backend.describe()}")
            self._build(state)
            self.folder.begin(state, print)
            start = state.step if state else 0
            signals = stack.enter_context(StopSignals())
            metrics = stack.enter_context(
                Metrics(self.folder.path, resume_step=self._metrics_start(start), warn=print)
            )
            progress = stack.enter_context(Progress(self.total, initial=start))
            self.report = Report(metrics, progress, self.folder)
            metrics.text(start + (start > 0), "config", self.config.to_yaml())
            metrics.hparams(self.config.to_dict(), ["loss/train", "loss/val"])
            last = self._train(start, signals)
        if signals.number is not None and last < self.end:
            print(f"stopped at step {last}, saved; go on with: {self._resume_command()}")
            return 128 + signals.number
        self._print_end(last)
        return 0

    # building

    def _build(self, state: State | None) -> None:
        """Data, model and step, fresh or from a checkpoint."""
        config = self.config
        corpus = load_corpus(config.data, log=print)
        tokenizer = None
        if state:
            check_corpus(corpus, state.meta["corpus"], print)
            tokenizer = CharTokenizer.from_dict(state.meta["tokenizer"])
        dataset = Dataset.build(config, corpus, tokenizer=tokenizer, log=print)
        self.corpus, self.dataset = corpus, dataset
        epochs = config.train.epochs or 0
        self.total = config.train.steps or epochs * dataset.train.steps_per_epoch
        self.end = min(config.train.stop_at or self.total, self.total)
        dims = Dims.of(config.model, dataset.tokenizer.vocab_size)
        held = f", {dataset.val.num_targets:,} held out" if dataset.val else ""
        print(
            f"data: {corpus.name}, {dataset.train.num_targets:,} tokens to train on{held}, "
            f"vocabulary {dims.vocab_size}, {dataset.train.samples:,} samples, "
            f"{dataset.train.steps_per_epoch:,} steps an epoch"
        )
        print(f"model: {dims.num_params:,} parameters")
        print(memory_plan.check(config, dims, self.backend))
        self.model = GPT(Params(dims, self.backend))
        self.step = Step.build(self.model, config, self.backend)
        self.val_loss = self.best_val_loss = math.inf
        if state:
            self._restore(state)
        else:
            self.model.params.load(self._initial_weights(dims), self.backend)

    def _initial_weights(self, dims: Dims) -> dict[str, np.ndarray[Any, Any]]:
        config = self.config
        if config.rng == "microgpt":
            draws = self._microgpt_random(dims).weights
        else:
            draws = config.model.init_std * normal(config.seed, Stream.INIT, dims.num_params)
        return initial_weights(dims, draws, config.model.scale_residual_init)

    def _microgpt_random(self, dims: Dims) -> MicrogptRandom:
        """Python's generator as microgpt.py has it after the weights are drawn."""
        config, documents = self.config, self.dataset.train.samples
        return MicrogptRandom(config.seed, documents, dims.num_params, config.model.init_std)

    def _restore(self, state: State) -> None:
        moments = {kind: _without_prefix(state.moments, kind) for kind in ("m.", "v.")}
        self.model.params.load(state.weights, self.backend)
        self.step.optimizer.m.load(moments["m."], self.backend)
        self.step.optimizer.v.load(moments["v."], self.backend)
        self.val_loss = state.meta["last_val_loss"] or math.inf
        self.best_val_loss = state.meta["best_val_loss"] or math.inf
        print(f"resumed at step {state.step}")

    def _metrics_start(self, start: int) -> int | None:
        if self.config.resume is None:
            return None
        return start if start else -1

    # the loop

    def _train(self, start: int, signals: StopSignals) -> int:
        """Run the steps after `start`; return the last one done."""
        config, step = self.config, start
        self._flushed = self._saved = start
        self._evaluated = -1  # the step val_loss is of
        while step < self.end and signals.number is None:
            step += 1
            self.report.begin_step()
            batches = [
                self.dataset.train.batch(step - 1, micro)
                for micro in range(config.train.grad_accum)
            ]
            self.step.train(batches, self._rate(step), step)
            rows = sum(batch.layout.offsets[-1] for batch in batches)
            sequences = sum(len(batch.layout.offsets) - 1 for batch in batches)
            self.report.end_step(rows, self.model.dims.train_flops(rows, rows / sequences))
            self.report.progress.advance(step)
            self._after_step(step, last=step == self.end or signals.number is not None)
        return step

    def _after_step(self, step: int, last: bool) -> None:
        """Whatever is due at this step: log, evaluate, histograms, samples, checkpoint."""
        train, total = self.config.train, step == self.total

        def due(interval: int, also: bool = False) -> bool:
            return also or (interval > 0 and step % interval == 0)

        evaluate = self.dataset.val is not None and due(train.eval_interval, total)
        save = due(self.config.checkpoint.interval, last)
        if due(train.log_interval, save or evaluate):
            self._flush(step)
        if due(train.histogram_interval):
            self._histograms(step)
        if evaluate and self._evaluate(step):
            save = True
        if due(train.sample_interval, total):
            self.report.samples(step, self._samples())
        if save:
            self._save(step)

    def _rate(self, step: int) -> float:
        """Learning rate of a step counted from 1."""
        config = self.config
        return learning_rate(config.schedule, config.optimizer.lr, step - 1, self.total)

    def _flush(self, step: int) -> None:
        """Read losses and norms of the steps since the last time; this waits for the device."""
        records = self.backend.to_host(self.step.records)
        for done in range(self._flushed + 1, step + 1):
            loss, norm = (float(x) for x in records[done % len(records)])
            self.report.check(done, loss, norm, self._rate(done), self._advice)
            if done % self.config.train.log_interval == 0 or done == self.total:
                self.report.train(done, norm, self._rate(done))
        self._flushed = step

    def _evaluate(self, step: int) -> bool:
        """Report the held-out loss; True where it is the lowest so far."""
        assert self.dataset.val is not None
        self.val_loss = mean_loss(self.step, self.dataset.val, self.config.train.eval_batches)
        self.report.evaluation(step, self.val_loss)
        self._evaluated = step
        better = self.val_loss < self.best_val_loss
        self.best_val_loss = min(self.val_loss, self.best_val_loss)
        return better

    def _samples(self) -> list[str]:
        wanted = self.config.sample
        writer = TextModel(self.model, self.dataset.tokenizer, self.config, self.backend)
        heat = (wanted.max_tokens, wanted.temperature, wanted.top_k, wanted.top_p)
        if self.config.rng == "microgpt":
            sampling, random = writer.sampling(*heat), self._microgpt_random(self.model.dims)

            def draw(position: int) -> np.ndarray[Any, Any]:
                return np.array([random.uniform()])

            # one text after the other, from the one generator
            return [writer.write([wanted.prompt], sampling, draw)[0] for _ in range(wanted.num)]
        max_tokens, temperature, top_k, top_p = heat
        return writer.generate(
            wanted.prompt,
            num_samples=wanted.num,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=self.config.seed,
        )

    def _histograms(self, step: int) -> None:
        """Distributions of weights and gradients, and attention over one held-out sequence."""
        weights, grads = (p.to_host(self.backend) for p in (self.model.params, self.step.grads))
        self.report.histograms(step, {"weights": weights, "gradients": grads})
        memory = self.step.shards[0].memory
        self.model.forward(memory, self._longest_sequence())
        rows = memory.rows(len(self._longest_sequence().tokens))
        for i, layer in enumerate(rows.layers):
            qkv = self.backend.to_host(layer.qkv)
            self.report.attention(step, i, qkv, self.model.dims.n_head)

    def _longest_sequence(self) -> Batch:
        """The longest sequence of the first held-out (or training) batch, always the same."""
        batch = next((self.dataset.val or self.dataset.train).batches(1))
        start = batch.layout.offsets[-2]
        return pack([np.append(batch.tokens[start:], batch.targets[-1])])

    # saving and ending

    def _save(self, step: int) -> None:
        self.report.metrics.flush()  # first: a checkpoint vouches for the metrics up to its step
        optimizer, backend = self.step.optimizer, self.backend
        moments = optimizer.m.to_host(backend, "m.") | optimizer.v.to_host(backend, "v.")
        meta = {
            "version": __version__,
            "config": self.config.to_dict(),
            "tokenizer": self.dataset.tokenizer.to_dict(),
            "corpus": corpus_record(self.corpus),
            "dtype": self.backend.dtype.name,
            "train_loss": self.report.loss,
            "val_loss": self.val_loss if self._evaluated == step else None,  # of these weights
            "last_val_loss": _finite(self.val_loss),
            "best_val_loss": _finite(self.best_val_loss),
        }
        self.folder.save(State(step, self.model.params.to_host(backend), moments, meta))
        self._saved = step

    def _advice(self) -> str:
        if self._saved == 0:
            return "no checkpoint was saved yet"
        return f"the checkpoint of step {self._saved} is kept; go on with: {self._resume_command()}"

    def _resume_command(self) -> str:
        further = ["train.stop_at=null"] if self.config.train.stop_at else []
        return command("train", self.folder.path / "config.yaml", "resume=auto", *further)

    def _print_end(self, last: int) -> None:
        report, held = self.report, ""
        if math.isfinite(self.val_loss):
            held = f"; held-out loss {self.val_loss:.4f}, lowest {self.best_val_loss:.4f}"
        if report.recent:
            mean = sum(report.recent) / len(report.recent)
            steps = len(report.recent)
            print(f"step {last}: training loss {report.loss:.4f}, mean of the last {steps} steps "
                  f"{mean:.4f}{held}")  # fmt: skip
        else:
            print(f"step {last}: nothing left to train{held}")
        if last < self.total:
            print(f"go on with:    {self._resume_command()}")
        print(f"run folder:    {self.folder.path} (checkpoints, samples, metrics.jsonl)")
        print(f"curves:        tensorboard --logdir {self.config.run.dir}")
        heat = f"--temperature {self.config.sample.temperature}"
        print(f"write text:    {command('generate', self.folder.path, heat)}")


def corpus_record(corpus: Corpus) -> dict[str, str]:
    """What a checkpoint keeps of the corpus really used."""
    return {"name": corpus.name, "requested": corpus.requested, "sha256": corpus.sha256}


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _without_prefix(
    arrays: dict[str, np.ndarray[Any, Any]], prefix: str
) -> dict[str, np.ndarray[Any, Any]]:
    return {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
