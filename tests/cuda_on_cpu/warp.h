// warp.h: operations that the lanes of a warp do together: shuffles, votes, reductions.
#pragma once
#include <type_traits>

namespace emu {

// From the `in` of every lane of the mask the `out` of every lane of it.
typedef void (*WarpFunction)(Warp&, uint32_t mask, const void* how);

// The last lane has arrived: compute, and let the others go on.
EMU_OWN inline void finish_warp_op(const char* op, int line, uint32_t mask, WarpFunction function,
                                   const void* how) {
    Fiber* const me = run.current;
    Warp& w = *me->warp;
    for (int l = 0; l < WARP; l++) {
        if (!(mask >> l & 1)) continue;
        const Fiber* f = w.lanes[l];
        if (w.mask[l] != mask || f->op != op || (run.config.strict && f->line != line))
            fail("divergent warp: %s line %d mask %08x here, lane %d is at %s line %d mask %08x",
                 op, line, mask, l, f->op, f->line, w.mask[l]);
    }
    if (function) function(w, mask, how);
    w.arrived &= ~mask;
    w.phase[__builtin_ctz(mask)] ^= 1;
    for (int l = 0; l < WARP; l++)
        if ((mask >> l & 1) && w.lanes[l] != me) make_ready(w.lanes[l]);
    if (run.config.order == RANDOM) {
        make_ready(me);
        suspend();
    }
}

// Wait until all lanes of the mask are here. Only __syncwarp orders memory accesses.
EMU_OWN inline void warp_op(const char* op, int line, uint32_t mask, const uint32_t* in, int n_in,
                            uint32_t* out, int n_out, WarpFunction function, const void* how,
                            bool orders_memory = false) {
    Fiber* const me = run.current;
    Warp& w = *me->warp;
    run.spins = 0;
    me->op = op;
    me->line = line;
    if (!(mask >> me->lane & 1))
        fail("%s line %d: mask %08x does not name the calling lane %d", op, line, mask, me->lane);
    if (mask & ~w.alive)
        fail("%s line %d: mask %08x names exited or missing lanes (alive %08x)", op, line, mask,
             w.alive);
    for (int i = 0; i < n_in; i++) w.in[me->lane][i] = in[i];
    w.mask[me->lane] = mask;
    w.arrived |= 1u << me->lane;
    (void)orders_memory;
    EMU_TSAN(const int first = __builtin_ctz(mask); char* key = &w.key[first][w.phase[first]];)
    EMU_TSAN(if (orders_memory) __tsan_release(key);)
    if ((w.arrived & mask) == mask) finish_warp_op(op, line, mask, function, how);
    else suspend();
    EMU_TSAN(if (orders_memory) __tsan_acquire(key);)
    for (int i = 0; i < n_out; i++) out[i] = w.out[me->lane][i];
}

enum Shuffle { INDEXED, UP, DOWN, XOR };
struct ShuffleHow { int kind, width; };

// The lane whose value lane l gets; its own where there is none.
EMU_OWN inline int shuffle_source(ShuffleHow how, int l, int by) {
    const int first = l & ~(how.width - 1), last = first + how.width - 1;
    if (how.kind == INDEXED) return first + (by & (how.width - 1));
    const int from = how.kind == UP ? l - by : how.kind == DOWN ? l + by : l ^ by;
    if (how.kind == UP) return from < first ? l : from;
    return from > last ? l : from;
}
EMU_OWN inline void shuffle_lanes(Warp& w, uint32_t mask, const void* how) {
    for (int l = 0; l < WARP; l++) {
        if (!(mask >> l & 1)) continue;
        const int by = static_cast<int>(w.in[l][2] & (WARP - 1));
        const int from = shuffle_source(*static_cast<const ShuffleHow*>(how), l, by);
        const bool defined = mask >> from & 1;  // else anything, on a GPU
        w.out[l][0] = defined ? w.in[from][0] : 0xFFFFFFFFu;
        w.out[l][1] = defined ? w.in[from][1] : 0xFFFFFFFFu;
    }
}
template <class T>
EMU_OWN inline T shuffle(const char* op, int line, Shuffle kind, uint32_t mask, T v, int by,
                         int width) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "1 to 8 bytes");
    if (width < 1 || width > WARP || (width & (width - 1))) fail("%s line %d: width", op, line);
    uint32_t in[3] = {0, 0, static_cast<uint32_t>(by)}, out[2];
    memcpy(in, &v, sizeof v);
    const ShuffleHow how{kind, width};
    warp_op(op, line, mask, in, 3, out, 2, shuffle_lanes, &how);
    memcpy(&v, out, sizeof v);
    return v;
}

enum Vote { BALLOT, ANY, ALL };

EMU_OWN inline void vote_lanes(Warp& w, uint32_t mask, const void* how) {
    const int kind = *static_cast<const int*>(how);
    uint32_t r = 0;
    for (int l = 0; l < WARP; l++)
        if (mask >> l & 1) r |= static_cast<uint32_t>(w.in[l][0] != 0) << l;
    if (kind == ANY) r = r != 0;
    if (kind == ALL) r = r == mask;
    for (int l = 0; l < WARP; l++) w.out[l][0] = r;
}
EMU_OWN inline uint32_t vote(const char* op, int line, int kind, uint32_t mask, uint32_t v) {
    uint32_t r;
    warp_op(op, line, mask, &v, 1, &r, 1, vote_lanes, &kind);
    return r;
}

}  // namespace emu
