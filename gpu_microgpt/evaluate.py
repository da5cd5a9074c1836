"""Held-out loss of a checkpoint, on its own split or on another text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from .checkpoint import find
from .config import Config
from .data.corpus import load_corpus
from .data.dataset import Dataset, Split
from .engine import make_evaluator
from .errors import DataError
from .errors import warn as warn_user
from .run_folder import check_corpus
from .text_model import TextModel, from_state

MAX_EXPONENT = 700  # exp of more is beyond a float


def evaluate(
    path: str | Path,
    data: str | None = None,
    which: Literal["best", "last"] = "best",
    *,
    backend: str = "auto",
    dtype: str = "auto",
    warn: Callable[[str], None] = warn_user,
) -> dict[str, Any]:
    """Return loss (nats a token), bits a character, perplexity, and what they were measured on.

    Without `data` the run's own held-out split is scored, else all of that file or source, each
    token once, in windows of block_size; a document is cut to its first block_size tokens. In
    documents mode its end counts as a character. backend, dtype: as `load` has them. Raises
    CheckpointError, DataError, BackendError.
    """
    state = find(Path(path), which, warn=warn, with_moments=False)
    model = from_state(state, backend, dtype)
    split, name = _own_split(model, state.meta["corpus"], warn) if data is None else _text(
        model, data, warn
    )  # fmt: skip
    with model.backend:
        evaluator = make_evaluator(model.gpt, model.config, model.backend)
        loss = evaluator.mean_loss(split)
    return {
        "loss": loss,
        "bits_per_char": loss / math.log(2),
        "perplexity": math.exp(loss) if loss < MAX_EXPONENT else math.inf,
        "tokens": split.num_targets,
        "data": name,
        "checkpoint": str(path),
        "step": state.step,
    }


def _own_split(
    model: TextModel, saved: dict[str, str], warn: Callable[[str], None]
) -> tuple[Split, str]:
    """What the run held out, from the very text it was trained on."""
    overrides = [f"data.source={saved['name']}", "data.fallback=null"]  # no other text will do
    config = Config.from_dict(model.config.to_dict(), overrides)
    corpus = load_corpus(config.data, log=warn)
    check_corpus(corpus, saved | {"requested": corpus.requested}, warn)
    dataset = Dataset.build(config, corpus, tokenizer=model.tokenizer, log=warn)
    if dataset.val is None:
        raise DataError(
            "data.val_fraction: this run held nothing out; name a text to score with --data FILE"
        )
    return dataset.val, f"{saved['name']} (held out)"


def _text(model: TextModel, source: str, warn: Callable[[str], None]) -> tuple[Split, str]:
    """All of another text."""
    overrides = [f"data.source={source}", "data.fallback=null", "data.val_fraction=0"]
    config = Config.from_dict(model.config.to_dict(), overrides)
    corpus, cut = load_corpus(config.data, log=warn), config
    if config.data.mode == "stream" and len(corpus.text) > 1:  # a short text is one short window
        size = min(config.model.block_size, len(corpus.text) - 1)
        cut = Config.from_dict(config.to_dict(), [f"model.block_size={size}"])
    text = Dataset.build(cut, corpus, tokenizer=model.tokenizer, log=warn).train
    return Split(config, text.flat, text.starts, text.lengths), source
