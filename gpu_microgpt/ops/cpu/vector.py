"""A little language of vectors for compiled functions; the width is the host's.

`a` and `c` are places: float32 or float64 arrays (C-contiguous; any shape, read as flat) or
addresses `at(a, i)`. i, j, n count elements. u, v, w are vectors of `lanes(a)` elements (float32 /
float64: 16 / 8 with AVX-512, 8 / 4 with AVX, 4 / 2 with NEON); x is a scalar of any type, which
becomes one of the vector's. All is generic over the dtype: it comes from the place.

| word | meaning |
|---|---|
| `lanes(a)` | how many elements of a make a vector (a constant once compiled) |
| `at(a, i)` | the address of a[i], itself a place; the array must outlive it |
| `place(a, i)` | the place at address i, a number, of elements like a's |
| `ints(i)`, `longs(i)`, `doubles(i)` | the int32, int64, float64 at address i, to be indexed |
| `double(i)` | the float64 with these bits |
| `load(a, i)`, `store(c, i, v)` | a[i:i + lanes], no alignment wanted, no bounds checked |
| `load_some(a, i, n, x)` | the same for the first n lanes (n <= 0: none), x in the rest |
| `store_some(c, i, v, n)` | store the first n lanes; what lies behind them is not touched |
| `prefetch(a, i)` | ask for the cache line of a[i], at any address |
| `splat(a, x)` | x in all lanes; a is a place or a vector |
| `u + v`, `- * /`, `-v` | by lanes; either side may be a scalar |
| `fma(u, v, w)` | u * v + w, rounded once; scalars too, but not all three |
| `vmax(u, v)` | by lanes; v where either is NaN: give what may be NaN second |
| `vsum(v)`, `vmax_of(v)` | one scalar of all lanes, in a fixed order |
| `keep(v, m)` | v where m > 0, else 0 |
| `with_lane(v, n, x)`, `lane_of(v, n)` | v with x in lane n; that lane; 0 <= n < lanes |
| `keep_below(v, n, x)` | lanes < n of v, x in the rest; n may be any integer |
| `keep_from(v, n, x)` | lanes >= n of v, x in the rest |
| `vsqrt(v)` | by lanes |
| `vexp(v)`, `vlog(v)`, `quotient(u, v)` | by lanes, with errors: see vector_functions.py |
| `group_sum(v, d)`, `spread(v, d)`, `gathered(v, d)` | of groups of d lanes: see vector_groups.py |
| `transpose(a, i, lda, c, j, ldc)` | a block of lanes x lanes; row r of a at a[i + r lda] |
| `transpose_some(a, i, lda, rows, columns, c, j, ldc)` | its corner: `columns` rows of c, with 0 \
after the first `rows` lanes |

A loop over a row of n elements, its tail included:

    for j in range(0, n, lanes(x)):
        v = load_some(x, row * n + j, n - j, 0)
        store_some(y, row * n + j, vmax(0, v), n - j)
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin

from .code import I32, I64, Code, Vec, places, word
from .vector_functions import quotient as quotient
from .vector_functions import vexp as vexp
from .vector_functions import vlog as vlog
from .vector_functions import vsqrt as vsqrt


def _vector(code: Code, x: ir.Value) -> ir.Value:
    """x itself, or a scalar in all lanes."""
    return x if x.type == code.vector else code.splat(x)


@word(places("i", "a"))
def lanes(code: Code, a: ir.Value) -> ir.Value:
    """How many elements make a vector."""
    return I64(code.lanes)


@word(places("a", "ai"))
def at(code: Code, a: ir.Value, i: ir.Value) -> ir.Value:
    """The address of a[i]."""
    return code.at(a, i)


@word(places("a", "ai"))
def place(code: Code, a: ir.Value, i: ir.Value) -> ir.Value:
    """The place at address i."""
    return code.builder.inttoptr(i, code.scalar.as_pointer())


def _numbers_at(kind: types.Type) -> Any:
    """A word: the numbers of this type at an address."""

    def numbers(context: Any, address: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], target.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), generate

    return intrinsic(numbers)


ints, longs, doubles = map(_numbers_at, (types.int32, types.int64, types.float64))


@intrinsic
def double(context: Any, bits: Any) -> Any:
    """The float64 with these bits."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.DoubleType())

    return types.float64(types.int64), generate


@word(places("v", "ai"))
def load(code: Code, a: ir.Value, i: ir.Value) -> ir.Value:
    """a[i:i + lanes]."""
    return code.load(a, i)


@word(places("-", "ai"))
def prefetch(code: Code, a: ir.Value, i: ir.Value) -> None:
    """Ask for the cache line of a[i], to be written too; any address will do."""
    code.call("llvm.prefetch.p0", ir.VoidType(), [code.at(a, i), I32(1), I32(3), I32(1)])


@word(places("-", "aiv"))
def store(code: Code, c: ir.Value, i: ir.Value, v: ir.Value) -> None:
    """c[i:i + lanes] = v."""
    code.store(v, c, i)


@word(places("v", "aiix"))
def load_some(code: Code, a: ir.Value, i: ir.Value, n: ir.Value, x: ir.Value) -> ir.Value:
    """a[i:i + n], then x."""
    return code.load_masked(a, i, code.below(n), code.splat(x))


@word(places("-", "aivi"))
def store_some(code: Code, c: ir.Value, i: ir.Value, v: ir.Value, n: ir.Value) -> None:
    """c[i:i + n] = v[:n]."""
    code.store_masked(v, c, i, code.below(n))


@word(places("v", "sx"))
def splat(code: Code, a: ir.Value, x: ir.Value) -> ir.Value:
    """x in all lanes."""
    return code.splat(x)


@word(places("v", "***"))
def fma(code: Code, u: ir.Value, v: ir.Value, w: ir.Value) -> ir.Value:
    """u * v + w."""
    return code.fma(*(_vector(code, x) for x in (u, v, w)))


@word(places("v", "**"))
def vmax(code: Code, u: ir.Value, v: ir.Value) -> ir.Value:
    """u where u > v, else v."""
    u, v = _vector(code, u), _vector(code, v)
    return code.pick(">", u, v, u, v)


@word(places("v", "vv"))
def keep(code: Code, v: ir.Value, m: ir.Value) -> ir.Value:
    """v where m > 0, else 0."""
    return code.pick(">", m, code.constant(0), v, code.constant(0))


@word(places("v", "vix"))
def with_lane(code: Code, v: ir.Value, n: ir.Value, x: ir.Value) -> ir.Value:
    """v with x in lane n, 0 <= n < lanes."""
    return code.builder.insert_element(v, x, n)


@word(places("x", "vi"))
def lane_of(code: Code, v: ir.Value, n: ir.Value) -> ir.Value:
    """Lane n of v, 0 <= n < lanes."""
    return code.builder.extract_element(v, n)


@word(places("v", "vix"))
def keep_below(code: Code, v: ir.Value, n: ir.Value, x: ir.Value) -> ir.Value:
    """Lanes < n of v, x in the rest."""
    return code.builder.select(code.below(n), v, code.splat(x))


@word(places("v", "vix"))
def keep_from(code: Code, v: ir.Value, n: ir.Value, x: ir.Value) -> ir.Value:
    """Lanes >= n of v, x in the rest."""
    return code.builder.select(code.below(n), code.splat(x), v)


def _halving(code: Code, v: ir.Value, combine: Any) -> ir.Value:
    """One scalar of all lanes: the lower half with the upper, again and again."""
    count = code.lanes
    while count > 1:
        count //= 2
        lower = code.shuffle(v, v, range(count))
        v = combine(lower, code.shuffle(v, v, range(count, 2 * count)))
    return code.builder.extract_element(v, I64(0))


@word(places("x", "v"))
def vsum(code: Code, v: ir.Value) -> ir.Value:
    """The sum of all lanes."""
    return _halving(code, v, lambda a, b: code.binary("fadd", a, b))


@word(places("x", "v"))
def vmax_of(code: Code, v: ir.Value) -> ir.Value:
    """The largest lane; a NaN may be passed over."""
    return _halving(code, v, lambda a, b: code.pick(">", a, b, a, b))


def _swapped(code: Code, a: ir.Value, b: ir.Value, step: int) -> tuple[ir.Value, ir.Value]:
    """Two rows after swapping a's odd blocks of `step` lanes with b's even ones."""
    count = code.lanes
    low = [k if not k & step else count + k - step for k in range(count)]
    high = [k + step if not k & step else count + k for k in range(count)]
    return code.shuffle(a, b, low), code.shuffle(a, b, high)


def _transposed(code: Code, rows: list[ir.Value]) -> list[ir.Value]:
    """Swap blocks of 1, 2, 4, ... lanes between pairs of rows."""
    step = 1
    while step < code.lanes:
        for k in range(code.lanes):
            if not k & step:
                rows[k], rows[k + step] = _swapped(code, rows[k], rows[k + step], step)
        step *= 2
    return rows


def merged(code: Code, rows: list[ir.Value]) -> ir.Value:
    """Lane k: the sum of row k. A transposition in which every two rows swapped are added."""
    step = 1
    while len(rows) > 1:
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [code.binary("fadd", *_swapped(code, a, b, step)) for a, b in pairs]
        step *= 2
    return rows[0]


def _row(code: Code, start: ir.Value, stride: ir.Value, number: int) -> ir.Value:
    """start + number * stride."""
    return code.builder.add(start, code.builder.mul(stride, I64(number)))


@word(places("-", "aiiaii"))
def transpose(
    code: Code, a: ir.Value, i: ir.Value, lda: ir.Value, c: ir.Value, j: ir.Value, ldc: ir.Value
) -> None:
    """c[j + s ldc + r] = a[i + r lda + s] for r, s < lanes."""
    rows = [code.load(a, _row(code, i, lda, k)) for k in range(code.lanes)]
    for k, row in enumerate(_transposed(code, rows)):
        code.store(row, c, _row(code, j, ldc, k))


@word(places("-", "aiiiiaii"))
def transpose_some(
    code: Code, a: ir.Value, i: ir.Value, lda: ir.Value, rows: ir.Value, columns: ir.Value,
    c: ir.Value, j: ir.Value, ldc: ir.Value,
) -> None:  # fmt: skip
    """The same for r < rows, s < columns; c gets `columns` rows of all lanes, 0 for r >= rows."""
    build, everything, nothing = code.builder, I64(code.lanes), I64(0)
    loaded = []
    for k in range(code.lanes):
        count = build.select(build.icmp_signed("<", I64(k), rows), columns, nothing)
        index = _row(code, i, lda, k)
        loaded.append(code.load_masked(a, index, code.below(count), code.constant(0)))
    for k, row in enumerate(_transposed(code, loaded)):
        count = build.select(build.icmp_signed("<", I64(k), columns), everything, nothing)
        code.store_masked(row, c, _row(code, j, ldc, k), code.below(count))


def _arithmetic(symbol: Any, instruction: str) -> None:
    """Give a Python operator its meaning for vectors."""

    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, arguments: Any, keywords: Any) -> Any:
            vectors = [kind for kind in arguments if isinstance(kind, Vec)]
            numbers = all(isinstance(kind, Vec | types.Number) for kind in arguments)
            if not vectors or not numbers or len(set(vectors)) > 1:
                return None
            vector = vectors[0]
            plain = [k if k == vector else vector.element for k in arguments]
            return signature(vector, *plain)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code = Code(builder, signature.return_type.element)
        return code.binary(instruction, *(_vector(code, value) for value in values))

    infer_global(symbol)(Template)
    for kinds in ((Vec, Vec), (Vec, types.Float), (types.Float, Vec)):
        lower_builtin(symbol, *kinds)(emit)


for _symbol, _instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
    (operator.truediv, "fdiv"), (operator.iadd, "fadd"), (operator.isub, "fsub"),
    (operator.imul, "fmul"), (operator.itruediv, "fdiv"),
):  # fmt: skip
    _arithmetic(_symbol, _instruction)


@infer_global(operator.neg)
class _Negation(AbstractTemplate):  # type: ignore[misc]
    def generic(self, arguments: Any, keywords: Any) -> Any:
        if len(arguments) == 1 and isinstance(arguments[0], Vec):
            return signature(arguments[0], arguments[0])
        return None


@lower_builtin(operator.neg, Vec)
def _negate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    return builder.fneg(values[0])
