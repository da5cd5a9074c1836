"""Words of memory by which threads in compiled code tell each other how far they are.

    words (threads, WIDTH) int64: each thread has a row, of cache lines of its own

What a thread wrote before `store_word` is seen by whoever reads that number with `load_word`. No
lock: a change is seen on another core after some 100 ns.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .code import I32, I64
from .compile import compiled

WIDTH = 32  # numbers in a row of words: two pairs of cache lines, as those are fetched in pairs
CAME, ABANDONED = 0, 16  # where in a row: how often its thread came to a barrier; 1: give up
PATIENCE = 2_000  # pauses of 10 to 50 ns each until a thread lets others have its core
YIELD = "sched_yield"


def _address(target: Any, builder: Any, kind: Any, words: Any, index: Any) -> Any:
    data = cgutils.create_struct_proxy(kind)(target, builder, words).data
    return builder.gep(data, [index], source_etype=I64)


@intrinsic
def load_word(context: Any, words: Any, index: Any) -> Any:
    """The number at an index of words, read as flat."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = _address(target, builder, signature.args[0], *values)
        return builder.load_atomic(address, "acquire", 8, typ=I64)

    return types.int64(words, types.intp), generate


@intrinsic
def store_word(context: Any, words: Any, index: Any, number: Any) -> Any:
    """Put a number at an index of words, read as flat."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = _address(target, builder, signature.args[0], *values[:2])
        builder.store_atomic(values[2], address, "release", 8)
        return target.get_dummy_value()

    return types.void(words, types.intp, types.int64), generate


@intrinsic
def pause(context: Any) -> Any:
    """Wait a moment, and leave the core's other thread its units."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        triple = llvm.get_process_triple()
        if triple.startswith(("x86_64", "i686")):
            _call(builder, ir.VoidType(), "llvm.x86.sse2.pause")
        elif triple.startswith(("aarch64", "arm64")):
            _call(builder, ir.VoidType(), "llvm.aarch64.isb", I32(15))
        return target.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_core(context: Any) -> Any:
    """Let another thread that wants this core have it, where the system has a call for that."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        if llvm.address_of_symbol(YIELD):
            _call(builder, I32, YIELD)
        return target.get_dummy_value()

    return types.void(), generate


def _call(builder: Any, returns: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(returns, [x.type for x in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@compiled
def barrier(words: Any, thread: Any) -> None:
    """Wait until every thread has come here as often as this one, or ABANDONED is set in row 0, as
    one never will: what is computed then is worth nothing, but it ends."""
    times = load_word(words, thread * WIDTH + CAME) + 1
    store_word(words, thread * WIDTH + CAME, times)
    for other in range(len(words)):
        tries = 0
        while load_word(words, other * WIDTH + CAME) < times:
            tries += 1
            if tries < PATIENCE:
                pause()
            elif load_word(words, ABANDONED):
                break
            else:
                yield_core()
