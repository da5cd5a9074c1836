"""Roots, quotients, exp and log of the vector language (see vector.py), by lanes.

Numba as pip installs it has no exp and log of vectors: here they are polynomials of a reduced
argument. The errors stated are checked in tests.
"""

from __future__ import annotations

import math

from llvmlite import ir

from .code import HAS_FMA, Code, places, word

# exp(r) by powers of r, |r| <= ln(2) / 2: fitted for float32, Taylor's for float64
EXP = {
    32: (1.0, 1.0, 0.49999991, 0.16666421, 0.04166836, 0.00837477, 0.00138294),
    64: tuple(1 / math.factorial(k) for k in range(12)),
}
# ln 2; where n ln 2 is rounded before it is subtracted, in two parts, n times the first being exact
LN2 = (math.log(2),) if HAS_FMA else (355 / 512, math.log(2) - 355 / 512)
# log((1 + s) / (1 - s)) / s by powers of s^2, |s| <= 0.172: so many terms of its series
LOG_TERMS = {32: 5, 64: 11}


@word(places("v", "v"))
def vsqrt(code: Code, v: ir.Value) -> ir.Value:
    """Square root."""
    return code.call(f"llvm.sqrt.{code.name}", code.vector, [v])


@word(places("v", "vv"))
def quotient(code: Code, u: ir.Value, v: ir.Value) -> ir.Value:
    """u / v with a relative error below 3e-7 (float32), v normal and all finite: half the time of
    u / v on x86, which has an estimate of 1 / v that one step of Newton's makes so good.
    """
    return code.builder.fdiv(u, v, flags=("arcp", "ninf"))


@word(places("v", "v"))
def vexp(code: Code, v: ir.Value) -> ir.Value:
    """exp(v) with a relative error below 4e-7 (float32; 1.5e-7 for |v| < 10) or 1e-13 (float64);
    NaN stays.
    exp(v) = 2^n exp(r), n = round(v / ln 2). Adding 1.5 2^23 (float64: 2^52) leaves n in the low
    bits of the sum, which, with the exponent's bias in it, are shifted to make 2^(n - 1): half of
    2^n, so that the largest results do not overflow early. Below 2^-126 (2^-1022) it gives 0, up
    to a factor of sqrt(2).
    """
    mantissa, bias, low, high = (23, 126, -87.4, 88.8) if code.bits == 32 else (
        52, 1022, -708.4, 709.8)  # fmt: skip
    v = code.pick(">", code.constant(low), v, code.constant(low), v)
    v = code.pick("<", code.constant(high), v, code.constant(high), v)
    magic = code.constant(1.5 * 2**mantissa + bias)
    n = code.fma(v, code.constant(1 / math.log(2)), magic)
    shift = code.integers(mantissa)
    scale = code.builder.shl(code.builder.bitcast(n, code.integer), shift)
    scale = code.builder.bitcast(scale, code.vector)
    n = code.binary("fsub", n, magic)
    r = v
    for part in LN2:
        r = code.fma(n, code.constant(-part), r)
    *others, last = EXP[code.bits]
    power = code.constant(2 * last)
    for coefficient in reversed(others):
        power = code.fma(power, r, code.constant(2 * coefficient))
    return code.binary("fmul", power, scale)


@word(places("v", "v"))
def vlog(code: Code, v: ir.Value) -> ir.Value:
    """log(v) of normal positive numbers, inf and NaN, with a relative error below 3e-7 (float32) or
    5e-16 (float64).
    log(v) = n ln 2 + log(f), v = 2^n f, f from sqrt(1/2) to sqrt(2): subtracting the bits of
    sqrt(1/2) leaves n in those of the exponent. log(f) is the series of 2 artanh(s),
    s = (f - 1) / (f + 1), where f - 1 is exact, so that log(1) is 0.
    """
    build = code.builder
    mantissa, half = (23, 0x3F3504F3) if code.bits == 32 else (52, 0x3FE6A09E667F3BCD)
    bits, shift = build.bitcast(v, code.integer), code.integers(mantissa)
    n = build.ashr(build.sub(bits, code.integers(half)), shift)
    f = build.bitcast(build.sub(bits, build.shl(n, shift)), code.vector)
    s = code.binary("fdiv", code.binary("fadd", f, code.constant(-1)),
                    code.binary("fadd", f, code.constant(1)))  # fmt: skip
    square = code.binary("fmul", s, s)
    series = code.constant(0)
    for k in reversed(range(LOG_TERMS[code.bits])):
        series = code.fma(series, square, code.constant(2 / (2 * k + 1)))
    log = code.fma(build.sitofp(n, code.vector), code.constant(math.log(2)),
                   code.binary("fmul", s, series))  # fmt: skip
    return code.pick("<", v, code.constant(math.inf), log, v)
