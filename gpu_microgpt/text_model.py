"""A trained model with its tokenizer: text in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .backend import Backend, choose
from .backend.cuda import CudaBackend
from .backend.numpy import NumpyBackend
from .checkpoint import State, find
from .config import Config
from .data.tokenizer import CharTokenizer
from .dims import Dims
from .errors import warn as warn_user
from .generate import Generator, PhiloxUniforms, Sampling, Uniforms
from .graph_generate import GraphGenerator
from .kv_cache import TOGETHER
from .model import GPT
from .params import Weights

STREAM_TOKENS = 500  # default length where no document end stops a text


class TextModel:
    """Writes text with a GPT; `load` makes one from a checkpoint."""

    def __init__(
        self, gpt: GPT, tokenizer: CharTokenizer, config: Config, backend: Backend
    ) -> None:
        """Use these weights; they are shared, not copied."""
        self.gpt, self.tokenizer, self.config, self.backend = gpt, tokenizer, config, backend
        self._kept: Generator | GraphGenerator | None = None  # while nobody writes with it

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Return prompt plus continuation, all samples of the first prompt first.

        In documents mode a text ends where the model ends it; `max_tokens` None is block_size
        there, 500 in stream mode. temperature 0 is greedy, top_k 0 and top_p 1 are off. The same
        (prompt, seed, sample number) gives the same text, whatever else is asked for beside it.
        Raises UserError for impossible settings, DataError for characters the model does not know.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sampling = self.sampling(max_tokens, temperature, top_k, top_p)
        numbered = [(p, n) for p in prompts for n in range(num_samples)]
        texts = []
        with self.backend:
            for first in range(0, len(numbered), TOGETHER):
                part = numbered[first : first + TOGETHER]
                uniforms = PhiloxUniforms(seed, [n for _, n in part])
                texts += self.write([p for p, _ in part], sampling, uniforms)
        return texts

    def stream(
        self,
        prompt: str = "",
        *,
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the same as `generate` for one prompt, character by character, samples in turn."""
        sampling = self.sampling(max_tokens, temperature, top_k, top_p)
        context = self._context(prompt)
        with self.backend, self._generator(1) as generator:
            for number in range(num_samples):
                yield prompt
                for tokens in generator.run([context], sampling, PhiloxUniforms(seed, [number])):
                    yield self.tokenizer.decode(tokens)

    def write(self, prompts: Sequence[str], sampling: Sampling, uniforms: Uniforms) -> list[str]:
        """Write one text a prompt, all side by side, within an active backend."""
        contexts = [self._context(prompt) for prompt in prompts]
        with self._generator(len(prompts)) as generator:
            columns = np.array(list(generator.run(contexts, sampling, uniforms)))  # (length, S)
        return [
            prompt + self.tokenizer.decode(column[column >= 0])
            for prompt, column in zip(prompts, columns.T, strict=True)
        ]

    def sampling(
        self, max_tokens: int | None, temperature: float, top_k: int, top_p: float
    ) -> Sampling:
        """Settings that fit the model: documents end at BOS, running text never has one."""
        documents, bos = self.config.data.mode == "documents", self.tokenizer.bos
        if max_tokens is None:
            max_tokens = self.config.model.block_size if documents else STREAM_TOKENS
        ends = {"stop": bos} if documents else {"never": bos}
        return Sampling(max_tokens, temperature, top_k, top_p, **ends)

    @contextmanager
    def _generator(self, sequences: int) -> Iterator[Generator | GraphGenerator]:
        """One for so many texts: the last one again where it fits, as on a GPU it has captured
        graphs. Each has one user at a time, even where several streams are read in turn."""
        generator, self._kept = self._kept, None
        if generator is None or generator.sequences != sequences:
            generator = None  # its memory is free before new memory is taken
            generator = make_generator(self.gpt, self.backend, sequences)
        try:
            yield generator
        finally:
            self._kept = generator

    def _context(self, prompt: str) -> np.ndarray[Any, Any]:
        """Tokens to start from: BOS and the prompt, or in stream mode the prompt or a newline.

        BOS is never shown to a model trained on running text, so it is not a start there.
        """
        ids = self.tokenizer.encode(prompt, "prompt")
        if self.config.data.mode == "documents":
            return np.concatenate([[self.tokenizer.bos], ids]).astype(np.int32)
        if prompt:
            return ids
        newline = "\n" in self.tokenizer.characters
        return self.tokenizer.encode("\n" if newline else self.tokenizer.characters[0])


def make_generator(model: GPT, backend: Backend, sequences: int) -> Generator | GraphGenerator:
    """Take memory for writing so many texts side by side."""
    if isinstance(backend, CudaBackend):
        return GraphGenerator(model, backend, sequences)
    if isinstance(backend, NumpyBackend) and backend.compiled:
        from .compiled_generate import CompiledGenerator  # with Numba, imported nowhere else

        return CompiledGenerator(model, backend, sequences)
    return Generator(model, backend, sequences)


def join_texts(texts: Sequence[str]) -> str:
    """Texts below one another, with a rule between them where they have lines of their own."""
    lines = any("\n" in text for text in texts)
    return ("\n" + "-" * 40 + "\n" if lines else "\n").join(texts)


def load(
    path: str | Path,
    which: Literal["best", "last"] = "best",
    *,
    backend: str = "auto",
    dtype: str = "auto",
    warn: Callable[[str], None] = warn_user,
) -> TextModel:
    """Read a run's best (lowest held-out loss) or last checkpoint, or the one at `path`.

    `backend`, `dtype`: as in a config, whatever the run had; dtype auto keeps to fp32 or fp64
    where that was asked for. Checkpoints that are damaged are passed over, each named through
    `warn`. Raises CheckpointError where none is left, BackendError for what cannot run here.
    """
    state = find(Path(path), which, warn=warn, with_moments=False)
    return from_state(state, backend, dtype)


def from_state(state: State, backend: str = "auto", dtype: str = "auto") -> TextModel:
    """A checkpoint's weights, tokenizer and settings as a model, computing as `load` says."""
    if dtype == "auto" and state.weights["wte"].dtype == np.float64:
        dtype = "fp64"
    elif dtype == "auto" and state.meta["config"].get("dtype") == "fp32":
        dtype = "fp32"
    here = [f"backend={backend}", "device=0", f"dtype={dtype}"]
    config = Config.from_dict(state.meta["config"], here, source="checkpoint")
    tokenizer = CharTokenizer.from_dict(state.meta["tokenizer"])
    chosen = choose(config)
    params = Weights(Dims.of(config.model, tokenizer.vocab_size), chosen)
    params.load(state.weights, chosen)
    return TextModel(GPT(params), tokenizer, config, chosen)
