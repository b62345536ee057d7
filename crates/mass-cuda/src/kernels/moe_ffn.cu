// What a mixture layer does around its products.

// y[t] (+)= sum of weights[a] outputs[a] over the assignments a of token t, in their order; weight one without weights.
extern "C" __global__ void combine(const float *outputs, const float *weights, const u32 *token_offsets,
                                   const u32 *assignments, float *y, i64 n, int d, int add) {
    EACH(i, n) {
        const int token = (int)(i / d), col = (int)(i % d);
        float sum = add != 0 ? y[i] : 0.0f;
        for (u32 p = token_offsets[token]; p < token_offsets[token + 1]; p++) {
            const u32 a = assignments[p];
            const float v = outputs[a * (i64)d + col];
            sum += weights != 0 ? weights[a] * v : v;
        }
        y[i] = sum;
    }
}

// For each assignment a with dh = dy[token] W2: d_weights = <dh, h> + <dy[token], b2>, then by_pre and by_factor become
// the gradients before the nonlinearity: slope dh w, or without slopes that of a ReLU by its value. A warp an
// assignment.
extern "C" __global__ void gate_gradient(const float *dh, const float *h, const float *dy, const float *const *b2,
                                         const u32 *expert_offsets, const u32 *tokens, const float *weights,
                                         float *by_pre, float *by_factor, float *d_weights, int assigned, int experts,
                                         int hidden, int dim, int relu) {
    const int a = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (a >= assigned) return;
    int low = 0,
        high = experts - 1; // the last expert whose segment begins at or before a: empty ones begin where the next does
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (expert_offsets[middle] <= (u32)a) low = middle;
        else high = middle - 1;
    }
    const float *bias = b2[low], *up = dy + tokens[a] * (i64)dim;
    float whole = 0.0f, rest = 0.0f;
    const int whole_d = dim / 32 * 32;
    for (int i = lane; i < whole_d; i += 32) whole += up[i] * bias[i];
    if (whole_d + lane < dim) rest = up[whole_d + lane] * bias[whole_d + lane];
    const float from_bias = fold_row(whole, rest, dim);
    whole = rest = 0.0f;
    const i64 at = (i64)a * hidden;
    const float w = weights[a];
    const int whole_h = hidden / 32 * 32;
    for (int i = lane; i < hidden; i += 32) {
        const float d = dh[at + i], value = h[at + i];
        if (i < whole_h) whole += d * value;
        else rest = d * value;
        if (relu != 0) by_pre[at + i] = value <= 0.0f ? 0.0f : d * w;
        else by_pre[at + i] *= d * w;
        if (by_factor != 0) by_factor[at + i] *= d * w;
    }
    const float total = from_bias + fold_row(whole, rest, hidden);
    if (lane == 0) d_weights[a] = total;
}
