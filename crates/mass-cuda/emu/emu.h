// CUDA's execution model on CPU threads: the threads of a block are fibers; blocks are shared out among a few CPU
// threads.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__ inline
#define __constant__ static const
#define __forceinline__ __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One copy a CPU thread, which runs one block at a time.
#define __shared__ static thread_local

struct dim3 {
    unsigned x, y, z;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emu {

struct Fiber {
    void *sp;
    dim3 tid;
    unsigned index;
    int state, site; // what it waits for, and where in the source
};

// All that belongs to a CPU thread which runs blocks.
struct Runner {
    Fiber *now;
    dim3 block, grid, block_dim;
    uint64_t *slots;
    struct Inside *inside;
};
extern thread_local Runner runner;

void block_barrier(int site);
void warp_barrier(int site);

template <class T> static inline T exchange(T v, unsigned lane, int site) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
    unsigned base = runner.now->index / 32 * 32, own = runner.now->index;
    memcpy(&runner.slots[own], &v, sizeof v);
    warp_barrier(site);
    T got;
    memcpy(&got, &runner.slots[base + lane % 32], sizeof got);
    warp_barrier(site);
    return got;
}

} // namespace emu

#define threadIdx (emu::runner.now->tid)
#define blockIdx (emu::runner.block)
#define gridDim (emu::runner.grid)
#define blockDim (emu::runner.block_dim)
// Each place in the source has its own number: threads that wait at different ones would hang or worse.
#define __syncthreads() emu::block_barrier(__COUNTER__ + 1)
#define __shfl_sync(mask, v, lane) emu::exchange((v), (lane), __COUNTER__ + 1)
#define __shfl_xor_sync(mask, v, d) emu::exchange((v), (emu::runner.now->index % 32) ^ (d), __COUNTER__ + 1)
#define __shfl_down_sync(mask, v, d)                                                                                   \
    emu::exchange(                                                                                                     \
        (v), emu::runner.now->index % 32 + (d) < 32 ? emu::runner.now->index % 32 + (d) : emu::runner.now->index % 32, \
        __COUNTER__ + 1)

static inline unsigned __float_as_uint(float v) {
    unsigned u;
    memcpy(&u, &v, 4);
    return u;
}
static inline float __uint_as_float(unsigned u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
}
#define fmaf(a, b, c) __builtin_fmaf(a, b, c)
#define sqrtf(a) __builtin_sqrtf(a)
