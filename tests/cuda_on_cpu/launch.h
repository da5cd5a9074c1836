// launch.h: memory for the threads of a launch; running its blocks.
#pragma once
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

namespace emu {

template <class T> EMU_OWN inline T* zeroed(size_t n) {
    return static_cast<T*>(calloc(n ? n : 1, sizeof(T)));
}

// `count` pieces of memory of `size` bytes, each between inaccessible pages (where they are not too
// many for the system); size is a whole number of pages.
class Guarded {
    size_t page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE)), step_, bytes_;
    char* base_;

public:
    Guarded(size_t count, size_t size) : step_(size + page_), bytes_(count * step_ + page_) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* const p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
        base_ = p == MAP_FAILED ? nullptr : static_cast<char*>(p);
        if (!base_ || count > 16384) return;
        for (size_t i = 0; i <= count; i++) mprotect(base_ + i * step_, page_, PROT_NONE);
    }
    ~Guarded() {
        if (!base_) return;
        EMU_ASAN(__asan_unpoison_memory_region(base_, bytes_);)  // frames' shadow dies with them
        munmap(base_, bytes_);
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    explicit operator bool() const { return base_ != nullptr; }
    char* operator[](size_t i) const { return base_ + page_ + i * step_; }
};

// Dynamic shared memory ends right before a guard page, but for what alignment leaves. The bytes
// beside it must stay as they are.
EMU_OWN inline void fill_shared(const Block& b) {
    const char* const end = b.shared + run.config.shared;
    EMU_ASAN(__asan_unpoison_memory_region(b.pages, run.pages);)
    poison(b.pages, run.pages);
    EMU_ASAN(__asan_poison_memory_region(b.pages, static_cast<size_t>(b.shared - b.pages));)
    EMU_ASAN(__asan_poison_memory_region(end, static_cast<size_t>(b.pages + run.pages - end));)
    (void)end;
}
EMU_OWN inline void check_beside_shared(const Block& b) {
    const char filled = static_cast<char>(0xFF);
    const char *const first = b.shared, *const end = first + run.config.shared;
    bool same = true;
    for (const char* p = b.pages; p < first; p++) same &= *p == filled;
    for (const char* p = end; p < b.pages + run.pages; p++) same &= *p == filled;
    if (!same && !run.error[0])
        snprintf(run.error, sizeof run.error,
                 "block (%u,%u,%u): wrote outside its %zu bytes of dynamic shared memory",
                 b.index.x, b.index.y, b.index.z, run.config.shared);
}

EMU_OWN inline void start_block(Block& b, unsigned id, Fiber* fibers, const Guarded& stacks) {
    memset(&b.index, 0, sizeof b - offsetof(Block, index));
    fill_shared(b);
    if (run.blocks > 1) poison(b.statics, run.statics_size);
    const dim3 grid = run.config.grid, block = run.config.block;
    b.linear = id;
    b.index = {id % grid.x, id / grid.x % grid.y, id / (grid.x * grid.y)};
    b.alive = run.threads;
    for (unsigned i = 0; i < run.threads; i++) {
        Fiber& f = fibers[i];
        memset(&f.next, 0, sizeof f - offsetof(Fiber, next));
        f.copies->count = f.copies->groups = 0;
        f.block = &b;
        f.linear = i;
        f.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
        f.lane = static_cast<int>(i % WARP);
        f.warp = &b.warp[i / WARP];
        f.warp->lanes[f.lane] = &f;
        f.warp->alive |= 1u << f.lane;
        f.op = "not started";
        prepare(f.context, stacks[static_cast<size_t>(&f - run.fiber)], STACK, begin_thread);
        make_ready(&f);
    }
}

// The blocks with these numbers, side by side.
EMU_OWN inline void run_blocks(const unsigned* ids, const Guarded& stacks) {
    run.head = run.tail = 0;
    run.spins = 0;
    run.live = run.blocks * run.threads;
    run.loaded = nullptr;
    poison(run.statics, run.statics_size);
    for (unsigned i = 0; i < run.blocks; i++)
        start_block(run.block[i], ids[i], run.fiber + i * run.threads, stacks);
    run.current = next_ready();
    if (run.blocks > 1) {
        load_statics(run.current->block);
        EMU_TSAN(AnnotateBenignRaceSized(__FILE__, __LINE__, run.statics,
                                         static_cast<long>(run.statics_size), "of many blocks");)
    }
    EMU_TSAN(run.main.tsan = __tsan_get_current_fiber(); __tsan_release(&run.began);)
    run.main.stack = nullptr;
    run.running = 1;
    if (!sigsetjmp(run.jump, 0)) switch_context(run.main, run.current->context, false, true);
    run.running = 0;
    EMU_TSAN(__tsan_acquire(&run.ended);)  // blocks one after the other are ordered
    for (unsigned i = 0; !EMU_SANITIZED && i < run.blocks; i++) check_beside_shared(run.block[i]);
}

// Static shared memory: the thread-local block of this library.
inline int find_statics(dl_phdr_info* library, size_t, void*) {
    char* const block = static_cast<char*>(library->dlpi_tls_data);
    for (int i = 0; block && i < library->dlpi_phnum; i++) {
        const size_t size = library->dlpi_phdr[i].p_memsz;
        if (library->dlpi_phdr[i].p_type != PT_TLS || anchor < block || anchor >= block + size)
            continue;
        run.statics = block;
        run.statics_size = size;
        return 1;
    }
    return 0;
}

// The order of blocks that run one after the other.
EMU_OWN inline void shuffle_blocks(unsigned* ids, unsigned n) {
    for (unsigned i = 0; i < n; i++) ids[i] = run.config.order == LIFO ? n - 1 - i : i;
    for (unsigned i = n - 1; run.config.order == RANDOM && i; i--) {
        const unsigned j = static_cast<unsigned>(random_bits() % (i + 1)), id = ids[i];
        ids[i] = ids[j];
        ids[j] = id;
    }
}

// A block's stacks stay for the next launch, as to make them takes longer than most launches; one
// set for all libraries of the process, as the system has no room for one each.
__attribute__((visibility("default"))) inline const Guarded* kept = nullptr;

inline void run_all(unsigned total) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t shared = (run.config.shared + 127) / 128 * 128;  // a GPU aligns it so at least
    const size_t n = static_cast<size_t>(run.blocks) * run.threads;
    run.pages = (shared + page - 1) / page * page;
    const bool keep = !EMU_SANITIZED && n <= MAX_THREADS;
    if (keep && !kept) kept = new Guarded(MAX_THREADS, STACK);
    const Guarded own(keep ? 0 : n, STACK), dynamic(run.blocks, run.pages);
    const Guarded& stacks = keep ? *kept : own;
    if (!stacks || !dynamic) {
        snprintf(run.error, sizeof run.error, "no memory for the stacks of %zu threads", n);
        return;
    }
    unsigned ring = 2;
    while (ring <= n) ring *= 2;
    run.mask = ring - 1;
    run.ready = zeroed<Fiber*>(ring);
    run.fiber = zeroed<Fiber>(n);
    run.block = zeroed<Block>(run.blocks);
    Copies* const copies = static_cast<Copies*>(malloc(n * sizeof(Copies)));
    unsigned* const ids = zeroed<unsigned>(total);
    char* const statics = zeroed<char>(run.blocks * run.statics_size);
    for (size_t i = 0; i < n; i++) {
        run.fiber[i].copies = copies + i;
        EMU_TSAN(run.fiber[i].context.tsan = run.config.tsan_fibers[i];)
    }
    for (unsigned i = 0; i < run.blocks; i++) {
        run.block[i].pages = dynamic[i];
        run.block[i].shared = dynamic[i] + run.pages - shared;
        run.block[i].statics = statics + i * run.statics_size;
    }
    shuffle_blocks(ids, total);
    for (unsigned i = 0; i < total && !run.error[0]; i += run.blocks) run_blocks(ids + i, stacks);
    free(statics), free(ids), free(copies), free(run.block), free(run.fiber), free(run.ready);
}

// Null, or what went wrong.
inline const char* launch(const Config& config, void (*kernel)(void** args)) {
    run = Run{};
    run.config = config;
    run.kernel = kernel;
    run.random = (config.seed + 1) * 0x9E3779B97F4A7C15ull;
    const dim3 g = config.grid, b = config.block;
    const uint64_t total = uint64_t(g.x) * g.y * g.z, threads = uint64_t(b.x) * b.y * b.z;
    run.threads = static_cast<unsigned>(threads);
    run.blocks = config.resident ? static_cast<unsigned>(total) : 1;
    if (!total || total >> 31 || !threads || threads > MAX_THREADS)
        return "the grid or the block is empty or too large";
    if (config.shared > MAX_SHARED) return "more dynamic shared memory than any GPU has";
    EMU_ASAN(if (run.blocks > 1) return "resident blocks need another build than address's";)
#if !defined(__SANITIZE_ADDRESS__)
    static_cast<volatile char*>(anchor)[0] = 0;  // makes the system allocate the block
    dl_iterate_phdr(find_statics, nullptr);
#endif
    const SubnormalsAreZeros flush;
    if (EMU_SANITIZED) {
        run_all(static_cast<unsigned>(total));
    } else {
        const SignalHandlers handlers(config.seconds);
        run_all(static_cast<unsigned>(total));
    }
    return run.error[0] ? run.error : nullptr;
}

}  // namespace emu
