// forbid, emit: what the writing of a token counts and keeps, in device memory, so that a token of
// many texts can be one CUDA graph.
//
// forbid: logits[s, token] = -inf; it is then not sampled.
// emit: the sampled tokens become text. For each sequence s
//   out[positions[s] % ring, s] = ended[s] ? -1 : tokens[s]
//   ended[s] |= tokens[s] == stop, positions[s] += 1, lengths[s] += 1
//   the token `stop` itself is still written, what is behind it is -1; stop -1: never.
//
// logits (S, V) real, rows `stride` numbers apart; out (ring, S), ended, lengths, positions, tokens
// (S,) int32; positions count the new text, lengths what a KV cache holds.
// A thread a sequence, striding over the grid. Any grid of any block.
// Bytes: forbid 2 or 4 a sequence, emit 32; far less than the launches cost. The same bits every
// time.
// Reference: gpu_microgpt/generate.py. Test: tests/cuda/test_decode.py.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(128) forbid(real* logits, int size, int64_t stride,
                                                         int token) {
    const int step = static_cast<int>(gridDim.x * blockDim.x);
    for (int s = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); s < size; s += step)
        logits[s * stride + token] = to_real(-INFINITY);
}

extern "C" __global__ void __launch_bounds__(128) emit(int* out, int* ended, int* lengths,
                                                       int* positions, const int* tokens,
                                                       int ring, int size, int stop) {
    const int step = static_cast<int>(gridDim.x * blockDim.x);
    for (int s = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); s < size; s += step) {
        const int token = tokens[s], position = positions[s];
        out[static_cast<size_t>(position % ring) * size + s] = ended[s] ? -1 : token;
        if (token == stop) ended[s] = 1;
        positions[s] = position + 1;
        lengths[s] += 1;
    }
}
