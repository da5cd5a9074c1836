// maths.h: what a GPU computes with less care than a CPU: functions it does not round correctly,
// and subnormal numbers.
#pragma once
#include <cmath>

namespace emu {

// The result next to the exact one, or up to `ulps` units in the last place beside it. How far is
// decided by the bits of x alone, so that the same arguments have the same result each time. Zero,
// infinity and NaN are what they are, and so is what becomes of 0.
template <class T, class Wide> T inexact(Wide exact, T x, int ulps) {
    typedef std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> Bits;
    const T nearest = static_cast<T>(exact);
    Bits from, to;
    memcpy(&from, &x, sizeof from), memcpy(&to, &nearest, sizeof to);
    const uint64_t mixed = from * 0x9E3779B97F4A7C15ull >> 40;
    to += static_cast<Bits>(mixed % (2 * static_cast<unsigned>(ulps) + 1)) - static_cast<Bits>(ulps);
    T beside;
    memcpy(&beside, &to, sizeof beside);
    return x != 0 && std::isnormal(nearest) && std::isnormal(beside) ? beside : nearest;
}

// Units in the last place: the largest errors the CUDA C++ Programming Guide tells of ("Mathematical
// Functions"). Not among them, as compiled without fast maths: + - * / fmaf sqrtf sqrt.
inline float rsqrtf(float x) { return inexact(1 / std::sqrt(static_cast<double>(x)), x, 2); }
inline float exp2f(float x) { return inexact(std::exp2(static_cast<double>(x)), x, 2); }
inline float expf(float x) { return inexact(std::exp(static_cast<double>(x)), x, 2); }
inline float logf(float x) { return inexact(std::log(static_cast<double>(x)), x, 1); }
inline double cospi(double x) { return inexact(std::cos(3.14159265358979323846264L * x), x, 2); }
inline double pow(double x, double y) {
    return inexact(std::pow(static_cast<long double>(x), y), y, 2);
}

// While it lives, subnormal numbers are zeros to this thread, as operands and as results: kernels
// are compiled with -ftz=true. (There for float alone; here for double too.)
class SubnormalsAreZeros {
#if defined(__x86_64__)
    static constexpr unsigned FLUSH = 0x8040;
    static unsigned mode() { return __builtin_ia32_stmxcsr(); }
    static void set(unsigned mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
    static constexpr unsigned FLUSH = 1u << 24;
    static unsigned mode() { return __builtin_aarch64_get_fpcr(); }
    static void set(unsigned mode) { __builtin_aarch64_set_fpcr(mode); }
#else  // they stay
    static constexpr unsigned FLUSH = 0;
    static unsigned mode() { return 0; }
    static void set(unsigned) {}
#endif
    const unsigned before_ = mode();

public:
    SubnormalsAreZeros() { set(before_ | FLUSH); }
    ~SubnormalsAreZeros() { set(before_); }
    SubnormalsAreZeros(const SubnormalsAreZeros&) = delete;
    SubnormalsAreZeros& operator=(const SubnormalsAreZeros&) = delete;
};

}  // namespace emu
