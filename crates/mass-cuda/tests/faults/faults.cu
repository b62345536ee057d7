// Kernels with a fault each. The emulated device has to find every one of them.

typedef unsigned int u32;

extern "C" __global__ void no_fault(float *y, int n) {
    __shared__ float s[64];
    s[threadIdx.x] = y[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
}

// Reverses 64 values through shared memory, without waiting for them.
extern "C" __global__ void missing_barrier(float *y, int n) {
    __shared__ float s[64];
    s[threadIdx.x] = y[threadIdx.x];
    y[threadIdx.x] = s[63 - threadIdx.x];
}

// Turns 64 values round twice: the second time may begin before everybody has read what the first left.
extern "C" __global__ void missing_second_barrier(float *y, int n) {
    __shared__ float s[64];
    float v = y[threadIdx.x];
    for (int i = 0; i < 2; i++) {
        s[threadIdx.x] = v + 1.0f;
        __syncthreads();
        v = s[(threadIdx.x + 1) % 64];
    }
    y[threadIdx.x] = v;
}

extern "C" __global__ void reads_past_the_end(float *y, int n) { y[threadIdx.x] = y[threadIdx.x + n]; }

extern "C" __global__ void reads_one_past_the_end(float *y, int n) {
    if (threadIdx.x == 0) y[0] = y[n];
}

extern "C" __global__ void writes_one_past_the_end(float *y, int n) {
    if (threadIdx.x == 0) y[n] = 1.0f;
}

extern "C" __global__ void reads_before_the_start(float *y, int n) {
    if (threadIdx.x == 0) y[0] = y[-2 - n];
}

extern "C" __global__ void leaves_values_unwritten(float *y, int n) {
    if (threadIdx.x % 2 == 0) y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void reads_shared_memory_unwritten(float *y, int n) {
    __shared__ float s[64];
    if (threadIdx.x > 0) s[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void barrier_for_some(float *y, int n) {
    if (threadIdx.x < 32) __syncthreads();
    y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void barriers_at_two_places(float *y, int n) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
    y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void shuffle_of_some(float *y, int n) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, y[threadIdx.x], 1);
}

extern "C" __global__ void follows_no_pointer(float *y, int n) { *(float *)(unsigned long long)(16 + n) = y[0]; }
