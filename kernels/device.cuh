// device.cuh: the only header a kernel includes.
//
// Under NVRTC and nvcc: thin wrappers of PTX instructions, needing no CUDA header. Under g++: an
// emulator with the same names (tests/cuda_on_cpu). Below both: what kernels share. A kernel is
// compiled with -DREAL_BF16=0 (float) or 1: the type `real` of weights and activations.
#pragma once
#if !defined(__CUDACC__)
#include "cuda_on_cpu.h"
#else
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define DYN_SHARED(T, name)                                                                        \
    extern __shared__ __align__(128) unsigned char dynamic_shared[];                               \
    T* name = reinterpret_cast<T*>(dynamic_shared)

// ------------------------------------------------------------------------------------- bfloat16
struct __align__(2) bf16 { uint16_t bits; };

__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
// Two floats rounded to nearest even, `lo` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
    uint32_t r;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    const float x[2] = {lo, hi};
    r = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t u = __float_as_uint(x[i]), odd = (u >> 16) & 1;
        r |= ((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (u + 0x7fffu + odd) >> 16) << (16 * i);
    }
#endif
    return r;
}
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 r;
    r.bits = static_cast<uint16_t>(pack_bf16(x, 0.0f));
    return r;
}

// ------------------------------------------------------------ asynchronous copies, tensor cores
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
// 16 bytes from global to shared memory; the last 16 - bytes of them become zero.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Wait until at most N of this thread's committed groups are in flight.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Four 8x8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}
// d (16, 8) += a (16, 16) b (16, 8), bf16 products summed in float.
__device__ __forceinline__ void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
#endif  // __CUDACC__

// Both sides from here on. Code for the tensor cores stands inside #if TENSOR_CORES.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TENSOR_CORES 1
#else
#define TENSOR_CORES 0
#endif

// --------------------------------------------------------------------- numbers and 16-byte packs
#if REAL_BF16
typedef bf16 real;
__device__ __forceinline__ real to_real(float x) { return to_bf16(x); }
#else
typedef float real;
__device__ __forceinline__ real to_real(float x) { return x; }
#endif
__device__ __forceinline__ float to_float(float x) { return x; }

// 1 / sqrt(x): rsqrtf, which may be off by two units in the last place, and a step of Newton's. Not
// 1.0f / sqrtf(x), whose calls for rare numbers keep registers in memory.
__device__ __forceinline__ float inverse_root(float x) {
    const float r = rsqrtf(x), error = fmaf(-(x * r), r, 1.0f);
    return error == error ? fmaf(0.5f * r, error, r) : r;  // of infinity: 0
}

#define PACK static_cast<int>(16 / sizeof(real))  // numbers in the widest access: 4 or 8

// Numbers from, and to, 16-byte aligned memory.
__device__ __forceinline__ void load_pack(float (&v)[4], const float* p) {
    const float4 q = *reinterpret_cast<const float4*>(p);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}
__device__ __forceinline__ void store_pack(float* p, const float (&v)[4]) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ void load_pack(float (&v)[8], const bf16* p) {
    const uint4 q = *reinterpret_cast<const uint4*>(p);
    v[0] = low_bf16(q.x), v[1] = high_bf16(q.x), v[2] = low_bf16(q.y), v[3] = high_bf16(q.y);
    v[4] = low_bf16(q.z), v[5] = high_bf16(q.z), v[6] = low_bf16(q.w), v[7] = high_bf16(q.w);
}
__device__ __forceinline__ void store_pack(bf16* p, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(p) = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                                              pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// ------------------------------------------------------------------------------------ reductions
template <class T> __device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}
// Over a block of whole warps, result in every thread; `part` is 32 numbers of shared memory.
template <class T> __device__ __forceinline__ T block_sum(T v, T* part) {
    const unsigned lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    v = warp_sum(v);
    __syncthreads();  // an earlier use of part is over
    if (lane == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    return warp_sum(lane < warps ? part[lane] : T(0));
}
__device__ __forceinline__ float block_max(float v, float* part) {
    const unsigned lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    v = warp_max(v);
    __syncthreads();  // an earlier use of part is over
    if (lane == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    return warp_max(lane < warps ? part[lane] : -INFINITY);
}

// Sum over the block's threads before this one; `total`: over all. Whole warps, `part` as above.
template <class T> __device__ __forceinline__ T block_before(T v, T* part, T& total) {
    const unsigned lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    T sum = v;
#pragma unroll
    for (unsigned o = 1; o < 32; o *= 2) {
        const T below = __shfl_up_sync(0xffffffffu, sum, o);
        sum += lane >= o ? below : T(0);
    }
    __syncthreads();  // an earlier use of part is over
    if (lane == 31) part[warp] = sum;
    __syncthreads();
    const T of_warp = lane < warps ? part[lane] : T(0);
    total = warp_sum(of_warp);
    return sum - v + warp_sum(lane < warp ? of_warp : T(0));
}

// A team shares a row: a warp, or a block. Which rows, and which of their numbers, are a thread's.
template <bool BLOCK> struct Team {
    const int size = BLOCK ? static_cast<int>(blockDim.x) : 32;
    const int rank = static_cast<int>(BLOCK ? threadIdx.x : threadIdx.x & 31);
    const size_t teams = BLOCK ? 1 : blockDim.x >> 5;  // in a block
    const size_t row = blockIdx.x * teams + (BLOCK ? 0 : threadIdx.x >> 5);
    const size_t rows = gridDim.x * teams;
};
template <bool BLOCK> __device__ __forceinline__ float team_max(float v, float* part) {
    if constexpr (BLOCK) return block_max(v, part);
    return warp_max(v);
}
template <bool BLOCK> __device__ __forceinline__ float team_sum(float v, float* part) {
    if constexpr (BLOCK) return block_sum(v, part);
    return warp_sum(v);
}

// ------------------------------------------------------------------------------------ randomness
// Philox4x32-10 (Salmon et al. 2011), as gpu_microgpt/rng.py has it.
__device__ __forceinline__ uint4 philox(uint4 x, uint32_t key0, uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t hi0 = __umulhi(0xD2511F53u, x.x), lo0 = 0xD2511F53u * x.x;
        const uint32_t hi1 = __umulhi(0xCD9E8D57u, x.z), lo1 = 0xCD9E8D57u * x.z;
        x = make_uint4(hi1 ^ x.y ^ key0, lo1, hi0 ^ x.w ^ key1, lo0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return x;
}

#if TENSOR_CORES
// ----------------------------------------------------- bf16 tiles in shared memory, as fragments
// Offset of the 16-byte chunk `chunk` of row `row` in a (rows, D) tile, D 16, 32, 64 or 128: chunks
// are permuted within 128 bytes so that the eight rows ldmatrix reads lie in different banks.
template <int D> __device__ __forceinline__ int swizzled(int row, int chunk) {
    const int mix = D >= 64 ? row & 7 : D == 32 ? (row >> 1) & 3 : (row >> 2) & 1;
    return row * D + (chunk ^ mix) * 8;
}
// Where a lane reads a (16, 16) fragment at the tile's first row and column. Columns from 16 k on:
// exclusive or with 16 k, a step within the permuted chunks; rows from 16 r on: 16 r D more.
// across, ldmatrix_x4: a left operand. across, ldmatrix_x4_trans: the right operands of two
// products, from a tile that has their rows as rows. along, ldmatrix_x4: the same from a tile that
// has their columns as rows. Columns 0 .. 7 of right operands come in b[0..1], 8 .. 15 in b[2..3].
template <int D> __device__ __forceinline__ int across_offset() {
    const int lane = threadIdx.x & 31;
    return swizzled<D>(lane & 15, lane >> 4);
}
template <int D> __device__ __forceinline__ int along_offset() {
    const int lane = threadIdx.x & 31;
    return swizzled<D>((lane >> 4) * 8 + (lane & 7), (lane >> 3) & 1);
}
#endif
