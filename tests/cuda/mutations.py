"""Faults to put into the kernels, each of which the tests must notice: tests of the tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """In kernels/<stem>.cu the text `old`, which is there once, becomes `new`."""

    stem: str
    fault: str  # in a few words
    old: str
    new: str
    dtype: str = ""  # the only one that is tried, if any: saves compiling the other
    mode: str = ""  # "thread": no schedule shows it, ThreadSanitizer does
    file: str = ""  # where the text is, if not in the stem's own file


FLOAT, BF16 = "float32", "bfloat16"

MUTATIONS = [
    Mutation(
        "relu", "wrong sign",
        "x < 0.0f ? 0.0f : x",
        "x > 0.0f ? 0.0f : x", FLOAT,
    ),
    Mutation(
        "relu", "pack past the end",
        "for (; i + PACK <= size; i += step) {\n        float v",
        "for (; i < size; i += step) {\n        float v", BF16,
    ),
    Mutation(
        "relu", "blocks write the same numbers",
        "relu(real* y, const real* x, int64_t size) {\n"
        "    const int64_t step = static_cast<int64_t>(gridDim.x) *",
        "relu(real* y, const real* x, int64_t size) {\n"
        "    const int64_t step = static_cast<int64_t>(1) *", mode="thread",
    ),
    Mutation(
        "rmsnorm", "wrong sign in the gradient",
        "r * (g - v * m)",
        "r * (g + v * m)", FLOAT,
    ),
    Mutation(
        "rmsnorm", "root as inexact as rsqrtf leaves it",
        "return error == error ? fmaf(0.5f * r, error, r) : r;",
        "return r;", FLOAT, file="device.cuh",
    ),
    Mutation(
        "rmsnorm", "barrier missing before a sum is read",
        "    if (lane == 0) part[threadIdx.x >> 5] = v;\n    __syncthreads();\n    return warp_sum",
        "    if (lane == 0) part[threadIdx.x >> 5] = v;\n    return warp_sum", FLOAT,
        file="device.cuh",
    ),
    Mutation(
        "softmax", "sum not scaled to the new maximum",
        "sum = sum * expf(largest - top) + piece;",
        "sum = sum + piece;", FLOAT,
    ),
    Mutation(
        "softmax", "barrier missing before a sum is overwritten",
        "    v = warp_sum(v);\n    __syncthreads();  // an earlier use of part is over\n",
        "    v = warp_sum(v);\n", mode="thread", file="device.cuh",
    ),
    Mutation(
        "cross_entropy", "one number too many at the end of a row",
        "v[k] = at + k < end ? to_float(row[at + k])",
        "v[k] = at + k <= end ? to_float(row[at + k])", FLOAT,
    ),
    Mutation(
        "embedding", "barrier missing behind the sort",
        "        __syncthreads();  // the block's entries are there\n",
        "", FLOAT,
    ),
    Mutation(
        "adamw", "barrier missing behind the one thread's work",
        "    __syncthreads();\n    const Factors f = shared;",
        "    const Factors f = shared;",
    ),
    Mutation(
        "attention_general", "a query sees the key after it",
        "p[r][c] = c <= row + r ?",
        "p[r][c] = c <= row + r + 1 ?",
    ),
    Mutation(
        "attention_general", "barrier missing before tiles are overwritten",
        "        __syncthreads();  // the tiles before are done with\n"
        "        fill(keys, qkv + at.width, start, tile, at);",
        "        fill(keys, qkv + at.width, start, tile, at);",
    ),
    Mutation(
        "attention_short", "right operands of the two products swapped",
        "mma_m16n8k16(s[m][0], a, b);\n            mma_m16n8k16(s[m][1], a, b + 2);",
        "mma_m16n8k16(s[m][0], a, b + 2);\n            mma_m16n8k16(s[m][1], a, b);",
    ),
    Mutation(
        "attention_short", "copies of the second part not waited for",
        "        else cp_async_wait<0>();\n",
        "        else cp_async_wait<1>();\n",
    ),
    Mutation(
        "attention_tiled", "copies not waited for",
        "            cp_async_wait<0>();\n            __syncthreads();  // these keys are there,",
        "            cp_async_wait<1>();\n            __syncthreads();  // these keys are there,",
    ),
    Mutation(
        "attention_tiled", "lanes' rows read by others without __syncwarp",
        "    __syncwarp();\n    const int row = lane / (D / 8), chunk = lane % (D / 8);",
        "    const int row = lane / (D / 8), chunk = lane % (D / 8);",
    ),
    Mutation(
        "attention_decode", "a position behind the last one",
        "p[a] = row + a * apart < end ? score",
        "p[a] = row + a * apart <= end ? score", FLOAT,
    ),
    Mutation(
        "batch", "lanes below sum too few",
        "sum += lane >= o ? below : T(0);",
        "sum += lane > o ? below : T(0);", file="device.cuh",
    ),
    Mutation(
        "batch", "a row too many of every sequence",
        "for (int t = first; t < length; t += step) {",
        "for (int t = first; t <= length; t += step) {", FLOAT,
    ),
    Mutation(
        "step", "rate of the step after",
        "learning_rate(step - 1, total,",
        "learning_rate(step, total,",
    ),
    Mutation(
        "step", "clipped by the norm of the sums",
        "clip_of(mean_norm, max_norm) / count",
        "clip_of(*norm, max_norm) / count",
    ),
    Mutation(
        "step", "the second thread goes on",
        "    if (threadIdx.x) return;\n",
        "",
    ),
    Mutation(
        "decode", "the token that ends a text is not written",
        "ended[s] ? -1 : token;",
        "ended[s] || token == stop ? -1 : token;", FLOAT,
    ),
    Mutation(
        "decode", "rows taken for neighbours",
        "logits[s * stride + token]",
        "logits[static_cast<int64_t>(s) * 5 + token]", FLOAT,
    ),
    Mutation(
        "sample", "of equal logits one too few",
        "(k == key && i <= id)",
        "(k == key && i < id)", FLOAT,
    ),
    Mutation(
        "sample", "plain sums where lanes meet",
        "const uint32_t old = atomicAdd(&shared.low[slot], low);",
        "const uint32_t old = shared.low[slot];\n            shared.low[slot] = old + low;",
        mode="thread",
    ),
]  # fmt: skip
