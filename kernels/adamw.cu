// adamw: one step of Adam with decoupled weight decay over flat buffers, as the reference has it:
//   g = clip grads; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
//   p = p (1 - rate weight_decay) - rate (m / c1) / (sqrt(v / c2) + eps); copy = p.
// global_norm: norm = sqrt(sum(grads^2)), in two launches. clip_scale: min(1, max_norm / norm).
//
// params p, m, v, grads: size floats; copy: as many bf16, or null; all 16-byte aligned.
// scalars (4,) double, in device memory as they change from step to step within a CUDA graph:
// rate, c1 = 1 - beta1^t, c2 = 1 - beta2^t, clip. norm, scale and part: double, part (gridDim.x,).
// A thread handles four numbers at a time and strides over the grid; the last, partial four one by
// one. Any grid of whole warps; sum_squares' grid, which root_of_sum is told, decides the bits.
// Bytes: adamw reads 16 and writes 12 a number, 14 with the copy; global_norm reads 4.
// Sums in a fixed order: the same bits every time on the same grid.
// Reference: gpu_microgpt/ops/reference/adamw.py. Test: tests/cuda/test_adamw.py.
#include "device.cuh"

__device__ __forceinline__ float sum_of_squares(const float (&g)[4]) {
    return (g[0] * g[0] + g[1] * g[1]) + (g[2] * g[2] + g[3] * g[3]);
}

// part[block] = the block's share of sum(grads^2): four squares in float, the rest in double.
extern "C" __global__ void __launch_bounds__(256) sum_squares(double* part, const float* grads,
                                                              int64_t size) {
    __shared__ double of_warp[32];
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * 4;
    int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    double sum = 0.0;
    for (; i + 3 * step + 4 <= size; i += 4 * step) {  // four loads on their way at once
        float g[4][4];
#pragma unroll
        for (int n = 0; n < 4; n++) load_pack(g[n], grads + i + n * step);
#pragma unroll
        for (int n = 0; n < 4; n++) sum += sum_of_squares(g[n]);
    }
    for (; i + 4 <= size; i += step) {
        float g[4];
        load_pack(g, grads + i);
        sum += sum_of_squares(g);
    }
    for (; i < size; i++) sum += grads[i] * grads[i];
    sum = block_sum(sum, of_warp);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

// One block of whole warps.
extern "C" __global__ void __launch_bounds__(1024) root_of_sum(double* norm, const double* part,
                                                               int parts) {
    __shared__ double of_warp[32];
    const int step = static_cast<int>(blockDim.x);
    double sum = 0.0;
    for (int i = static_cast<int>(threadIdx.x); i < parts; i += step) sum += part[i];
    sum = block_sum(sum, of_warp);
    if (threadIdx.x == 0) *norm = sqrt(sum);
}

// One thread.
extern "C" __global__ void __launch_bounds__(32) clip_scale(double* scale, const double* norm,
                                                            double max_norm) {
    *scale = fmin(1.0, max_norm / fmax(*norm, 1e-12));
}

// What the step multiplies by and adds, out of `scalars`.
struct Factors { float beta1, gradient, beta2, root, eps, rate, keep; };

__device__ __forceinline__ Factors factors(const double* scalars, double beta1, double beta2,
                                           double eps, double weight_decay) {
    const double rate = scalars[0], root = sqrt(scalars[2]), clip = scalars[3];
    Factors f;
    f.beta1 = static_cast<float>(beta1);
    f.gradient = static_cast<float>(clip * (1.0 - beta1));
    f.beta2 = static_cast<float>(beta2);
    f.root = static_cast<float>(clip * sqrt(1.0 - beta2));  // before squaring: no overflow
    f.eps = static_cast<float>(eps * root);
    f.rate = static_cast<float>(rate * root / scalars[1]);
    f.keep = static_cast<float>(1.0 - rate * weight_decay);
    return f;
}
__device__ __forceinline__ void update(float& p, float& m, float& v, float g, const Factors& f) {
    m = m * f.beta1 + g * f.gradient;
    v = v * f.beta2 + (g * f.root) * (g * f.root);
    p = p * f.keep - m / (sqrtf(v) + f.eps) * f.rate;
}

extern "C" __global__ void __launch_bounds__(256)
adamw(float* params, float* m, float* v, bf16* copy, const float* grads, const double* scalars,
      int64_t size, double beta1, double beta2, double eps, double weight_decay) {
    __shared__ Factors shared;  // one thread's work: many GPUs are slow in double
    if (threadIdx.x == 0) shared = factors(scalars, beta1, beta2, eps, weight_decay);
    __syncthreads();
    const Factors f = shared;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * 4;
    int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    for (; i + 4 <= size; i += step) {
        float p[4], mean[4], square[4], g[4];
        load_pack(p, params + i);
        load_pack(mean, m + i);
        load_pack(square, v + i);
        load_pack(g, grads + i);
#pragma unroll
        for (int k = 0; k < 4; k++) update(p[k], mean[k], square[k], g[k], f);
        store_pack(params + i, p);
        store_pack(m + i, mean);
        store_pack(v + i, square);
        if (copy)
            *reinterpret_cast<uint2*>(copy + i) =
                make_uint2(pack_bf16(p[0], p[1]), pack_bf16(p[2], p[3]));
    }
    for (; i < size; i++) {
        update(params[i], m[i], v[i], grads[i], f);
        if (copy) copy[i] = to_bf16(params[i]);
    }
}
