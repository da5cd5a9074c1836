// rmsnorm: y = x rstd, rstd = 1 / sqrt(mean(x^2) + EPS), a row.
// backward: dx = rstd (dy - y mean(dy y)); rmsnorm_backward_add adds that to dx.
// Forward is also fused with what comes before it:
//   embedding_rmsnorm: x = wte[tokens] + wpe[positions], which is not stored (nor rounded to real);
//   add_rmsnorm:       x = residual + branch, stored, and the norm is of what was stored.
//
// x, y, dx, dy, residual, branch (rows, channels), wte (V, channels), wpe (T, channels): real, rows
// one after another, arrays 16-byte aligned. rstd (rows,) float. tokens, positions (rows,) int, in
// range. y may be x; dx may be dy; x may be residual or branch.
// A team holds a row in registers: read once, written once. -D constants:
//   TEAM: its threads: 32, a warp of a block of up to 256; or 256, a block.
//   HELD: numbers of a row that a thread holds, of each array; channels <= TEAM HELD.
//   PACKED 1: 16 bytes an access, channels a multiple of PACK; 0: a number an access.
// Neighbouring threads take neighbouring packs; teams stride over the rows: any grid of fewer than
// 2^32 threads.
// Bytes: rmsnorm 2 arrays, embedding_rmsnorm 1 and what the caches do not hold of the tables,
// add_rmsnorm 4, backward 3, backward_add 4; rstd beside them. The same bits every time.
// Reference: gpu_microgpt/ops/reference/rmsnorm.py. Test: tests/cuda/test_rmsnorm.py.
#include "device.cuh"

constexpr float EPS = 1e-5f;
constexpr int W = PACKED ? PACK : 1;

// A thread's part of a row: HELD / W times W neighbouring numbers; zeros beyond the row's end.
struct Part { float v[HELD / W][W]; };

// Where in the row the thread's k-th W numbers are.
__device__ __forceinline__ int place(int k) {
    return (k * TEAM + static_cast<int>(threadIdx.x % TEAM)) * W;
}
__device__ __forceinline__ Part read(const real* row, int channels) {
    Part p = {};
#pragma unroll
    for (int k = 0; k < HELD / W; k++) {
        if (place(k) >= channels) continue;
#if PACKED
        load_pack(p.v[k], row + place(k));
#else
        p.v[k][0] = to_float(row[place(k)]);
#endif
    }
    return p;
}
__device__ __forceinline__ void write(real* row, const Part& p, int channels) {
#pragma unroll
    for (int k = 0; k < HELD / W; k++) {
        if (place(k) >= channels) continue;
#if PACKED
        store_pack(row + place(k), p.v[k]);
#else
        row[place(k)] = to_real(p.v[k][0]);
#endif
    }
}
// f(a, b), number by number.
template <class F> __device__ __forceinline__ Part map(const Part& a, const Part& b, F f) {
    Part p;
#pragma unroll
    for (int k = 0; k < HELD / W; k++)
#pragma unroll
        for (int j = 0; j < W; j++) p.v[k][j] = f(a.v[k][j], b.v[k][j]);
    return p;
}
// mean(a b) over the row, in every thread of the team.
__device__ __forceinline__ float mean(const Part& a, const Part& b, int channels) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < HELD / W; k++)
#pragma unroll
        for (int j = 0; j < W; j++) sum += a.v[k][j] * b.v[k][j];
#if TEAM > 32
    __shared__ float part[32];
    return block_sum(sum, part) / static_cast<float>(channels);
#else
    return warp_sum(sum) / static_cast<float>(channels);
#endif
}

// A team's rows: for (n = first_row(); n < rows; n += row_step()).
__device__ __forceinline__ int first_row() {
    return static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / TEAM);
}
__device__ __forceinline__ int row_step() {
    return static_cast<int>(gridDim.x * blockDim.x / TEAM);
}
__device__ __forceinline__ size_t offset(int row, int channels) {
    return static_cast<size_t>(row) * channels;
}

// The norm of row n, which is x.
__device__ __forceinline__ void norm(real* y, float* rstd, const Part& x, int n, int channels) {
    const float r = inverse_root(mean(x, x, channels) + EPS);
    if (place(0) == 0) rstd[n] = r;
    const Part out = map(x, x, [r](float a, float) { return a * r; });
    write(y + offset(n, channels), out, channels);
}

extern "C" __global__ void __launch_bounds__(256) rmsnorm(real* y, float* rstd, const real* x,
                                                              int rows, int channels) {
    for (int n = first_row(); n < rows; n += row_step())
        norm(y, rstd, read(x + offset(n, channels), channels), n, channels);
}

extern "C" __global__ void __launch_bounds__(256) embedding_rmsnorm(
    real* y, float* rstd, const int* tokens, const int* positions, const real* wte, const real* wpe,
    int rows, int channels) {
    for (int n = first_row(); n < rows; n += row_step()) {
        const Part token = read(wte + offset(tokens[n], channels), channels);
        const Part position = read(wpe + offset(positions[n], channels), channels);
        const Part x = map(token, position, [](float a, float b) { return a + b; });
        norm(y, rstd, x, n, channels);
    }
}

extern "C" __global__ void __launch_bounds__(256) add_rmsnorm(
    real* x, real* y, float* rstd, const real* branch, const real* residual, int rows,
    int channels) {
    for (int n = first_row(); n < rows; n += row_step()) {
        const Part a = read(residual + offset(n, channels), channels);
        const Part b = read(branch + offset(n, channels), channels);
        const Part sum = map(a, b, [](float u, float v) { return to_float(to_real(u + v)); });
        write(x + offset(n, channels), sum, channels);
        norm(y, rstd, sum, n, channels);
    }
}

// dx of row n.
__device__ __forceinline__ Part gradient(const Part& dy, const Part& y, float r, int channels) {
    const float m = mean(dy, y, channels);
    return map(dy, y, [=](float g, float v) { return r * (g - v * m); });
}

extern "C" __global__ void __launch_bounds__(256) rmsnorm_backward(
    real* dx, const real* dy, const real* y, const float* rstd, int rows, int channels) {
    for (int n = first_row(); n < rows; n += row_step()) {
        const size_t start = offset(n, channels);
        const Part upstream = read(dy + start, channels), out = read(y + start, channels);
        write(dx + start, gradient(upstream, out, rstd[n], channels), channels);
    }
}

extern "C" __global__ void __launch_bounds__(256) rmsnorm_backward_add(
    real* dx, const real* dy, const real* y, const float* rstd, int rows, int channels) {
    for (int n = first_row(); n < rows; n += row_step()) {
        const size_t start = offset(n, channels);
        const Part upstream = read(dy + start, channels), out = read(y + start, channels);
        const Part before = read(dx + start, channels);
        const Part branch = gradient(upstream, out, rstd[n], channels);
        const Part sum = map(before, branch, [](float a, float b) { return a + b; });
        write(dx + start, sum, channels);
    }
}
