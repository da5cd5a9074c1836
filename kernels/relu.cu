// relu: y = max(x, 0), NaN where x is.  backward: dx = dy where y > 0, else 0.
//
// y, x, dx, dy: size numbers of type real, 16-byte aligned; y may be x, dx may be dy.
// A thread handles one pack of 16 bytes at a time and strides over the grid; the last, partial
// pack number by number. Any grid of any block.
// Bytes: forward 2, backward 3 times the array. The same bits every time.
// Reference: gpu_microgpt/ops/reference/relu.py. Test: tests/cuda/test_relu.py.
#include "device.cuh"

// Not fmaxf, which would hide a NaN.
__device__ __forceinline__ float rectified(float x) { return x < 0.0f ? 0.0f : x; }

extern "C" __global__ void __launch_bounds__(256) relu(real* y, const real* x, int64_t size) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * PACK;
    int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    for (; i + PACK <= size; i += step) {
        float v[PACK];
        load_pack(v, x + i);
#pragma unroll
        for (int k = 0; k < PACK; k++) v[k] = rectified(v[k]);
        store_pack(y + i, v);
    }
    for (; i < size; i++) y[i] = to_real(rectified(to_float(x[i])));
}

extern "C" __global__ void __launch_bounds__(256) relu_backward(real* dx, const real* dy,
                                                                const real* y, int64_t size) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * PACK;
    int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    for (; i + PACK <= size; i += step) {
        float gradient[PACK], out[PACK];
        load_pack(gradient, dy + i);
        load_pack(out, y + i);
#pragma unroll
        for (int k = 0; k < PACK; k++) gradient[k] = out[k] > 0.0f ? gradient[k] : 0.0f;
        store_pack(dx + i, gradient);
    }
    for (; i < size; i++) dx[i] = to_real(to_float(y[i]) > 0.0f ? to_float(dy[i]) : 0.0f);
}
