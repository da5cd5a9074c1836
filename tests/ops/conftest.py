from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["reference", "compiled"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose operations `planned_ops` makes; a file of tests for both names it in its pytestmark."""
    if request.param == "compiled":
        pytest.importorskip("numba", reason="the compiled operations need Numba")
    monkeypatch.setattr("tests.op_cases.IMPLEMENTATION", request.param)
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def _one_blas_thread() -> Iterator[None]:
    """Small products wait longer for a second thread than they gain by it."""
    with threadpool_limits(1, "blas"):
        yield
