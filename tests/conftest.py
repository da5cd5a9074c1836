"""Tests that cannot even be imported on some systems."""

from __future__ import annotations

import sys

# CUDA kernels on the CPU: made of Linux's memory mapping and g++'s fibers
collect_ignore = ["cuda", "cuda_on_cpu"] if sys.platform == "win32" else []
