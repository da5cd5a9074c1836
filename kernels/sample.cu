// sample, sample_philox: the next token of each row, drawn from exp(logits / temperature).
//
// tokens[s] = the first id at which the running sum of the kept weights exceeds u times their sum.
// Kept are the top_k largest logits (0: all), of those the fewest likeliest whose weights add up to
// top_p of theirs; of equal logits the lower id comes first. temperature 0: the largest logit.
//   tokens (S,) int32; logits (S, V) real, rows `stride` numbers apart, left as they are.
//   sample: u = uniforms[s], float64 in [0, 1). sample_philox: u = (w + 0.5) / 2^32, w the first
//   word of Philox at (positions[s], 0, numbers[s], SAMPLE), both (S,) int32: text and place in it.
//   Limits: V <= 65536, 0 < top_p. Any grid of blocks of whole warps, a row a block.
//
// A weight exp((x - largest) / temperature) is counted in units of 2^-47: sums over a row are exact
// in 64 bits, whatever their order. Instead of sorting, the last token that is kept is found from
// the bits of its logit, 11 at a time: a histogram of what logits weigh (or, for top_k, of how many
// they are), its sums from the top, the bin in which they exceed the limit, and so on inside it.
// Bytes: the row, 3 times plain, 3 times more for top_k and for top_p each (2 in bfloat16), all but
// the first from a cache; not in step with the other rows, so a token costs the time of one row.
// The same bits every time. Reference: gpu_microgpt/ops/reference/sample.py.
// Test: tests/cuda/test_sample.py.
#include "device.cuh"

#define SAMPLE 4  // rng.py's Stream.SAMPLE
#define DIGIT 11  // bits of a logit looked at together
#define BINS (1 << DIGIT)
#define SLOTS (BINS + BINS / 32)  // neighbours of neighbouring threads lie in different banks
#define UNIT 0x1p47f
#define KEY_BITS static_cast<int>(8 * sizeof(real))

struct Shared {
    uint32_t low[SLOTS], high[SLOTS];  // halves of the histogram's 64-bit sums
    uint64_t part[32], before;
    int found;
};

// Logits as integers in the same order, in the upper KEY_BITS bits; both zeros are one.
#define KEY_MASK (0xffffffffu << (32 - KEY_BITS))
__device__ __forceinline__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return (bits >> 31 ? ~bits : bits | 0x80000000u) & KEY_MASK;
}
__device__ __forceinline__ float logit_of(uint32_t key) {
    return __uint_as_float((key >> 31 ? key ^ 0x80000000u : ~key) & KEY_MASK);
}

struct Row {
    const real* logits;
    int vocab;
    float largest, scale;  // the scale: log2(e) / temperature

    __device__ __forceinline__ uint64_t weight(float x) const {  // NaN weighs as the largest
        const float units = exp2f(fminf((x - largest) * scale, 0.0f)) * (UNIT * 0x1p-32f);
        const uint32_t high = static_cast<uint32_t>(units);  // two conversions: to 64 bits is slow
        const float rest = units - static_cast<float>(high);
        return static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(rest * 0x1p32f);
    }
    // The logits of ids first .. first + PACK - 1; how many of those there are.
    __device__ __forceinline__ int load(float (&v)[PACK], int first) const {
        const int count = max(0, min(PACK, vocab - first));
        if (count == PACK && reinterpret_cast<size_t>(logits) % 16 == 0) {
            load_pack(v, logits + first);
        } else {
#pragma unroll
            for (int k = 0; k < PACK; k++) v[k] = k < count ? to_float(logits[first + k]) : 0.0f;
        }
        return count;
    }
    // f(logit, id) for this thread's share of the row.
    template <class F> __device__ __forceinline__ void each(const F& f) const {
        const int step = static_cast<int>(blockDim.x) * PACK;
        for (int first = static_cast<int>(threadIdx.x) * PACK; first < vocab; first += step) {
            float v[PACK];
            const int count = load(v, first);
#pragma unroll
            for (int k = 0; k < PACK; k++)
                if (k < count) f(v[k], first + k);
        }
    }
};

// The tokens that come, largest logit and then lowest id first, no later than this one.
struct Kept {
    uint32_t key;
    int id;
    __device__ __forceinline__ bool has(uint32_t k, int i) const {
        return k > key || (k == key && i <= id);
    }
};

__device__ __forceinline__ uint64_t block_max(uint64_t v, uint64_t* part) {
    const unsigned lane = threadIdx.x & 31, warps = blockDim.x >> 5;
#pragma unroll
    for (int o = 16; o; o >>= 1) v = max(v, __shfl_xor_sync(0xffffffffu, v, o));
    __syncthreads();  // an earlier use of part is over
    if (lane == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    v = lane < warps ? part[lane] : 0;
#pragma unroll
    for (int o = 16; o; o >>= 1) v = max(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

// The first id at which the sum of value(logit, id) exceeds `limit`, which is below the whole sum.
template <class F>
__device__ __forceinline__ int find_id(const Row& row, uint64_t limit, Shared& shared,
                                       const F& value) {
    const int step = static_cast<int>(blockDim.x) * PACK;
    uint64_t sum = 0;
    for (int base = 0; base < row.vocab && sum <= limit; base += step) {
        const int first = base + static_cast<int>(threadIdx.x) * PACK;
        float v[PACK];
        const int count = row.load(v, first);
        uint64_t mine = 0, total;
#pragma unroll
        for (int k = 0; k < PACK; k++) mine += k < count ? value(v[k], first + k) : 0;
        uint64_t before = sum + block_before(mine, shared.part, total);
        if (before <= limit && limit < before + mine) {
#pragma unroll
            for (int k = 0; k < PACK; k++) {
                const uint64_t next = before + (k < count ? value(v[k], first + k) : 0);
                if (before <= limit && limit < next) shared.found = first + k;
                before = next;
            }
        }
        sum += total;
    }
    __syncthreads();
    return shared.found;
}

// The tokens, largest first, up to the one at which the sum of their values exceeds `limit`, and
// that sum. The value depends on the logit only.
template <class F>
__device__ __forceinline__ Kept cut(const Row& row, uint64_t limit, Shared& shared, uint64_t& sum,
                                    const F& value) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int share = (BINS + threads - 1) / threads;  // bins of a thread, from the top
    uint32_t key = 0;                                  // of the last one kept, as far as known
    sum = 0;                                           // of all with larger known bits
#pragma unroll 1
    for (int left = 32; left > 32 - KEY_BITS;) {
        const int digit = left < DIGIT ? left : DIGIT;
        left -= digit;
        for (int i = thread; i < SLOTS; i += threads) shared.low[i] = shared.high[i] = 0;
        __syncthreads();
        row.each([&](float x, int) {
            const uint32_t bin = (key_of(x) - key) >> left;
            if (bin >> digit) return;  // of other known bits
            const uint64_t v = value(x);
            const uint32_t slot = bin + bin / 32, low = static_cast<uint32_t>(v);
            const uint32_t old = atomicAdd(&shared.low[slot], low);
            const uint32_t high = static_cast<uint32_t>(v >> 32) + (old + low < low);
            if (high) atomicAdd(&shared.high[slot], high);
        });
        __syncthreads();
        const auto bin_sum = [&](int bin) {
            const int slot = bin + bin / 32;
            return static_cast<uint64_t>(shared.high[slot]) << 32 | shared.low[slot];
        };
        const int top = BINS - 1 - thread * share, end = max(-1, top - share);
        uint64_t mine = 0, total;
        for (int bin = top; bin > end; bin--) mine += bin_sum(bin);
        uint64_t before = sum + block_before(mine, shared.part, total);
        if (before <= limit && limit < before + mine) {
            int bin = top;
            while (before + bin_sum(bin) <= limit) before += bin_sum(bin--);
            shared.found = bin;
            shared.before = before;
        }
        __syncthreads();
        key += static_cast<uint32_t>(shared.found) << left;
        sum = shared.before;
    }
    const uint64_t each = value(logit_of(key)), equals = (limit - sum) / each;
    sum += (equals + 1) * each;
    const auto equal = [&](float x, int) -> uint64_t { return key_of(x) == key; };
    return {key, find_id(row, equals, shared, equal)};
}

__device__ __forceinline__ int draw(const real* logits, int vocab, double uniform,
                                    float temperature, int top_k, double top_p, Shared& shared) {
    Row row = {logits, vocab, 0.0f, 1.4426950408889634f / temperature};
    uint64_t largest = 0;  // of equal logits the one of the lowest id
    row.each([&](float x, int id) {
        largest = max(largest, static_cast<uint64_t>(key_of(x)) << 32 | ~static_cast<uint32_t>(id));
    });
    largest = block_max(largest, shared.part);
    if (temperature == 0.0f) return static_cast<int>(~static_cast<uint32_t>(largest));
    row.largest = logit_of(static_cast<uint32_t>(largest >> 32));

    Kept kept = {0, vocab};
    uint64_t sum;
    if (0 < top_k && top_k < vocab)
        kept = cut(row, top_k - 1, shared, sum, [](float) -> uint64_t { return 1; });
    const auto kept_weight = [&](float x, int id) {
        return kept.has(key_of(x), id) ? row.weight(x) : 0;
    };
    uint64_t mine = 0;
    row.each([&](float x, int id) { mine += kept_weight(x, id); });
    sum = block_sum(mine, shared.part);
    if (top_p < 1) {
        const uint64_t enough = static_cast<uint64_t>(ceil(top_p * static_cast<double>(sum)));
        const uint64_t limit = min(max(enough, uint64_t(1)), sum) - 1;
        // the nucleus ends among those already kept, which come first
        kept = cut(row, limit, shared, sum, [&](float x) { return row.weight(x); });
    }
    const uint64_t limit = static_cast<uint64_t>(uniform * static_cast<double>(sum));
    return find_id(row, min(limit, sum - 1), shared, kept_weight);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    sample(int* tokens, const real* logits, const double* uniforms, int rows, int vocab,
           int64_t stride, float temperature, int top_k, double top_p) {
    __shared__ Shared shared;
    for (int s = static_cast<int>(blockIdx.x); s < rows; s += gridDim.x) {
        const int token = draw(logits + s * static_cast<size_t>(stride), vocab, uniforms[s],
                               temperature, top_k, top_p, shared);
        if (threadIdx.x == 0) tokens[s] = token;
    }
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    sample_philox(int* tokens, const real* logits, const int* numbers, const int* positions,
                  int rows, int vocab, int64_t stride, uint32_t key0, uint32_t key1,
                  float temperature, int top_k, double top_p) {
    __shared__ Shared shared;
    for (int s = static_cast<int>(blockIdx.x); s < rows; s += gridDim.x) {
        const uint4 at = make_uint4(positions[s], 0, numbers[s], SAMPLE);
        const double uniform = (philox(at, key0, key1).x + 0.5) * 0x1p-32;
        const int token = draw(logits + s * static_cast<size_t>(stride), vocab, uniform,
                               temperature, top_k, top_p, shared);
        if (threadIdx.x == 0) tokens[s] = token;
    }
}
