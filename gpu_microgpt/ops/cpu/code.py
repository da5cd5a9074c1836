"""What the vector language is made of: LLVM instructions on vectors of the host's width.

`Vec` is the type of a vector in compiled functions; `Code` writes its instructions; `word` turns a
Python function that calls `Code` into one that compiled functions can call. Float arithmetic has
the flag `contract` alone (a * b + c may be rounded once), so NaN and inf go through unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

FLAGS = ("contract",)
I32, I64 = ir.IntType(32), ir.IntType(64)
BITS = {types.float32: 32, types.float64: 64}


def _features() -> frozenset[str]:
    """Of the CPU that Numba compiles for, as LLVM names them: +avx512f, -amx-tile."""
    features = numba.config.CPU_FEATURES
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    return frozenset(features.split(","))


def _machine(has: frozenset[str]) -> tuple[int, int, bool]:
    """Bytes in a vector register, how many there are, whether with FMA."""
    if "+avx512f" in has:
        return 64, 32, True
    if "+avx" in has:
        return 32, 16, "+fma" in has
    neon = llvm.get_process_triple().startswith(("aarch64", "arm64"))
    return 16, 32 if neon else 16, neon


FEATURES = _features()
VECTOR_BYTES, REGISTERS, HAS_FMA = _machine(FEATURES)
HAS_MXCSR = llvm.get_process_triple().startswith(("x86_64", "i686"))


class Vec(types.Type):  # type: ignore[misc]
    """A vector register full of float32 or float64."""

    def __init__(self, element: types.Float) -> None:
        """`element`: numba.float32 or numba.float64."""
        self.element = element
        self.lanes = VECTOR_BYTES * 8 // BITS[element]
        super().__init__(name=f"Vec({element}, {self.lanes})")


@register_model(Vec)
class _VecModel(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vec) -> None:
        super().__init__(manager, kind, Code(None, kind.element).vector)


def element_of(kind: types.Type) -> types.Float | None:
    """The float type in an array (C-contiguous), behind a pointer or in a vector; else None."""
    if isinstance(kind, types.Array) and kind.layout != "C":
        return None
    element = kind.element if isinstance(kind, Vec) else getattr(kind, "dtype", None)
    return element if element in BITS else None


class Code:
    """Writes instructions on vectors of one element type into a function being compiled."""

    def __init__(self, builder: Any, element: types.Float) -> None:
        """`builder`, an ir.IRBuilder, stands where instructions go; None where types are wanted."""
        self.builder = builder
        self.bits = BITS[element]
        self.lanes = VECTOR_BYTES * 8 // self.bits
        self.scalar = ir.FloatType() if self.bits == 32 else ir.DoubleType()
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.integer = ir.VectorType(ir.IntType(self.bits), self.lanes)
        self.name = f"v{self.lanes}f{self.bits}"

    def constant(self, x: float) -> ir.Value:
        """x in all lanes."""
        return ir.Constant(self.vector, [float(x)] * self.lanes)

    def integers(self, x: int) -> ir.Value:
        """The integer x in all lanes, as wide as the elements."""
        return ir.Constant(self.integer, [x] * self.lanes)

    def splat(self, x: ir.Value) -> ir.Value:
        """A scalar in all lanes."""
        kind = ir.VectorType(x.type, self.lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), x, I32(0))
        return self.shuffle(first, first, [0] * self.lanes)

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """The named lanes of a, then (counted on) of b."""
        indices = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(a, b, indices)

    def at(self, place: ir.Value, index: ir.Value) -> ir.Value:
        """The address `index` elements on."""
        return self.builder.gep(place, [index], source_etype=self.scalar)

    def load(self, place: ir.Value, index: ir.Value) -> ir.Value:
        """A vector from any address."""
        return self.builder.load(self.at(place, index), align=self.bits // 8, typ=self.vector)

    def store(self, value: ir.Value, place: ir.Value, index: ir.Value) -> None:
        """A vector to any address."""
        target = self.builder.bitcast(self.at(place, index), self.vector.as_pointer())
        self.builder.store(value, target, align=self.bits // 8)

    def below(self, count: ir.Value) -> ir.Value:
        """Mask: the lanes before `count`, which may be negative or more than there are."""
        numbers = ir.Constant(ir.VectorType(I32, self.lanes), list(range(self.lanes)))
        few = self.builder.icmp_signed("<", count, I64(self.lanes))
        capped = self.builder.select(few, count, I64(self.lanes))
        some = self.builder.icmp_signed(">", capped, I64(0))
        capped = self.builder.select(some, capped, I64(0))
        return self.builder.icmp_signed("<", numbers, self.splat(self.builder.trunc(capped, I32)))

    def load_masked(
        self, place: ir.Value, index: ir.Value, mask: ir.Value, other: ir.Value
    ) -> ir.Value:
        """The masked lanes from memory, the rest from `other`; the rest's memory is not touched."""
        arguments = [self.at(place, index), I32(self.bits // 8), mask, other]
        return self.call(f"llvm.masked.load.{self.name}.p0", self.vector, arguments)

    def store_masked(
        self, value: ir.Value, place: ir.Value, index: ir.Value, mask: ir.Value
    ) -> None:
        """The masked lanes to memory; the rest's memory is not touched."""
        arguments = [value, self.at(place, index), I32(self.bits // 8), mask]
        self.call(f"llvm.masked.store.{self.name}.p0", ir.VoidType(), arguments)

    def call(self, name: str, returns: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        """One of LLVM's own functions."""
        kinds = [ir.PointerType() if x.type.is_pointer else x.type for x in arguments]
        kind = ir.FunctionType(returns, kinds)
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, list(arguments))

    def binary(self, name: str, a: ir.Value, b: ir.Value) -> ir.Value:
        """fadd, fsub, fmul or fdiv."""
        return getattr(self.builder, name)(a, b, flags=FLAGS)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once where the machine can."""
        return self.call(f"llvm.fmuladd.{self.name}", self.vector, [a, b, c])

    def pick(self, relation: str, a: ir.Value, b: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        """x where a `relation` b, else (also where either is NaN) y."""
        return self.builder.select(self.builder.fcmp_ordered(relation, a, b), x, y)


def places(returns: str, pattern: str) -> Any:
    """Signatures by letters: a place, i integer, v vector, x scalar of the element, - nothing, `*`
    vector or scalar (but not all of them scalars), s place or vector."""

    def typing(*arguments: types.Type) -> Any:
        element = next((e for e in map(element_of, arguments) if e is not None), None)
        if element is None:
            return None
        vector = Vec(element)
        fixed = {"i": types.intp, "v": vector, "x": element, "-": types.void}
        wanted: list[types.Type] = []
        for letter, kind in zip(pattern, arguments, strict=True):
            number = isinstance(kind, types.Number)
            if letter == "a" and element_of(kind) == element and not isinstance(kind, Vec):
                wanted.append(kind)
            elif letter in "v*" and kind == vector:
                wanted.append(vector)
            elif (letter in "x*" and number) or (letter == "i" and isinstance(kind, types.Integer)):
                wanted.append(fixed["x" if letter == "*" else letter])
            elif letter == "s" and element_of(kind) == element:
                wanted.append(kind)
            else:
                return None
        result = types.CPointer(element) if returns == "a" else fixed[returns]
        return result(*wanted)

    return typing


def word(typing: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a word of the language of `emit(code, *values)`; arrays reach it as their address.

    `typing(*argument types)` gives the signature, or None where the types do not fit. The first
    argument that holds floats says of which element type the code is.
    """

    def wrap(emit: Callable[..., Any]) -> Any:
        def define(context: Any, *arguments: types.Type) -> Any:
            signature = typing(*arguments)
            if signature is None:
                return None

            def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
                kinds = signature.args
                element = next(e for e in map(element_of, kinds) if e is not None)
                plain = [
                    cgutils.create_struct_proxy(kind)(target, builder, value).data
                    if isinstance(kind, types.Array)
                    else value
                    for kind, value in zip(kinds, values, strict=True)
                ]
                result = emit(Code(builder, element), *plain)
                return target.get_dummy_value() if result is None else result

            return signature, generate

        first, *others = inspect.signature(emit).parameters.values()
        plain = [p.replace(annotation=p.empty) for p in (first, *others)]
        define.__signature__ = inspect.Signature(plain)  # type: ignore[attr-defined]
        define.__name__ = emit.__name__
        define.__doc__ = emit.__doc__
        return intrinsic(define)

    return wrap


# of the control register of x86: results below the normal numbers become 0, and count as 0 read
FLUSH_TO_ZERO = 0x8040


@intrinsic
def flush_subnormals(context: Any, like: Any) -> Any:
    """From here on, on this thread, numbers below the normal ones are 0, where like's floats are
    float32: an x86 takes some hundred cycles for each, others nothing. Returns what
    `restore_floats` wants."""
    flag = FLUSH_TO_ZERO if element_of(like) == types.float32 else 0

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        if not HAS_MXCSR:
            return I32(0)
        state = cgutils.alloca_once(builder, I32)
        _control(builder, "stmxcsr", state)
        before = builder.load(state, typ=I32)
        builder.store(builder.or_(before, I32(flag)), state)
        _control(builder, "ldmxcsr", state)
        return before

    return types.int32(like), generate


@intrinsic
def restore_floats(context: Any, before: Any) -> Any:
    """As they were before `flush_subnormals`, which returned `before`."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        if HAS_MXCSR:
            state = cgutils.alloca_once_value(builder, values[0])
            _control(builder, "ldmxcsr", state)
        return target.get_dummy_value()

    return types.void(types.int32), generate


def _control(builder: Any, name: str, state: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType()])
    builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{name}"), [state]
    )
