// fibers.h: which thread runs next, barriers, and reports of threads that wait forever.
#pragma once

namespace emu {

EMU_OWN inline void make_ready(Fiber* f) { run.ready[run.tail++ & run.mask] = f; }

EMU_OWN inline Fiber* next_ready() {
    Fiber** const ring = run.ready;
    if (run.config.order == LIFO) return ring[--run.tail & run.mask];
    if (run.config.order == RANDOM) {
        const uint64_t among = run.tail - run.head;
        const unsigned pick = run.head + static_cast<unsigned>(random_bits() % among);
        Fiber* const f = ring[pick & run.mask];
        ring[pick & run.mask] = ring[run.head & run.mask];
        ring[run.head & run.mask] = f;
    }
    return ring[run.head++ & run.mask];
}

// Not memcpy and memset: ThreadSanitizer would watch those. 0xFF bytes are NaN, and -1.
EMU_OWN inline void copy_bytes(void* to, const void* from, size_t n) {
#if defined(__x86_64__)
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
#else
    for (size_t i = 0; i < n; i++)
        static_cast<volatile char*>(to)[i] = static_cast<const char*>(from)[i];
#endif
}
EMU_OWN inline void poison(void* p, size_t n) {
#if defined(__x86_64__)
    asm volatile("rep stosb" : "+D"(p), "+c"(n) : "a"(0xFF) : "memory");
#else
    for (size_t i = 0; i < n; i++) static_cast<volatile char*>(p)[i] = static_cast<char>(0xFF);
#endif
}

// Static shared memory has one address for all blocks: its contents are exchanged.
EMU_OWN inline void load_statics(Block* b) {
    if (run.loaded == b || !run.statics_size) return;
    if (run.loaded) copy_bytes(run.loaded->statics, run.statics, run.statics_size);
    copy_bytes(run.statics, b->statics, run.statics_size);
    run.loaded = b;
}

[[noreturn]] EMU_OWN inline void report_stuck() {  // who waits where; neighbours alike once
    char text[2000] = "";
    size_t n = 0;
    const Fiber* last = nullptr;
    for (unsigned i = 0, shown = 0; i < run.blocks * run.threads && shown < 12; i++) {
        const Fiber* f = &run.fiber[i];
        const bool same = last && last->block == f->block && last->done == f->done;
        if (!same || (!f->done && (last->op != f->op || last->line != f->line))) {
            n += static_cast<size_t>(snprintf(
                text + n, sizeof text - n, "\n  from block %u thread %u: %s (line %d)",
                f->block->linear, f->linear, f->done ? "exited" : f->op, f->done ? 0 : f->line));
            shown++;
        }
        last = f;
    }
    fail("deadlock, divergent barrier or warp operation:%s", text);
}

// Run another thread; the current one is queued somewhere, or done.
EMU_OWN inline void suspend() {
    Fiber* const me = run.current;
    if (run.head == run.tail) report_stuck();
    Fiber* const next = next_ready();
    if (next == me) return;
    if (run.blocks > 1) load_statics(next->block);
    run.current = next;
    switch_context(me->context, next->context, me->done, false);
}

// __nanosleep: all others run before the current thread does again.
EMU_OWN inline void yield() {
    Fiber* const me = run.current;
    me->op = "__nanosleep";
    if (++run.spins > 20000ull * (run.live + 1))
        fail("livelock: every thread spins in __nanosleep");
    if (run.config.order == LIFO) run.ready[--run.head & run.mask] = me;
    else make_ready(me);
    suspend();
}

EMU_OWN inline void release(Barrier& b) {
    b.count = 0;
    b.phase ^= 1;
    Fiber* in_order = nullptr;
    for (Fiber *f = b.waiting, *next; f; f = next) {  // the last to arrive is the first in the list
        next = f->next;
        f->next = in_order;
        in_order = f;
    }
    b.waiting = nullptr;
    for (; in_order; in_order = in_order->next) make_ready(in_order);
}

// Arrive at a barrier of `expected` threads and wait for the others.
EMU_OWN inline void barrier(Barrier& b, unsigned expected, const char* op, int line,
                            bool wait = true) {
    Fiber* const me = run.current;
    run.spins = 0;
    me->op = op;
    me->line = line;
    if (b.count && b.expected != expected)
        fail("%s line %d: of %u threads, line %d says %u", op, line, expected, b.line, b.expected);
    const bool one_line = run.config.strict && &b == me->block->barrier;
    if (one_line && b.count && b.line != line)
        fail("divergent %s: this thread is at line %d, another waits at line %d", op, line,
             b.line);
    if (!b.count) b.expected = expected, b.line = line;
    EMU_TSAN(char* key = &b.key[b.phase]; __tsan_release(key);)
    if (wait) me->next = b.waiting, b.waiting = me;
    if (++b.count == b.expected) release(b);
    if (!wait) return;
    suspend();
    EMU_TSAN(__tsan_acquire(key);)
}

EMU_OWN inline void syncthreads(int line) {
    Block* const b = run.current->block;
    if (run.config.strict > 1 && b->alive != run.threads)
        fail("__syncthreads line %d after %u threads of the block exited", line,
             run.threads - b->alive);
    barrier(b->barrier[0], b->alive, "__syncthreads", line);
}

EMU_OWN inline void named_barrier(const char* op, int id, int threads, int line, bool wait) {
    if (id < 1 || id >= BARRIERS) fail("%s line %d: barrier %d is not one of 1..15", op, line, id);
    if (threads < WARP || threads % WARP) fail("%s line %d: %d threads", op, line, threads);
    barrier(run.current->block->barrier[id], static_cast<unsigned>(threads), op, line, wait);
}

EMU_OWN inline void end_thread() {
    Fiber* const me = run.current;
    Block* const b = me->block;
    if (me->copies->count) fail("thread exits with cp.async copies not waited for");
    me->done = true;
    me->warp->alive &= ~(1u << me->lane);
    b->alive--;
    run.live--;
    run.spins = 0;
    Barrier& all = b->barrier[0];
    if (all.count) {  // who has left no longer counts
        if (run.config.strict > 1)
            fail("thread exits while others wait at __syncthreads line %d", all.line);
        if (all.count == b->alive) release(all);
        else all.expected = b->alive;
    }
    EMU_TSAN(__tsan_release(&run.ended);)
    if (!run.live) leave();
    suspend();
    abort();
}

EMU_OWN inline void begin_thread() {
    arrive(run.main);
    EMU_TSAN(__tsan_acquire(&run.began);)
    run.kernel(run.config.args);
    end_thread();
}

}  // namespace emu
