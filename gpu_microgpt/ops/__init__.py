"""The operations of training and generation; `protocol.py` is the contents page."""

from __future__ import annotations

from ..backend import Backend
from ..types import Array
from .protocol import Ops
from .reference import ReferenceOps, workspace_bytes

__all__ = ["Ops", "make_ops", "workspace_bytes"]


def make_ops(backend: Backend, workspace: Array) -> Ops:
    """Return the backend's operations, bound to their own scratch memory (uint8 bytes)."""
    return ReferenceOps(backend.xp, workspace)
