// memory.h: addresses in shared memory, and cp.async.
#pragma once

namespace emu {

EMU_OWN inline bool in_shared(const void* p, size_t n) {
    EMU_ASAN(return true;)  // static shared memory is anywhere then; a wrong access is reported
    const char* const first = static_cast<const char*>(p);
    const char* const dynamic = run.current->block->shared;
    return (first >= dynamic && first + n <= dynamic + run.config.shared) ||
           (first >= run.statics && first + n <= run.statics + run.statics_size);
}
EMU_OWN inline bool aligned(const void* p, size_t n) {
    return reinterpret_cast<uintptr_t>(p) % n == 0;
}
EMU_OWN inline void check_shared(const char* op, int line, const void* p, size_t n) {
    if (!in_shared(p, n))
        fail("%s line %d: address is not inside this block's shared memory", op, line);
    if (!aligned(p, n)) fail("%s line %d: address is not %zu-byte aligned", op, line, n);
}

inline void do_copy(const Copy& c) {  // seen by ThreadSanitizer
    if (c.bytes) memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    if (c.bytes < 16)
        memset(static_cast<char*>(c.to) + c.bytes, 0, static_cast<size_t>(16 - c.bytes));
}
// The copy happens as late as it may (fifo), at once (lifo), or either (random).
inline void cp_async(int line, void* to, const void* from, int bytes) {
    check_shared("cp_async", line, to, 16);
    if (!aligned(from, 16)) fail("cp_async line %d: source is not 16-byte aligned", line);
    if (bytes < 0 || bytes > 16) fail("cp_async line %d: %d bytes", line, bytes);
    Copies& copies = *run.current->copies;
    const int order = run.config.order;
    if (order == LIFO || (order == RANDOM && (random_bits() >> 20 & 1)))
        return do_copy({to, from, bytes});
    if (copies.count == MAX_COPIES)
        fail("cp_async line %d: more than %d copies outstanding", line, MAX_COPIES);
    copies.list[copies.count++] = {to, from, bytes};
}
inline void cp_async_end_group() {
    Copies& copies = *run.current->copies;
    if (copies.groups == MAX_GROUPS) fail("more than %d cp.async groups outstanding", MAX_GROUPS);
    copies.end[copies.groups++] = copies.count;
}
inline void cp_async_wait_until(int in_flight) {  // at most so many groups
    Copies& copies = *run.current->copies;
    const int over = copies.groups - in_flight;
    if (over <= 0) return;
    const int done = copies.end[over - 1];
    for (int i = 0; i < done; i++) do_copy(copies.list[i]);
    for (int i = done; i < copies.count; i++) copies.list[i - done] = copies.list[i];
    for (int i = over; i < copies.groups; i++) copies.end[i - over] = copies.end[i] - done;
    copies.count -= done;
    copies.groups -= over;
}

}  // namespace emu
