// attention_general: y = softmax(scale q k^T, causal) v per sequence and head, scale = D^-1/2, in
// float arithmetic: for float32, head dims the tensor cores' kernels leave out, and older GPUs.
// backward: p = exp(scale q k^T - lse); dv = p^T dy; ds = p (dy v^T - delta), delta = rowsum(dy y);
// dq = scale ds k; dk = scale ds^T q.
//
// qkv, dqkv (N, 3, H, D), y, dy (N, C) real; lse (N, H) float32: log(sum(exp(scale q k))); sequence
// s is rows offsets[s].. offsets[s + 1] - 1; rows from offsets[S] on become 0. -DHEAD_DIM: a
// multiple of 4 up to 128. -DROWS: rows a thread, 1, 2 or 4, of which backward takes 2 at most.
// SHARE neighbouring lanes own some neighbouring rows of a sequence and head: each keeps at most 16
// channels of a row, in quads dealt out in turn, in registers; dot products are summed over the
// SHARE lanes. Keys and values (or queries and their gradients) pass by in shared memory as float,
// `tile` rows at a time: a quad read from there serves all rows of a thread. `lanes` threads, a
// power of two, do lanes / SHARE * ROWS rows of a sequence and head: a band.
// Grid (ceil(S H / (block / lanes)), ceil(longest / rows of a band)), block max(32, lanes) <= 128.
// Where lanes < 32 a warp serves several heads; their sequences must fit one band and one tile.
// Forward takes late bands, the long ones, first. A block of backward takes its band as queries
// (dq), then as keys (dk, dv): all blocks of a sequence do equal work.
// Bytes: forward reads qkv (keys and values again for each band, from L2) and writes y, lse;
// backward reads qkv, dy, y, lse and writes dqkv. FLOPs: forward 4, backward 14 T^2 D / 2 a head.
// No atomics: the same bits every time. Reference: gpu_microgpt/ops/reference/attention.py. Test:
// tests/cuda/test_attention_general.py.
#include "device.cuh"

constexpr int QUADS = HEAD_DIM / 4;
constexpr int SHARE = QUADS <= 4 ? 1 : QUADS <= 8 ? 2 : QUADS <= 16 ? 4 : 8;  // lanes a row
constexpr int HELD = (QUADS + SHARE - 1) / SHARE;  // quads of a row a lane, zeros behind the last
constexpr int WIDTH = 4 * HELD * SHARE;            // floats a row of a tile
// Forward's blocks a multiprocessor: with one more, some head dims would spill.
constexpr int RESIDENT = ROWS == 4 ? 2 : ROWS == 2 ? 3 : 4;
constexpr int FEWER = ROWS < 2 ? ROWS : 2;         // rows a thread in backward: what fits

// Four numbers: 16 bytes, or 8 of bf16, to which every head is aligned.
__device__ __forceinline__ float4 load_quad(const float* p) {
    return *reinterpret_cast<const float4*>(p);
}
__device__ __forceinline__ float4 load_quad(const bf16* p) {
    const uint2 q = *reinterpret_cast<const uint2*>(p);
    return make_float4(low_bf16(q.x), high_bf16(q.x), low_bf16(q.y), high_bf16(q.y));
}
__device__ __forceinline__ void store_quad(float* p, float4 v) {
    *reinterpret_cast<float4*>(p) = v;
}
__device__ __forceinline__ void store_quad(bf16* p, float4 v) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

// --------------------------------------------------------------------------- a lane's part of rows
__device__ __forceinline__ void multiply(float4 (&x)[HELD], float by) {
#pragma unroll
    for (int j = 0; j < HELD; j++) x[j].x *= by, x[j].y *= by, x[j].z *= by, x[j].w *= by;
}
// From global memory, times `scale`; zeros where the row or the quad does not exist.
__device__ __forceinline__ void load_row(float4 (&x)[HELD], const real* row, int share, bool exists,
                                         float scale = 1.0f) {
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        const int quad = j * SHARE + share;
        x[j] = float4{};
        if (exists && (QUADS % SHARE == 0 || quad < QUADS)) x[j] = load_quad(row + 4 * quad);
    }
    multiply(x, scale);
}
__device__ __forceinline__ void store_row(real* row, float4 (&x)[HELD], int share, float scale) {
    multiply(x, scale);
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        const int quad = j * SHARE + share;
        if (QUADS % SHARE == 0 || quad < QUADS) store_quad(row + 4 * quad, x[j]);
    }
}
// To and from a tile in shared memory, where the lanes of a row have neighbouring quads.
__device__ __forceinline__ void write_tile(float* row, const float4 (&x)[HELD], int share) {
#pragma unroll
    for (int j = 0; j < HELD; j++) reinterpret_cast<float4*>(row)[j * SHARE + share] = x[j];
}
__device__ __forceinline__ void read_tile(float4 (&x)[HELD], const float* row, int share) {
#pragma unroll
    for (int j = 0; j < HELD; j++) x[j] = reinterpret_cast<const float4*>(row)[j * SHARE + share];
}
// Of whole rows: all lanes of a warp must come.
__device__ __forceinline__ float dot(const float4 (&a)[HELD], const float4 (&b)[HELD]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        sum = fmaf(a[j].y, b[j].y, fmaf(a[j].x, b[j].x, sum));
        sum = fmaf(a[j].w, b[j].w, fmaf(a[j].z, b[j].z, sum));
    }
#pragma unroll
    for (int o = SHARE / 2; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    return sum;
}
__device__ __forceinline__ void add_scaled(float4 (&sum)[HELD], float by, const float4 (&x)[HELD]) {
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        sum[j].x = fmaf(by, x[j].x, sum[j].x), sum[j].y = fmaf(by, x[j].y, sum[j].y);
        sum[j].z = fmaf(by, x[j].z, sum[j].z), sum[j].w = fmaf(by, x[j].w, sum[j].w);
    }
}
// e^x of a difference x of scores: the product's rounding counts only where e^x is next to nothing.
__device__ __forceinline__ float power(float x) { return exp2f(1.44269504f * x); }
__device__ __forceinline__ float score_scale() { return inverse_root(static_cast<float>(HEAD_DIM)); }

// --------------------------------------------------------------------------------- who does what
struct Place {
    int heads, sequence, head, length;  // whose rows, counted from 0, and how many
    int thread, lanes, share;           // of the band's `lanes` threads; of the SHARE of a row
    int first, row, warp_first;         // the first row of the band, of the thread, of its warp
    int end, stop, warp_stop;           // rows end here for the block, its band, the warp's rows
    size_t width, thin, packed;         // C; where its rows begin in (N, C) and (N, 3C)
};

// R rows a thread. Where a block has several heads, `end`, `stop` and `warp_stop`, alike in whole
// blocks and warps, are those of the whole band, and zeros stand for rows behind a sequence.
template <int R>
__device__ __forceinline__ Place find_place(const int* offsets, int sequences, int heads,
                                            int lanes) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int pair = static_cast<int>(blockIdx.x) * (threads / lanes) + thread / lanes;
    const int band = lanes / SHARE * R, warp_rows = 32 / SHARE * R;
    const bool alone = lanes == threads;
    Place at;
    at.heads = heads, at.sequence = pair / heads, at.head = pair % heads;
    const bool exists = at.sequence < sequences;
    const int start = exists ? offsets[at.sequence] : 0;
    at.length = exists ? offsets[at.sequence + 1] - start : 0;
    at.thread = thread % lanes, at.lanes = lanes, at.share = at.thread % SHARE;
    at.first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * band;
    at.row = at.first + at.thread / SHARE * R;
    at.warp_first = at.first + (alone ? thread / 32 * warp_rows : 0);
    at.end = alone ? at.length : band;
    at.stop = min(at.first + band, at.end);
    at.warp_stop = alone ? min(at.warp_first + warp_rows, at.end) : band;
    at.width = static_cast<size_t>(heads) * HEAD_DIM;
    at.thin = start * at.width + at.head * HEAD_DIM;
    at.packed = at.thin + 2 * at.width * start;
    return at;
}
// Zeros in the head's columns, `parts` times a row, in the rows of no sequence that are this one's.
__device__ __forceinline__ void clear_padding(real* x, int parts, const Place& at,
                                              const int* offsets, int rows, int sequences) {
    if (at.first != 0 || at.sequence >= sequences) return;
    for (int row = offsets[sequences] + at.sequence; row < rows; row += sequences)
        for (int i = at.thread; i < parts * QUADS; i += at.lanes)
            store_quad(x + (static_cast<size_t>(row) * parts + i / QUADS) * at.width +
                           at.head * HEAD_DIM + i % QUADS * 4, float4{});
}
// Rows start.. start + size - 1 of q, k or v, times `scale`, become a tile, zeros behind the last.
__device__ __forceinline__ void fill(float* tile, const real* part, int start, int size,
                                     const Place& at, float scale = 1.0f) {
    for (int i = at.thread / SHARE; i < size; i += at.lanes / SHARE) {
        float4 x[HELD];
        load_row(x, part + (start + i) * 3 * at.width, at.share, start + i < at.length, scale);
        write_tile(tile + i * WIDTH, x, at.share);
    }
}

// --------------------------------------------------------------------------------------- forward
// Four keys and values more; `row` is the thread's first, counted from the first of these keys.
__device__ __forceinline__ void attend(const float4 (&q)[ROWS][HELD], float4 (&sum)[ROWS][HELD],
                                       float (&largest)[ROWS], float (&total)[ROWS],
                                       const float* keys, const float* values, int row, int share) {
    float4 x[HELD];
    float p[ROWS][4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
        read_tile(x, keys + c * WIDTH, share);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float score = dot(q[r], x);
            p[r][c] = c <= row + r ? score : -INFINITY;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float before = largest[r], most = fmaxf(p[r][0], p[r][1]);
        largest[r] = fmaxf(fmaxf(most, fmaxf(p[r][2], p[r][3])), before);
        const float shrink = power(before - largest[r]);
#pragma unroll
        for (int c = 0; c < 4; c++) p[r][c] = power(p[r][c] - largest[r]);
        total[r] = fmaf(total[r], shrink, (p[r][0] + p[r][1]) + (p[r][2] + p[r][3]));
        multiply(sum[r], shrink);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
        read_tile(x, values + c * WIDTH, share);
#pragma unroll
        for (int r = 0; r < ROWS; r++) add_scaled(sum[r], p[r][c], x);
    }
}

extern "C" __global__ void __launch_bounds__(128, RESIDENT)
    attention_general(real* y, float* lse, const real* qkv, const int* offsets, int rows,
                      int sequences, int heads, int lanes, int tile) {
    DYN_SHARED(float, shared);
    const Place at = find_place<ROWS>(offsets, sequences, heads, lanes);
    clear_padding(y, 1, at, offsets, rows, sequences);
    if (at.first == 0 && at.thread == 0 && at.sequence < sequences)
        for (int row = offsets[sequences] + at.sequence; row < rows; row += sequences)
            lse[static_cast<size_t>(row) * heads + at.head] = 0.0f;
    if (at.first >= at.end) return;  // the whole block
    float* keys = shared + static_cast<int>(threadIdx.x) / lanes * (2 * tile * WIDTH);
    float* values = keys + tile * WIDTH;
    y += at.thin, lse += at.thin / HEAD_DIM, qkv += at.packed;

    // Key 0 is seen by every row and comes first: `largest` is then finite.
    float4 q[ROWS][HELD], sum[ROWS][HELD] = {};
    float largest[ROWS], total[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = at.row + r;
        load_row(q[r], qkv + row * 3 * at.width, at.share, row < at.length, score_scale());
        largest[r] = -INFINITY;
    }
    for (int start = 0; start < at.stop; start += tile) {
        __syncthreads();  // the tiles before are done with
        fill(keys, qkv + at.width, start, tile, at);
        fill(values, qkv + 2 * at.width, start, tile, at);
        __syncthreads();
        const int end = min(tile, at.warp_stop - start);
        for (int key = 0; key < end; key += 4) {  // tiles are multiples of 4
            attend(q, sum, largest, total, keys + key * WIDTH, values + key * WIDTH,
                   at.row - start - key, at.share);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (at.row + r >= at.length) continue;
        const size_t row = at.row + r;
        store_row(y + row * at.width, sum[r], at.share, 1.0f / total[r]);
        if (at.share == 0) lse[row * heads] = largest[r] + logf(total[r]);
    }
}

// -------------------------------------------------------------------------------------- backward
// A tile of dy with each row's delta and lse; all lanes of a warp come to every sum.
__device__ __forceinline__ void fill_gradients(float* tile, float* delta, float* base,
                                               const real* dy, const real* y, const float* lse,
                                               int start, int size, const Place& at) {
    for (int before = 0; before < size; before += at.lanes / SHARE) {
        const int i = before + at.thread / SHARE;
        const bool exists = i < size && start + i < at.length;
        const size_t row = start + i;
        float4 g[HELD], out[HELD];
        load_row(g, dy + row * at.width, at.share, exists);
        load_row(out, y + row * at.width, at.share, exists);
        const float sum = dot(g, out);
        if (i >= size) continue;
        write_tile(tile + i * WIDTH, g, at.share);
        if (at.share == 0) delta[i] = sum, base[i] = exists ? lse[row * at.heads] : 0.0f;
    }
}

// The thread's rows as queries: dq, over keys up to them; or, if KEYS, as keys: dk and dv, over
// queries from them on. Own rows a, b (scale q and dy, or k and v) meet passing rows c, d (k and v,
// or scale q and dy) in shared memory. Passing rows go by backwards: a key's weights grow towards
// its first query, and small numbers summed first lose least. Rows behind a sequence add zeros:
// their dy and delta are 0. Pointers are to the head's columns in the sequence's first row.
template <bool KEYS>
__device__ __forceinline__ void gradients(real* dq, const real* dy, const real* y, const float* lse,
                                          const real* q, int tile, float* shared, const Place& at) {
    const size_t stride = 3 * at.width;
    float *c = shared, *d = c + tile * WIDTH, *deltas = d + tile * WIDTH, *bases = deltas + tile;
    float4 a[FEWER][HELD], b[FEWER][HELD], da[FEWER][HELD] = {}, db[FEWER][HELD] = {};
    float base[FEWER] = {}, delta[FEWER] = {};
#pragma unroll
    for (int r = 0; r < FEWER; r++) {
        const bool exists = at.row + r < at.length;
        const size_t row = at.row + r;
        load_row(a[r], q + row * stride + KEYS * at.width, at.share, exists,
                 KEYS ? 1.0f : score_scale());
        if (KEYS) {
            load_row(b[r], q + row * stride + 2 * at.width, at.share, exists);
        } else {
            float4 out[HELD];
            load_row(b[r], dy + row * at.width, at.share, exists);
            load_row(out, y + row * at.width, at.share, exists);
            delta[r] = dot(b[r], out);
            if (exists) base[r] = lse[row * at.heads];
        }
    }
    const int from = KEYS ? at.first : 0, to = KEYS ? at.end : at.stop;
    for (int start = from + (to - 1 - from) / tile * tile; start >= from; start -= tile) {
        __syncthreads();  // the tiles before are done with
        if (KEYS) {
            fill(c, q, start, tile, at, score_scale());
            fill_gradients(d, deltas, bases, dy, y, lse, start, tile, at);
        } else {
            fill(c, q + at.width, start, tile, at);
            fill(d, q + 2 * at.width, start, tile, at);
        }
        __syncthreads();
        const int first = KEYS ? max(0, at.warp_first - start) : 0;
        for (int i = min(tile, (KEYS ? at.end : at.warp_stop) - start) - 1; i >= first; i--) {
            float4 x[HELD], g[HELD];
            read_tile(x, c + i * WIDTH, at.share);
            read_tile(g, d + i * WIDTH, at.share);
#pragma unroll
            for (int r = 0; r < FEWER; r++) {
                const float score = dot(a[r], x) - (KEYS ? bases[i] : base[r]);
                const float dp = dot(b[r], g) - (KEYS ? deltas[i] : delta[r]);
                const int ahead = start + i - at.row - r;
                const float p = (KEYS ? ahead >= 0 : ahead <= 0) ? power(score) : 0.0f;
                add_scaled(da[r], p * dp, x);
                if (KEYS) add_scaled(db[r], p, g);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < FEWER; r++) {
        if (at.row + r >= at.length) continue;
        real* row = dq + (at.row + r) * stride;
        store_row(row + KEYS * at.width, da[r], at.share, KEYS ? 1.0f : score_scale());
        if (KEYS) store_row(row + 2 * at.width, db[r], at.share, 1.0f);
    }
}

extern "C" __global__ void __launch_bounds__(128, 1)
    attention_general_backward(real* dqkv, const real* dy, const real* y, const float* lse,
                               const real* qkv, const int* offsets, int rows, int sequences,
                               int heads, int lanes, int tile) {
    DYN_SHARED(float, shared);
    const Place at = find_place<FEWER>(offsets, sequences, heads, lanes);
    clear_padding(dqkv, 3, at, offsets, rows, sequences);
    if (at.first >= at.end) return;  // the whole block
    float* mine = shared + static_cast<int>(threadIdx.x) / lanes * (2 * tile * (WIDTH + 1));
    dqkv += at.packed, qkv += at.packed, dy += at.thin, y += at.thin, lse += at.thin / HEAD_DIM;
    gradients<false>(dqkv, dy, y, lse, qkv, tile, mine, at);
    gradients<true>(dqkv, dy, y, lse, qkv, tile, mine, at);
}
