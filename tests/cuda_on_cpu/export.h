// export.h: kernels for callers who know them by name only.
#pragma once

namespace emu {

// A word for each parameter: p (to const) or P for pointers, then i, u, f, b (bf16) or v (other) of
// what it is or points to, and its size in bytes.
template <class T> char* describe(char* out) {
    typedef std::remove_pointer_t<T> Pointed;
    typedef std::remove_cv_t<Pointed> E;
    if (std::is_pointer<T>::value) *out++ = std::is_const<Pointed>::value ? 'p' : 'P';
    *out++ = std::is_same<E, bf16>::value       ? 'b'
             : std::is_floating_point<E>::value ? 'f'
             : !std::is_integral<E>::value      ? 'v'
             : std::is_signed<E>::value         ? 'i'
                                                : 'u';
    const size_t size = sizeof(std::conditional_t<std::is_void<E>::value, char, E>);
    return out + sprintf(out, "%zu ", size);
}
template <class... A> void signature(void (*)(A...), char* out) {
    ((out = describe<A>(out)), ...);
    *out = 0;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<A>*>(args[I])...);
}
template <class... A> void call(void (*kernel)(A...), void** args) {
    call(kernel, args, std::index_sequence_for<A...>{});
}

}  // namespace emu

#define EMU_PUBLIC extern "C" __attribute__((visibility("default")))
#define EMU_EXPORT(kernel)                                                                         \
    static void emu_call_##kernel(void** args) { emu::call(&kernel, args); }                       \
    EMU_PUBLIC void emu_signature_##kernel(char* out) { emu::signature(&kernel, out); }            \
    EMU_PUBLIC const char* emu_launch_##kernel(const emu::Config* config) {                        \
        return emu::launch(*config, emu_call_##kernel);                                            \
    }
