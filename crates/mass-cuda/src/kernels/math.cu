// What all kernels share. Compiled without contraction: where a multiplication and an addition are fused, it says fmaf.
// So the functions below give the bits that the CPU's (mass-model/src/kernels/vector.rs) give, and so does the emulated
// device.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define FULL 0xffffffffu
#define LOWEST (-3.40282347e+38f)
#define INFINITE __uint_as_float(0x7f800000u)

// e^x: Cody-Waite range reduction and a polynomial of degree 6; under about 1e-38 flushed up to that value.
__device__ float exp_of(float x) {
    const float ROUND = 12582912.0f; // 1.5 * 2^23: adding it rounds to the nearest integer
    x = x < -87.33654f ? -87.33654f : x;
    x = x > 88.37626f ? 88.37626f : x;
    float shifted = x * 1.44269504f + ROUND;
    float n = shifted - ROUND;
    float r = x - n * 0.6933594f + n * 2.1219444e-4f;
    float poly = 1.9875691e-4f;
    poly = poly * r + 1.3981999e-3f;
    poly = poly * r + 8.333452e-3f;
    poly = poly * r + 4.1665796e-2f;
    poly = poly * r + 1.6666665e-1f;
    poly = poly * r + 0.5f;
    poly = poly * r * r + r + 1.0f;
    u32 exponent = (__float_as_uint(shifted) - __float_as_uint(ROUND) + 127u) << 23;
    return poly * __uint_as_float(exponent);
}

__device__ float erf_of(float x) {
    x = x < -4.0f ? -4.0f : x;
    x = x > 4.0f ? 4.0f : x;
    float x2 = x * x;
    float p = -2.7261424e-10f;
    p = p * x2 + 2.7706814e-8f;
    p = p * x2 + -2.101024e-6f;
    p = p * x2 + -5.6925064e-5f;
    p = p * x2 + -7.3499066e-4f;
    p = p * x2 + -2.9546e-3f;
    p = p * x2 + -1.6096033e-2f;
    float q = -1.4566072e-5f;
    q = q * x2 + -2.1337406e-4f;
    q = q * x2 + -1.682827e-3f;
    q = q * x2 + -7.3733292e-3f;
    q = q * x2 + -1.4264739e-2f;
    return x * p / q;
}

__device__ float tanh_of(float x) { return 1.0f - 2.0f / (1.0f + exp_of(2.0f * x)); }

// Which nonlinearity: the numbers of the Rust enum, zero for none.
#define ACT_RELU 1
#define ACT_GELU_ERF 2
#define ACT_GELU_TANH 3
#define ACT_SILU 4

// The activation of x and its derivative there.
__device__ float2 activation(int which, float x) {
    // So that NaN stays NaN.
    if (which == ACT_RELU) return x <= 0.0f ? make_float2(0.0f, 0.0f) : make_float2(x, 1.0f);
    if (which == ACT_GELU_ERF) {
        float cdf = 0.5f * (1.0f + erf_of(x * 0.70710678f));
        float exponent = -0.5f * x * x;
        float density = 0.3989423f * exp_of(exponent > -80.0f ? exponent : -80.0f);
        return make_float2(x * cdf, cdf + x * density);
    }
    if (which == ACT_GELU_TANH) {
        float t = tanh_of(0.7978846f * (x + 0.044715f * x * x * x));
        float inner = 0.7978846f * (1.0f + 3.0f * 0.044715f * x * x);
        return make_float2(0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner);
    }
    if (which == ACT_SILU) {
        float s = 1.0f / (1.0f + exp_of(-x < 80.0f ? -x : 80.0f));
        return make_float2(x * s, s * (1.0f + x * (1.0f - s)));
    }
    return make_float2(x, 1.0f);
}

// Factor of element i under a dropout key: zero, or one over the probability of staying. As mass-model's.
__device__ float dropout_factor(float rate, u64 key, u32 i) {
    u32 h = i ^ (u32)key;
    h = ((h ^ (h >> 16)) * 0x7feb352du) ^ (u32)(key >> 32);
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    h ^= h >> 16;
    float uniform = (float)(h >> 8) * (1.0f / 16777216.0f);
    return uniform < rate ? 0.0f : 1.0f / (1.0f - rate);
}

// Sum over a row, a warp together, in the order of mass-model's `vector::sum`: thirty-two running sums, folded, then
// the rest one by one. `whole` is this lane's running sum, `rest` its value among the last n % 32.
__device__ float fold_row(float whole, float rest, int n) {
    for (int d = 16; d > 0; d /= 2) whole += __shfl_down_sync(FULL, whole, d);
    float total = __shfl_sync(FULL, whole, 0);
    int left = n % 32;
    for (int i = 0; i < left; i++) total += __shfl_sync(FULL, rest, i);
    return total;
}

// Largest value of a warp.
__device__ float warp_max(float v) {
    for (int d = 16; d > 0; d /= 2) {
        float other = __shfl_xor_sync(FULL, v, d);
        v = other > v ? other : v;
    }
    return v;
}
