"""The operations of training and generation; `protocol.py` is the contents page."""

from __future__ import annotations

from .protocol import Ops

__all__ = ["Ops"]
