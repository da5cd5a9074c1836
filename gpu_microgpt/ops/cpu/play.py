"""What every instruction does: the one compiled function that programs are played by."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import overload

from . import attention_bf16, attention_bf16_backward, bf16_linear, split_linear
from .adamw import adamw_flat, clip, norm_of
from .amx import bf16_unit
from .attention import attend, attend_backward
from .attention_decode import keep_kv
from .code import flush_subnormals, restore_floats
from .compile import OPTIONS, compiled
from .cross_entropy import cross_entropy_backward_rows, cross_entropy_rows
from .embedding import embedding_backward_tables, embedding_rows
from .instructions import (
    ADAMW,
    ADD_LOSSES,
    ADD_RMSNORM,
    ATTENTION,
    ATTENTION_BACKWARD,
    CACHE_KV,
    CLIP_SCALE,
    CROSS_ENTROPY,
    CROSS_ENTROPY_BACKWARD,
    EMBEDDING,
    EMBEDDING_BACKWARD,
    EMBEDDING_RMSNORM,
    FULL,
    GLOBAL_NORM,
    GRADIENTS,
    MULTIPLY,
    RELU,
    RELU_BACKWARD,
    RMSNORM,
    RMSNORM_BACKWARD,
    SAMPLE,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    SPLIT,
)
from .linear import gradients
from .parts import can_be_shared, instruction, play_part, scratch_of
from .relu import pass_positive, rectify
from .rmsnorm import (
    add_rmsnorm_rows,
    embedding_rmsnorm_rows,
    rmsnorm_backward_rows,
    rmsnorm_rows,
)
from .rows import sum_of
from .sample import sample_rows
from .softmax import softmax_backward_rows, softmax_rows
from .vector import double, doubles, ints, place


@compiled
def play(like: Any, code: Any, rows: Any, sequences: Any) -> None:
    """Do the instructions of code (count, WIDTH) int64, in order, over `rows` rows.

    like: any array of the dtype of the places; sequences: that the rows make up. Numbers below the
    normal ones are 0 meanwhile: in training many a probability and moment fades away.
    """
    floats = flush_subnormals(like)
    for i in range(len(code)):
        perform(like, instruction(code, i), rows, sequences)
    restore_floats(floats)


@compiled
def perform(like: Any, a: Any, rows: Any, sequences: Any) -> None:
    """Do one instruction."""
    if a[0] < MULTIPLY:
        _by_rows(like, a, rows)
    elif can_be_shared(a):
        play_part(like, a, rows, 0, 1, place(like, a[1]), scratch_of(like, a))
    elif a[0] < SOFTMAX:
        _products(like, a, rows, sequences)
    else:
        _losses_and_update(like, a, rows)


@compiled
def _by_rows(like: Any, a: Any, rows: Any) -> None:
    """Embedding and norms."""
    p, q = place(like, a[1]), place(like, a[2])
    if a[0] == EMBEDDING:
        tokens, positions = ints(a[4]), ints(a[5])
        embedding_rows(p, tokens, positions, q, place(like, a[3]), rows, a[6])
    elif a[0] == EMBEDDING_BACKWARD:
        tokens, positions = ints(a[4]), ints(a[5])
        dy = place(like, a[3])
        embedding_backward_tables(p, q, dy, tokens, positions, rows, a[6], a[7], a[8], a[9])
    elif a[0] == RMSNORM:
        rmsnorm_rows(p, q, place(like, a[3]), rows, a[4])
    elif a[0] == EMBEDDING_RMSNORM:
        tokens, positions = ints(a[5]), ints(a[6])
        wte, wpe = place(like, a[3]), place(like, a[4])
        embedding_rmsnorm_rows(p, q, tokens, positions, wte, wpe, rows, a[7])
    elif a[0] == ADD_RMSNORM:
        rstd, branch, residual = place(like, a[3]), place(like, a[4]), place(like, a[5])
        add_rmsnorm_rows(p, q, rstd, branch, residual, rows, a[6])
    elif a[0] == RMSNORM_BACKWARD:
        rmsnorm_backward_rows(p, q, place(like, a[3]), place(like, a[4]), rows, a[5], a[6])


@compiled
def _products(like: Any, a: Any, rows: Any, sequences: Any) -> None:
    """Gradients of matrix products, the relu between them, attention."""
    p, q, r = place(like, a[1]), place(like, a[2]), place(like, a[3])
    s, t, u = place(like, a[4]), place(like, a[5]), place(like, a[6])
    if _unit(a) != FULL:
        _unit_products(like, a, rows, sequences)
    elif a[0] == GRADIENTS:
        panel, block = u, place(like, a[7])
        gradients(a[8], rows, a[9], a[10], p, q, r, s, t, a[11], panel, block)
    elif a[0] == RELU:
        rectify(rows * a[3], p, q)
    elif a[0] == RELU_BACKWARD:
        pass_positive(rows * a[4], p, q, r)
    elif a[0] == ATTENTION:
        attend(p, q, r, ints(a[4]), sequences, a[5], a[6], place(like, a[7]))
    elif a[0] == ATTENTION_BACKWARD:
        y, scratch = place(like, a[10]), place(like, a[8])
        attend_backward(p, q, y, r, s, ints(a[5]), sequences, a[6], a[7], scratch)
    elif a[0] == CACHE_KV:
        owners, positions = ints(a[4]), ints(a[5])
        keep_kv(p, q, r, owners, positions, rows, a[6], a[7], a[8])


@compiled
def _unit(a: Any) -> Any:
    """What multiplies: FULL, or another."""
    if a[0] == GRADIENTS:
        return a[12]
    if a[0] == ATTENTION:
        return a[8]
    return a[9] if a[0] == ATTENTION_BACKWARD else FULL


def _unit_products(like: Any, a: Any, rows: Any, sequences: Any) -> None:
    """Products on units of bfloat16: nothing where there are none, or for other floats."""


@overload(_unit_products, jit_options=OPTIONS, strict=False)
def _choose_unit_products(like: Any, a: Any, rows: Any, sequences: Any) -> Any:
    if like.dtype == types.float32 and bf16_unit():
        return lambda like, a, rows, sequences: _on_unit(like, a, rows, sequences)
    return lambda like, a, rows, sequences: None


@compiled
def _on_unit(like: Any, a: Any, rows: Any, sequences: Any) -> None:
    """As `_products`, on the instruction's unit."""
    p, q, r = place(like, a[1]), place(like, a[2]), place(like, a[3])
    s, t, u = place(like, a[4]), place(like, a[5]), place(like, a[6])
    if a[0] == GRADIENTS and a[12] == SPLIT:
        panel, block = u, place(like, a[7])
        split_linear.gradients(a[8], rows, a[9], a[10], p, q, r, s, t, a[11], panel, block)
    elif a[0] == GRADIENTS:
        panel, block = u, place(like, a[7])
        bf16_linear.gradients(
            a[12], a[8], rows, a[9], a[10], p, q, r, s, t, a[11], panel, block
        )  # fmt: skip
    elif a[0] == ATTENTION:
        attention_bf16.attend(
            a[8], p, q, r, ints(a[4]), sequences, a[5], a[6], place(like, a[7])
        )  # fmt: skip
    elif a[0] == ATTENTION_BACKWARD:
        y, scratch = place(like, a[10]), place(like, a[8])
        attention_bf16_backward.attend_backward(
            a[9], p, q, y, r, s, ints(a[5]), sequences, a[6], a[7], scratch
        )  # fmt: skip


@compiled
def _losses_and_update(like: Any, a: Any, rows: Any) -> None:
    """Softmax, losses, the update, the next token."""
    p, q, r, s = place(like, a[1]), place(like, a[2]), place(like, a[3]), place(like, a[4])
    if a[0] == SOFTMAX:
        softmax_rows(p, q, rows, a[3])
    elif a[0] == SOFTMAX_BACKWARD:
        softmax_backward_rows(p, q, r, rows, a[4])
    elif a[0] == CROSS_ENTROPY:
        cross_entropy_rows(p, q, ints(a[3]), rows, a[4])
    elif a[0] == CROSS_ENTROPY_BACKWARD:
        targets, scale = ints(a[4]), doubles(a[5])[0]
        cross_entropy_backward_rows(p, q, r, targets, scale, rows, a[6])
    elif a[0] == ADD_LOSSES:
        doubles(a[2])[0] += sum_of(p, rows)
    elif a[0] == GLOBAL_NORM:
        doubles(a[2])[0] = norm_of(p, a[3])
    elif a[0] == CLIP_SCALE:
        doubles(a[1])[0] = clip(doubles(a[2])[0], double(a[3]))
    elif a[0] == ADAMW:
        rates = double(a[6]), double(a[7]), double(a[8]), double(a[9])
        adamw_flat(p, q, r, s, doubles(a[5]), *rates, a[10])
    elif a[0] == SAMPLE:
        heat = double(a[5]), a[6], double(a[7])
        sample_rows(ints(a[2]), p, doubles(a[3]), ints(a[4]), *heat, rows, a[8])
