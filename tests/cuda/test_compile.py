"""Every kernel as machine code for every architecture: compiled and read, without a GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from gpu_microgpt.errors import BackendError
from gpu_microgpt.ops.cuda import compiler, table
from gpu_microgpt.ops.cuda.cache import KernelCache
from gpu_microgpt.ops.cuda.catalog import CATALOG, Launch, Variant
from gpu_microgpt.ops.cuda.compiler import compile_kernel, kernels_folder, resources
from gpu_microgpt.ops.cuda.device import KNOWN
from tests.cuda_on_cpu.build import CACHE

pytest.importorskip("cupy", reason="CuPy is not installed: pip install -e '.[kernels-test]'")
try:
    RELEASE = compiler.compiler_release()
except BackendError as missing:
    pytest.skip(str(missing), allow_module_level=True)

COMPILED = KernelCache(CACHE / "cubin")  # kept from one session to the next
FORMS = [(variant, dtype) for variant in CATALOG for dtype in variant.dtypes]
TENSOR_KERNELS = ("attention_short", "attention_tiled")
ADVICE = "run python scripts/kernel_table.py"
DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
TABLE = (DOCS / "kernel_table.json").read_text("utf-8")
MADE_BY = json.loads(TABLE)["nvrtc"]


def numbers(release: str) -> list[int]:
    return [int(number) for number in release.split(".")]


# Bytes a thread may keep in local memory. Older compilers need a register or a few more here and
# there than fit (NVRTC 12.9 to 13.3: up to 64 bytes, stack, stores and loads counted apart).
LOCAL_BYTES = {"sm_100": 64, "sm_120": 64} if numbers(RELEASE) < numbers(MADE_BY) else {}


def form(value: Variant | str) -> str:
    if isinstance(value, str):
        return value
    return "-".join([value.stem, *(f"{k}={v}" for k, v in value.constants.items())])


def assert_lean(row: table.Row) -> None:
    """No local memory; a block fits, if only on the largest where launchers have a choice."""
    for arch, used in row.arches.items():
        where = f"{row.name} on {arch}: {used}"
        assert row.local(arch) <= LOCAL_BYTES.get(arch, 0), where
        assert used.registers <= 255, where
        assert KNOWN[arch].occupancy(row.threads, used.registers, used.static_shared) >= 1, where
        if "sm_75" in row.arches or arch == "sm_90":
            assert row.blocks(arch) >= 1, where


@pytest.mark.parametrize(("variant", "dtype"), FORMS, ids=form)
def test_compiles_without_spills_and_fits(variant, dtype):
    wanted = [a for a, gpu in KNOWN.items() if gpu.tensor_cores or not variant.tensor_cores]
    for row in table.rows([replace(variant, dtypes=(dtype,))], COMPILED):
        assert list(row.arches) == wanted
        assert_lean(row)
    for program in table.programs(variant, dtype):
        assert "warning" not in COMPILED.compiled(program).log


def test_the_catalog_names_all_files():
    stems = {variant.stem for variant in CATALOG}
    assert stems == {path.stem for path in kernels_folder().glob("*.cu")}
    assert stems >= set(TENSOR_KERNELS)


def test_another_catalog_than_the_sources_is_refused():
    wrong = Variant("relu", {"relu": Launch(256), "rely": Launch(256)})
    wanted = r"relu.cu .*: got kernels \['relu', 'relu_backward'\], wanted \['relu', 'rely'\]"
    with pytest.raises(ValueError, match=wanted):
        table.rows([wrong], COMPILED)


def test_every_kernel_of_the_sources_is_in_the_catalog():
    """Also those that only a constant nobody has listed would bring in."""
    start = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(')
    for source in kernels_folder().glob("*.cu"):
        kernels = set(start.findall(source.read_text("utf-8")))
        listed = {k for variant in CATALOG if variant.stem == source.stem for k in variant.kernels}
        assert kernels == listed, source.name


# ----------------------------------------------------------------------- a look at the machine code


@cache
def disassembler() -> str:
    """nvdisasm of its wheel, or of a CUDA toolkit."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
        return str(next(f.locate() for f in files if f.stem == "nvdisasm" and "bin" in f.parts))
    except (metadata.PackageNotFoundError, StopIteration):
        found = shutil.which("nvdisasm")
    if found is None:
        pytest.skip("nvdisasm is not installed: pip install -e '.[kernels-test]'")
    return found


def instructions(cubin: bytes, folder: Path) -> dict[str, set[str]]:
    """The instructions, with all their suffixes, that occur in each kernel."""
    path = folder / "kernels.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [disassembler(), "-c", str(path)], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.M)[1:]
    code = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.M)
    return {
        name: set(code.findall(body)) for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


TENSOR_PROGRAMS = [
    pytest.param(program, id=f"{form(variant)}-{program.arch}")
    for variant in CATALOG
    if variant.stem in TENSOR_KERNELS
    for program in table.programs(variant, "bfloat16")
    if program.arch in ("sm_80", "sm_90", "sm_120")
]


@pytest.mark.parametrize("program", TENSOR_PROGRAMS)
def test_attention_is_tensor_core_code(program, tmp_path):
    kernels = instructions(COMPILED.compiled(program).cubin, tmp_path)
    used = set().union(*kernels.values())
    assert "HMMA.16816.F32.BF16" in used
    assert any(name.startswith("LDSM") for name in used), "no ldmatrix"
    assert any(name.startswith("LDGSTS") for name in used), "no cp.async"
    local = [name for name in used if re.match(r"(LDL|STL)\b", name)]
    assert not local or LOCAL_BYTES, f"local memory: {local}"


# ------------------------------------------------------------------------------- tests of the tests

SPILL = """#include "device.cuh"
extern "C" __global__ void __launch_bounds__(1024) spill(float* x) {
    float v[96];
    for (int i = 0; i < 96; i++) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 96; i++) x[i * 1024 + threadIdx.x] = v[i] * v[(i + 7) % 96] + v[95 - i];
}
extern "C" __global__ void stack(float* x, int size) {
    float v[64] = {};
    for (int i = 0; i < size; i++) v[i & 63] += x[i];
    for (int i = 0; i < size; i++) x[i] = v[i * 7 & 63];
}
extern "C" __global__ void neither(float* x) {
    __shared__ float part[100];
    part[threadIdx.x % 100] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = part[99 - threadIdx.x % 100];
}
"""


@pytest.fixture
def source(tmp_path):
    """Writes a kernel file beside a copy of the header."""
    shutil.copy(kernels_folder() / compiler.HEADER, tmp_path)

    def write(text: str) -> Path:
        path = tmp_path / "test.cu"
        path.write_text(text, "utf-8")
        return path

    return write


@pytest.mark.parametrize("arch", KNOWN)
def test_spills_are_seen(source, arch, tmp_path):
    compiled = compile_kernel(source(SPILL), arch)
    used = resources(compiled.log)
    assert used["spill"].spill_stores > 0
    assert used["spill"].spill_loads > 0
    assert used["spill"].registers <= 64
    assert used["stack"].stack == 256
    neither = used["neither"]
    assert (neither.stack, neither.spill_stores, neither.spill_loads) == (0, 0, 0)
    assert neither.static_shared == 400
    kernels = instructions(compiled.cubin, tmp_path)
    assert {"STL", "STL.64", "STL.128"} & kernels["spill"]
    assert not [name for name in kernels["neither"] if name.startswith(("LDL", "STL"))]


def test_a_log_of_another_form_is_no_zero():
    with pytest.raises(ValueError, match="f: got a log without its resources"):
        resources("ptxas info : Compiling entry function 'f' for 'sm_90'\nUsed 9 registers")


# ------------------------------------------------------------------------------------------- errors

HELLO = '#include "device.cuh"\nextern "C" __global__ void hello(float* x) {'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y = 1; z = 2; }", r'test.cu\(2\): error: identifier "y" is undefined'),
        ("\n#error wanted TILE\n}", r"test.cu\(3\): catastrophic error: .* wanted TILE"),
        ("__shared__ float s[20000]; s[x[0] > 1] = 2; __syncthreads(); x[0] = s[int(x[2])]; }",
         r"ptxas error +: Entry function 'hello' uses too much shared data"),
    ],
    ids=["undefined", "directive", "assembler"],
)  # fmt: skip
def test_one_line_names_file_constants_arch_and_error(source, text, message):
    with pytest.raises(BackendError) as caught:
        compile_kernel(source(HELLO + text), "sm_90", ["REAL_BF16=1", "TILE=8"])
    assert re.fullmatch(
        f"test.cu REAL_BF16=1 TILE=8 for sm_90 does not compile: {message}.*", str(caught.value)
    )
    if "y = 1" in text:
        assert 'identifier "z" is undefined' in "".join(caught.value.__notes__)


def test_unknown_architecture(source):
    with pytest.raises(BackendError, match=r"sm_999: NVRTC \d+\.\d+.* knows sm_\d+ to sm_\d+ only"):
        compile_kernel(source(HELLO + "}"), "sm_999")


def test_missing_file(tmp_path):
    with pytest.raises(BackendError, match=r"nowhere.cu: cannot be read: No such file"):
        compile_kernel(tmp_path / "nowhere.cu", "sm_90")


def test_the_kernels_are_found_in_a_wheel_in_a_clone_or_not(tmp_path, monkeypatch):
    package = tmp_path / "gpu_microgpt"
    monkeypatch.setattr(compiler, "__file__", str(package / "ops" / "cuda" / "compiler.py"))
    with pytest.raises(
        BackendError, match=f"neither {package / '_kernels'} nor {tmp_path / 'kernels'}"
    ):
        kernels_folder()
    (tmp_path / "kernels").mkdir()
    with pytest.raises(BackendError):  # some folder of that name, beside site-packages
        kernels_folder()
    (tmp_path / "pyproject.toml").touch()
    assert kernels_folder() == tmp_path / "kernels"
    (package / "_kernels").mkdir(parents=True)
    assert kernels_folder() == package / "_kernels"


# ------------------------------------------------------------------------------ the committed table


def test_the_table_is_of_these_kernels():
    """Number for number where it was made by this compiler."""
    made, committed = table.rows(CATALOG, COMPILED), table.from_json(TABLE)
    assert [row.name for row in made] == [row.name for row in committed], ADVICE
    if MADE_BY == RELEASE:
        assert made == committed, ADVICE
    page = (DOCS / "kernel_table.md").read_text("utf-8")
    assert page == table.markdown(committed, MADE_BY), ADVICE
