"""Train small GPTs fast, with every gradient derived by hand and readable."""

from __future__ import annotations

from .config import Config
from .errors import UserError
from .model import GPT
from .text_model import TextModel, load
from .trainer import Trainer
from .version import __version__

__all__ = ["GPT", "Config", "TextModel", "Trainer", "UserError", "__version__", "load"]
