"""Words of the vector language (see vector.py) for groups of d lanes: 0 to d - 1, d to 2 d - 1, ...

d is a power of two, at most `lanes`. It is known only when the code runs, but there it stays the
same, so that the jumps it decides are foreseen.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from .code import I64, Code, places, word


@word(places("v", "vi"))
def group_sum(code: Code, v: ir.Value, d: ir.Value) -> ir.Value:
    """In every lane the sum of its group: of neighbours, then of pairs, then of fours."""
    build = code.builder
    done = build.append_basic_block("group_added")
    sums, step = [(v, build.block)], 1
    while step < code.lanes:
        add = build.append_basic_block("group_add")
        build.cbranch(build.icmp_signed(">", d, I64(step)), add, done)
        build.position_at_end(add)
        v = code.binary("fadd", v, code.shuffle(v, v, [k ^ step for k in range(code.lanes)]))
        sums.append((v, add))
        step *= 2
    build.branch(done)
    build.position_at_end(done)
    return _one_of(code, sums)


@word(places("v", "vi"))
def spread(code: Code, v: ir.Value, d: ir.Value) -> ir.Value:
    """Lane k holds lane k // d of v."""
    return _shuffled(code, v, d, lambda k, size: k // size)


@word(places("v", "vi"))
def gathered(code: Code, v: ir.Value, d: ir.Value) -> ir.Value:
    """Lane k holds lane k d of v, for k < lanes / d."""
    return _shuffled(code, v, d, lambda k, size: k * size % code.lanes)


def _shuffled(code: Code, v: ir.Value, d: ir.Value, lane: Callable[[int, int], int]) -> ir.Value:
    """Lane k holds lane `lane(k, d)` of v."""
    build = code.builder
    done = build.append_basic_block("group_shuffled")
    results, size = [(v, build.block)], 2
    choice = build.switch(d, done)
    while size <= code.lanes:
        block = build.append_basic_block("group_shuffle")
        choice.add_case(I64(size), block)
        build.position_at_end(block)
        chosen = [lane(k, size) for k in range(code.lanes)]
        results.append((code.shuffle(v, v, chosen), block))
        build.branch(done)
        size *= 2
    build.position_at_end(done)
    return _one_of(code, results)


def _one_of(code: Code, results: list[tuple[ir.Value, ir.Block]]) -> ir.Value:
    """The result of the block that was gone through."""
    phi = code.builder.phi(code.vector)
    for value, block in results:
        phi.add_incoming(value, block)
    return phi
