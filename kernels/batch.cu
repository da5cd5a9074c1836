// batch_order, batch_gather: the batch of any step, made on the device from the whole text.
//
// batch_order: which samples. Samples counter * B .. + B - 1 of an endless sequence, by one of
//   epochs  (half >= 1)      sample n is permutation n / choices of range(choices) at n % choices:
//                            a Feistel network of 12 rounds over 4^half >= choices values, round
//                            function Philox at (right, round, epoch, ORDER), cycle walking
//   random  (half = 0)       floor(choices (w + 0.5) / 2^32), w Philox at (n, 0, ORDER), in double
//   table   (table not null) table[n % choices]
// shortest first, of equals the earlier first. A sample is a window (lengths null: block_size rows
// from item * block_size on, or at random from item on) or a document (starts, lengths).
//   out: sources (B,) int64, where each begins in the text; offsets (B + 1,) int32; count (1,)
//   int32 = rows = targets.
//   in: counter (1,) int64; starts int64, lengths, table int32, a number each for a sample.
//   One block, a thread a sample. Dynamic shared memory: for documents, 8 bytes for each of B
//   rounded up to a power of two. Limits: B <= 4096, block_size < 2^20, fewer than 2^27 rows and
//   2^31 samples.
// batch_gather: their rows. tokens[row] = flat[source + t], targets[row] = flat[source + t + 1],
//   positions[row] = t, all (capacity,) int32; flat uint16. Rows from offsets[B] on: 0, -1, 0.
//   Of an empty sequence (equal offsets) nothing is read.
//   grid (sequences, parts of one): a thread a row, and its share of the padding. Any grid, block.
//
// Bytes: 16 a row (4 read); far less than the launches cost. The same bits every time.
// Reference: gpu_microgpt/data/dataset.py, data/batch.py, rng.py. Test: tests/cuda/test_batch.py.
#include "device.cuh"

#define ORDER 1  // rng.py's Stream.ORDER
#define ROUNDS 12
#define MAX_HALF 9  // the round function is tabulated for inputs of up to so many bits

// Position `value` of the permutation of range(size); round_function(round, right) has half bits.
template <class F>
__device__ __forceinline__ uint32_t permuted(uint32_t value, uint32_t size, int half,
                                             const F& round_function) {
    const uint32_t mask = (1u << half) - 1;
    do {
        uint32_t left = value >> half, right = value & mask;
#pragma unroll 1
        for (int round = 0; round < ROUNDS; round++) {
            const uint32_t next = left ^ round_function(round, right);
            left = right;
            right = next;
        }
        value = left << half | right;
    } while (value >= size);
    return value;
}

// put(b, item) for the B samples from number `first` on, each epoch shuffled anew. Where the batch
// lies in one or two small epochs, their round functions are tabulated by all threads: a walk of
// 12 rounds is then 12 look-ups one after the other, else 12 times Philox.
template <class Put>
__device__ __forceinline__ void draw_epochs(const Put& put, uint64_t first, int batch_size,
                                            uint64_t choices, int half, uint32_t key0,
                                            uint32_t key1) {
    __shared__ uint16_t table[ROUNDS << MAX_HALF];
    const uint64_t start = first / choices, end = (first + batch_size - 1) / choices + 1;
    const uint32_t size = static_cast<uint32_t>(choices), mask = (1u << half) - 1;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    if (half > MAX_HALF || end - start > 2) {
        for (int b = thread; b < batch_size; b += threads) {
            const uint64_t number = first + b, epoch = number / choices;
            const auto computed = [&](int round, uint32_t right) {
                const uint32_t step = static_cast<uint32_t>(epoch);
                return philox(make_uint4(right, round, step, ORDER), key0, key1).x & mask;
            };
            put(b, permuted(static_cast<uint32_t>(number % choices), size, half, computed));
        }
        return;
    }
    for (uint64_t epoch = start; epoch < end; epoch++) {
        __syncthreads();  // the table of the epoch before is done with
        for (int i = thread; i < ROUNDS << half; i += threads) {
            const uint4 at = make_uint4(i & mask, i >> half, static_cast<uint32_t>(epoch), ORDER);
            table[i] = static_cast<uint16_t>(philox(at, key0, key1).x & mask);
        }
        __syncthreads();
        for (int b = thread; b < batch_size; b += threads) {
            const uint64_t index = first + b - epoch * choices;  // of another epoch: too large
            const auto tabulated = [&](int round, uint32_t right) {
                return static_cast<uint32_t>(table[(round << half) + right]);
            };
            if (index < choices)
                put(b, permuted(static_cast<uint32_t>(index), size, half, tabulated));
        }
    }
}

// The same for independent draws, or for a given order.
template <class Put>
__device__ __forceinline__ void draw_each(const Put& put, uint64_t first, int batch_size,
                                          uint64_t choices, const int* order, uint32_t key0,
                                          uint32_t key1) {
    for (int b = static_cast<int>(threadIdx.x); b < batch_size; b += blockDim.x) {
        const uint64_t number = first + b;
        if (order) {
            put(b, order[number % choices]);
        } else {
            const uint4 at = make_uint4(static_cast<uint32_t>(number),
                                        static_cast<uint32_t>(number >> 32), 0, ORDER);
            const double uniform = (philox(at, key0, key1).x + 0.5) * 0x1p-32;
            put(b, static_cast<int64_t>(uniform * static_cast<double>(choices)));
        }
    }
}

// Bitonic sort (Batcher 1968) of `padded` numbers, a power of two, by the block.
__device__ __forceinline__ void sort(uint64_t* keys, int padded) {
    for (int size = 2; size <= padded; size *= 2) {
        for (int apart = size / 2; apart; apart /= 2) {
            __syncthreads();
            for (int pair = static_cast<int>(threadIdx.x); pair < padded / 2; pair += blockDim.x) {
                const int i = 2 * pair - (pair & (apart - 1));
                const uint64_t a = keys[i], b = keys[i + apart];
                if ((a > b) == ((i & size) == 0)) {
                    keys[i] = b;
                    keys[i + apart] = a;
                }
            }
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(512, 1)
    batch_order(int64_t* sources, int* offsets, int* count, const int64_t* counter,
                const int64_t* starts, const int* lengths, const int* table, int batch_size,
                int block_size, int64_t choices, int half, uint32_t key0, uint32_t key1) {
    DYN_SHARED(uint64_t, keys);  // length << 44 | b << 32 | item: sorted, they carry the item along
    __shared__ int part[32];
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const uint64_t first = static_cast<uint64_t>(*counter) * batch_size;
    const auto put = [&](int b, int64_t item) {
        if (lengths) {
            keys[b] = static_cast<uint64_t>(lengths[item]) << 44 |
                      static_cast<uint64_t>(b) << 32 | static_cast<uint64_t>(item);
        } else {
            sources[b] = item * (half ? block_size : 1);
            offsets[b + 1] = (b + 1) * block_size;
        }
    };
    if (half && !table)
        draw_epochs(put, first, batch_size, choices, half, key0, key1);
    else
        draw_each(put, first, batch_size, choices, table, key0, key1);

    int rows = lengths ? 0 : batch_size * block_size;
    if (lengths) {
        int padded = 1;
        while (padded < batch_size) padded *= 2;
        for (int b = batch_size + thread; b < padded; b += threads) keys[b] = ~uint64_t(0);
        sort(keys, padded);
        for (int base = 0; base < batch_size; base += threads) {
            const int b = base + thread;
            const uint64_t key = b < batch_size ? keys[b] : 0;
            const int length = static_cast<int>(key >> 44);
            int total;
            const int end = rows + length + block_before(length, part, total);
            if (b < batch_size) {
                sources[b] = starts[static_cast<uint32_t>(key)];
                offsets[b + 1] = end;
            }
            rows += total;
        }
    }
    if (thread == 0) {
        offsets[0] = 0;
        *count = rows;
    }
}

extern "C" __global__ void __launch_bounds__(256)
    batch_gather(int* tokens, int* targets, int* positions, const uint16_t* flat,
                 const int64_t* sources, const int* offsets, int batch_size, int capacity) {
    const int step = static_cast<int>(gridDim.y * blockDim.x);
    const int first = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
    for (int s = static_cast<int>(blockIdx.x); s < batch_size; s += gridDim.x) {
        const int begin = offsets[s], length = offsets[s + 1] - begin;
        const uint16_t* source = flat + sources[s];
        for (int t = first; t < length; t += step) {
            tokens[begin + t] = source[t];
            targets[begin + t] = source[t + 1];
            positions[begin + t] = t;
        }
    }
    const int threads = static_cast<int>(gridDim.x) * step;
    for (int row = offsets[batch_size] + static_cast<int>(blockIdx.x) * step + first;
         row < capacity; row += threads) {
        tokens[row] = 0;
        targets[row] = -1;
        positions[row] = 0;
    }
}
