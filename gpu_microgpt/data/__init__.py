"""Text to batches: corpora, tokenizer, splits."""

from .batch import Batch, Layout, Run, pack
from .corpus import Corpus, load_corpus, prepare
from .dataset import Dataset, Split
from .tokenizer import CharTokenizer

__all__ = [
    "Batch",
    "CharTokenizer",
    "Corpus",
    "Dataset",
    "Layout",
    "Run",
    "Split",
    "load_corpus",
    "pack",
    "prepare",
]
