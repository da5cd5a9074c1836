// cross_entropy: loss = log(sum(exp(x))) - x[target], zero where the target is -1.
// backward: dx = scale (softmax(x) - onehot(target)), zero where the target is -1, and the losses.
// add_losses: total += sum(losses), in float64.
//
// logits x and dlogits dx: (rows, vocab) of type real, rows `stride` numbers apart, each array its
// own; dx may be x. Padding columns vocab .. stride of dx become zero, those of x are never read.
// losses (rows,) float; targets (rows,) int; the scale is `scale`, times *factor where that is not
// null: a CUDA graph's number of targets changes.
// A row is shared by a team: a warp (_warp, any block of whole warps) or a block (_block, _shared,
// up to 1024 threads). A thread takes numbers rank, rank + team, ... of a row: packs of 16 bytes
// where `vector` (every row 16-byte aligned), else single numbers. Any grid.
// The first pass keeps a running maximum and sum. The second takes the row from where the first
// left it: _shared (whole packs only) from ceil(vocab / PACK) * 16 bytes of shared memory, where a
// thread finds what it put there itself; the others from the row again, out of L1 or L2.
// The thread with the target's logit writes the loss: another might find a gradient in its place.
// Bytes: x read once, dx written once; add_losses the losses, by one block. FLOPs: 10 a number.
// Sums in a fixed order: the same bits every time.
// Reference: gpu_microgpt/ops/reference/cross_entropy.py. Test: tests/cuda/test_cross_entropy.py.
#include "device.cuh"

#define LOWEST -3.402823466e38f  // not above any logit, and exp(LOWEST - LOWEST) is 1

__device__ __forceinline__ float exponential(float x) {
#if REAL_BF16
    return exp2f(x * 1.4426950408889634f);  // two instructions; the result is rounded to 8 bits
#else
    return expf(x);
#endif
}

template <int WIDTH> __device__ __forceinline__ void load(float (&v)[WIDTH], const real* from) {
    if constexpr (WIDTH > 1) load_pack(v, from);
    else v[0] = to_float(*from);
}
// The last numbers of a row, at .. end; then -inf, which adds nothing.
template <int WIDTH>
__device__ __forceinline__ void load_last(float (&v)[WIDTH], const real* row, int64_t at, int end) {
#pragma unroll
    for (int k = 0; k < WIDTH; k++) v[k] = at + k < end ? to_float(row[at + k]) : -INFINITY;
}
template <int WIDTH> __device__ __forceinline__ void store(real* to, const float (&v)[WIDTH]) {
    if constexpr (WIDTH > 1) store_pack(to, v);
    else *to = to_real(v[0]);
}

// Of a thread's numbers, then of a row: the largest, and the sum of exp(x - largest).
struct Total {
    float largest = LOWEST, sum = 0.0f;

    template <int N, int WIDTH> __device__ __forceinline__ void add(const float (&v)[N][WIDTH]) {
        float top = largest, piece = 0.0f;
#pragma unroll
        for (int k = 0; k < N * WIDTH; k++) top = fmaxf(top, v[k / WIDTH][k % WIDTH]);
#pragma unroll
        for (int k = 0; k < N * WIDTH; k++) piece += exponential(v[k / WIDTH][k % WIDTH] - top);
        sum = sum * exponential(largest - top) + piece;
        largest = top;
    }
    template <bool BLOCK> __device__ __forceinline__ void over_team(float* part) {
        const float top = team_max<BLOCK>(largest, part);
        sum = team_sum<BLOCK>(sum * exponential(largest - top), part);
        largest = top;
    }
};

// A row's total; the row is left in `kept`, if so wanted.
template <bool BLOCK, int WIDTH, bool KEEP>
__device__ __forceinline__ Total total_of(const real* row, real* kept, int vocab,
                                          const Team<BLOCK>& team, float* part) {
    constexpr int N = WIDTH > 1 ? 4 : 8;  // loads on their way at once
    const int64_t step = team.size * WIDTH;
    Total total;
    int64_t at = team.rank * WIDTH;
    for (; at + (N - 1) * step + WIDTH <= vocab; at += N * step) {
        float v[N][WIDTH];
#pragma unroll
        for (int n = 0; n < N; n++) load(v[n], row + at + n * step);
#pragma unroll
        for (int n = 0; KEEP && n < N; n++) store(kept + at + n * step, v[n]);
        total.add(v);
    }
    for (; at < vocab; at += step) {
        float v[1][WIDTH];
        if (at + WIDTH <= vocab) load(v[0], row + at);
        else load_last(v[0], row, at, vocab);
        if constexpr (KEEP) store(kept + at, v[0]);
        total.add(v);
    }
    total.template over_team<BLOCK>(part);
    return total;
}

template <bool BLOCK, int WIDTH>
__device__ __forceinline__ void forward(float* losses, const real* logits, const int* targets,
                                        int rows, int vocab, int64_t stride, float* part) {
    const Team<BLOCK> team;
    for (size_t row = team.row; row < static_cast<size_t>(rows); row += team.rows) {
        const real* x = logits + row * stride;
        const int target = targets[row];
        float loss = 0.0f;
        if (target >= 0) {  // of all the team alike
            const Total total = total_of<BLOCK, WIDTH, false>(x, nullptr, vocab, team, part);
            loss = logf(total.sum) + total.largest - to_float(x[target]);
        }
        if (team.rank == 0) losses[row] = loss;
    }
}

// What a row's gradient and loss come from.
struct Slope {
    const Total total;
    const float scale, factor;  // factor = scale / sum
    const int target;
    float* const loss;

    // From logits to gradients, of the numbers from `at`.
    template <int WIDTH>
    __device__ __forceinline__ void apply(float (&v)[WIDTH], int64_t at) const {
        const int64_t hit = target - at;
        const bool here = hit >= 0 && hit < WIDTH;
        if (here) {
            float x = 0.0f;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) x = k == hit ? v[k] : x;
            *loss = logf(total.sum) + total.largest - x;
        }
#pragma unroll
        for (int k = 0; k < WIDTH; k++) v[k] = exponential(v[k] - total.largest) * factor;
        if (here) {
#pragma unroll
            for (int k = 0; k < WIDTH; k++) v[k] -= k == hit ? scale : 0.0f;
        }
    }
};

// dx may be x, the row's logits: a thread reads what it is about to overwrite, and nothing else.
template <bool BLOCK, int WIDTH>
__device__ __forceinline__ void gradient(real* dx, const real* x, const Slope& slope,
                                         const Team<BLOCK>& team, int vocab, int stride) {
    const int64_t step = team.size * WIDTH;
    int64_t at = team.rank * WIDTH;
    float v[WIDTH];
    for (; at + WIDTH <= vocab; at += step) {
        load(v, x + at);
        slope.apply(v, at);
        store(dx + at, v);
    }
    for (; at < stride; at += step) {
        load_last(v, x, at, vocab);
        slope.apply(v, at);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) v[k] = at + k < vocab ? v[k] : 0.0f;  // not even NaN
        store(dx + at, v);
    }
}

template <bool BLOCK, int WIDTH, bool KEEP>
__device__ __forceinline__ void backward(real* dlogits, float* losses, const real* logits,
                                         const int* targets, const float* factor, int rows,
                                         int vocab, int64_t dx_stride, int64_t x_stride,
                                         float scale, real* kept, float* part) {
    const Team<BLOCK> team;
    if (factor) scale *= *factor;
    for (size_t row = team.row; row < static_cast<size_t>(rows); row += team.rows) {
        const real* x = logits + row * x_stride;
        real* dx = dlogits + row * dx_stride;
        const int target = targets[row], stride = static_cast<int>(dx_stride);
        if (target >= 0) {  // of all the team alike
            const Total total = total_of<BLOCK, WIDTH, KEEP>(x, kept, vocab, team, part);
            const Slope slope{total, scale, scale / total.sum, target, losses + row};
            gradient<BLOCK, WIDTH>(dx, KEEP ? kept : x, slope, team, vocab, stride);
        } else {
            const float zeros[WIDTH] = {};
            for (int64_t at = team.rank * WIDTH; at < stride; at += team.size * WIDTH)
                store(dx + at, zeros);
            if (team.rank == 0) losses[row] = 0.0f;
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
cross_entropy_warp(float* losses, const real* logits, const int* targets, int rows, int vocab,
                   int64_t stride, int vector) {
    if (vector) forward<false, PACK>(losses, logits, targets, rows, vocab, stride, nullptr);
    else forward<false, 1>(losses, logits, targets, rows, vocab, stride, nullptr);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
cross_entropy_block(float* losses, const real* logits, const int* targets, int rows, int vocab,
                    int64_t stride, int vector) {
    __shared__ float part[32];
    if (vector) forward<true, PACK>(losses, logits, targets, rows, vocab, stride, part);
    else forward<true, 1>(losses, logits, targets, rows, vocab, stride, part);
}

extern "C" __global__ void __launch_bounds__(256)
cross_entropy_backward_warp(real* dlogits, float* losses, const real* logits, const int* targets,
                            const float* factor, int rows, int vocab, int64_t dx_stride,
                            int64_t x_stride, float scale, int vector) {
    if (vector)
        backward<false, PACK, false>(dlogits, losses, logits, targets, factor, rows, vocab,
                                     dx_stride, x_stride, scale, nullptr, nullptr);
    else
        backward<false, 1, false>(dlogits, losses, logits, targets, factor, rows, vocab,
                                  dx_stride, x_stride, scale, nullptr, nullptr);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
cross_entropy_backward_block(real* dlogits, float* losses, const real* logits, const int* targets,
                             const float* factor, int rows, int vocab, int64_t dx_stride,
                             int64_t x_stride, float scale, int vector) {
    __shared__ float part[32];
    if (vector)
        backward<true, PACK, false>(dlogits, losses, logits, targets, factor, rows, vocab,
                                    dx_stride, x_stride, scale, nullptr, part);
    else
        backward<true, 1, false>(dlogits, losses, logits, targets, factor, rows, vocab,
                                 dx_stride, x_stride, scale, nullptr, part);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
cross_entropy_backward_shared(real* dlogits, float* losses, const real* logits, const int* targets,
                              const float* factor, int rows, int vocab, int64_t dx_stride,
                              int64_t x_stride, float scale) {
    DYN_SHARED(real, kept);
    __shared__ float part[32];
    backward<true, PACK, true>(dlogits, losses, logits, targets, factor, rows, vocab, dx_stride,
                               x_stride, scale, kept, part);
}

// One block of whole warps; losses 16-byte aligned.
extern "C" __global__ void __launch_bounds__(1024, 1) add_losses(double* total, const float* losses,
                                                              int64_t size) {
    __shared__ double part[32];
    const int64_t step = static_cast<int64_t>(blockDim.x) * 4;
    double sum = 0.0;
    int64_t i = static_cast<int64_t>(threadIdx.x) * 4;
#pragma unroll 4
    for (; i + 4 <= size; i += step) {
        float v[4];
        load_pack(v, losses + i);
        sum += (static_cast<double>(v[0]) + v[1]) + (static_cast<double>(v[2]) + v[3]);
    }
    for (; i < size; i++) sum += losses[i];
    sum = block_sum(sum, part);
    if (threadIdx.x == 0) *total += sum;
}
