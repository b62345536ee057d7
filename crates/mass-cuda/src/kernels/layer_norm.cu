// Layer normalisation: a warp a row, eight rows a block.

extern "C" __global__ void layer_norm_forward(const float *x, const float *gamma, const float *beta, float *y,
                                              float *stats, int rows, int d, float eps) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (i64)row * d;
    y += (i64)row * d;
    const int whole_d = d / 32 * 32;
    float whole = 0.0f, rest = 0.0f;
    for (int i = lane; i < whole_d; i += 32) whole += x[i];
    if (whole_d + lane < d) rest = x[whole_d + lane];
    const float mean = fold_row(whole, rest, d) / (float)d;
    whole = rest = 0.0f;
    for (int i = lane; i < whole_d; i += 32) {
        float c = x[i] - mean;
        whole += c * c;
    }
    if (whole_d + lane < d) {
        float c = x[whole_d + lane] - mean;
        rest = c * c;
    }
    const float rstd = 1.0f / sqrtf(fold_row(whole, rest, d) / (float)d + eps);
    for (int i = lane; i < d; i += 32) y[i] = (x[i] - mean) * rstd * gamma[i] + beta[i];
    if (lane == 0) {
        stats[2 * (i64)row] = mean;
        stats[2 * (i64)row + 1] = rstd;
    }
}

// dx (+)= rstd (dy gamma - mean(dy gamma) - normed mean(dy gamma normed))
extern "C" __global__ void layer_norm_backward(const float *x, const float *gamma, const float *stats, const float *dy,
                                               float *dx, int rows, int d, int add) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (i64)row * d;
    dy += (i64)row * d;
    dx += (i64)row * d;
    const float mean = stats[2 * (i64)row], rstd = stats[2 * (i64)row + 1];
    const int whole_d = d / 32 * 32;
    float whole_a = 0.0f, rest_a = 0.0f, whole_b = 0.0f, rest_b = 0.0f;
    for (int i = lane; i < whole_d; i += 32) {
        float scaled = dy[i] * gamma[i];
        whole_a += scaled;
        whole_b += scaled * ((x[i] - mean) * rstd);
    }
    if (whole_d + lane < d) {
        int i = whole_d + lane;
        rest_a = dy[i] * gamma[i];
        rest_b = rest_a * ((x[i] - mean) * rstd);
    }
    const float a = fold_row(whole_a, rest_a, d) / (float)d, b = fold_row(whole_b, rest_b, d) / (float)d;
    for (int i = lane; i < d; i += 32) {
        float share = rstd * (dy[i] * gamma[i] - a - (x[i] - mean) * rstd * b);
        dx[i] = add != 0 ? dx[i] + share : share;
    }
}

// Partial sums of the gradients of gamma and beta over 256 rows: parts is [blocks of rows, 2 d].
extern "C" __global__ void layer_norm_parts(const float *x, const float *stats, const float *dy, float *parts, int rows,
                                            int d) {
    const int col = blockIdx.x * 256 + threadIdx.x, first = blockIdx.y * 256;
    if (col >= d) return;
    const int end = first + 256 < rows ? first + 256 : rows;
    float g = 0.0f, b = 0.0f;
    for (i64 row = first; row < end; row++) {
        float up = dy[row * d + col];
        g += up * ((x[row * d + col] - stats[2 * row]) * stats[2 * row + 1]);
        b += up;
    }
    parts[(i64)blockIdx.y * 2 * d + col] = g;
    parts[(i64)blockIdx.y * 2 * d + d + col] = b;
}

extern "C" __global__ void layer_norm_sums(const float *parts, float *dgamma, float *dbeta, int blocks, int d) {
    const int col = blockIdx.x * 256 + threadIdx.x;
    if (col >= d) return;
    float g = dgamma[col], b = dbeta[col];
    for (int block = 0; block < blocks; block++) {
        g += parts[(i64)block * 2 * d + col];
        b += parts[(i64)block * 2 * d + d + col];
    }
    dgamma[col] = g;
    dbeta[col] = b;
}
