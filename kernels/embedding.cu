// embedding: x = wte[tokens] + wpe[positions].
// backward: dwte[v] = sum of dy over the rows whose token is v; dwpe[t] over those of position t.
//
// x, dy (rows, channels), wte (vocab, channels), wpe (block_size, channels): real. dwte, dwpe: as
// wte, wpe but float. tokens, positions (rows,) int, in range. All row after row, 16-byte aligned;
// packs of 16 bytes where channels is a multiple of a pack, else single numbers.
// Forward: threadIdx.y a row, threadIdx.x its packs. Backward is three kernels (the first twice
// where there are many ids), each for both tables; all four stride: any grid.
// 1. embedding_sort: rows in the order of their ids, equal ids in the order of rows: (keys, rows).
//    A block for each value of a digit of the id: it counts the lower digits, which says where its
//    own begin, then keeps its own in order. One pass sorts by the whole id; or two, first by its
//    lower bits, then by the others. The last leaves where each id starts. Whole warps.
// 2. embedding_sum: the sorted order is cut into slices of `slice` entries, a group of threads
//    (threadIdx.y) each, a run of equal ids after the other. Runs wholly inside go to the table;
//    the slice's first and last run may go on in its neighbours: to parts[slice][0 or 1].
// 3. embedding_combine: a block an id: the parts of its run added up, or zeros if it has no row.
// A frequent id is many slices, so it is spread over the GPU like the others.
// Bytes: forward 1 array and what caches do not hold of the tables. Backward: dy twice, the tables
// once (twice with add), parts (4 channels floats a slice) twice; each block of a sort all the ids.
// Sums are in an order given by the ids alone: the same bits every time, on every GPU.
// Reference: gpu_microgpt/ops/reference/embedding.py. Test: tests/cuda/test_embedding.py.
#include "device.cuh"

constexpr int DEPTH = 8;       // loads that a thread has in flight; a slice is a multiple of it
constexpr int STRETCH = 1024;  // consecutive entries that a warp of embedding_sort looks at

extern "C" __global__ void __launch_bounds__(256) embedding(
    real* x, const int* tokens, const int* positions, const real* wte, const real* wpe, int rows,
    int channels) {
    const int first = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);
    const int lane = static_cast<int>(threadIdx.x), lanes = static_cast<int>(blockDim.x);
    for (int n = first; n < rows; n += static_cast<int>(gridDim.x * blockDim.y)) {
        const real* token = wte + static_cast<size_t>(tokens[n]) * channels;
        const real* position = wpe + static_cast<size_t>(positions[n]) * channels;
        real* out = x + static_cast<size_t>(n) * channels;
        if (channels % PACK == 0) {
            for (int i = lane * PACK; i < channels; i += lanes * PACK) {
                float a[PACK], b[PACK];
                load_pack(a, token + i);
                load_pack(b, position + i);
#pragma unroll
                for (int k = 0; k < PACK; k++) a[k] += b[k];
                store_pack(out + i, a);
            }
        } else {
            for (int i = lane; i < channels; i += lanes)
                out[i] = to_real(to_float(token[i]) + to_float(position[i]));
        }
    }
}

// --------------------------------------------------------------------------------- backward: sort
// One table's entries. in_rows null: entry i is row i.
struct Sort {
    int *keys, *rows;
    const int *in_keys, *in_rows;
    int count, shift, mask;

    __device__ __forceinline__ int digit(int i) const { return (in_keys[i] >> shift) & mask; }
};

// How many entries have a lower digit; every thread of the block gets it.
__device__ __forceinline__ int count_lower(const Sort& s, int digit, int* part) {
    int lower = 0;
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x); i < s.count; i += static_cast<int>(blockDim.x))
        lower += s.digit(i) < digit;
    return block_sum(lower, part);
}

// Copies the entries of this digit, in order, to place `next` on; returns the place after them.
__device__ __forceinline__ int keep(const Sort& s, int digit, int next, int* part) {
    const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31);
    const int warps = static_cast<int>(blockDim.x >> 5);
    for (int first = 0; first < s.count; first += warps * STRETCH) {
        const int mine = first + warp * STRETCH;
        unsigned match = 0;  // bit b of lane k: entry mine + 32 k + b has the digit
#pragma unroll 8
        for (int k = 0; k < 32; k++) {
            const int i = mine + 32 * k + lane;
            const unsigned hits = __ballot_sync(~0u, i < s.count && s.digit(i) == digit);
            if (lane == k) match = hits;
        }
        const int matches = __popc(match);
        int up_to = matches;  // those of this lane and of the lanes before
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int below = __shfl_up_sync(~0u, up_to, o);
            if (lane >= o) up_to += below;
        }
        __syncthreads();  // an earlier use of part is over
        if (lane == 31) part[warp] = up_to;
        __syncthreads();
        int place = next + up_to - matches;
        for (int w = 0; w < warps; w++) {
            if (w < warp) place += part[w];
            next += part[w];
        }
        for (; match; match &= match - 1, place++) {
            const int i = mine + 32 * lane + __ffs(static_cast<int>(match)) - 1;
            s.keys[place] = s.in_keys[i];
            s.rows[place] = s.in_rows ? s.in_rows[i] : i;
        }
    }
    return next;
}

// starts[id] for the ids from `low` to before `high`, whose entries are begin .. end - 1.
__device__ __forceinline__ void mark_starts(int* starts, const int* keys, int begin, int end,
                                            int low, int high) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = begin + thread; i <= end; i += threads) {
        const int last = i == end ? high - 1 : keys[i];
        for (int id = i == begin ? low : keys[i - 1] + 1; id <= last; id++) starts[id] = i;
    }
}

// keys, rows, in_rows (2, count): of tokens, then of positions; in_rows may be null. starts
// (vocab + 1 + block_size + 1,) in the last pass, else null: entries of id v are from starts[v] to
// before starts[v + 1]. Block (d, table), striding, takes digit d of (id >> shift) & mask.
extern "C" __global__ void __launch_bounds__(1024) embedding_sort(
    int* keys, int* rows, int* starts, const int* tokens, const int* positions, const int* in_rows,
    int count, int vocab, int block_size, int shift, int mask) {
    __shared__ int part[32];
    const bool second = blockIdx.y;
    const size_t skip = second ? count : 0;
    const Sort s = {keys + skip, rows + skip, second ? positions : tokens,
                    in_rows ? in_rows + skip : nullptr, count, shift, mask};
    const int size = second ? block_size : vocab;
    const int digits = min(mask, (size - 1) >> shift) + 1;
    if (starts && second) starts += vocab + 1;
    for (int d = static_cast<int>(blockIdx.x); d < digits; d += static_cast<int>(gridDim.x)) {
        const int begin = count_lower(s, d, part);
        const int end = keep(s, d, begin, part);
        __syncthreads();  // the block's entries are there
        if (!starts) continue;
        mark_starts(starts, s.keys, begin, end, d << shift, min(size, (d + 1) << shift));
        if (d == digits - 1 && threadIdx.x == 0) starts[size] = end;
    }
}

// --------------------------------------------------------------------------------- backward: sums
// W numbers on their way from memory: as they are there, which takes the fewest registers.
template <int W> struct Raw { uint4 bits; };
template <> struct Raw<1> { real number; };

template <int W> __device__ __forceinline__ Raw<W> fetch(const real* p) {
    return *reinterpret_cast<const Raw<W>*>(p);
}
template <int W> __device__ __forceinline__ void unpack(float (&v)[W], const Raw<W>& raw) {
    const real* numbers = reinterpret_cast<const real*>(&raw);
    if constexpr (W == 1) v[0] = to_float(*numbers);
    else load_pack(v, numbers);
}
// v += W floats at p.
template <int W> __device__ __forceinline__ void plus(float (&v)[W], const float* p) {
    if constexpr (W == 1) {
        v[0] += *p;
    } else {
#pragma unroll
        for (int k = 0; k < W; k += 4) {
            float four[4];
            load_pack(four, p + k);
#pragma unroll
            for (int j = 0; j < 4; j++) v[k + j] += four[j];
        }
    }
}
// W floats to p, or added to those there; v becomes zero.
template <int W> __device__ __forceinline__ void put(float* p, float (&v)[W], bool add) {
    if (add) plus(v, p);
    if constexpr (W == 1) {
        *p = v[0];
    } else {
#pragma unroll
        for (int k = 0; k < W; k += 4) {
            const float four[4] = {v[k], v[k + 1], v[k + 2], v[k + 3]};
            store_pack(p + k, four);
        }
    }
#pragma unroll
    for (int k = 0; k < W; k++) v[k] = 0.0f;
}

// The runs of one slice: `count` entries, whose keys and rows are in shared memory.
template <int W>
__device__ __forceinline__ void sum_slice(float* dw, float* parts, const real* dy, const int* keys,
                                          const int* rows, int count, int channels, bool add) {
    const int lane = static_cast<int>(threadIdx.x), lanes = static_cast<int>(blockDim.x);
    for (int c = lane * W; c < channels; c += lanes * W) {
        float sum[W] = {};
        int id = keys[0];  // of the present run
        float* to = parts;
        for (int i = 0; i < count; i += DEPTH) {
            Raw<W> raw[DEPTH];
#pragma unroll
            for (int k = 0; k < DEPTH; k++) {
                const size_t row = i + k < count ? rows[i + k] : rows[i];
                raw[k] = fetch<W>(dy + row * channels + c);
            }
#pragma unroll
            for (int k = 0; k < DEPTH; k++) {
                if (i + k >= count) continue;
                if (keys[i + k] != id) {  // the run is over
                    put(to + c, sum, add && to != parts);
                    id = keys[i + k];
                    to = dw + static_cast<size_t>(id) * channels;
                }
                float v[W];
                unpack(v, raw[k]);
#pragma unroll
                for (int j = 0; j < W; j++) sum[j] += v[j];
            }
        }
        put(c + (to == parts ? parts : parts + channels), sum, false);
    }
}

// parts (2, slices, 2, channels): of tokens' runs, then of positions'. Dynamic shared memory: 2
// `slice` ints a group. Block (several slices, table), striding.
extern "C" __global__ void __launch_bounds__(256, 2) embedding_sum(
    float* dwte, float* dwpe, float* parts, const real* dy, const int* keys, const int* rows,
    int count, int channels, int slice, int add) {
    DYN_SHARED(int, shared);
    const int groups = static_cast<int>(blockDim.y), group = static_cast<int>(threadIdx.y);
    int *group_keys = shared + group * 2 * slice, *group_rows = group_keys + slice;
    const int slices = (count + slice - 1) / slice;
    const bool second = blockIdx.y;
    keys += second ? count : 0;
    rows += second ? count : 0;
    parts += second ? static_cast<size_t>(slices) * 2 * channels : 0;
    for (int first = static_cast<int>(blockIdx.x) * groups; first < slices;
         first += static_cast<int>(gridDim.x) * groups) {
        const int s = first + group;
        const int entries = min(slice, count - min(s, slices) * slice);
        __syncthreads();  // an earlier use of shared is over
        const int lane = static_cast<int>(threadIdx.x), lanes = static_cast<int>(blockDim.x);
        for (int i = lane; i < entries; i += lanes) {
            group_keys[i] = keys[s * slice + i];
            group_rows[i] = rows[s * slice + i];
        }
        __syncthreads();
        if (entries <= 0) continue;  // beyond the last slice
        float *dw = second ? dwpe : dwte, *own = parts + static_cast<size_t>(s) * 2 * channels;
        if (channels % PACK == 0)
            sum_slice<PACK>(dw, own, dy, group_keys, group_rows, entries, channels, add);
        else
            sum_slice<1>(dw, own, dy, group_keys, group_rows, entries, channels, add);
    }
}

// One id's row of the table: the sum of `slices` parts, 2 channels apart from `parts` on, the first
// one `skip` further on. Group g takes every groups-th of them; then the groups' sums.
template <int W>
__device__ __forceinline__ void combine(float* row, const float* parts, int skip, int slices,
                                        int channels, bool add, float* shared) {
    const int lane = static_cast<int>(threadIdx.x), lanes = static_cast<int>(blockDim.x);
    const int group = static_cast<int>(threadIdx.y), groups = static_cast<int>(blockDim.y);
    for (int base = 0; base < channels; base += lanes * W) {
        const int c = base + lane * W;
        float sum[W] = {};
#pragma unroll 4
        for (int s = c < channels ? group : slices; s < slices; s += groups) {
            const size_t place = static_cast<size_t>(s) * 2 * channels;
            plus(sum, parts + place + (s ? c : c + skip));
        }
        if (slices > 1 && groups > 1) {
            float* own = shared + (group * lanes + lane) * W;
            __syncthreads();  // an earlier use of shared is over
            put(own, sum, false);
            __syncthreads();
            for (int g = 0; group == 0 && g < groups; g++) plus(sum, own + g * lanes * W);
        }
        if (group == 0 && c < channels) put(row + c, sum, add);
    }
}

// Block n, striding: id n of tokens, or n - vocab of positions.
extern "C" __global__ void __launch_bounds__(256) embedding_combine(
    float* dwte, float* dwpe, const float* parts, const int* starts, int count, int vocab,
    int block_size, int channels, int slice, int add) {
    __shared__ __align__(16) float shared[256 * 4];
    const int slices = (count + slice - 1) / slice;
    for (int n = static_cast<int>(blockIdx.x); n < vocab + block_size;
         n += static_cast<int>(gridDim.x)) {
        const bool second = n >= vocab;
        const int begin = starts[n + second], end = starts[n + second + 1];
        const int s = begin / slice, own = begin < end ? (end - 1) / slice - s + 1 : 0;
        const bool opens = begin % slice == 0, closes = end % slice == 0 || end == count;
        if (own == 0 ? add : own == 1 && !opens && !closes) continue;  // nothing, or already there
        const size_t place = static_cast<size_t>(second ? slices : 0) + s;
        const float* of_slice = parts + place * 2 * channels;
        const int skip = opens ? 0 : channels;
        float* row = (second ? dwpe : dwte) + static_cast<size_t>(n - second * vocab) * channels;
        if (channels % 4 == 0)
            combine<4>(row, of_slice, skip, own, channels, add, shared);
        else
            combine<1>(row, of_slice, skip, own, channels, add, shared);
    }
}
