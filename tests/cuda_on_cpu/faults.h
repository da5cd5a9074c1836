// faults.h: signals a kernel causes: guard pages, undefined behaviour (compiled as a trap), and
// running for too long.
#pragma once
#include <csignal>
#include <dlfcn.h>
#include <sys/time.h>
#include <ucontext.h>

namespace emu {

EMU_OWN inline size_t program_counter(void* context) {  // in this library; 0: somewhere else
    void* pc = nullptr;
#if defined(__x86_64__)
    pc = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
    pc = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#endif
    Dl_info there{}, here{};
    if (!dladdr(pc, &there) || !dladdr(&run, &here) || there.dli_fbase != here.dli_fbase) return 0;
    return static_cast<size_t>(static_cast<char*>(pc) - static_cast<char*>(there.dli_fbase));
}
inline void on_signal(int signal_number, siginfo_t* info, void* context) {
    if (!run.running) {
        signal(signal_number, SIG_DFL);
        return;
    }
    const size_t pc = program_counter(context);
    if (signal_number == SIGVTALRM)
        report("still running after %d seconds [pc %#zx]", run.config.seconds, pc);
    else if (signal_number == SIGILL || signal_number == SIGTRAP)
        report("undefined behaviour (bounds, alignment, overflow, shift, division) [pc %#zx]", pc);
    else
        report("invalid memory access at %p [pc %#zx]", info->si_addr, pc);
    siglongjmp(run.jump, 1);
}

// While it exists, on_signal handles what kernels cause, on a stack of its own.
class SignalHandlers {
    static constexpr int SIGNALS[5] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGVTALRM};
    static constexpr size_t SIZE = 64 << 10;
    struct sigaction old_[5];
    stack_t old_stack_;
    void* stack_ = malloc(SIZE);

    static void set_timer(int seconds) {
        itimerval timer{};
        timer.it_value.tv_sec = seconds;
        setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    }

public:
    explicit SignalHandlers(int seconds) {
        stack_t stack{};
        stack.ss_sp = stack_;
        stack.ss_size = SIZE;
        sigaltstack(&stack, &old_stack_);
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &action, &old_[i]);
        set_timer(seconds);
    }
    ~SignalHandlers() {
        set_timer(0);
        for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
        free(stack_);
    }
    SignalHandlers(const SignalHandlers&) = delete;
    SignalHandlers& operator=(const SignalHandlers&) = delete;
};

}  // namespace emu
