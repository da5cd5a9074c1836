// cache_kv: keys[sequences[n], :, positions[n]] = k_n, values likewise = v_n.
// attention_decode: y = softmax(D^-1/2 q k^T) v, one query a sequence, over the cache's positions
// 0.. lengths[s]. attention_decode_merge: y from the parts of several blocks a sequence and head.
//
// qkv (N, 3, H, D), y (S, H D), keys, values (S, H, T, D) real, 16-byte aligned; sequences,
// positions (N,), lengths (S,) int32; sums (S H, splits, D), stats (S H, splits, 2) float32: parts
// of the numerator, the largest score and the denominator. -DHEAD_DIM: a multiple of 4 up to 128.
// Rows with a negative sequence are not kept; a negative length gives y = 0.
// cache_kv: blocks of (columns, rows) threads over the pieces of k and v of a row, any grid.
// attention_decode: grid (S H, splits), block 32 to 128. SHARE neighbouring lanes read a key, in
// pieces of 16 bytes (8 where bf16 heads are aligned to no more) dealt out in turn; a lane asks for
// AHEAD keys and values, at most 128 bytes of each, before it uses the first. Lanes of a key keep
// their own softmax; warps, blocks and splits are merged in a fixed order, the last by
// attention_decode_merge: a thread a number of y, any grid.
// The host does not know the lengths: splits share those that there are evenly, in whole steps.
// Bytes: 2 (lengths[s] + 1) D numbers a sequence and head; nothing is read twice. FLOPs: two a
// number. No atomics: the same bits every time. Reference:
// gpu_microgpt/ops/reference/attention_decode.py. Test: tests/cuda/test_attention_decode.py.
#include "device.cuh"

#if REAL_BF16 && HEAD_DIM % 8
typedef uint2 Piece;
#else
typedef uint4 Piece;
#endif
constexpr int NUMBERS = static_cast<int>(sizeof(Piece) / sizeof(real));
constexpr int PIECES = HEAD_DIM / NUMBERS;
constexpr int SHARE = HEAD_DIM <= 16 ? 1 : HEAD_DIM <= 32 ? 2 : HEAD_DIM <= 64 ? 4 : 8;
constexpr int MINE = (PIECES + SHARE - 1) / SHARE;  // pieces a lane, zeros behind the last
constexpr int HELD = MINE * NUMBERS;
constexpr int FITTING = 128 / (MINE * static_cast<int>(sizeof(Piece)));
constexpr int AHEAD = FITTING < 8 ? FITTING : 8;
constexpr int MAX_WARPS = 4;
constexpr float LOWEST = -1e30f;  // below any score, and finite: differences are numbers

__device__ __forceinline__ void load_row(Piece (&x)[MINE], const real* row, int share,
                                         bool exists) {
#pragma unroll
    for (int j = 0; j < MINE; j++) {
        const int piece = j * SHARE + share;
        x[j] = Piece{};
        if (exists && (PIECES % SHARE == 0 || piece < PIECES))
            x[j] = reinterpret_cast<const Piece*>(row)[piece];
    }
}
// Number i of a lane's part of a row; i is known when compiled.
__device__ __forceinline__ float number(const Piece (&x)[MINE], int i) {
    const unsigned* words = reinterpret_cast<const unsigned*>(x);
#if REAL_BF16
    return i % 2 ? high_bf16(words[i / 2]) : low_bf16(words[i / 2]);
#else
    return __uint_as_float(words[i]);
#endif
}
// e^x of a difference x of scores: the product's rounding counts only where e^x is next to nothing.
__device__ __forceinline__ float power(float x) { return exp2f(1.44269504f * x); }

extern "C" __global__ void __launch_bounds__(128)
    cache_kv(real* keys, real* values, const real* qkv, const int* sequences, const int* positions,
             int rows, int heads, int size) {
    const int half = heads * PIECES;
    const int step = static_cast<int>(gridDim.x * blockDim.y);
    for (int n = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y); n < rows; n += step) {
        const int sequence = sequences[n], position = positions[n];
        const size_t first = (3 * static_cast<size_t>(n) + 1) * half;
        for (int i = static_cast<int>(threadIdx.x); i < 2 * half && sequence >= 0;
             i += static_cast<int>(blockDim.x)) {
            const int head = i % half / PIECES;
            const size_t at = (static_cast<size_t>(sequence) * heads + head) * size + position;
            real* cache = i < half ? keys : values;
            reinterpret_cast<Piece*>(cache)[at * PIECES + i % PIECES] =
                reinterpret_cast<const Piece*>(qkv)[first + i];
        }
    }
}

// A lane's softmax so far: the numerator of its channels, the largest score, the denominator.
struct Soft {
    float sum[HELD], largest, total;
};

// AHEAD keys and values more, `apart` rows apart from `row` on, those before `end`.
__device__ __forceinline__ void attend(Soft& soft, const float (&q)[HELD], const real* keys,
                                       const real* values, int row, int apart, int end, int share) {
    Piece k[AHEAD][MINE], v[AHEAD][MINE];
    float p[AHEAD], largest = soft.largest;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
        const size_t at = static_cast<size_t>(row + a * apart) * HEAD_DIM;
        load_row(k[a], keys + at, share, row + a * apart < end);
        load_row(v[a], values + at, share, row + a * apart < end);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) score = fmaf(q[i], number(k[a], i), score);
#pragma unroll
        for (int o = SHARE / 2; o; o >>= 1) score += __shfl_xor_sync(0xffffffffu, score, o);
        p[a] = row + a * apart < end ? score : -INFINITY;
        largest = fmaxf(largest, p[a]);
    }
    const float shrink = power(soft.largest - largest);
    soft.largest = largest;
    soft.total *= shrink;
#pragma unroll
    for (int i = 0; i < HELD; i++) soft.sum[i] *= shrink;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
        p[a] = power(p[a] - largest);
        soft.total += p[a];
#pragma unroll
        for (int i = 0; i < HELD; i++) soft.sum[i] = fmaf(p[a], number(v[a], i), soft.sum[i]);
    }
}

// The whole warp's, in each of its lanes.
__device__ __forceinline__ void merge_warp(Soft& soft) {
    const float largest = warp_max(soft.largest), shrink = power(soft.largest - largest);
    soft.largest = largest;
    soft.total *= shrink;
#pragma unroll
    for (int i = 0; i < HELD; i++) soft.sum[i] *= shrink;
#pragma unroll
    for (int o = 16; o >= SHARE; o >>= 1) {
        soft.total += __shfl_xor_sync(0xffffffffu, soft.total, o);
#pragma unroll
        for (int i = 0; i < HELD; i++)
            soft.sum[i] += __shfl_xor_sync(0xffffffffu, soft.sum[i], o);
    }
}

extern "C" __global__ void __launch_bounds__(128, 4)
    attention_decode(real* y, float* sums, float* stats, const real* qkv, const real* keys,
                     const real* values, const int* lengths, int heads, int size) {
    __shared__ float warp_sum_of[MAX_WARPS][HEAD_DIM], warp_largest[MAX_WARPS];
    __shared__ float warp_total[MAX_WARPS];
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int share = thread % SHARE, apart = threads / SHARE, step = apart * AHEAD;
    const int pair = static_cast<int>(blockIdx.x), sequence = pair / heads;
    const int splits = static_cast<int>(gridDim.y), split = static_cast<int>(blockIdx.y);
    const int count = lengths[sequence] + 1;
    const int steps = ((count + step - 1) / step + splits - 1) / splits;
    const int end = min(count, (split + 1) * steps * step);
    const size_t cache = static_cast<size_t>(pair) * size * HEAD_DIM;

    Soft soft = {{}, LOWEST, 0.0f};
    Piece pieces[MINE];
    float q[HELD];
    load_row(pieces, qkv + (3 * static_cast<size_t>(sequence) * heads + pair % heads) * HEAD_DIM,
             share, true);
#pragma unroll
    for (int i = 0; i < HELD; i++)
        q[i] = number(pieces, i) * inverse_root(static_cast<float>(HEAD_DIM));
    for (int row = split * steps * step; row < end; row += step)
        attend(soft, q, keys + cache, values + cache, row + thread / SHARE, apart, end, share);
    merge_warp(soft);

    const int warp = thread / 32, warps = threads / 32;
    if (thread % 32 == 0) warp_largest[warp] = soft.largest, warp_total[warp] = soft.total;
    if (thread % 32 < SHARE) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int channel = (i / NUMBERS * SHARE + share) * NUMBERS + i % NUMBERS;
            if (channel < HEAD_DIM) warp_sum_of[warp][channel] = soft.sum[i];
        }
    }
    __syncthreads();
    float largest = LOWEST, total = 0.0f;
    for (int w = 0; w < warps; w++) largest = fmaxf(largest, warp_largest[w]);
    for (int w = 0; w < warps; w++) total += warp_total[w] * power(warp_largest[w] - largest);
    const size_t part = static_cast<size_t>(pair) * splits + split;
    for (int i = thread; i < HEAD_DIM; i += threads) {
        float sum = 0.0f;
        for (int w = 0; w < warps; w++)
            sum += warp_sum_of[w][i] * power(warp_largest[w] - largest);
        if (splits > 1) sums[part * HEAD_DIM + i] = sum;
        else y[part * HEAD_DIM + i] = to_real(count > 0 ? sum / total : 0.0f);
    }
    if (splits > 1 && thread == 0) stats[2 * part] = largest, stats[2 * part + 1] = total;
}

extern "C" __global__ void __launch_bounds__(128)
    attention_decode_merge(real* y, const float* sums, const float* stats, int size, int splits) {
    const int step = static_cast<int>(gridDim.x * blockDim.x);
    for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < size; i += step) {
        const size_t first = static_cast<size_t>(i / HEAD_DIM) * splits;
        float largest = LOWEST, total = 0.0f, sum = 0.0f;
        for (int s = 0; s < splits; s++) largest = fmaxf(largest, stats[2 * (first + s)]);
        for (int s = 0; s < splits; s++) {
            const float weight = power(stats[2 * (first + s)] - largest);
            total = fmaf(weight, stats[2 * (first + s) + 1], total);
            sum = fmaf(weight, sums[(first + s) * HEAD_DIM + i % HEAD_DIM], sum);
        }
        y[i] = to_real(total == 0.0f ? 0.0f : sum / total);  // 0: no keys
    }
}
