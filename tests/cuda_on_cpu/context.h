// context.h: switching from one stack to another, and telling the sanitizers.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_UCONTEXT 0
extern "C" void emu_switch(void** save, void* load);
asm(R"(
    .text
    .p2align 4
    .hidden emu_switch
    .globl emu_switch
    .type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp,(%rdi)
    movq %rsi,%rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch,.-emu_switch
)");
#else  // any other processor
#undef EMU_UCONTEXT
#define EMU_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emu {

struct Context {
#if EMU_UCONTEXT
    ucontext_t registers;
#else
    void* top;  // of the stack, where the registers are saved
#endif
    const void* stack;
    size_t size;
    void* tsan;
};

// A context that will begin with entry(), which never returns.
EMU_OWN inline void prepare(Context& c, char* stack, size_t size, void (*entry)()) {
    c.stack = stack;
    c.size = size;
#if EMU_UCONTEXT
    getcontext(&c.registers);
    c.registers.uc_stack.ss_sp = stack;
    c.registers.uc_stack.ss_size = size;
    c.registers.uc_link = nullptr;
    makecontext(&c.registers, entry, 0);
#else
    void** top = reinterpret_cast<void**>(stack + size) - 2;
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;  // registers
    c.top = top;
#endif
    EMU_ASAN(__asan_unpoison_memory_region(stack, size);)
}

// `ends`: from is never returned to. `ordered`: what from did happened before what to will do;
// between CUDA threads only barriers and atomics say so.
EMU_OWN inline void switch_context(Context& from, Context& to, bool ends, bool ordered) {
    (void)ends, (void)ordered;
    EMU_ASAN(void* fake = nullptr;)
    EMU_ASAN(__sanitizer_start_switch_fiber(ends ? nullptr : &fake, to.stack, to.size);)
    EMU_TSAN(__tsan_switch_to_fiber(to.tsan, ordered ? 0 : 1);)
#if EMU_UCONTEXT
    swapcontext(&from.registers, &to.registers);
#else
    emu_switch(&from.top, to.top);
#endif
    EMU_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
}

// The first thing on a new stack. The first of a launch comes from `main`, whose stack it learns.
EMU_OWN inline void arrive(Context& main) {
    (void)main;
    EMU_ASAN(const void* stack; size_t size;)
    EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &stack, &size);)
    EMU_ASAN(if (!main.stack) main.stack = stack, main.size = size;)
}

}  // namespace emu
