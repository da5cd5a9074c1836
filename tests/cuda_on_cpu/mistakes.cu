// mistakes: kernels that do what no GPU forgives, for the emulator to find; never run them on one.
// Test: test_mistakes.py.
#include "device.cuh"

#define FULL 0xffffffffu

// -------------------------------------------------------------------------------------- memory
extern "C" __global__ void write_at(float* x, int i) { x[i] = 1.0f; }
extern "C" __global__ void read_at(float* out, const float* x, int i) { *out = x[i]; }
extern "C" __global__ void misaligned(float4* out, const float* x, int i) {
    *out = *reinterpret_cast<const float4*>(x + i);
}
extern "C" __global__ void misaligned_copy(float4* out, const float* x, int i) {
    __shared__ float4 s;
    cp_async_16(&s, x + i, 16);
    cp_async_commit();
    cp_async_wait<0>();
    *out = s;
}
extern "C" __global__ void static_shared_at(float* x, int i) {
    __shared__ float s[8];
    s[i] = 1.0f;
    x[0] = s[i & 7];
}
extern "C" __global__ void dynamic_shared_at(float* x, int i) {
    DYN_SHARED(float, s);
    s[i] = 1.0f;
    x[0] = s[0];
}
extern "C" __global__ void copy_to_global(float4* out, const float4* x) {
    cp_async_16(out, x, 16);
    cp_async_commit();
    cp_async_wait<0>();
}
extern "C" __global__ void unset_shared(float* x) {
    __shared__ float s[8];
    DYN_SHARED(float, d);
    x[0] = s[5];
    x[1] = d[5];
}
extern "C" __global__ void unset_local(float* x, int i) {
    float v[4];
    if (i > 4) v[i & 3] = 1.0f;
    x[0] = v[i & 3];
}
// Shared memory of block 0 must be nothing to the others.
extern "C" __global__ void leaked_shared(float* out, float one) {
    __shared__ float s;
    DYN_SHARED(float, d);
    if (blockIdx.x == 0) s = *d = one;
    out[2 * blockIdx.x] = s;
    out[2 * blockIdx.x + 1] = *d;
}
extern "C" __global__ void overflow(int* x, int i) { x[0] = i * 1000000; }

// ------------------------------------------------------------------------------------- barriers
extern "C" __global__ void barrier_of_some(int* x) {  // two lines, one barrier
    if (threadIdx.x < 32) {
        __syncthreads();
        x[0] = 1;
    } else {
        x[1] = 2;
        __syncthreads();
    }
}
extern "C" __global__ void early_exit(int* x) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    x[threadIdx.x] = 1;
}
extern "C" __global__ void unequal_barriers(int* x) {  // warp 1 comes once more than warp 0
    for (unsigned i = 0; i <= threadIdx.x / 32; i++) __syncthreads();
    x[0] = 1;
}
extern "C" __global__ void absent_lanes(int* x) {
    if (threadIdx.x < 20) x[threadIdx.x] = __shfl_sync(FULL, 1, 0);
}
extern "C" __global__ void mask_without_caller(int* x) {
    x[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0);
}
extern "C" __global__ void different_operations(int* x) {
    if (threadIdx.x & 1) x[threadIdx.x] = __shfl_sync(FULL, 1, 0);
    else x[threadIdx.x] = __any_sync(FULL, 1);
}
extern "C" __global__ void waits_for_no_one(unsigned* x) {  // nobody sets it
    while (ld_acquire(x) == 0) __nanosleep(20);
}
extern "C" __global__ void waits_for_later_block(unsigned* x) {  // hangs where it is not resident
    if (blockIdx.x == 0 && threadIdx.x == 0)
        while (ld_acquire(x) == 0) __nanosleep(20);
    if (blockIdx.x == 1 && threadIdx.x == 0) atomic_add_acq_rel(x, 1u);
}
extern "C" __global__ void endless(float* x) {
    while (x[0] < 1e30f) x[0] *= 0.5f;
}

// ---------------------------------------------------------------------------------------- races
extern "C" __global__ void no_syncwarp(int* out, const int* in) {
    __shared__ int s[32];
    s[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s[31 - threadIdx.x];
}
extern "C" __global__ void no_syncthreads(int* out, const int* in) {  // 64 threads
    __shared__ int s[64];
    s[threadIdx.x] = in[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void no_second_barrier(int* out, const int* in) {  // s is filled too early
    __shared__ int s[64];
    for (int k = 0; k < 2; k++) {
        s[threadIdx.x] = in[64 * k + threadIdx.x];
        __syncthreads();
        out[64 * k + threadIdx.x] = s[63 - threadIdx.x];
    }
}
extern "C" __global__ void no_copy_wait(int4* out, const int4* in) {
    __shared__ int4 s[32];
    cp_async_16(s + threadIdx.x, in + threadIdx.x, 16);
    cp_async_commit();
    out[threadIdx.x] = s[threadIdx.x];
    cp_async_wait<0>();
}
extern "C" __global__ void copy_left_behind(int4* out, const int4* in) {
    __shared__ int4 s[32];
    cp_async_16(s + threadIdx.x, in + threadIdx.x, 16);
    out[threadIdx.x] = in[threadIdx.x];
}
// Blocks add to one number: fine one after the other, a race as soon as they run side by side.
extern "C" __global__ void add_between_blocks(unsigned* sum) {
    if (threadIdx.x == 0) *sum += blockIdx.x + 1;
}
