// Values one by one. A block has 256 threads and four values for each.

#define EACH(i, n)                                                                                                     \
    for (i64 i = blockIdx.x * 1024LL + threadIdx.x, stop_ = blockIdx.x * 1024LL + 1024; i < stop_ && i < (n); i += 256)

extern "C" __global__ void fill(float *y, i64 n, float value) { EACH(i, n) y[i] = value; }

extern "C" __global__ void scale(float *y, i64 n, float factor) { EACH(i, n) y[i] *= factor; }

// y += factor x
extern "C" __global__ void add_scaled(const float *x, float *y, i64 n, float factor) {
    EACH(i, n) y[i] += factor * x[i];
}

// y = a + x masked; without dropout (rate 0) a plain sum
extern "C" __global__ void sum_masked(const float *a, const float *x, float *y, i64 n, float rate, u64 key) {
    EACH(i, n) {
        float v = x[i];
        if (rate > 0.0f) v *= dropout_factor(rate, key, (u32)i);
        y[i] = a[i] + v;
    }
}

// y (+)= x masked
extern "C" __global__ void masked(const float *x, float *y, i64 n, float rate, u64 key, int add) {
    EACH(i, n) {
        float v = x[i];
        if (rate > 0.0f) v *= dropout_factor(rate, key, (u32)i);
        y[i] = add != 0 ? y[i] + v : v;
    }
}

extern "C" __global__ void tanh_forward(const float *x, float *y, i64 n) { EACH(i, n) y[i] = tanhf(x[i]); }

// dx (+)= dy (1 - y^2)
extern "C" __global__ void tanh_backward(const float *y, const float *dy, float *dx, i64 n, int add) {
    EACH(i, n) {
        float share = dy[i] * (1.0f - y[i] * y[i]);
        dx[i] = add != 0 ? dx[i] + share : share;
    }
}

// average = keep average + take x
extern "C" __global__ void moving_average(const float *x, float *average, i64 n, float keep, float take) {
    EACH(i, n) average[i] = keep * average[i] + take * x[i];
}

// mean += (x - mean) share
extern "C" __global__ void running_mean(const float *x, float *mean, i64 n, float share) {
    EACH(i, n) mean[i] += (x[i] - mean[i]) * share;
}

// y = x factor, column by column
extern "C" __global__ void scale_columns(const float *x, const float *factor, float *y, i64 n, int cols, int add) {
    EACH(i, n) {
        float v = x[i] * factor[i % cols];
        y[i] = add != 0 ? y[i] + v : v;
    }
}

// y[i] = x[rows[i]], times a weight a row if there is one
extern "C" __global__ void gather_rows(const float *x, const u32 *rows, const float *weight, float *y, i64 n,
                                       int cols) {
    EACH(i, n) {
        i64 row = i / cols;
        float v = x[rows[row] * (i64)cols + i % cols];
        y[i] = weight != 0 ? v * weight[row] : v;
    }
}
