// attention_short: causal attention of sequences that fit in shared memory, on bf16 tensor cores.
//
// Per sequence and head, with s_ij = scale q_i k_j for j <= i:
//   y_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
// backward, with delta_i = dy_i y_i:
//   ds_ij = p_ij (dy_i v_j - delta_i)
//   dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij dy_i
//
// qkv, dqkv (N, 3, H, D) and y, dy (N, H, D): bf16, D = HEAD_DIM 16, 32, 64 or 128; lse (N, H)
// float; offsets (S + 1) int. Rows from offsets[S] on belong to no sequence: y, lse, dqkv become 0.
//
// A tile is 16 rows, a block TILES tiles. A warp holds a block of one side (queries or keys) as
// left operands in registers, straight from global memory, and passes over the tiles of the other
// side in shared memory; it uses each right operand it reads there TILES times. Forward: a CUDA
// block is a sequence and head and holds k and v. Backward: two CUDA blocks, one holds k and v and
// makes dq, one holds q and dy and makes dk and dv; each computes the probabilities for itself, so
// nothing is summed between warps. Warp w does blocks w and last - w, together as many tiles as any
// other warp has; shared memory is filled in two parts, the second during the work on the first.
//
// Grid: x a head, backward two a head; y, z the sequences, long ones (the last) first.
// Block: a warp for each two blocks of the longest sequence, which has up to 256 rows. sm_80 on.
// Dynamic shared memory: a TILE for each tile of the longest sequence; backward, behind that, a
// block's left operand for each warp.
// Scores, sums and the division are float; p and ds are rounded to bf16 as operands. A row's bits
// depend on its own sequence and head alone, and are the same every time.
// Bytes: forward 4 N C 2; backward 8 N C 2, and 6 N C 2 again from the L2 cache; lse beside them.
// FLOPs a sequence and head: forward 2 T^2 D; backward 7 T^2 D, of which 5 are needed; tiles on the
// diagonal whole.
// Reference: gpu_microgpt/ops/reference/attention.py. Test: tests/cuda/test_attention_short.py.
#include "device.cuh"

#if TENSOR_CORES
constexpr int D = HEAD_DIM, TILES = D > 64 ? 1 : 2, BLOCK = 16 * TILES;
constexpr int MAX_THREADS = 256 / BLOCK / 2 * 32;
// CUDA blocks a multiprocessor is to hold, for the compiler to count registers by.
constexpr int FORWARD_BLOCKS = D == 16 ? 5 : D == 32 ? 4 : D == 64 ? 3 : 1;
constexpr int BACKWARD_BLOCKS = D == 16 ? 4 : D == 32 ? 3 : D == 64 ? 2 : 1;
// A tile of shared memory: 16 rows of one array, of the other, then lse and delta of each row. At
// fixed distances, so that one address serves for all.
constexpr int SECOND = 16 * D, STATS = 32 * D, TILE = 32 * D + (D > 64 ? D : 64);
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;  // exponents are powers of two inside
constexpr float SCALE = D == 16 ? 0.25f : D == 32 ? 0.176776695f : D == 64 ? 0.125f : 0.0883883476f;
constexpr float SCALE2 = SCALE * LOG2E;
constexpr unsigned ALL = 0xffffffffu;

typedef uint32_t Left[TILES][D / 16][4];  // (BLOCK, D) as left operands
typedef uint32_t Weights[TILES][4];       // (BLOCK, 16) as left operands
typedef float Scores[TILES][2][4];        // (BLOCK, 16) as results
typedef float Sums[TILES][D / 8][4];      // (BLOCK, D) as results
typedef float PerRow[TILES][2];           // for rows g and g + 8 of each tile

// One head's columns of an array in global memory.
template <class T> struct View {
    T* array;
    size_t stride;
    __device__ __forceinline__ T* row(int i) const {
        return array + static_cast<size_t>(i) * stride;
    }
};
typedef View<const bf16> Input;
typedef View<bf16> Output;
struct Rows {  // of a sequence
    int first, length;
};
__device__ __forceinline__ Rows rows_of(const int* offsets) {
    return {offsets[0], offsets[1] - offsets[0]};
}

// This thread's rows and columns in fragments.
__device__ __forceinline__ int row_of(int m, int half) {
    return 16 * m + 8 * half + static_cast<int>(threadIdx.x >> 2 & 7);
}
__device__ __forceinline__ int column_of(int n) {
    return 8 * n + 2 * static_cast<int>(threadIdx.x & 3);
}
__device__ __forceinline__ int after_diagonal(int n, int e) {  // column - row in one tile
    return column_of(n) + e % 2 - row_of(0, e / 2);
}
__device__ __forceinline__ uint32_t pair_of(const bf16* row, int n) {
    return *reinterpret_cast<const uint32_t*>(row + column_of(n));
}
__device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}
__device__ __forceinline__ float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

// Rows `row`.. as left operands; zeros behind the sequence.
__device__ __forceinline__ void load_left(Left& a, const Input& from, Rows rows, int row) {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + row_of(m, half);
            const bf16* numbers = from.row(rows.first + r);
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                a[m][n / 2][half + n % 2 * 2] = r < rows.length ? pair_of(numbers, n) : 0;
        }
}
__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < TILES * D / 2; i++) sums[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0.0f;
}
// Results times a factor to rows `row`... Neighbouring threads swap pairs, so that four threads
// write 32 bytes side by side, as memory does.
__device__ __forceinline__ void store_sums(const Output& to, Rows rows, int row,
                                           const Sums& sums, const PerRow& factor) {
    const int odd = threadIdx.x & 1;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + row_of(m, half);
            const float f = factor[m][half];
            bf16* numbers = to.row(rows.first + r) + 8 * odd + (threadIdx.x & 2) * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                const float *x = sums[m][n] + 2 * half, *z = sums[m][n + 1] + 2 * half;
                const uint32_t low = pack_bf16(x[0] * f, x[1] * f);
                const uint32_t high = pack_bf16(z[0] * f, z[1] * f);
                const uint32_t other = __shfl_xor_sync(ALL, odd ? low : high, 1);
                const uint2 both = odd ? make_uint2(other, high) : make_uint2(low, other);
                if (r < rows.length) *reinterpret_cast<uint2*>(numbers + 8 * n) = both;
            }
        }
}
__device__ __forceinline__ void store_sums(const Output& to, Rows rows, int row,
                                           const Sums& sums, float factor) {
    PerRow same;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) same[i / 2][i % 2] = factor;
    store_sums(to, rows, row, sums, same);
}

// A left operand that this thread holds in registers, or has put away in shared memory.
__device__ __forceinline__ void fetch(uint32_t (&a)[4], const Left& left, int m, int k) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = left[m][k][i];
}
__device__ __forceinline__ void fetch(uint32_t (&a)[4], const uint4* left, int m, int k) {
    const uint4 q = left[32 * (m * (D / 16) + k)];
    a[0] = q.x, a[1] = q.y, a[2] = q.z, a[3] = q.w;
}

// Places in tiles are stepped by an exclusive or, as tiles begin at multiples of a row: one place
// in a register and an instruction each, not a register for each k.

// s (BLOCK, 16) = a (BLOCK, D) times 16 rows of shared memory, as columns; tiles [FROM, TO) of s.
template <int FROM, int TO, class Operand>
__device__ __forceinline__ void multiply(Scores& s, const Operand& left, const bf16* array,
                                         int tile) {
    const int at = tile + along_offset<D>();
#pragma unroll
    for (int i = 8 * FROM; i < 8 * TO; i++) s[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t b[4];
        ldmatrix_x4(b, array + (at ^ 16 * k));
#pragma unroll
        for (int m = FROM; m < TO; m++) {
            uint32_t a[4];
            fetch(a, left, m, k);
            mma_m16n8k16(s[m][0], a, b);
            mma_m16n8k16(s[m][1], a, b + 2);
        }
    }
}
// sums (BLOCK, D) += a (BLOCK, 16) times 16 rows of shared memory.
template <int FROM, int TO>
__device__ __forceinline__ void accumulate(Sums& sums, const Weights& a, const bf16* array,
                                           int tile) {
    const int at = tile + across_offset<D>();
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, array + (at ^ 8 * n));
#pragma unroll
        for (int m = FROM; m < TO; m++) {
            mma_m16n8k16(sums[m][n], a[m], b);
            mma_m16n8k16(sums[m][n + 1], a[m], b + 2);
        }
    }
}
template <int FROM, int TO> __device__ __forceinline__ void round(Weights& a, const Scores& s) {
#pragma unroll
    for (int m = FROM; m < TO; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[m][i] = pack_bf16(s[m][i / 2][i % 2 * 2], s[m][i / 2][i % 2 * 2 + 1]);
}

// Rows [start, stop) of an array to shared memory, not waited for; zeros behind the sequence.
__device__ __forceinline__ void copy_rows(bf16* tiles, const Input& from, Rows rows, int start,
                                          int stop) {
    for (int i = start * (D / 8) + static_cast<int>(threadIdx.x); i < stop * (D / 8);
         i += static_cast<int>(blockDim.x)) {
        const int row = i / (D / 8), chunk = i % (D / 8), real_row = row < rows.length;
        cp_async_16(tiles + row / 16 * TILE + swizzled<D>(row % 16, chunk),
                    from.row(rows.first + (real_row ? row : 0)) + chunk * 8, real_row ? 16 : 0);
    }
}
// Two arrays to shared memory, in two parts: of the blocks that `pass` does first, and the rest.
template <bool QUERIES> __device__ __forceinline__ void fill(bf16* tiles, const Input& a,
                                                             const Input& b, Rows rows) {
    const int blocks = (rows.length + BLOCK - 1) / BLOCK, end = (rows.length + 15) / 16 * 16;
    const int cut = min((QUERIES ? blocks + 1 : blocks) / 2 * BLOCK, end);
    for (int part = 0; part < 2; part++) {
        const bool lower = (part == 0) == QUERIES;
        copy_rows(tiles, a, rows, lower ? 0 : cut, lower ? cut : end);
        copy_rows(tiles + SECOND, b, rows, lower ? 0 : cut, lower ? cut : end);
        cp_async_commit();
    }
}
// This warp's blocks of `task`, which says what to load for a block beforehand, what to do with a
// tile of shared memory (tile DIAGONAL of the block meets it on the diagonal; -1: none does) and
// what to store. QUERIES: a block is of queries and meets the tiles up to its own; else of keys,
// and meets those from its own on. `offsets`: this sequence's, read when wanted, not kept.
template <bool QUERIES, class Task>
__device__ __forceinline__ void pass(Task& task, const bf16* tiles, const int* offsets) {
    const int length = offsets[1] - offsets[0];
    const int blocks = (length + BLOCK - 1) / BLOCK, end = (length + 15) / 16 * TILE;
#pragma unroll 1
    for (int part = 0; part < 2; part++) {
        const int low = threadIdx.x >> 5, high = blocks - 1 - low;
        const int block = (part == 0) == QUERIES ? low : high;
        const bool mine = low + part <= high;  // the middle one only once
        if (mine) task.load(rows_of(offsets), block * BLOCK);
        if (part == 0) cp_async_wait<1>();
        else cp_async_wait<0>();
        __syncthreads();
        if (!mine) continue;
        const int diagonal = block * TILES * TILE;
        if (QUERIES)
            for (int tile = 0; tile < diagonal; tile += TILE) task.template meet<-1>(tiles, tile);
        task.template meet<0>(tiles, diagonal);
        if (TILES > 1 && diagonal + TILE < end)
            task.template meet<TILES - 1>(tiles, diagonal + TILE);
        if (!QUERIES)
            for (int tile = diagonal + TILES * TILE; tile < end; tile += TILE)
                task.template meet<-1>(tiles, tile);
        task.store(rows_of(offsets), block * BLOCK);
    }
}

// ---------------------------------------------------------------------------------------- forward
struct Attend {
    Input q;
    Output y;
    View<float> lse;
    Left left;
    Sums sums;         // y before the division
    PerRow base, sum;  // exponents are relative to base
    static constexpr float SLACK = 8.0f;  // scores may be above base by so much

    __device__ __forceinline__ void load(Rows rows, int row) {
        load_left(left, q, rows, row);
        clear(sums);
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            base[i / 2][i % 2] = -INFINITY;
            sum[i / 2][i % 2] = 0.0f;
        }
    }
    // Lift the base of rows that need it to their largest score; others keep their bits.
    template <int FROM> __device__ __forceinline__ void lift(const PerRow& largest) {
#pragma unroll
        for (int i = 2 * FROM; i < 2 * TILES; i++) {
            const int m = i / 2, half = i % 2;
            const float old = base[m][half], top = max_of_row(largest[m][half]);
            base[m][half] = top > old + SLACK ? top : old;
            const float factor = exp2f(old - base[m][half]);
            sum[m][half] *= factor;
#pragma unroll
            for (int n = 0; n < D / 4; n++) sums[m][n / 2][2 * half + n % 2] *= factor;
        }
    }
    template <int DIAGONAL> __device__ __forceinline__ void meet(const bf16* keys, int tile) {
        constexpr int FROM = DIAGONAL < 0 ? 0 : DIAGONAL;
        Scores s;
        PerRow largest;
        Weights p;
        bool above = false;
        multiply<FROM, TILES>(s, left, keys, tile);
#pragma unroll
        for (int i = 2 * FROM; i < 2 * TILES; i++) {
            const int m = i / 2, half = i % 2;
            float top = -INFINITY;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float& x = s[m][j / 2][2 * half + j % 2];
                if (m == DIAGONAL && after_diagonal(j / 2, 2 * half + j % 2) > 0) x = -INFINITY;
                top = fmaxf(top, x);
            }
            largest[m][half] = top * SCALE2;
            above |= largest[m][half] > base[m][half] + SLACK;
        }
        if (__any_sync(ALL, above)) lift<FROM>(largest);
#pragma unroll
        for (int i = 8 * FROM; i < 8 * TILES; i++) {
            float& x = s[i / 8][i / 4 % 2][i % 4];
            x = exp2f(x * SCALE2 - base[i / 8][i % 4 / 2]);
            sum[i / 8][i % 4 / 2] += x;
        }
        round<FROM, TILES>(p, s);
        accumulate<FROM, TILES>(sums, p, keys + SECOND, tile);
    }
    __device__ __forceinline__ void store(Rows rows, int row) {
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            const int m = i / 2, half = i % 2, r = row + row_of(m, half);
            const float total = sum_of_row(sum[m][half]);
            sum[m][half] = 1.0f / total;
            if (r < rows.length && (threadIdx.x & 3) == 0)
                *lse.row(rows.first + r) = base[m][half] * LN2 + logf(total);
        }
        store_sums(y, rows, row, sums, sum);
    }
};

// --------------------------------------------------------------------------------------- backward
struct Queries {  // a block of them makes dq
    Input q, dy, y;
    View<const float> lse_rows;
    Output dq;
    Left left_q, left_dy;
    PerRow lse, delta;
    Sums sums;

    __device__ __forceinline__ void load(Rows rows, int row) {
        load_left(left_q, q, rows, row);
        load_left(left_dy, dy, rows, row);
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            const int m = i / 2, half = i % 2, r = row + row_of(m, half);
            float dot = 0.0f;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const uint32_t a = left_dy[m][n / 2][half + n % 2 * 2];
                const uint32_t b = r < rows.length ? pair_of(y.row(rows.first + r), n) : 0;
                dot += low_bf16(a) * low_bf16(b) + high_bf16(a) * high_bf16(b);
            }
            delta[m][half] = sum_of_row(dot);
            lse[m][half] = r < rows.length ? *lse_rows.row(rows.first + r) * LOG2E : 0.0f;
        }
        clear(sums);
    }
    template <int DIAGONAL> __device__ __forceinline__ void meet(const bf16* keys, int tile) {
        constexpr int FROM = DIAGONAL < 0 ? 0 : DIAGONAL;
        Scores p, ds;
        Weights weights;
        multiply<FROM, TILES>(p, left_q, keys, tile);
        multiply<FROM, TILES>(ds, left_dy, keys + SECOND, tile);
#pragma unroll
        for (int i = 8 * FROM; i < 8 * TILES; i++) {
            const int m = i / 8, n = i / 4 % 2, e = i % 4;
            float x = exp2f(p[m][n][e] * SCALE2 - lse[m][e / 2]);
            if (m == DIAGONAL && after_diagonal(n, e) > 0) x = 0.0f;
            ds[m][n][e] = x * (ds[m][n][e] - delta[m][e / 2]);
        }
        round<FROM, TILES>(weights, ds);
        accumulate<FROM, TILES>(sums, weights, keys, tile);
    }
    __device__ __forceinline__ void store(Rows rows, int row) {
        store_sums(dq, rows, row, sums, SCALE);
    }
};

struct Keys {  // a block of them makes dk and dv
    Input k, v;
    Output dk, dv;
    uint4* left_v;  // in shared memory: registers are short
    Left left_k;
    Sums sums_k, sums_v;

    __device__ __forceinline__ void load(Rows rows, int row) {
        load_left(left_k, v, rows, row);
#pragma unroll
        for (int i = 0; i < TILES * D / 16; i++) {
            const uint32_t* a = left_k[i / (D / 16)][i % (D / 16)];
            left_v[32 * i] = make_uint4(a[0], a[1], a[2], a[3]);
        }
        load_left(left_k, k, rows, row);
        clear(sums_k);
        clear(sums_v);
    }
    template <int DIAGONAL> __device__ __forceinline__ void meet(const bf16* queries, int tile) {
        constexpr int TO = DIAGONAL < 0 ? TILES : DIAGONAL + 1;
        const float2* stats =
            reinterpret_cast<const float2*>(queries + tile + STATS) + (threadIdx.x & 3);
        Scores s;
        Weights p, ds;
        multiply<0, TO>(s, left_k, queries, tile);
#pragma unroll
        for (int i = 0; i < 8 * TO; i++) {
            const int m = i / 8, n = i / 4 % 2, e = i % 4;
            const float2 lse = stats[4 * n];
            s[m][n][e] = exp2f(s[m][n][e] * SCALE2 - (e % 2 ? lse.y : lse.x));
            if (m == DIAGONAL && after_diagonal(n, e) < 0) s[m][n][e] = 0.0f;
        }
        round<0, TO>(p, s);
        accumulate<0, TO>(sums_v, p, queries + SECOND, tile);
        multiply<0, TO>(s, left_v, queries + SECOND, tile);
#pragma unroll
        for (int i = 0; i < 8 * TO; i += 2) {  // from p as rounded: fewer registers
            const float2 delta = stats[8 + i / 4 % 2 * 4];
            const uint32_t both = p[i / 8][i / 2 % 4];
            float* ds_at = s[i / 8][i / 4 % 2] + i % 4;
            ds_at[0] = low_bf16(both) * (ds_at[0] - delta.x);
            ds_at[1] = high_bf16(both) * (ds_at[1] - delta.y);
        }
        round<0, TO>(ds, s);
        accumulate<0, TO>(sums_k, ds, queries, tile);
    }
    __device__ __forceinline__ void store(Rows rows, int row) {
        store_sums(dk, rows, row, sums_k, SCALE);
        store_sums(dv, rows, row, sums_v, 1.0f);
    }
};

// lse in base 2 and delta of all queries, beside their tiles; behind the sequence 0, as dy is.
__device__ __forceinline__ void make_stats(bf16* tiles, const Input& dy, const Input& y,
                                           const View<const float>& lse, Rows rows) {
    const int numbers = (rows.length + 15) / 16 * (2 * D);  // in packs of 8, D / 8 threads a row
    for (int i = static_cast<int>(threadIdx.x); i < numbers; i += static_cast<int>(blockDim.x)) {
        const int row = i / (D / 8), c = i % (D / 8) * 8;
        float a[8] = {}, b[8] = {}, delta = 0.0f;
        if (row < rows.length) {
            load_pack(a, dy.row(rows.first + row) + c);
            load_pack(b, y.row(rows.first + row) + c);
        }
#pragma unroll
        for (int e = 0; e < 8; e++) delta += a[e] * b[e];
#pragma unroll
        for (int o = D / 16; o; o >>= 1) delta += __shfl_xor_sync(ALL, delta, o);
        if (c) continue;
        float* stats = reinterpret_cast<float*>(tiles + row / 16 * TILE + STATS) + row % 16;
        stats[0] = row < rows.length ? *lse.row(rows.first + row) * LOG2E : 0.0f;
        stats[16] = delta;
    }
}

// Zeros in a head's columns of every S-th row of no sequence, from offsets[S] + s on.
__device__ __forceinline__ void zero_padding(const Output& to, const int* offsets, int N, int S,
                                             int s) {
    const int start = offsets[S] + s, count = start < N ? (N - start + S - 1) / S : 0;
    for (int i = static_cast<int>(threadIdx.x); i < count * (D / 8);
         i += static_cast<int>(blockDim.x)) {
        bf16* row = to.row(start + i / (D / 8) * S);
        *reinterpret_cast<uint4*>(row + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, FORWARD_BLOCKS)
attention_short(bf16* y, float* lse, const bf16* qkv, const int* offsets, int N, int S, int H) {
    DYN_SHARED(bf16, tiles);
    const int s = S - 1 - static_cast<int>(blockIdx.z * gridDim.y + blockIdx.y);
    const int h = static_cast<int>(blockIdx.x);
    if (s < 0) return;
    const size_t C = static_cast<size_t>(H) * D;
    const Input k = {qkv + C + h * D, 3 * C}, v = {k.array + C, 3 * C};
    fill<true>(tiles, k, v, rows_of(offsets + s));
    Attend task;
    task.q = {qkv + h * D, 3 * C}, task.y = {y + h * D, C};
    task.lse = {lse + h, static_cast<size_t>(H)};
    zero_padding(task.y, offsets, N, S, s);
    for (size_t row = offsets[S] + s + threadIdx.x * static_cast<size_t>(S); row < N;
         row += blockDim.x * static_cast<size_t>(S))
        lse[row * H + h] = 0.0f;
    pass<true>(task, tiles, offsets + s);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BACKWARD_BLOCKS)
attention_short_backward(bf16* dqkv, const bf16* dy, const bf16* y, const float* lse,
                         const bf16* qkv, const int* offsets, int N, int S, int H) {
    DYN_SHARED(bf16, tiles);
    const int s = S - 1 - static_cast<int>(blockIdx.z * gridDim.y + blockIdx.y);
    const int h = static_cast<int>(blockIdx.x / 2);
    if (s < 0) return;
    const size_t C = static_cast<size_t>(H) * D;
    const Input q = {qkv + h * D, 3 * C}, k = {q.array + C, 3 * C}, v = {k.array + C, 3 * C};
    const Input dy_rows = {dy + h * D, C}, y_rows = {y + h * D, C};
    const View<const float> lse_rows = {lse + h, static_cast<size_t>(H)};
    const Output dq = {dqkv + h * D, 3 * C}, dk = {dq.array + C, 3 * C}, dv = {dk.array + C, 3 * C};
    const Rows rows = rows_of(offsets + s);
    if (blockIdx.x % 2) {
        fill<true>(tiles, k, v, rows);
        zero_padding(dq, offsets, N, S, s);
        Queries task;
        task.q = q, task.dy = dy_rows, task.y = y_rows, task.lse_rows = lse_rows, task.dq = dq;
        pass<true>(task, tiles, offsets + s);
    } else {
        fill<false>(tiles, q, dy_rows, rows);
        zero_padding(dk, offsets, N, S, s);
        zero_padding(dv, offsets, N, S, s);
        make_stats(tiles, dy_rows, y_rows, lse_rows, rows);
        Keys task;
        task.k = k, task.v = v, task.dk = dk, task.dv = dv;
        task.left_v = reinterpret_cast<uint4*>(tiles + (rows.length + 15) / 16 * TILE);
        task.left_v += (threadIdx.x >> 5) * (TILES * D * 2) + (threadIdx.x & 31);
        pass<false>(task, tiles, offsets + s);
    }
}
#endif
