"""A float32 number as the sum of three bfloat16 numbers, so that AMX multiplies float32.

x = x1 + x2 + x3 exactly: x1 is x rounded to eight bits, x2 what is left, x - x1, likewise, x3 the
rest, which has no more than eight. So a b is a3 b1 + a2 b2 + a1 b3 + a2 b1 + a1 b2 + a1 b1, added
up in this order, the smallest first, and three products below 2^-24 |a b|, which are left out.
(Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype For
Higher-Precision Computations, ARITH 2019.) Each is exact in float32, and a unit rounds a sum once
for 32 of them: the whole is nearer than a float32 sum, which rounds every product.

- inf and NaN: x1 = +-1, x2 = 0, x3 = x. x3 meets b1 alone, which is 0 only where b is (or
  subnormal), so that inf b is inf, and inf inf is, by x3 b1 and x1 b3.
- Parts and products below 2^-126, which float32 has as subnormal numbers, a unit takes as 0: a
  term a b is off by up to 2^-126 (|a| + |b| + 6).
"""

from __future__ import annotations

from llvmlite import ir

from .code import Code

HIGH, HALF = 0xFFFF0000, 0x8000  # bits of a bfloat16 number in float32; half its last one
SIGN, ONE, INFINITE, NAN = 0x80000000, 0x3F800000, 0x7F800000, 0x7FC00000
LARGEST = 0x7F7F7FFF  # rounded up from here on, a number would be infinite


def three_parts(code: Code, u: ir.Value, v: ir.Value) -> list[ir.Value]:
    """Words of the first, second and third parts of u (low halves) and v."""
    build = code.builder
    low, high = _plain_parts(code, u), _plain_parts(code, v)
    odd = build.fcmp_unordered("uno", *(build.bitcast(x[2], code.vector) for x in (low, high)))
    any_odd = build.icmp_unsigned("!=", build.bitcast(odd, ir.IntType(code.lanes)),
                                  ir.IntType(code.lanes)(0))  # fmt: skip
    before = build.block
    with build.if_then(any_odd, likely=False):
        careful = [_odd_parts(code, x) for x in (u, v)]
        inside = build.block
    words = []
    for side, other in zip((low, high), careful, strict=True):
        merged = []
        for part, odd_part in zip(side, other, strict=True):
            phi = build.phi(code.integer)
            phi.add_incoming(part, before)
            phi.add_incoming(odd_part, inside)
            merged.append(phi)
        words.append(merged)
    return [_joined(code, x, y) for x, y in zip(*words, strict=True)]


def _joined(code: Code, x: ir.Value, y: ir.Value) -> ir.Value:
    """High halves of x, shifted down, and of y: what is below them, subnormal numbers have."""
    build = code.builder
    high = build.and_(y, code.integers(HIGH))
    return build.bitcast(build.or_(build.lshr(x, code.integers(16)), high), code.vector)


def _plain_parts(code: Code, x: ir.Value) -> list[ir.Value]:
    """Bits of x's parts, each the high half of a float32 number; the third is NaN for numbers above
    LARGEST, infinite or NaN."""
    parts = []
    for _ in range(2):
        part = _rounded(code, code.builder.bitcast(x, code.integer))
        parts.append(part)
        x = code.binary("fsub", x, code.builder.bitcast(part, code.vector))
    return [*parts, code.builder.bitcast(x, code.integer)]


def _rounded(code: Code, bits: ir.Value) -> ir.Value:
    """To nearest; ties away from 0."""
    up = code.builder.add(bits, code.integers(HALF))
    return code.builder.and_(up, code.integers(HIGH))


def _odd_parts(code: Code, x: ir.Value) -> list[ir.Value]:
    """The same for any x: large numbers have a first part cut off, not rounded."""
    build = code.builder
    bits = build.bitcast(x, code.integer)
    size = build.and_(bits, code.integers(SIGN - 1))
    cut = build.and_(bits, code.integers(HIGH))
    large = build.icmp_unsigned(">", size, code.integers(LARGEST))
    first = build.select(large, cut, _rounded(code, bits))
    rest = code.binary("fsub", x, build.bitcast(first, code.vector))
    second = _rounded(code, build.bitcast(rest, code.integer))
    third = build.bitcast(
        code.binary("fsub", rest, build.bitcast(second, code.vector)), code.integer
    )
    finite = build.icmp_unsigned("<", size, code.integers(INFINITE))
    nan = build.icmp_unsigned(">", size, code.integers(INFINITE))
    one = build.or_(build.and_(bits, code.integers(SIGN)), code.integers(ONE))
    strange = build.select(nan, code.integers(NAN), bits)
    return [
        build.select(finite, first, one),
        build.select(finite, second, code.integers(0)),
        build.select(finite, third, strange),
    ]
