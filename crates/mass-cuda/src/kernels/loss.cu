// Losses: a warp a row, eight rows a block.

// probs = softmax(logits), nll = -ln probs[target]. The largest begins below every number: a row of which all are -inf is
// NaN.
extern "C" __global__ void cross_entropy_forward(const float *logits, const u32 *targets, float *probs, float *nll,
                                                 int rows, int classes) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    logits += (i64)row * classes;
    probs += (i64)row * classes;
    const float picked = logits[targets[row]];
    float most = -INFINITE;
    for (int i = lane; i < classes; i += 32) most = logits[i] > most ? logits[i] : most;
    most = warp_max(most);
    const int whole_n = classes / 32 * 32;
    float whole = 0.0f, rest = 0.0f;
    for (int i = lane; i < whole_n; i += 32) {
        float e = exp_of(logits[i] - most);
        probs[i] = e;
        whole += e;
    }
    if (whole_n + lane < classes) {
        rest = exp_of(logits[whole_n + lane] - most);
        probs[whole_n + lane] = rest;
    }
    const float total = fold_row(whole, rest, classes);
    const float inverse = 1.0f / total;
    for (int i = lane; i < classes; i += 32) probs[i] *= inverse;
    if (lane == 0) nll[row] = most + logf(total) - picked;
}

// dlogits (+)= factor (probs - onehot(target))
extern "C" __global__ void cross_entropy_backward(const float *probs, const u32 *targets, float *dlogits, i64 n,
                                                  int classes, float factor, int add) {
    EACH(i, n) {
        float d = add != 0 ? dlogits[i] : 0.0f;
        d += factor * probs[i];
        if (targets[i / classes] == (u32)(i % classes)) d -= factor;
        dlogits[i] = d;
    }
}

// residuals = x - targets, squares = residuals^2
extern "C" __global__ void squared_error_forward(const float *x, const float *targets, float *residuals, float *squares,
                                                 i64 n) {
    EACH(i, n) {
        float r = x[i] - targets[i];
        residuals[i] = r;
        squares[i] = r * r;
    }
}

// dx (+)= upstream 2 residual / count
extern "C" __global__ void squared_error_backward(const float *residuals, float *dx, i64 n, float upstream, float count,
                                                  int add) {
    EACH(i, n) {
        float share = upstream * 2.0f * residuals[i] / count;
        dx[i] = add != 0 ? dx[i] + share : share;
    }
}

// The mean of values, summed in double precision in order: pieces of 1024, then the pieces. One block.
extern "C" __global__ void mean_of(const float *x, i64 n, float *mean) {
    __shared__ double pieces[256];
    double total = 0.0;
    for (i64 start = 0; start < n; start += 256 * 1024) {
        const i64 first = start + threadIdx.x * 1024;
        double piece = 0.0;
        for (i64 i = first; i < first + 1024 && i < n; i++) piece += x[i];
        pieces[threadIdx.x] = piece;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < 256; i++) total += pieces[i];
        __syncthreads();
    }
    if (threadIdx.x == 0) *mean = (float)(total / (double)n);
}
