"""Train small GPTs fast, with every gradient derived by hand and readable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import Config
    from .errors import UserError
    from .model import GPT
    from .text_model import TextModel, load
    from .trainer import Trainer

__all__ = ["GPT", "Config", "TextModel", "Trainer", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import the parts when one is first asked for: the command line's help needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import config, errors, model, text_model, trainer

    return {
        "Config": config.Config,
        "GPT": model.GPT,
        "TextModel": text_model.TextModel,
        "Trainer": trainer.Trainer,
        "UserError": errors.UserError,
        "load": text_model.load,
    }[name]
