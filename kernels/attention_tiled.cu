// attention_tiled: causal attention of long sequences on tensor cores; no (T, T) array is stored.
//
// forward:   s = scale q k^T for keys not after the query; lse = log sum exp s; y = exp(s - lse) v
// backward:  p = exp(s - lse); dp = dy v^T; delta = sum(dy y); ds = p (dp - delta);
//            dq = scale ds k; dk = scale ds^T q; dv = p^T dy
//
// qkv, dqkv (N, 3, H, D), y, dy (N, H, D): bf16; lse, delta (N, H): float; offsets (S + 1,): int.
// Sequence s is rows offsets[s] .. offsets[s + 1]; rows from offsets[S] on get zeros. D = HEAD_DIM
// is 16, 32, 64 or 128; lengths up to 128 tiles; all but offsets 16-byte aligned.
//
// A block has 128 rows of a sequence and head, 32 a warp (16 in backward at D = 128), and streams
// the other rows by 64 through shared memory, the next 64 on their way. Grid: tiles H S.
// Forward, 4 warps: rows are queries; softmax online, base 2, longest rows first.
// Backward, 4 warps (8): first rows are queries, for dq; then they are keys, for dk and dv. Block i
// of n meets i + 1 and n - i others of 128 rows: all have the same work, and no number is summed
// by two blocks. For that p and dp are computed twice: 7 products where 5 would do.
// delta: a thread a pack of 16 bytes, any grid.
//
// FLOPs: 4 D (forward), 14 D (backward) a pair of query and key. Bytes: every row of qkv, and in
// backward dy, once from memory, then on average T / 256 times from L2. The same bits every time.
// Reference: gpu_microgpt/ops/reference/attention.py. Test: tests/cuda/test_attention_tiled.py.
#include "device.cuh"

#if TENSOR_CORES
constexpr int D = HEAD_DIM;
constexpr int ROWS = 128;  // of a block, and of a ring of streamed rows
constexpr int TILE = 64;   // rows on their way to a ring at a time
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
constexpr float SCALE = D == 16 ? 0.25f : D == 32 ? 0.17677670f : D == 64 ? 0.125f : 0.08838835f;

// A block's sequence, its head, and the first of its rows there. Lies in shared memory, where it is
// read again and again: the kernels need every register.
struct Job {
    int start, length, head, first;
};

// Fills in the job; zeros in rows of no sequence, dealt out to the blocks of a head, in its columns
// of the PARTS of `out` and in lse. Returns whether the sequence has rows for this block.
template <int PARTS> __device__ __forceinline__ bool start_job(
    Job& job, bf16* out, float* lse, const int* offsets, int rows, int sequences, int n_head,
    int tiles, int tile) {
    const int place = static_cast<int>(blockIdx.x) / tiles;
    const int head = place % n_head, sequence = sequences - 1 - place / n_head;  // longest first
    const int start = offsets[sequence];
    constexpr int CHUNKS = PARTS * (D / 8);
    for (int i = static_cast<int>(threadIdx.x);; i += static_cast<int>(blockDim.x)) {
        const size_t turn = static_cast<size_t>(i / CHUNKS) * sequences + sequence;
        const size_t row = offsets[sequences] + turn * tiles + tile;
        if (row >= static_cast<size_t>(rows)) break;
        const int part = i % CHUNKS / (D / 8), chunk = i % (D / 8);
        bf16* to = out + ((row * PARTS + part) * n_head + head) * D + chunk * 8;
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
        if (lse && i % CHUNKS == 0) lse[row * n_head + head] = 0.0f;
    }
    if (threadIdx.x == 0) job = {start, offsets[sequence + 1] - start, head, tile * ROWS};
    __syncthreads();
    return job.first < job.length;
}

// Row `row` of the job's sequence in a (rows, parts, H, D) array, and columns of its head.
template <class T> __device__ __forceinline__ T* at(T* x, const Job& job, int row, int parts,
                                                    int part, int n_head) {
    return x + (static_cast<size_t>(job.start) + row) * (parts * n_head * D) +
           (part * n_head + job.head) * D;
}

// A row's place in the ring. Not row % ROWS: for signed numbers that takes registers more.
__device__ __forceinline__ int in_ring(int row) { return row & (ROWS - 1); }

// R rows to shared memory, by N threads; rows from `valid` on become zero. Not waited for.
template <int R, int N> __device__ __forceinline__ void copy_rows(bf16* to, const bf16* from,
                                                                  int stride, int valid) {
    constexpr int CHUNKS = D / 8, PASS = N / CHUNKS;  // PASS % 8 == 0: every pass swizzles alike
    const int row = static_cast<int>(threadIdx.x) / CHUNKS, chunk = threadIdx.x % CHUNKS;
    to += swizzled<D>(row, chunk);
#pragma unroll 1
    for (int i = 0; i < R; i += PASS) {
        const int real = min(row + i, valid - 1);
        cp_async_16(to + i * D, from + (real * stride + chunk * 8), row + i < valid ? 16 : 0);
    }
}

// Where a lane reads fragments.
struct Lane {
    int across, along;
};
__device__ __forceinline__ Lane lane_offsets() {
    return {across_offset<D>(), along_offset<D>()};
}

// x (16 M, 8 W) = own (16 M, D) streamed^T
template <int M, int W> __device__ __forceinline__ void multiply(
    float (&x)[M][W][4], const uint32_t (&own)[M][D / 16][4], const bf16* streamed,
    const Lane& from) {
#pragma unroll
    for (int c = 0; c < D / 16; c++)
#pragma unroll
        for (int n = 0; n < W; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, streamed + (from.along ^ c * 16) + n * 8 * D);
#pragma unroll
            for (int i = 0; i < M; i++) {
                mma_m16n8k16(x[i][n], own[i][c], b);
                mma_m16n8k16(x[i][n + 1], own[i][c], b + 2);
            }
        }
}

// sum (16 M, D) += x (16 M, 8 W) streamed
template <int M, int W> __device__ __forceinline__ void accumulate(
    float (&sum)[M][D / 8][4], const float (&x)[M][W][4], const bf16* streamed, const Lane& from) {
#pragma unroll
    for (int n = 0; n < W; n += 2) {
        uint32_t a[M][4], b[4];
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                a[i][r] = pack_bf16(x[i][n + r / 2][r % 2 * 2], x[i][n + r / 2][r % 2 * 2 + 1]);
#pragma unroll
        for (int c = 0; c < D / 8; c += 2) {
            ldmatrix_x4_trans(b, streamed + (from.across ^ c * 8) + n * 8 * D);
#pragma unroll
            for (int i = 0; i < M; i++) {
                mma_m16n8k16(sum[i][c], a[i], b);
                mma_m16n8k16(sum[i][c + 1], a[i], b + 2);
            }
        }
    }
}

// A warp's 16 M rows of results to memory, the first `valid` of them, times a factor a row, by way
// of shared memory. Rows are padded there, which keeps fragments in different banks.
template <int M> __device__ __forceinline__ void store_rows(
    bf16* to, int stride, int valid, const float (&x)[M][D / 8][4], const float (&factor)[M][2],
    bf16* shared) {
    constexpr int PADDED = D + 8;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    bf16* part = shared + warp * 16 * M * PADDED;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<uint32_t*>(part + (i * 16 + h * 8 + g) * PADDED + n * 8 + 2 * t) =
                    pack_bf16(x[i][n][2 * h] * factor[i][h], x[i][n][2 * h + 1] * factor[i][h]);
    __syncwarp();
    const int row = lane / (D / 8), chunk = lane % (D / 8);
#pragma unroll 1
    for (int i = row; i < min(16 * M, valid); i += 32 / (D / 8))
        *reinterpret_cast<uint4*>(to + i * stride + chunk * 8) =
            *reinterpret_cast<const uint4*>(part + i * PADDED + chunk * 8);
    __syncwarp();  // the part may be filled again
}

// ---------------------------------------------------------------------------------------- forward
constexpr int FORWARD_THREADS = 128;
constexpr int STEP = 32;  // keys at a time
// Sixteens of columns of the queries that registers can hold; the others are read each time.
constexpr int HELD = D == 128 ? 0 : D == 64 ? 3 : D / 16;

struct Softmax {  // of a lane's rows 16 i + 8 h + g; its columns only in total
    float largest[2][2], total[2][2];
};

// s becomes exp2(scale s - largest). A row's largest follows its scores only when one exceeds it by
// 8: y and total rarely shrink, and p up to 2^8 is as exact. Each row decides for itself, so that
// it does not depend on later rows of the warp (but for numbers below float's normal range).
__device__ __forceinline__ void online_softmax(float (&s)[2][STEP / 8][4], Softmax& row,
                                               float (&y)[2][D / 8][4]) {
    float top[2][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            top[i][h] = s[i][0][2 * h];
#pragma unroll
            for (int n = 0; n < STEP / 8; n++)
                top[i][h] = fmaxf(top[i][h], fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
            top[i][h] *= SCALE * LOG2E;
            grown |= top[i][h] > row.largest[i][h] + 8.0f;
        }
    if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float now = fmaxf(top[i][h], __shfl_xor_sync(0xffffffffu, top[i][h], 1));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
                now = now > row.largest[i][h] + 8.0f ? now : row.largest[i][h];
                const float shrink = exp2f(row.largest[i][h] - now);
                row.largest[i][h] = now;
                row.total[i][h] *= shrink;
#pragma unroll
                for (int n = 0; n < D / 8; n++)
                    y[i][n][2 * h] *= shrink, y[i][n][2 * h + 1] *= shrink;
            }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < STEP / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[i][n][e] = exp2f(fmaf(s[i][n][e], SCALE * LOG2E, -row.largest[i][e / 2]));
                row.total[i][e / 2] += s[i][n][e];
            }
}

// Columns [16 C, 16 END) of a warp's queries as left operands.
template <int C, int END> __device__ __forceinline__ void load_queries(
    uint32_t (&q)[2][D / 16][4], const bf16* queries, const Lane& from) {
#pragma unroll
    for (int c = C; c < END; c++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            ldmatrix_x4(q[i][c], queries + (from.across ^ c * 16) + i * 16 * D);
}

extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, D < 128 ? 3 : 2) attention_tiled(
    bf16* y, float* lse, const bf16* qkv, const int* offsets, int rows, int sequences, int n_head,
    int tiles) {
    DYN_SHARED(bf16, shared);  // ROWS queries, and a ring each of keys and values
    __shared__ Job job;
    constexpr int N = FORWARD_THREADS;
    const int tile = tiles - 1 - static_cast<int>(blockIdx.x) % tiles;  // the longest first
    if (!start_job<1>(job, y, lse, offsets, rows, sequences, n_head, tiles, tile)) return;

    const int width = n_head * D, stride = 3 * width;
    bf16* ring = shared + ROWS * D;
    auto copy = [&](int key) {
        const int valid = job.length - key;
        bf16* to = ring + in_ring(key) * D;
        copy_rows<TILE, N>(to, at(qkv, job, key, 3, 1, n_head), stride, valid);
        copy_rows<TILE, N>(to + ROWS * D, at(qkv, job, key, 3, 2, n_head), stride, valid);
        cp_async_commit();
    };
    copy_rows<ROWS, N>(shared, at(qkv, job, job.first, 3, 0, n_head), stride,
                       job.length - job.first);
    copy(0);

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row = job.first + warp * 32;  // the warp's first
    const int end = min(job.first + ROWS, job.length);
    const bf16* queries = shared + warp * 32 * D;
    const Lane from = lane_offsets();
    float out[2][D / 8][4] = {};
    Softmax stats = {{{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, {}};
    uint32_t q[2][D / 16][4];
#pragma unroll 1
    for (int key = 0; key < end; key += STEP) {
        if (in_ring(key) % TILE == 0) {
            cp_async_wait<0>();
            __syncthreads();  // these keys are there, those before are done with
            if (key + TILE < end) copy(key + TILE);
        }
        if (key == 0) load_queries<0, HELD>(q, queries, from);
        if (row >= end || key >= row + 32) continue;
        const bf16* k = ring + in_ring(key) * D;
        float s[2][STEP / 8][4] = {};
        load_queries<HELD, D / 16>(q, queries, from);
        multiply(s, q, k, from);
        if (key + STEP - 1 > row) {  // some keys lie after some queries
            const int behind = row - key + g - 2 * t;
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n * 8 + e % 2 > behind + i * 16 + e / 2 * 8) s[i][n][e] = -INFINITY;
        }
        online_softmax(s, stats, out);
        accumulate(out, s, k + ROWS * D, from);
    }

    float share[2][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float total = stats.total[i / 2][i % 2];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        share[i / 2][i % 2] = 1.0f / total;
        const int query = row + i * 8 + g;
        if (t == 0 && query < end)
            lse[(static_cast<size_t>(job.start) + query) * n_head + job.head] =
                stats.largest[i / 2][i % 2] * LN2 + logf(total);
    }
    __syncthreads();  // all are done with the last tile
    store_rows(at(y, job, row, 1, 0, n_head), width, end - row, out, share, ring);
}

// --------------------------------------------------------------------------------------- backward
// delta = sum(dy y), a number a row and head; `size` packs of 16 bytes.
extern "C" __global__ void __launch_bounds__(256) attention_tiled_delta(
    float* delta, const bf16* dy, const bf16* y, int64_t size) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i - (threadIdx.x & 31) < size; i += step) {  // whole warps
        float sum = 0.0f;
        if (i < size) {
            float a[8], b[8];
            load_pack(a, dy + i * 8);
            load_pack(b, y + i * 8);
#pragma unroll
            for (int k = 0; k < 8; k++) sum += a[k] * b[k];
        }
#pragma unroll
        for (int o = D / 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
        if (i < size && i % (D / 8) == 0) delta[i / (D / 8)] = sum;
    }
}

constexpr int TALL = D < 128 ? 2 : 1;  // a warp's rows, in sixteens
constexpr int WIDE = D < 32 ? 4 : 2;   // columns at a time, in eights
constexpr int BACKWARD_THREADS = ROWS / (16 * TALL) * 32;

// A warp's rows as left operands, from memory; rows from `valid` on are zeros.
__device__ __forceinline__ void load_own(uint32_t (&a)[TALL][D / 16][4], const bf16* from,
                                         int stride, int valid) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < TALL; i++)
#pragma unroll
        for (int c = 0; c < D / 16; c++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int row = i * 16 + r % 2 * 8 + g, column = c * 16 + r / 2 * 8 + 2 * t;
                const bf16* pair = from + (row * stride + column);
                a[i][c][r] = row < valid ? *reinterpret_cast<const uint32_t*>(pair) : 0;
            }
}

// A block's rows against all rows of the other kind that causality allows, as columns.
// Queries against keys: own = (q, dy), streamed = (k, v), first_sum = ds k.
// KEYS against queries: own = (k, v), streamed = (q, dy), first_sum = ds^T q, second_sum = p^T dy.
// ring: of the two streamed arrays; ring_stats: lse in base 2, and delta, of streamed queries.
template <bool KEYS> __device__ __forceinline__ void backward_pass(
    float (&first_sum)[TALL][D / 8][4], float (&second_sum)[TALL][D / 8][4], const bf16* qkv,
    const bf16* dy, const float* lse, const float* delta, const Job& job, int n_head, bf16* ring,
    float (*ring_stats)[ROWS]) {
    constexpr int N = BACKWARD_THREADS, COLUMNS = WIDE * 8;
    const int width = n_head * D, packed = 3 * width;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row = job.first + warp * 16 * TALL;  // the warp's first
    const int begin = KEYS ? job.first : 0;
    const int end = KEYS ? job.length : min(job.first + ROWS, job.length);
    const bool is_lse = threadIdx.x < TILE, has_stat = KEYS && threadIdx.x < 2 * TILE;
    const int stat_column = static_cast<int>(threadIdx.x % TILE);
    auto stat = [&](int query, bool want_lse) {
        const size_t i = (static_cast<size_t>(job.start) + query) * n_head + job.head;
        if (query >= job.length) return 0.0f;  // of a zero q and dy: p is 1, all else 0
        return want_lse ? lse[i] * LOG2E : delta[i];
    };
    auto copy = [&](int column) {
        bf16* to = ring + in_ring(column) * D;
        const bf16* second = KEYS ? at(dy, job, column, 1, 0, n_head)
                                  : at(qkv, job, column, 3, 2, n_head);
        const int valid = job.length - column;
        copy_rows<TILE, N>(to, at(qkv, job, column, 3, !KEYS, n_head), packed, valid);
        copy_rows<TILE, N>(to + ROWS * D, second, KEYS ? width : packed, valid);
        cp_async_commit();
    };

    __syncthreads();  // shared memory is free
    copy(begin);
    float next_stat = has_stat ? stat(begin + stat_column, is_lse) : 0.0f;
    uint32_t first[TALL][D / 16][4], second[TALL][D / 16][4];
    load_own(first, at(qkv, job, row, 3, KEYS, n_head), packed, job.length - row);
    load_own(second, KEYS ? at(qkv, job, row, 3, 2, n_head) : at(dy, job, row, 1, 0, n_head),
             KEYS ? packed : width, job.length - row);
    float row_lse[TALL][2], row_delta[TALL][2];
#pragma unroll
    for (int i = 0; i < TALL * 2 && !KEYS; i++) {
        row_lse[i / 2][i % 2] = stat(row + i * 8 + g, true);
        row_delta[i / 2][i % 2] = stat(row + i * 8 + g, false);
    }
    const Lane from = lane_offsets();
#pragma unroll 1
    for (int column = begin; column < end; column += COLUMNS) {
        if (in_ring(column) % TILE == 0) {
            if (has_stat) ring_stats[!is_lse][in_ring(column) + stat_column] = next_stat;
            cp_async_wait<0>();
            __syncthreads();  // these columns are there, those before are done with
            if (column + TILE < end) {
                copy(column + TILE);
                if (has_stat) next_stat = stat(column + TILE + stat_column, is_lse);
            }
        }
        if (row >= end) continue;
        if (KEYS ? column + COLUMNS <= row : column >= row + 16 * TALL) continue;  // all hidden
        const bf16* one = ring + in_ring(column) * D;
        const bf16* two = one + ROWS * D;
        float p[TALL][WIDE][4] = {}, ds[TALL][WIDE][4] = {};
        multiply(p, first, one, from);
        multiply(ds, second, two, from);
        const int ahead = column - row + 2 * t - g;
        const bool diagonal = KEYS ? column < row + 16 * TALL - 1 : column + COLUMNS - 1 > row;
#pragma unroll
        for (int i = 0; i < TALL; i++)
#pragma unroll
            for (int n = 0; n < WIDE; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int slot = in_ring(column) + 2 * t + n * 8 + e % 2;
                    const int ahead_of = i * 16 + e / 2 * 8 - n * 8 - e % 2;
                    const bool hidden = KEYS ? ahead < ahead_of : ahead > ahead_of;
                    float& x = p[i][n][e];
                    x = exp2f(fmaf(x, SCALE * LOG2E,
                                   -(KEYS ? ring_stats[0][slot] : row_lse[i][e / 2])));
                    if (diagonal && hidden) x = 0.0f;
                    ds[i][n][e] = x * (ds[i][n][e] - (KEYS ? ring_stats[1][slot]
                                                           : row_delta[i][e / 2]));
                }
        if (KEYS) accumulate(second_sum, p, two, from);
        accumulate(first_sum, ds, one, from);
    }
    __syncthreads();  // results may go through shared memory
}

// A warp's rows of dq, dk or dv.
__device__ __forceinline__ void store_part(bf16* dqkv, int part, float factor,
                                           const float (&x)[TALL][D / 8][4], const Job& job,
                                           int n_head, bf16* shared) {
    const int row = job.first + static_cast<int>(threadIdx.x >> 5) * 16 * TALL;
    float factors[TALL][2];
#pragma unroll
    for (int i = 0; i < TALL * 2; i++) factors[i / 2][i % 2] = factor;
    store_rows(at(dqkv, job, row, 3, part, n_head), 3 * n_head * D, job.length - row, x, factors,
               shared);
}

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, D < 64 ? 3 : D < 128 ? 2 : 1)
attention_tiled_backward(bf16* dqkv, const bf16* dy, const float* lse, const float* delta,
                         const bf16* qkv, const int* offsets, int rows, int sequences, int n_head,
                         int tiles) {
    DYN_SHARED(bf16, shared);  // two rings
    __shared__ float ring_stats[2][ROWS];
    __shared__ Job job;
    const int tile = static_cast<int>(blockIdx.x) % tiles;
    if (!start_job<3>(job, dqkv, nullptr, offsets, rows, sequences, n_head, tiles, tile)) return;
    {
        float dq[TALL][D / 8][4] = {};
        backward_pass<false>(dq, dq, qkv, dy, lse, delta, job, n_head, shared, ring_stats);
        store_part(dqkv, 0, SCALE, dq, job, n_head, shared);
    }
    float dk[TALL][D / 8][4] = {}, dv[TALL][D / 8][4] = {};
    backward_pass<true>(dk, dv, qkv, dy, lse, delta, job, n_head, shared, ring_stats);
    store_part(dqkv, 1, SCALE, dk, job, n_head, shared);
    store_part(dqkv, 2, 1.0f, dv, job, n_head, shared);
}
#endif
