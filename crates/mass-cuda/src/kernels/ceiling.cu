// What the device can do at most: fused multiply-adds in registers, sixteen chains a thread.

extern "C" __global__ void __launch_bounds__(256) multiply_adds(float *y, int loops, float factor) {
    float chain[16];
#pragma unroll
    for (int i = 0; i < 16; i++) chain[i] = (float)(threadIdx.x + i);
    for (int loop = 0; loop < loops; loop++)
#pragma unroll
        for (int i = 0; i < 16; i++) chain[i] = fmaf(chain[i], factor, 1.0f);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) sum += chain[i];
    y[(i64)blockIdx.x * 256 + threadIdx.x] = sum;
}
