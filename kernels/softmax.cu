// softmax: y = exp(x - max(x)) / sum(exp(x - max(x))) over each row.
// backward: dx = y (dy - sum(dy y)).
//
// y, x, dx, dy: (rows, width) of type real, rows `stride` numbers apart, each array its own; y may
// be x, dx may be dy. Columns from width on are neither read nor written.
// A row is shared by a team: a warp (softmax_warp, any block of whole warps) or a block
// (softmax_block, up to 512 threads). A thread takes numbers rank, rank + team, ... of a row: packs
// of 16 bytes where `vector` (every row 16-byte aligned), else single numbers. Any grid.
// The first pass keeps a running maximum and sum, the second reads the row again, from L1 or L2.
// Bytes: forward 2, backward 3 times the array. Sums in a fixed order: the same bits every time.
// Reference: gpu_microgpt/ops/reference/softmax.py. Test: tests/cuda/test_softmax.py.
#include "device.cuh"

#define LOWEST -3.402823466e38f  // not above any logit, and exp(LOWEST - LOWEST) is 1

// Numbers at .. at + WIDTH of a row; `fill` from its end on.
template <int WIDTH>
__device__ __forceinline__ void load(float (&v)[WIDTH], const real* row, int64_t at, int end,
                                     float fill) {
    if constexpr (WIDTH > 1)
        if (at + WIDTH <= end) return load_pack(v, row + at);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) v[k] = at + k < end ? to_float(row[at + k]) : fill;
}
template <int WIDTH>
__device__ __forceinline__ void store(real* row, const float (&v)[WIDTH], int64_t at, int end) {
    if constexpr (WIDTH > 1)
        if (at + WIDTH <= end) return store_pack(row + at, v);
#pragma unroll
    for (int k = 0; k < WIDTH; k++)
        if (at + k < end) row[at + k] = to_real(v[k]);
}

template <bool BLOCK, int WIDTH>
__device__ __forceinline__ void forward(real* y, const real* x, int rows, int width,
                                        int64_t y_stride, int64_t x_stride, float* part) {
    const Team<BLOCK> team;
    const int first = team.rank * WIDTH, step = team.size * WIDTH;
    for (size_t row = team.row; row < static_cast<size_t>(rows); row += team.rows) {
        const real* from = x + row * x_stride;
        real* to = y + row * y_stride;
        float largest = LOWEST, sum = 0.0f, v[WIDTH];
        for (int64_t at = first; at < width; at += step) {
            load<WIDTH>(v, from, at, width, -INFINITY);
            float top = largest, piece = 0.0f;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) top = fmaxf(top, v[k]);
#pragma unroll
            for (int k = 0; k < WIDTH; k++) piece += expf(v[k] - top);
            sum = sum * expf(largest - top) + piece;
            largest = top;
        }
        const float top = team_max<BLOCK>(largest, part);
        const float scale = 1.0f / team_sum<BLOCK>(sum * expf(largest - top), part);
        for (int64_t at = first; at < width; at += step) {
            load<WIDTH>(v, from, at, width, -INFINITY);
#pragma unroll
            for (int k = 0; k < WIDTH; k++) v[k] = expf(v[k] - top) * scale;
            store<WIDTH>(to, v, at, width);
        }
    }
}

template <bool BLOCK, int WIDTH>
__device__ __forceinline__ void backward(real* dx, const real* dy, const real* y, int rows,
                                         int width, int64_t dx_stride, int64_t dy_stride,
                                         int64_t y_stride, float* part) {
    const Team<BLOCK> team;
    const int first = team.rank * WIDTH, step = team.size * WIDTH;
    for (size_t row = team.row; row < static_cast<size_t>(rows); row += team.rows) {
        const real *gradient = dy + row * dy_stride, *out = y + row * y_stride;
        real* to = dx + row * dx_stride;
        float dot = 0.0f, g[WIDTH], p[WIDTH];
        for (int64_t at = first; at < width; at += step) {
            load<WIDTH>(g, gradient, at, width, 0.0f);
            load<WIDTH>(p, out, at, width, 0.0f);
#pragma unroll
            for (int k = 0; k < WIDTH; k++) dot += g[k] * p[k];
        }
        dot = team_sum<BLOCK>(dot, part);
        for (int64_t at = first; at < width; at += step) {
            load<WIDTH>(g, gradient, at, width, 0.0f);
            load<WIDTH>(p, out, at, width, 0.0f);
#pragma unroll
            for (int k = 0; k < WIDTH; k++) g[k] = p[k] * (g[k] - dot);
            store<WIDTH>(to, g, at, width);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) softmax_warp(real* y, const real* x, int rows,
                                                               int width, int64_t y_stride,
                                                               int64_t x_stride, int vector) {
    if (vector) forward<false, PACK>(y, x, rows, width, y_stride, x_stride, nullptr);
    else forward<false, 1>(y, x, rows, width, y_stride, x_stride, nullptr);
}

extern "C" __global__ void __launch_bounds__(512, 1) softmax_block(real* y, const real* x, int rows,
                                                                 int width, int64_t y_stride,
                                                                 int64_t x_stride, int vector) {
    __shared__ float part[32];
    if (vector) forward<true, PACK>(y, x, rows, width, y_stride, x_stride, part);
    else forward<true, 1>(y, x, rows, width, y_stride, x_stride, part);
}

extern "C" __global__ void __launch_bounds__(256)
softmax_backward_warp(real* dx, const real* dy, const real* y, int rows, int width,
                      int64_t dx_stride, int64_t dy_stride, int64_t y_stride, int vector) {
    if (vector)
        backward<false, PACK>(dx, dy, y, rows, width, dx_stride, dy_stride, y_stride, nullptr);
    else backward<false, 1>(dx, dy, y, rows, width, dx_stride, dy_stride, y_stride, nullptr);
}

extern "C" __global__ void __launch_bounds__(512, 1)
softmax_backward_block(real* dx, const real* dy, const real* y, int rows, int width,
                       int64_t dx_stride, int64_t dy_stride, int64_t y_stride, int vector) {
    __shared__ float part[32];
    if (vector)
        backward<true, PACK>(dx, dy, y, rows, width, dx_stride, dy_stride, y_stride, part);
    else backward<true, 1>(dx, dy, y, rows, width, dx_stride, dy_stride, y_stride, part);
}
