"""The training loop: batches -> loss -> gradients -> update, and all that goes with it."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import numpy as np

from . import memory_plan, snapshot
from .backend import Backend, choose
from .checkpoint import State
from .config import Config
from .data.batch import Batch, pack
from .data.corpus import Corpus, load_corpus
from .data.dataset import Dataset
from .data.tokenizer import CharTokenizer
from .dims import Dims
from .engine import Engine, make_engine
from .errors import DeviceError, DivergedError
from .metrics import Metrics
from .model import GPT
from .params import Weights, initial_weights, seeded_weights
from .profile import make_profiler
from .progress import Progress
from .readings import Readings
from .report import Report
from .rng import MicrogptRandom
from .run_folder import RunFolder, check_corpus
from .schedule import learning_rate
from .signals import StopSignals
from .snapshot import Scores
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
        state = self.folder.start(print)
        self.backend: Backend = choose(self.config)
        self.profiler = make_profiler(self.backend, self.config.profile)
        print(f"backend: {self.backend.describe()}")
        self._build(state)
        self.start = state.step if state else 0
        if self.start >= self.end:
            print(f"step {self.start}: nothing left to train")
            print(self.folder.places(finished=self.start >= self.total))
            return 0
        with ExitStack() as stack:
            stack.enter_context(self.backend)
            stack.enter_context(self.folder.lock())
            resume_step = None if self.config.resume is None else self.start or -1
            if state:
                self.folder.rewind(state, print)
            del state  # its arrays are copied: let them go
            metrics = Metrics(self.folder.path, resume_step=resume_step, warn=print)
            stack.enter_context(metrics)
            settings = self.folder.settings(self.corpus)
            self.folder.write_settings(settings)
            signals = stack.enter_context(StopSignals())
            progress = stack.enter_context(Progress(self.total, initial=self.start))
            self.report = Report(metrics, progress, self.folder, self.backend)
            metrics.text(self.start + (self.start > 0), "config", settings)
            metrics.hparams(self.config.to_dict(), ["loss/train", "loss/val"])
            try:
                last = self._train(signals)
            except DeviceError as failure:
                raise DeviceError(f"{failure}; {self._advice('')}") from None
        if signals.number is not None and last < self.end:
            print(f"stopped at step {last}, saved; go on with: {self.folder.resume_command()}")
            return 128 + signals.number
        self.report.end(last, self.scores)
        print(self.folder.places(finished=last >= self.total))
        return 0

    # building

    def _build(self, state: State | None) -> None:
        """Data, model and step, fresh or from a checkpoint."""
        config = self.config
        corpus = self._load_corpus(state)
        tokenizer = CharTokenizer.from_dict(state.meta["tokenizer"]) if state else None
        dataset = Dataset.build(config, corpus, tokenizer=tokenizer, log=print)
        dataset.tokenizer.encode(config.sample.prompt, "sample.prompt")  # fails now, not at the end
        self.dataset, train = dataset, config.train
        epochs = (train.epochs or 0) * dataset.train.samples
        self.total = train.steps or -(-epochs // (train.batch_size * train.grad_accum))
        self.end = min(train.stop_at or self.total, self.total)
        dims = Dims.of(config.model, dataset.tokenizer.vocab_size)
        held = f", {dataset.val.num_targets:,} held out" if dataset.val else ""
        print(
            f"data: {corpus.name}, {dataset.train.num_targets:,} tokens to train on{held}, "
            f"vocabulary {dims.vocab_size}, {dataset.train.samples:,} samples, "
            f"{dataset.train.steps_per_epoch:,} steps an epoch"
        )
        print(f"model: {dims.num_params:,} parameters")
        text = sum(split.nbytes for split in (dataset.train, dataset.val) if split)
        print(memory_plan.check(config, dims, self.backend, text))
        self.model = GPT(Weights(dims, self.backend))
        self._writer = TextModel(self.model, dataset.tokenizer, config, self.backend)
        self.engine: Engine = make_engine(
            self.model, config, self.backend, dataset.train, self.total, self.profiler
        )
        if state:
            snapshot.restore(state, self.engine.optimizer, self.backend)
            self.scores = Scores.from_meta(state.meta)
            print(f"resumed at step {state.step}")
        else:
            self.model.params.load(self._initial_weights(dims), self.backend)
            self.scores = Scores()

    def _load_corpus(self, state: State | None) -> Corpus:
        """The configured text; for a run that had to fall back, what it fell back to."""
        data = self.config.data
        if state is None:
            corpus = load_corpus(data, log=print)
            self.corpus = snapshot.corpus_record(corpus)
            return corpus
        saved = state.meta["corpus"]
        if data.source == saved["requested"] != saved["name"]:
            print(f"data: this run was trained on {saved['name']} and goes on with it")
            data = data.model_copy(update={"source": saved["name"]})
        corpus = load_corpus(data, log=print)
        same = corpus.sha256 == saved["sha256"]
        self.corpus = saved if same else snapshot.corpus_record(corpus)
        check_corpus(corpus, saved, print)
        return corpus

    def _initial_weights(self, dims: Dims) -> dict[str, np.ndarray[Any, Any]]:
        config = self.config
        if config.rng == "microgpt":
            draws = self._microgpt_random(dims).weights
            return initial_weights(dims, draws, config.model.scale_residual_init)
        return seeded_weights(config, dims)

    def _microgpt_random(self, dims: Dims) -> MicrogptRandom:
        """Python's generator as microgpt.py has it after the weights are drawn."""
        config, documents = self.config, self.dataset.train.samples
        return MicrogptRandom(config.seed, documents, dims.num_params, config.model.init_std)

    # the loop

    def _train(self, signals: StopSignals) -> int:
        """Run the steps after `start`; return the last one done, which is saved."""
        step = self.start
        self._saved = step
        self.readings = Readings(
            self.engine, self.report, self.config, self.model.dims, step, self.total, self._rate,
            self._advice,
        )  # fmt: skip
        stopped = False
        while step < self.end and not stopped:
            count = self._ahead(step)
            with self.profiler.step(step + 1):
                self.engine.train(step + 1, count)
            step += count
            self.report.progress.advance(step)
            self._profile(step)
            stopped = self._after_step(step, signals)
        self._profile(step, at_end=True)
        return step

    def _ahead(self, step: int) -> int:
        """Steps to do together behind this one: as the engine likes it, but nothing may be due
        between them."""
        train = self.config.train
        intervals = (train.eval_interval, train.histogram_interval, train.sample_interval)
        due = [i - step % i for i in (*intervals, self.config.checkpoint.interval) if i > 0]
        return min(self.engine.stride, self.readings.ahead(step), self.end - step, *due)

    def _profile(self, step: int, at_end: bool = False) -> None:
        """Report where the time went once that is known."""
        if profile := self.profiler.take(at_end):
            self.report.profile(step, profile)

    def _after_step(self, step: int, signals: StopSignals) -> bool:
        """Whatever is due: log, evaluate, histograms, samples, checkpoint. True: asked to stop."""
        train, at_end = self.config.train, step == self.total

        def due(interval: int) -> bool:
            return interval > 0 and step % interval == 0

        evaluate = self.dataset.val is not None and (due(train.eval_interval) or at_end)
        save = due(self.config.checkpoint.interval) or step == self.end
        histograms = due(train.histogram_interval)
        samples = (due(train.sample_interval) or at_end) and self.config.sample.num > 0
        self.readings.after(step)
        if save or evaluate or histograms or samples or at_end:
            self.readings.flush(step)  # what follows looks at the weights
        if histograms:
            with self.profiler.range("histograms"):
                self._histograms(step)
        if evaluate:
            with self.profiler.range("evaluation"):
                save |= self._evaluate(step)
        if samples:
            with self.profiler.range("samples"):
                self.report.samples(step, self._samples())
            self.engine.pause()
        stopped = signals.number is not None  # asked once, so that what is answered is also saved
        if save or stopped:
            self.readings.flush(step)
            with self.profiler.range("checkpoint"):
                self._save(step)
        return stopped

    def _rate(self, step: int) -> float:
        """Learning rate of a step counted from 1."""
        config = self.config
        return float(learning_rate(config.schedule, config.optimizer.lr, step - 1, self.total))

    def _evaluate(self, step: int) -> bool:
        """Report the held-out loss; True where it is the lowest so far."""
        assert self.dataset.val is not None
        loss = self.engine.mean_loss(self.dataset.val, self.config.train.eval_batches)
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {step}: held-out loss {loss:g} at learning rate {self._rate(step):.3g}, "
                f"wanted a finite number: lower optimizer.lr; {self._advice()}"
            )
        self.report.evaluation(step, loss)
        better = loss < self.scores.best
        self.scores.val, self.scores.val_step = loss, step
        self.scores.best = min(loss, self.scores.best)
        return better

    def _samples(self) -> list[str]:
        wanted = self.config.sample
        writer = self._writer
        if self.config.rng == "microgpt":  # one text after the other, from the one generator
            random = self._microgpt_random(self.model.dims)

            def draw(position: int) -> np.ndarray[Any, Any]:
                return np.array([random.uniform()])

            sampling = writer.sampling(
                wanted.max_tokens, wanted.temperature, wanted.top_k, wanted.top_p
            )
            return [writer.write([wanted.prompt], sampling, draw)[0] for _ in range(wanted.num)]
        return writer.generate(
            wanted.prompt,
            num_samples=wanted.num,
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            top_p=wanted.top_p,
            seed=self.config.seed,
        )

    def _histograms(self, step: int) -> None:
        """Distributions of weights and gradients, and attention over one held-out sequence."""
        weights = self.model.params.to_host(self.backend)
        gradients = self.engine.gradients()
        self.report.histograms(step, {"weights": weights, "gradients": gradients})
        memory, batch = self.engine.memory, self._longest_sequence()
        self.model.forward(memory, batch.to(self.backend.from_host))
        for i, layer in enumerate(memory.rows(len(batch.tokens)).layers):
            qkv = self.backend.to_host(layer.qkv)
            self.report.attention(step, i, qkv, self.model.dims.n_head)
        self.engine.pause()

    def _longest_sequence(self) -> Batch:
        """The longest sequence of the first held-out (or training) batch, always the same."""
        batch = next((self.dataset.val or self.dataset.train).batches(1))
        start = batch.layout.offsets[-2]
        return pack([np.append(batch.tokens[start:], batch.targets[-1])])

    # saving

    def _save(self, step: int) -> None:
        self.report.metrics.flush()  # first: a checkpoint vouches for the metrics up to its step
        self.scores.train = self.report.loss
        meta = {
            "version": __version__,
            "config": self.config.to_dict(),
            "tokenizer": self.dataset.tokenizer.to_dict(),
            "corpus": self.corpus,
            "dtype": self.backend.dtype.name,
            **self.scores.to_meta(step),
        }
        try:
            state = snapshot.take(step, self.engine.optimizer, self.backend, meta)
        except DivergedError as failure:
            rate = f"at learning rate {self._rate(step):.3g}, not saved"
            raise DivergedError(f"{failure} {rate}: lower optimizer.lr; {self._advice()}") from None
        self.folder.save(state)
        self._saved = step

    def _advice(self, change: str = " optimizer.lr=LOWER") -> str:
        if self._saved == 0:
            return "no checkpoint was saved yet"
        again = f"{self.folder.resume_command()}{change}"
        return f"the checkpoint of step {self._saved} is kept; go on with: {again}"
