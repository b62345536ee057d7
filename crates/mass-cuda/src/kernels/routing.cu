// From logits to a routing plan, as mass-routing makes it: a thread a token, so that every sum and every choice has one
// order.

// e^x for x <= 0; zero below the smallest normal number. As mass-routing's, fused where that is.
__device__ float exp_of_logit(float x) {
    const float ROUND = 12582912.0f;
    const float bounded = x < -88.0f ? -88.0f : x;
    const float shifted = fmaf(bounded, 1.44269504f, ROUND);
    const float n = shifted - ROUND;
    const float f = fmaf(n, 2.1219444e-4f, fmaf(n, -0.693359375f, bounded));
    float poly = 1.9875692e-4f;
    poly = fmaf(poly, f, 1.3981999e-3f);
    poly = fmaf(poly, f, 8.333452e-3f);
    poly = fmaf(poly, f, 4.1665796e-2f);
    poly = fmaf(poly, f, 1.6666666e-1f);
    poly = fmaf(poly, f, 0.5f);
    const float fraction = fmaf(poly, f * f, f) + 1.0f;
    const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
    return x < -87.3f ? 0.0f : fraction * power;
}

__device__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u; }

// probs = softmax over the experts in use, zero at the others; bad = 1 for a token with a logit in use that is NaN or
// infinite.
extern "C" __global__ void routing_softmax(const float *logits, const u32 *in_use, float *probs, u32 *bad, int n,
                                           int k) {
    const int token = blockIdx.x * 256 + threadIdx.x;
    if (token >= n) return;
    const float *l = logits + (i64)token * k;
    float *r = probs + (i64)token * k;
    float most = LOWEST;
    bool good = true;
    for (int e = 0; e < k; e++) {
        if (in_use != 0 && in_use[e] == 0) continue;
        good = good && is_finite(l[e]);
        most = l[e] > most ? l[e] : most;
    }
    bad[token] = good ? 0 : 1;
    // Sums of sixteen, then of those.
    float total = 0.0f;
    for (int first = 0; first < k; first += 16) {
        float subtotal = 0.0f;
        for (int e = first; e < first + 16 && e < k; e++) {
            const bool used = good && (in_use == 0 || in_use[e] != 0);
            const float v = used ? exp_of_logit(l[e] - most) : 0.0f;
            r[e] = v;
            subtotal += v;
        }
        total += subtotal;
    }
    const float inverse = 1.0f / total;
    for (int e = 0; e < k; e++) r[e] = good ? r[e] * inverse : 0.0f;
}

// Makes weights of the chosen experts' probabilities; the others are marked by -1. Returns how many there are.
__device__ u32 weigh(float *chosen, int k, int renormalise) {
    float sum = 0.0f;
    u32 count = 0;
    for (int e = 0; e < k; e++)
        if (chosen[e] >= 0.0f) {
            sum += chosen[e];
            count++;
        }
    if (renormalise != 0 && sum > 0.0f) {
        const float inverse = 1.0f / sum;
        for (int e = 0; e < k; e++)
            if (chosen[e] >= 0.0f) chosen[e] = is_finite(inverse) ? chosen[e] * inverse : chosen[e] / sum;
    }
    return count;
}

// The smallest set of experts whose probabilities reach p, ties to the lower index.
extern "C" __global__ void routing_top_p(const float *probs, const u32 *bad, float *chosen, u32 *counts, int n, int k,
                                         float p, int renormalise) {
    const int token = blockIdx.x * 256 + threadIdx.x;
    if (token >= n) return;
    const float *r = probs + (i64)token * k;
    float *c = chosen + (i64)token * k;
    const bool skip = bad[token] != 0;
    for (int e = 0; e < k; e++) c[e] = !skip && p >= 1.0f && r[e] > 0.0f ? r[e] : -1.0f;
    if (!skip && p < 1.0f) {
        double mass = 0.0;
        float last = 2.0f; // above every probability
        int last_e = -1;
        while (mass < (double)p) {
            float best = 0.0f;
            int best_e = -1;
            for (int e = 0; e < k; e++)
                if ((r[e] < last || (r[e] == last && e > last_e)) && r[e] > best) {
                    best = r[e];
                    best_e = e;
                }
            if (best_e < 0) break; // rounding: all together fall short
            c[best_e] = best;
            mass += (double)best;
            last = best;
            last_e = best_e;
        }
    }
    counts[token] = weigh(c, k, renormalise);
}

// The `want` largest logits, ties to the lower index.
extern "C" __global__ void routing_top_k(const float *logits, const float *probs, const u32 *in_use, const u32 *bad,
                                         float *chosen, u32 *counts, int n, int k, int want, int renormalise) {
    const int token = blockIdx.x * 256 + threadIdx.x;
    if (token >= n) return;
    const float *l = logits + (i64)token * k, *r = probs + (i64)token * k;
    float *c = chosen + (i64)token * k;
    for (int e = 0; e < k; e++) c[e] = -1.0f;
    if (bad[token] == 0)
        for (int i = 0; i < want; i++) {
            int best_e = -1;
            for (int e = 0; e < k; e++) {
                if ((in_use != 0 && in_use[e] == 0) || c[e] >= 0.0f) continue;
                if (best_e < 0 || l[e] > l[best_e]) best_e = e;
            }
            if (best_e >= 0) c[best_e] = r[best_e];
        }
    counts[token] = weigh(c, k, renormalise);
}

// Every expert whose score passes its bound; without any, and unless training, the one with the largest logit. Weights
// 1 / number.
extern "C" __global__ void routing_top_any(const float *logits, const float *bounds, const u32 *in_use, float *scores,
                                           u32 *bad, float *chosen, u32 *counts, int n, int k, int training) {
    const int token = blockIdx.x * 256 + threadIdx.x;
    if (token >= n) return;
    const float *l = logits + (i64)token * k;
    float *s = scores + (i64)token * k, *c = chosen + (i64)token * k;
    bool good = true;
    for (int e = 0; e < k; e++) good = good && (is_finite(l[e]) || (in_use != 0 && in_use[e] == 0));
    bad[token] = good ? 0 : 1;
    u32 count = 0;
    int best_e = -1;
    for (int e = 0; e < k; e++) {
        const bool used = good && (in_use == 0 || in_use[e] != 0);
        float score = 0.0f;
        if (used) {
            const float e_x = expf(l[e] >= 0.0f ? -l[e] : l[e]);
            score = l[e] >= 0.0f ? 1.0f / (1.0f + e_x) : e_x / (1.0f + e_x);
            if (best_e < 0 || l[e] > l[best_e]) best_e = e;
        }
        const bool active = used && score > bounds[e];
        s[e] = active ? score : 0.0f;
        c[e] = active ? 1.0f : -1.0f;
        count += active ? 1 : 0;
    }
    if (count == 0 && training == 0 && best_e >= 0) {
        c[best_e] = 1.0f;
        count = 1;
    }
    for (int e = 0; e < k; e++)
        if (c[e] >= 0.0f) c[e] = 1.0f / (float)count;
    counts[token] = count;
}

// ---- Grouping by expert: tokens in blocks of 256, a count of each block and expert, sums over those, then everybody's
// place ----

extern "C" __global__ void group_count(const float *chosen, const u32 *counts, const u32 *bad, u32 *by_block,
                                       u32 *of_tokens, u32 *first_bad, int n, int k) {
    const int expert = blockIdx.y * 256 + threadIdx.x, first = blockIdx.x * 256;
    const int end = first + 256 < n ? first + 256 : n;
    if (expert < k) {
        u32 count = 0;
        for (int t = first; t < end; t++) count += chosen[(i64)t * k + expert] >= 0.0f ? 1 : 0;
        by_block[(i64)blockIdx.x * k + expert] = count;
    }
    if (expert == 0) {
        u32 sum = 0, wrong = FULL;
        for (int t = end - 1; t >= first; t--) {
            sum += counts[t];
            if (bad[t] != 0) wrong = t;
        }
        of_tokens[blockIdx.x] = sum;
        first_bad[blockIdx.x] = wrong;
    }
}

// One block. Turns counts into what comes before; outcome = expert offsets, the first bad token, the number of experts
// in use.
extern "C" __global__ void group_scan(u32 *by_block, u32 *of_tokens, const u32 *first_bad, const u32 *in_use,
                                      u32 *outcome, int blocks, int k) {
    for (int e = threadIdx.x; e < k; e += 256) {
        u32 before = 0;
        for (int b = 0; b < blocks; b++) {
            const u32 own = by_block[(i64)b * k + e];
            by_block[(i64)b * k + e] = before;
            before += own;
        }
        outcome[e + 1] = before;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        outcome[0] = 0;
        for (int e = 0; e < k; e++) outcome[e + 1] += outcome[e];
        u32 before = 0, wrong = FULL;
        for (int b = 0; b < blocks; b++) {
            const u32 own = of_tokens[b];
            of_tokens[b] = before;
            before += own;
            if (wrong == FULL) wrong = first_bad[b];
        }
        outcome[k + 1] = wrong;
        u32 available = 0;
        for (int e = 0; e < k; e++) available += in_use == 0 || in_use[e] != 0 ? 1 : 0;
        outcome[k + 2] = available;
    }
}

// Tokens and weights of each expert, ascending; places[token, expert] is where.
extern "C" __global__ void group_fill(const float *chosen, const u32 *by_block, const u32 *expert_offsets, u32 *tokens,
                                      float *weights, u32 *places, int n, int k) {
    const int expert = blockIdx.y * 256 + threadIdx.x, first = blockIdx.x * 256;
    if (expert >= k) return;
    const int end = first + 256 < n ? first + 256 : n;
    u32 at = expert_offsets[expert] + by_block[(i64)blockIdx.x * k + expert];
    for (int t = first; t < end; t++) {
        const float weight = chosen[(i64)t * k + expert];
        if (weight < 0.0f) continue;
        tokens[at] = t;
        weights[at] = weight;
        places[(i64)t * k + expert] = at;
        at++;
    }
}

// Of each token, its assignments and experts, ascending.
extern "C" __global__ void group_inverse(const float *chosen, const u32 *counts, const u32 *of_tokens,
                                         const u32 *places, u32 *token_offsets, u32 *assignments, u32 *experts, int n,
                                         int k) {
    const int token = blockIdx.x * 256 + threadIdx.x;
    if (token >= n) return;
    u32 at = of_tokens[blockIdx.x];
    for (int t = blockIdx.x * 256; t < token; t++) at += counts[t];
    token_offsets[token] = at;
    for (int e = 0; e < k; e++) {
        if (chosen[(i64)token * k + e] < 0.0f) continue;
        assignments[at] = places[(i64)token * k + e];
        experts[at] = e;
        at++;
    }
    if (token == n - 1) token_offsets[n] = at;
}

// dlogits += the gradient of the weights. Rules: 0 raw, 1 renormalised, 2 straight through to top-any's scores, 3 straight
// through to the softmax: as raw weights have it, whatever the weights are.
extern "C" __global__ void routing_backward(const float *scores, const float *weights, const float *d_weights,
                                            const u32 *token_offsets, const u32 *assignments, const u32 *experts,
                                            float *dlogits, int n, int k, int rule) {
    const int token = blockIdx.x * 256 + threadIdx.x;
    if (token >= n) return;
    const u32 from = token_offsets[token], to = token_offsets[token + 1];
    float *d = dlogits + (i64)token * k;
    const float *s = scores + (i64)token * k;
    float dot = 0.0f;
    for (u32 p = from; p < to; p++) {
        const u32 a = assignments[p];
        dot += (rule == 3 ? s[experts[p]] : weights[a]) * d_weights[a];
    }
    if (rule == 0 || rule == 3)
        for (int e = 0; e < k; e++) d[e] -= s[e] * dot;
    for (u32 p = from; p < to; p++) {
        const u32 a = assignments[p], e = experts[p];
        if (rule == 0) d[e] += weights[a] * d_weights[a];
        else if (rule == 1) d[e] += weights[a] * (d_weights[a] - dot);
        else if (rule == 3) d[e] += s[e] * d_weights[a];
        else d[e] += weights[a] * d_weights[a] * s[e] * (1.0f - s[e]);
    }
}

// dthresholds[e] -= g (1 - g) times the sum of w dw over the expert's tokens whose score passes; a block an expert.
extern "C" __global__ void thresholds_backward(const float *scores, const float *weights, const float *d_weights,
                                               const u32 *expert_offsets, const u32 *tokens, const float *bounds,
                                               float *dthresholds, int k) {
    __shared__ float sums[256];
    const int expert = blockIdx.x;
    const i64 from = expert_offsets[expert], to = expert_offsets[expert + 1];
    const i64 piece = (to - from + 255) / 256;
    float sum = 0.0f;
    for (i64 a = from + threadIdx.x * piece; a < from + (threadIdx.x + 1) * piece && a < to; a++)
        if (scores[tokens[a] * (i64)k + expert] > 0.0f) sum += d_weights[a] * weights[a];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float total = 0.0f;
    for (int i = 0; i < 256; i++) total += sums[i];
    dthresholds[expert] -= total * bounds[expert] * (1.0f - bounds[expert]);
}
