"""What is packed into cuBLASLt's structures: by its own functions and header where it is installed,
else by the stand-in's."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_microgpt.errors import BackendError
from gpu_microgpt.ops.cuda import cublaslt
from gpu_microgpt.ops.cuda.cublaslt import (
    ALIGNMENTS,
    AUX_LD,
    AUX_POINTER,
    EPILOGUE,
    MAX_WORKSPACE,
    REDUCTIONS,
    TRANSPOSE_A,
    TRANSPOSE_B,
    Algorithm,
    Compute,
    CublasLt,
    Epilogue,
    HeuristicResult,
    Operand,
    Product,
)
from tests.cuda.machine import gpu_is_there
from tests.cuda_on_cpu.cublaslt import library as fake_library

MISSING = "cuBLASLt is not installed: pip install -e '.[kernels-test]'"
COMPUTE_TYPE, SCALE_TYPE = (0, ctypes.c_int32), (1, ctypes.c_int32)
LAYOUT = {
    "type": (0, ctypes.c_uint32), "order": (1, ctypes.c_int32), "rows": (2, ctypes.c_uint64),
    "columns": (3, ctypes.c_uint64), "ld": (4, ctypes.c_int64),
}  # fmt: skip


def real_path() -> Path:
    pathfinder = pytest.importorskip("cuda.pathfinder", reason=MISSING)
    try:
        return Path(pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path)
    except RuntimeError:
        pytest.skip(MISSING)


@pytest.fixture(params=["fake", "real"])
def library(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    if request.param == "real":
        yield ctypes.CDLL(str(real_path()))
        return
    fake_library().fake_reset()
    yield fake_library()
    fake_library().fake_reset()


def value(library: ctypes.CDLL, kind: str, of: object, attribute) -> int:
    """What the library's own function says an attribute is; its size is checked."""
    number, type_ = attribute
    get = getattr(library, f"cublasLt{kind}GetAttribute")
    pointer, size_t = ctypes.c_void_p, ctypes.c_size_t
    get.argtypes = (pointer, ctypes.c_int, pointer, size_t, pointer)
    size, got = ctypes.c_size_t(), type_()
    assert get(of, number, None, 0, ctypes.byref(size)) == 0
    assert size.value == ctypes.sizeof(type_)
    assert get(of, number, ctypes.byref(got), size, ctypes.byref(size)) == 0
    return got.value


def product(**changes) -> Product:
    a, b = Operand(33, 7, 40, "bfloat16", 16), Operand(5, 7, 8, "bfloat16", 2)
    c, d = Operand(33, 5, 48, "float32", 64), Operand(33, 5, 36, "float32", 256)
    plain = Product(a, b, c, d, False, True, True, False, Compute.FLOAT32)
    return plain._replace(**changes)


PRODUCTS = [
    product(),
    product(transpose_a=True, transpose_b=False),
    product(compute=Compute.TF32, a=Operand(1, 1, 1, "float32", 4)),
    product(epilogue=Epilogue.RELU),
    product(epilogue=Epilogue.RELU_AUX, aux_ld=128, aux_align=16),
    product(epilogue=Epilogue.DRELU, aux_ld=384, aux_align=256),
]


@pytest.mark.parametrize("wanted", PRODUCTS)
def test_operations(library, wanted):
    operation = CublasLt(library).operation(wanted)

    def description(attribute) -> int:
        return value(library, "MatmulDesc", operation.description, attribute)

    assert description(COMPUTE_TYPE) == wanted.compute
    assert description(SCALE_TYPE) == 0  # float32
    assert description(TRANSPOSE_A) == wanted.transpose_a
    assert description(TRANSPOSE_B) == wanted.transpose_b
    assert description(EPILOGUE) == wanted.epilogue
    assert description(AUX_LD) == wanted.aux_ld
    assert not description(AUX_POINTER)
    for layout, operand in zip(operation.layouts, wanted[:4], strict=True):
        got = {name: value(library, "MatrixLayout", layout, a) for name, a in LAYOUT.items()}
        type_ = {"float32": 0, "bfloat16": 14}[operand.dtype]
        expected = {"type": type_, "order": 0, "rows": operand.rows, "columns": operand.columns}
        assert got == {**expected, "ld": operand.ld}


@pytest.mark.parametrize(
    ("dtype", "inner", "reductions"),
    [("float32", 256, 6), ("bfloat16", 256, 2), ("float32", 192, 0), ("bfloat16", 7, 0)],
)
def test_preferences(library, dtype, inner, reductions):
    """Sums in parts: never in place, not in bfloat16, and of whole steps only."""
    wanted = product()
    wanted = wanted._replace(d=wanted.d._replace(dtype=dtype), a=wanted.a._replace(columns=inner))
    preference = CublasLt(library)._preference(wanted, 32 << 20)

    def preferred(attribute) -> int:
        return value(library, "MatmulPreference", preference, attribute)

    assert preferred(MAX_WORKSPACE) == 32 << 20
    assert preferred(REDUCTIONS) == reductions
    assert [preferred(alignment) for alignment in ALIGNMENTS] == [16, 2, 64, 256]


def test_wrong_attributes_are_refused(library):
    lt = CublasLt(library)
    operation = lt.operation(product())
    for number, kind in ((7, ctypes.c_uint64), (12, ctypes.c_int32), (99, ctypes.c_int32)):
        with pytest.raises(BackendError, match=rf"SetAttribute\({number}, 1\): status 7, "):
            lt._describe(operation.description, (number, kind), 1)


def test_version(library):
    assert 100_000 < CublasLt(library).version < 1_000_000


def test_no_gpu_is_said(library):
    if hasattr(library, "fake_gpu"):
        library.fake_gpu(0)
    elif gpu_is_there():
        pytest.skip("there is a GPU")
    lt = CublasLt(library)
    with pytest.raises(BackendError, match="cublasLtCreate: status 1, the library was not init"):
        lt.heuristic(product(), lt.operation(product()), 0, 0, 1)


def test_descriptors_are_given_back():
    lt, before = CublasLt(fake_library()), fake_library().fake_live()
    operation = lt.operation(product())
    assert fake_library().fake_live() == before + 5
    lt.heuristic(product(), operation, 0, 0, 1)
    assert fake_library().fake_live() == before + 5
    del operation
    assert fake_library().fake_live() == before


def test_the_handle_is_taken_once_and_given_back():
    lt = CublasLt(fake_library())
    lt.close()
    handle = lt._open()
    assert lt._open() is handle
    lt.close()
    assert lt._open() is not handle


def test_a_missing_library_is_said(monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder", reason=MISSING)

    def nothing(name: str) -> None:
        raise pathfinder.DynamicLibNotFoundError(f"Failure finding {name}\nlong\ntext")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", nothing)
    with pytest.raises(BackendError) as failure:
        CublasLt()
    assert str(failure.value) == (
        "cuBLASLt cannot be loaded (Failure finding cublasLt): pip install 'gpu-microgpt[cuda13]', "
        "or [cuda12] with an older driver"
    )


# --- the header

NAMES = {
    "CUBLASLT_MATMUL_DESC_TRANSA": TRANSPOSE_A[0],
    "CUBLASLT_MATMUL_DESC_TRANSB": TRANSPOSE_B[0],
    "CUBLASLT_MATMUL_DESC_EPILOGUE": EPILOGUE[0],
    "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER": AUX_POINTER[0],
    "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD": AUX_LD[0],
    "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES": MAX_WORKSPACE[0],
    "CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK": REDUCTIONS[0],
    **{
        f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{x}_BYTES": number
        for x, (number, _) in zip("ABCD", ALIGNMENTS, strict=True)
    },
    "CUBLASLT_REDUCTION_SCHEME_NONE": cublaslt.NO_PARTS,
    "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE": cublaslt.FLOAT_PARTS,
    "CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE": cublaslt.OUTPUT_PARTS,
    "CUBLASLT_EPILOGUE_DEFAULT": Epilogue.DEFAULT,
    "CUBLASLT_EPILOGUE_RELU": Epilogue.RELU,
    "CUBLASLT_EPILOGUE_RELU_AUX": Epilogue.RELU_AUX,
    "CUBLASLT_EPILOGUE_DRELU": Epilogue.DRELU,
    "CUBLAS_COMPUTE_32F": Compute.FLOAT32,
    "CUBLAS_COMPUTE_32F_FAST_TF32": Compute.TF32,
    "CUBLAS_STATUS_SUCCESS": cublaslt.SUCCESS,
    "CUBLAS_STATUS_INVALID_VALUE": cublaslt.INVALID_VALUE,
    "CUBLAS_STATUS_ARCH_MISMATCH": cublaslt.ARCH_MISMATCH,
    "CUBLAS_STATUS_NOT_SUPPORTED": cublaslt.NOT_SUPPORTED,
}


def header() -> str:
    folder = real_path().parent.parent / "include"
    if not (folder / "cublasLt.h").is_file():
        pytest.skip(f"{folder}: cublasLt.h is not installed")
    return "".join((folder / name).read_text("utf-8") for name in ("cublas_api.h", "cublasLt.h"))


def test_numbers_are_the_headers():
    text, known = header(), {}
    for name, said in re.findall(r"^\s*(CUBLAS\w+) = ([^,}/\n]+?),?\s*(?:/\*.*)?$", text, re.M):
        terms = [term.strip(" ()") for term in said.split("|")]
        if all(term in known or re.fullmatch(r"0x[0-9a-f]+|\d+", term) for term in terms):
            known[name] = 0
            for term in terms:
                known[name] |= known[term] if term in known else int(term, 0)
    assert {name: known[name] for name in NAMES} == {name: int(n) for name, n in NAMES.items()}


def test_sizes_are_the_headers():
    assert "typedef struct {\n  uint64_t data[8];\n} cublasLtMatmulAlgo_t;" in header()
    fields = re.search(r"typedef struct \{([^}]+)\} cublasLtMatmulHeuristicResult_t;", header())
    assert fields is not None
    code = re.sub(r"/\*.*?\*/", "", fields[1], flags=re.S)
    assert re.findall(r"\w+ \w+(?:\[\d\])?", code) == [
        "cublasLtMatmulAlgo_t algo", "size_t workspaceSize", "cublasStatus_t state",
        "float wavesCount", "int reserved[4]",
    ]  # fmt: skip
    assert ctypes.sizeof(Algorithm) == 64
    assert ctypes.sizeof(HeuristicResult) == 64 + 8 + 4 + 4 + 16
    assert (HeuristicResult.workspace.offset, HeuristicResult.state.offset) == (64, 72)
    assert (HeuristicResult.waves.offset, HeuristicResult.reserved.offset) == (76, 80)
