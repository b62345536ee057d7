// The kernels by name.
#pragma once
#include "emu.h"
#include <vector>

namespace emu {
struct Kernel {
    const char *name;
    void (*run)(void **);
    std::vector<size_t> sizes; // bytes of its parameters
};
std::vector<Kernel> &kernels();
} // namespace emu
