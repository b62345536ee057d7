// The kernels, in a file of their own: where races are looked for, their accesses to memory are compiled into calls.
#include "table.h"
#include "kernels.inc" // the sources: written by xtask
#include <type_traits>
#include <utility>

namespace emu {
template <class... A, size_t... I> void call(void (*f)(A...), void **p, std::index_sequence<I...>) {
    f(*(std::remove_cv_t<std::remove_reference_t<A>> *)p[I]...);
}
template <auto F> struct Thunk;
template <class... A, void (*F)(A...)> struct Thunk<F> {
    static void run(void **p) { call(F, p, std::index_sequence_for<A...>()); }
    static std::vector<size_t> sizes() { return {sizeof(A)...}; }
};
#define LIST(f) Kernel{#f, Thunk<f>::run, Thunk<f>::sizes()},
std::vector<Kernel> &kernels() {
    static auto *all = new std::vector<Kernel>{
#include "list.inc"
    };
    return *all;
}
} // namespace emu
