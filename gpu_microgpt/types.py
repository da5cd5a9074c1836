"""The one array type: every backend's arrays speak NumPy's language."""

from __future__ import annotations

from typing import Any, TypeAlias

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray; shapes are in the docstrings
