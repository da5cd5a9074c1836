// selftest: the functions kernels are built of, each against its definition in test_selftest.py.
//
// The same file compiles for a GPU, and there shows whether the emulator does as the GPU does. All
// kernels are one block of one warp unless said otherwise.
#include "device.cuh"

#define FULL 0xffffffffu

#if defined(__CUDACC__)  // no kernel has needed these so far
__device__ __forceinline__ void named_bar_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_bar_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ unsigned ld_acquire(const unsigned* p) {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ unsigned atomic_add_acq_rel(unsigned* p, unsigned v) {
    unsigned old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
#endif

// -------------------------------------------------------------------------- shuffles and votes
// out (9, 32): one row each.
extern "C" __global__ void shuffles(int* out, const int* in, int by, int width) {
    const int lane = threadIdx.x, v = in[lane];
    out[lane] = __shfl_sync(FULL, v, by * lane, width);
    out[32 + lane] = __shfl_up_sync(FULL, v, by, width);
    out[64 + lane] = __shfl_down_sync(FULL, v, by, width);
    out[96 + lane] = __shfl_xor_sync(FULL, v, by, width);
    out[128 + lane] = static_cast<int>(__ballot_sync(FULL, v & 1));
    out[160 + lane] = __any_sync(FULL, v == by);
    out[192 + lane] = __all_sync(FULL, v >= by);
    if (lane < 16) out[224 + lane] = __shfl_xor_sync(0x0000ffffu, v, 1);  // halves by themselves
    else out[224 + lane] = __shfl_xor_sync(0xffff0000u, v, 2);
    __syncwarp();
    const double wide = __shfl_sync(FULL, v + 0.5, 31 - lane);  // 8 bytes
    out[256 + lane] = static_cast<int>(2 * wide);
}

// ------------------------------------------------------------------------------ named barriers
// Warp 0 hands rows of in (4, 32) to three others, barrier 1: the box is full, 2: it is empty.
// out (4, 3, 32): the row backwards, plus the number of the warp.
extern "C" __global__ void hand_over(int* out, const int* in) {
    __shared__ int box[32];
    const int warp = static_cast<int>(threadIdx.x) >> 5, lane = threadIdx.x & 31;
    for (int row = 0; row < 4; row++) {
        if (warp == 0) {
            if (row) named_bar_sync(2, 128);
            box[lane] = in[32 * row + lane];
            named_bar_arrive(1, 128);
        } else {
            named_bar_sync(1, 128);
            out[(row * 3 + warp - 1) * 32 + lane] = box[31 - lane] + warp;
            if (row < 3) named_bar_arrive(2, 128);
        }
    }
}

// ------------------------------------------------------------------------- numbers and packs
// bits (n,) of to_bf16; pairs (n,) of pack_bf16(x[i], x[n - 1 - i]) and back: wide (n, 2).
extern "C" __global__ void bf16_numbers(uint16_t* bits, uint32_t* pairs, float* wide,
                                        const float* x, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const bf16 one = to_bf16(x[i]);
        bits[i] = one.bits;
        pairs[i] = pack_bf16(x[i], x[n - 1 - i]);
        wide[2 * i] = low_bf16(pairs[i]);
        wide[2 * i + 1] = high_bf16(pairs[i]);
        if (__float_as_uint(to_float(one)) != __float_as_uint(wide[2 * i])) bits[i] = 0;
    }
}
// y = x by packs, both (n,), n a multiple of PACK; and as numbers of type real.
extern "C" __global__ void packs(real* y, float* wide, const real* x, int n) {
    for (int i = threadIdx.x * PACK; i < n; i += blockDim.x * PACK) {
        float v[PACK];
        load_pack(v, x + i);
        for (int k = 0; k < PACK; k++) wide[i + k] = to_float(to_real(v[k]));
        store_pack(y + i, v);
    }
}
extern "C" __global__ void float_bits(float* out, const float* x) {  // one block of any size
    const float v = x[threadIdx.x];
    out[threadIdx.x] = __uint_as_float(__float_as_uint(v)) + __int_as_float(0);
}
// out (n, 5): high product, ones, zeros in front, first one from the back, larger.
extern "C" __global__ void integers(unsigned* out, const unsigned* a, const unsigned* b) {
    const int i = threadIdx.x;
    out[5 * i] = __umulhi(a[i], b[i]);
    out[5 * i + 1] = static_cast<unsigned>(__popc(a[i]));
    out[5 * i + 2] = static_cast<unsigned>(__clz(static_cast<int>(a[i])));
    out[5 * i + 3] = static_cast<unsigned>(__ffs(static_cast<int>(a[i])));
    out[5 * i + 4] = max(a[i], b[i]) - min(a[i], b[i]);
}
extern "C" __global__ void doubles(double* out, const double* x, const double* y) {  // (2, block)
    const int i = threadIdx.x, n = blockDim.x;
    out[i] = cospi(x[i]);
    out[n + i] = pow(x[i], y[i]);
}
// out (5, n), n all threads of the grid: what a GPU does not round correctly, and what is made of it.
extern "C" __global__ void inexact(float* out, const float* x) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    out[i] = rsqrtf(fabsf(x[i]));
    out[n + i] = exp2f(x[i]);
    out[2 * n + i] = expf(x[i]);
    out[3 * n + i] = logf(fabsf(x[i]));
    out[4 * n + i] = inverse_root(fabsf(x[i]));
}
// out (5, block): of numbers some of which are subnormal, or whose results are.
extern "C" __global__ void small_numbers(float* out, const float* x, const float* y) {
    const int i = threadIdx.x, n = blockDim.x;
    out[i] = x[i] * y[i];
    out[n + i] = x[i] + y[i];
    out[2 * n + i] = fmaf(x[i], y[i], x[i]);
    out[3 * n + i] = x[i] > 0.0f ? 1.0f : 0.0f;
    out[4 * n + i] = x[i];
}
extern "C" __global__ void random_words(uint4* out, const uint4* counters, uint32_t key0,
                                        uint32_t key1) {
    out[threadIdx.x] = philox(counters[threadIdx.x], key0, key1);
}

// ---------------------------------------------------------------------------------- reductions
// out (5, threads): of a warp, then of the block, whose sums follow each other in one `part`.
extern "C" __global__ void reductions(float* out, double* sums, const float* x) {
    __shared__ float part[32];
    __shared__ double wide_part[32];
    const int i = threadIdx.x, n = blockDim.x;
    out[i] = warp_sum(x[i]);
    out[n + i] = warp_max(x[i]);
    out[2 * n + i] = block_sum(x[i], part);
    out[3 * n + i] = block_max(x[i], part);
    out[4 * n + i] = block_sum(2 * x[i], part);
    sums[i] = block_sum(static_cast<double>(x[i]), wide_part);
}

// ---------------------------------------------------------------------------- between blocks
// Resident blocks add up in turn, each waiting for the one before it: sum (1,), plain memory
// ordered by `turn` (1,), which begins as 0. seen (grid,): the sum each found.
extern "C" __global__ void in_turn(unsigned* sum, unsigned* seen, unsigned* turn) {
    const unsigned block = blockIdx.x;
    if (threadIdx.x == 0) {
        while (ld_acquire(turn) < block) __nanosleep(20);
        seen[block] = *sum;
        *sum += block + 1;
        atomic_add_acq_rel(turn, 1u);
    }
}
// The last block to arrive, whichever it is, adds what all have written: out (1,), parts (grid,).
extern "C" __global__ void last_block(unsigned* out, unsigned* parts, unsigned* arrived) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = blockIdx.x + 1;
        last = atomic_add_acq_rel(arrived, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x) return;
    unsigned sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += parts[i];
    *out = sum;
}
// A grid and block of two or three dimensions: out[z][y][x] of blocks and threads is its own index.
extern "C" __global__ void indices(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z, i = block * threads + thread;
    out[i] = static_cast<int>(i);
}

#if TENSOR_CORES
// --------------------------------------------------- asynchronous copies, matrices, fragments
// Rows of 16 bytes: row i gets bytes[i] of x's, then zeros; 32 rows a group, two groups.
extern "C" __global__ void copies(uint4* out, const uint4* x, const int* bytes) {
    __shared__ uint4 tile[64];
    const int lane = threadIdx.x;
    for (int group = 0; group < 2; group++) {
        const int i = 32 * group + lane;
        cp_async_16(tile + i, x + i, bytes[i]);
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncwarp();
    out[lane] = tile[31 - lane];
    cp_async_wait<0>();
    __syncwarp();
    out[32 + lane] = tile[63 - lane];
}
// Registers as the instructions have them: a (32, 4), b (32, 2), d (32, 4) += .
extern "C" __global__ void products(float* d, const uint32_t* a, const uint32_t* b) {
    mma_m16n8k16(d + 4 * threadIdx.x, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
}
// out (2, 32, 4): four matrices of x (32, 8), as they are and transposed.
extern "C" __global__ void matrices(uint32_t* out, const uint4* x) {
    __shared__ uint4 rows[32];
    rows[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    ldmatrix_x4(out + 4 * threadIdx.x, rows + threadIdx.x);
    ldmatrix_x4_trans(out + 128 + 4 * threadIdx.x, rows + threadIdx.x);
}
#ifndef WIDTH
#define WIDTH 64
#endif
// With bf16 tiles of WIDTH columns, a (16, WIDTH), rows of it from `valid` on taken as zero:
// by_rows (16, 16) = a b^T, b (16, WIDTH); by_columns (16, 16) = a c, c (WIDTH, 16) in the first
// 16 columns of rows of WIDTH.
extern "C" __global__ void tiles(float* by_rows, float* by_columns, const bf16* a, const bf16* b,
                                 const bf16* c, int valid) {
    DYN_SHARED(bf16, shared);
    bf16 *const tile_a = shared, *const tile_b = shared + 16 * WIDTH;
    bf16* const tile_c = shared + 32 * WIDTH;
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < 16 * (WIDTH / 8); i += 32) {
        const int row = i / (WIDTH / 8), chunk = i % (WIDTH / 8), at = row * WIDTH + chunk * 8;
        cp_async_16(tile_a + swizzled<WIDTH>(row, chunk), a + at, row < valid ? 16 : 0);
        cp_async_16(tile_b + swizzled<WIDTH>(row, chunk), b + at, 16);
    }
    for (int i = lane; i < WIDTH * (WIDTH / 8); i += 32) {
        const int row = i / (WIDTH / 8), chunk = i % (WIDTH / 8);
        cp_async_16(tile_c + swizzled<WIDTH>(row, chunk), c + row * WIDTH + chunk * 8, 16);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float r[2][4] = {}, s[2][4] = {};
    for (int k = 0; k < WIDTH; k += 16) {
        uint32_t left[4], right[4];
        ldmatrix_x4(left, tile_a + (across_offset<WIDTH>() ^ k));
        ldmatrix_x4(right, tile_b + (along_offset<WIDTH>() ^ k));
        mma_m16n8k16(r[0], left, right);
        mma_m16n8k16(r[1], left, right + 2);
        ldmatrix_x4_trans(right, tile_c + across_offset<WIDTH>() + k * WIDTH);
        mma_m16n8k16(s[0], left, right);
        mma_m16n8k16(s[1], left, right + 2);
    }
    const int g = static_cast<int>(threadIdx.x) >> 2, t = static_cast<int>(threadIdx.x) & 3;
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++) {
            const int at = (g + (i >> 1) * 8) * 16 + 8 * half + 2 * t + (i & 1);
            by_rows[at] = r[half][i];
            by_columns[at] = s[half][i];
        }
}
// banks (8 rows, WIDTH / 8 chunks): which of the eight 16-byte banks a chunk lies in.
extern "C" __global__ void banks(int* out) {
    const int i = threadIdx.x, chunks = WIDTH / 8;
    if (i < 8 * chunks) out[i] = swizzled<WIDTH>(i / chunks, i % chunks) / 8;
}
#endif
