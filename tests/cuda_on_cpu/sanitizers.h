// sanitizers.h: what AddressSanitizer and ThreadSanitizer must be told about fibers.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN(...) __VA_ARGS__
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_poison_memory_region(const void* p, size_t size);
void __asan_unpoison_memory_region(const void* p, size_t size);
}
#else
#define EMU_ASAN(...)
#endif

#if defined(__SANITIZE_THREAD__)  // to it each CUDA thread is a thread
#define EMU_TSAN(...) __VA_ARGS__
extern "C" {
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateBenignRaceSized(const char* file, int line, volatile void* p, long size,
                             const char* why);
}
#else
#define EMU_TSAN(...)
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define EMU_SANITIZED 1
#else
#define EMU_SANITIZED 0
#endif

// The emulator's own functions: sanitizers judge kernels only.
#define EMU_OWN __attribute__((no_sanitize("thread"), no_sanitize("undefined")))
