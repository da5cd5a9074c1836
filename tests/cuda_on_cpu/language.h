// language.h: what CUDA C++ has and C++ has not: keywords, built-in variables, vector types.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

#if defined(__SANITIZE_ADDRESS__)  // gives plain statics red zones, thread-locals none
#define __shared__ static
#else  // the module's thread-local block then is its static shared memory, and nothing else
#define __shared__ static thread_local __attribute__((used))
#endif
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::run.current->block->shared)

#define warpSize 32
#define threadIdx (emu::run.current->thread)
#define blockIdx (emu::run.current->block->index)
#define blockDim (emu::run.config.block)
#define gridDim (emu::run.config.grid)

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

#define EMU_VECTORS(T, name)                                                                       \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                             \
    struct alignas(sizeof(T) > 4 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };                  \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                     \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(float, float)
EMU_VECTORS(double, double)
EMU_VECTORS(int, int)
EMU_VECTORS(unsigned, uint)
EMU_VECTORS(short, short)
EMU_VECTORS(unsigned short, ushort)
#undef EMU_VECTORS

struct bf16 { uint16_t bits; };

inline float to_float(bf16 x) {
    const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
inline bf16 to_bf16(float f) {  // to nearest even; every NaN becomes 0x7fff
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
inline uint32_t pack_bf16(float low, float high) {
    return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}
