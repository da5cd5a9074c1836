// advance, update_scalars: what a training step counts and looks up, in device memory, so that the
// step can be one CUDA graph.
//
// advance, behind each micro-batch: counter += 1, targets += count.
// update_scalars, behind the last of a step. Loss, gradients and their norm come as sums over the
// step's targets. With s = counter / grad_accum, steps counting from 1:
//   scalars = rate, 1 - beta1^s, 1 - beta2^s, clip / targets
//     clip = min(1, max_norm / (norm / targets)); 1 where max_norm is 0
//     rate, the first w = `warmup` of `total` steps climbing to lr, p = (s - 1 - w) / (total - w):
//       s <= w    lr s / w
//       constant  lr
//       linear    min_lr + (lr - min_lr) (1 - p)
//       cosine    min_lr + (lr - min_lr) (1 + cos(pi p)) / 2
//   records[s % ring] = loss / targets, norm / targets, targets
//   loss = 0, targets = 0
// A step without targets moves no weight: rate and clip are 0; its record has loss and norm NaN.
//
// counter, targets (1,) int64; count (1,) int32; scalars (4,), records (ring, 3), loss, norm (1,)
// double. advance is one thread. update_scalars is two, for the two powers, of which the first does
// all else. Bytes: some 100; the time is a launch and a power in double.
// The same bits every time. Limits: counts below 2^53.
// Reference: gpu_microgpt/schedule.py, optim.py, step.py, ops/reference/adamw.py (clip_scale).
// Test: tests/cuda/test_step.py.
#include "device.cuh"

#define CONSTANT 0  // as ops/cuda/step.py numbers them
#define LINEAR 1

extern "C" __global__ void __launch_bounds__(32) advance(int64_t* counter, int64_t* targets,
                                                         const int* count) {
    *counter += 1;
    *targets += *count;
}

// `step` counts from 0.
__device__ __forceinline__ double learning_rate(int64_t step, int64_t total, int64_t warmup,
                                                int schedule, double lr, double min_lr) {
    if (step < warmup) return lr * static_cast<double>(step + 1) / static_cast<double>(warmup);
    if (schedule == CONSTANT) return lr;
    const double p = static_cast<double>(step - warmup) / static_cast<double>(total - warmup);
    // not cos(pi p), which keeps an array in local memory for arguments of any size
    const double decay = schedule == LINEAR ? 1.0 - p : (1.0 + cospi(p)) / 2.0;
    return min_lr + (lr - min_lr) * decay;
}

// NaN gives 1, as in the reference: not fmin and fmax, which drop a NaN one by one.
__device__ __forceinline__ double clip_of(double norm, double max_norm) {
    const double scale = max_norm / (norm < 1e-12 ? 1e-12 : norm);
    return max_norm != 0.0 && scale < 1.0 ? scale : 1.0;
}

extern "C" __global__ void __launch_bounds__(32)
    update_scalars(double* scalars, double* records, double* loss, int64_t* targets,
                   const double* norm, const int64_t* counter, int ring, int64_t grad_accum,
                   int64_t total, int64_t warmup, int schedule, double lr, double min_lr,
                   double beta1, double beta2, double max_norm) {
    const int64_t step = *counter / grad_accum;
    const double beta = threadIdx.x == 0 ? beta1 : beta2;
    scalars[1 + threadIdx.x] = 1.0 - pow(beta, static_cast<double>(step));
    if (threadIdx.x) return;
    const bool any = *targets != 0;
    const double count = any ? static_cast<double>(*targets) : nan("");
    const double mean_norm = *norm / count;
    scalars[0] = any ? learning_rate(step - 1, total, warmup, schedule, lr, min_lr) : 0.0;
    scalars[3] = any ? clip_of(mean_norm, max_norm) / count : 0.0;
    double* record = records + step % ring * 3;
    record[0] = *loss / count;
    record[1] = mean_norm;
    record[2] = any ? count : 0.0;
    *loss = 0.0;
    *targets = 0;
}
