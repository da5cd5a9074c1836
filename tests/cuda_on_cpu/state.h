// state.h: a launch and its threads, warps and blocks; how an error ends it.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdio>

namespace emu {

enum Order { FIFO, LIFO, RANDOM };
enum { WARP = 32, MAX_THREADS = 1024, MAX_SHARED = 227 * 1024, BARRIERS = 16 };
enum { WORDS_IN = 12, WORDS_OUT = 4 };       // a lane's share of a warp operation
enum { MAX_COPIES = 256, MAX_GROUPS = 32 };  // of cp.async in flight, a thread
enum { STACK = (EMU_SANITIZED ? 256 : 64) << 10 };

struct Block;
struct Warp;

struct Copy {
    void* to;
    const void* from;
    int bytes;  // of 16; the others become zero
};
struct Copies {  // of one thread, that it has not waited for
    int count, groups;
    int end[MAX_GROUPS];  // of each committed group
    Copy list[MAX_COPIES];
};
struct Fiber {
    Context context;
    Copies* copies;
    Fiber* next;  // waiting at the same barrier; this and what follows is cleared at the start
    Block* block;
    Warp* warp;
    uint3 thread;
    unsigned linear;
    int lane;
    const char* op;  // what it last waited for, and where
    int line;
    bool done;
};
struct Warp {
    uint32_t arrived, alive;  // lanes
    uint32_t mask[WARP];
    Fiber* lanes[WARP];
    uint32_t in[WARP][WORDS_IN], out[WARP][WORDS_OUT];
    char key[WARP][2];  // what ThreadSanitizer orders by, of a mask's first lane
    uint8_t phase[WARP];
};
struct Barrier {
    unsigned count, expected;
    int line, phase;
    Fiber* waiting;
    char key[2];
};
struct Block {
    char* pages;    // guarded on both sides; dynamic shared memory is at their end
    char* shared;   // dynamic shared memory
    char* statics;  // static shared memory while another resident block runs
    uint3 index;    // this and what follows is cleared at the start
    unsigned linear, alive;
    Barrier barrier[BARRIERS];  // [0] is __syncthreads
    Warp warp[MAX_THREADS / WARP];
};

struct Config {  // launch.py has the same
    dim3 grid, block;
    size_t shared;   // bytes of dynamic shared memory
    int resident;    // all blocks side by side
    int order;       // of threads, and of blocks
    int strict;      // 1: a barrier is one line; 2: and nobody leaves before the last one
    int seconds;     // of processor time, then the kernel is stopped
    uint64_t seed;
    void** args;
    void** tsan_fibers;  // ThreadSanitizer's, one for each thread that is there at once
};
struct Run {  // the launch under way; there is only ever one
    Config config;
    void (*kernel)(void** args);
    unsigned threads, blocks;  // a block; side by side
    unsigned live;             // threads
    size_t pages;              // bytes
    Fiber* current;
    Fiber** ready;             // ring of those that can go on: [head, tail) modulo mask + 1
    unsigned head, tail, mask;
    uint64_t random, spins;
    Fiber* fiber;
    Block* block;
    Block* loaded;  // whose static shared memory is in place
    char* statics;  // that place
    size_t statics_size;
    Context main;
    char began, ended;  // what ThreadSanitizer orders blocks by
    sigjmp_buf jump;
    volatile sig_atomic_t running;
    char error[4096];
};
inline Run run;

inline thread_local char anchor[16] __attribute__((used));  // lies in static shared memory

template <class... A> EMU_OWN void report(const char* format, A... values) {  // the first one stays
    if (run.error[0]) return;
    const Fiber* f = run.current;
    const uint3 b = f->block->index, t = f->thread;
    const int n = snprintf(run.error, sizeof run.error, "block (%u,%u,%u) thread (%u,%u,%u): ",
                           b.x, b.y, b.z, t.x, t.y, t.z);
    snprintf(run.error + n, sizeof run.error - static_cast<size_t>(n), format, values...);
}
[[noreturn]] EMU_OWN inline void leave() {  // end the launch, from a thread of it
    switch_context(run.current->context, run.main, true, true);
    abort();
}
template <class... A> [[noreturn]] EMU_OWN void fail(const char* format, A... values) {
    report(format, values...);
    leave();
}

EMU_OWN inline uint64_t random_bits() {  // xorshift
    run.random ^= run.random << 13;
    run.random ^= run.random >> 7;
    return run.random ^= run.random << 17;
}

}  // namespace emu
