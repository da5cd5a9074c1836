// intrinsics.h: CUDA's functions, and the wrappers of device.cuh, as kernels call them.
#pragma once

#define EMU_LINE int line = __builtin_LINE()  // of the caller

// -------------------------------------------------------------------------------------- barriers
inline void __syncthreads(EMU_LINE) { emu::syncthreads(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_LINE) {
    emu::warp_op("__syncwarp", line, mask, nullptr, 0, nullptr, 0, nullptr, nullptr, true);
}
inline void named_bar_sync(int id, int threads, EMU_LINE) {
    emu::named_barrier("named_bar_sync", id, threads, line, true);
}
inline void named_bar_arrive(int id, int threads, EMU_LINE) {
    emu::named_barrier("named_bar_arrive", id, threads, line, false);
}
inline void __nanosleep(unsigned) { emu::yield(); }

// ------------------------------------------------------------------------------- shuffles, votes
template <class T>
inline T __shfl_sync(unsigned mask, T v, int from, int width = 32, EMU_LINE) {
    return emu::shuffle("__shfl_sync", line, emu::INDEXED, mask, v, from, width);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_LINE) {
    return emu::shuffle("__shfl_up_sync", line, emu::UP, mask, v, static_cast<int>(by), width);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_LINE) {
    return emu::shuffle("__shfl_down_sync", line, emu::DOWN, mask, v, static_cast<int>(by), width);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32, EMU_LINE) {
    return emu::shuffle("__shfl_xor_sync", line, emu::XOR, mask, v, by, width);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMU_LINE) {
    return emu::vote("__ballot_sync", line, emu::BALLOT, mask, p != 0);
}
inline int __any_sync(unsigned mask, int p, EMU_LINE) {
    return static_cast<int>(emu::vote("__any_sync", line, emu::ANY, mask, p != 0));
}
inline int __all_sync(unsigned mask, int p, EMU_LINE) {
    return static_cast<int>(emu::vote("__all_sync", line, emu::ALL, mask, p != 0));
}

// ------------------------------------------------------------ asynchronous copies, tensor cores
inline void cp_async_16(void* to, const void* from, int bytes, EMU_LINE) {
    emu::cp_async(line, to, from, bytes);
}
inline void cp_async_commit() { emu::cp_async_end_group(); }
template <int N> inline void cp_async_wait() { emu::cp_async_wait_until(N); }
inline void ldmatrix_x4(uint32_t* r, const void* row, EMU_LINE) {
    emu::ldmatrix("ldmatrix_x4", r, row, false, line);
}
inline void ldmatrix_x4_trans(uint32_t* r, const void* row, EMU_LINE) {
    emu::ldmatrix("ldmatrix_x4_trans", r, row, true, line);
}
inline void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, EMU_LINE) {
    uint32_t in[10], out[4];
    memcpy(in, a, 16), memcpy(in + 4, b, 8), memcpy(in + 6, d, 16);
    emu::warp_op("mma_m16n8k16", line, 0xffffffffu, in, 10, out, 4, emu::mma_lanes, nullptr);
    memcpy(d, out, 16);
}

// ------------------------------------------------------------------------------ memory, atomics
inline unsigned ld_acquire(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline unsigned atomic_add_acq_rel(unsigned* p, unsigned v) {
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
template <class T> inline T atomicAdd(T* p, std::common_type_t<T> v) {
    T old, now;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do now = static_cast<T>(old + v);
    while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

// ----------------------------------------------------------------------------------------- maths
#define rsqrtf emu::rsqrtf  // macros, as the C library may have functions of these names
#define exp2f emu::exp2f
#define expf emu::expf
#define logf emu::logf
#define cospi emu::cospi
#define pow emu::pow
template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <class To, class From> inline To emu_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To r;
    memcpy(&r, &x, sizeof r);
    return r;
}
inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emu_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
