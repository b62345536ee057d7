// Multi-head self-attention over sequences that lie end to end, in tiles: of the probabilities only two numbers a row
// are kept. 256 threads as 16 x 16. A tile of queries or keys lies in shared memory by depth: tile[d][row]. Where heads
// are too wide for whole tiles (C < D), C of their D columns lie there at a time: sums go through the same chain.

struct Attention {
    const float *qkv; // [rows, 3 dim]
    const u32 *keys;  // whether each row may be attended to, or null
    const u32 *tiles; // of each block: first row of the sequence, its length, first row of the tile, first position for
                      // dropout
    int heads, dim, causal, unused;
    float scale, rate;
    u64 key;
};

// Columns beyond `width`, which may be negative, and rows beyond the sequence are zero.
template <int C, int R>
__device__ void load_rows(float (*to)[R + 4], const float *from, i64 stride, int first, int length, int width) {
    for (int e = threadIdx.x; e < C * R; e += 256) {
        const int r = e / C, d = e % C;
        to[d][r] = first + r < length && d < width ? from[(i64)(first + r) * stride + d] : 0.0f;
    }
}

// The same, by row.
template <int C, int R>
__device__ void load_values(float (*to)[C], const float *from, i64 stride, int first, int length, int width) {
    for (int e = threadIdx.x; e < C * R; e += 256) {
        const int r = e / C, d = e % C;
        to[r][d] = first + r < length && d < width ? from[(i64)(first + r) * stride + d] : 0.0f;
    }
}

// Whether query i sees key j.
__device__ bool sees(const Attention &at, int start, int length, int i, int j) {
    return i < length && j < length && (at.causal == 0 || j <= i) && (at.keys == 0 || at.keys[start + j] != 0);
}

// The largest of the sixteen threads that share rows, and their sum.
__device__ float max_of_16(float v) {
    for (int d = 8; d > 0; d /= 2) {
        float other = __shfl_xor_sync(FULL, v, d);
        v = other > v ? other : v;
    }
    return v;
}
__device__ float sum_of_16(float v) {
    for (int d = 8; d > 0; d /= 2) v += __shfl_xor_sync(FULL, v, d);
    return v;
}

// stats[row, head]: the largest score and the inverse of the sum of exponentials; both 0 where nothing is seen. Where all
// that is seen has a score of -inf, the sum is NaN.
template <int D, int Q, int K, int C> __device__ void attention_forward(const Attention &at, float *y, float *stats) {
    const int RQ = Q / 16, RK = K / 16, RD = D / 16;
    const bool WHOLE = C == D;
    __shared__ float qs[C][Q + 4], ks[C][K + 4], vs[K][C], ps[K][Q + 4];
    const u32 *tile = at.tiles + 4 * (i64)blockIdx.x;
    const int start = tile[0], length = tile[1], q0 = tile[2], head = blockIdx.y, width = at.dim / at.heads;
    const u32 position = tile[3] + (u32)head * (u32)length * (u32)length;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const i64 stride = 3 * (i64)at.dim;
    const float *own = at.qkv + start * stride + head * width;
    if (WHOLE) load_rows<C, Q>(qs, own, stride, q0, length, width);
    float o[RQ][RD], most[RQ], total[RQ];
    u32 sighted = 0; // bit i: row i sees something
#pragma unroll
    for (int i = 0; i < RQ; i++) {
        most[i] = -INFINITE;
        total[i] = 0.0f;
#pragma unroll
        for (int c = 0; c < RD; c++) o[i][c] = 0.0f;
    }
    const int last = at.causal != 0 && q0 + Q < length ? q0 + Q : length;
    for (int k0 = 0; k0 < last; k0 += K) {
        const float *values = own + 2 * (i64)at.dim;
        float s[RQ][RK];
#pragma unroll
        for (int i = 0; i < RQ; i++)
#pragma unroll
            for (int j = 0; j < RK; j++) s[i][j] = 0.0f;
        for (int d0 = 0; d0 < D; d0 += C) {
            if (!WHOLE) load_rows<C, Q>(qs, own + d0, stride, q0, length, width - d0);
            load_rows<C, K>(ks, own + at.dim + d0, stride, k0, length, width - d0);
            if (WHOLE) load_values<C, K>(vs, values, stride, k0, length, width);
            __syncthreads();
#pragma unroll 4
            for (int d = 0; d < C; d++)
#pragma unroll
                for (int i = 0; i < RQ; i++)
#pragma unroll
                    for (int j = 0; j < RK; j++) s[i][j] = fmaf(qs[d][ty * RQ + i], ks[d][tx * RK + j], s[i][j]);
            if (!WHOLE) __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < RQ; i++) {
            const int query = q0 + ty * RQ + i;
            float high = most[i];
            bool seen[RK];
#pragma unroll
            for (int j = 0; j < RK; j++) {
                s[i][j] *= at.scale;
                seen[j] = sees(at, start, length, query, k0 + tx * RK + j);
                if (!seen[j]) continue;
                sighted |= 1u << i;
                high = s[i][j] > high ? s[i][j] : high;
            }
            high = max_of_16(high);
            const float shrink = high > most[i] ? exp_of(most[i] - high) : 1.0f;
            most[i] = high;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < RK; j++) {
                const int k = k0 + tx * RK + j;
                // Before anything larger than -inf is seen, the difference of two such counts for nothing yet.
                float p = seen[j] && (high > -INFINITE || s[i][j] != high) ? exp_of(s[i][j] - high) : 0.0f;
                sum += p;
                if (at.rate > 0.0f) p *= dropout_factor(at.rate, at.key, position + (u32)query * (u32)length + (u32)k);
                ps[tx * RK + j][ty * RQ + i] = p;
            }
            total[i] = total[i] * shrink + sum_of_16(sum);
#pragma unroll
            for (int c = 0; c < RD; c++) o[i][c] *= shrink;
        }
#pragma unroll
        for (int d0 = 0; d0 < D; d0 += C) {
            if (!WHOLE) load_values<C, K>(vs, values + d0, stride, k0, length, width - d0);
            __syncthreads();
#pragma unroll 4
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int i = 0; i < RQ; i++)
#pragma unroll
                    for (int c = 0; c < C / 16; c++)
                        o[i][d0 / 16 + c] = fmaf(ps[k][ty * RQ + i], vs[k][tx + 16 * c], o[i][d0 / 16 + c]);
            __syncthreads();
        }
    }
    for (int d = 8; d > 0; d /= 2) sighted |= __shfl_xor_sync(FULL, sighted, d);
#pragma unroll
    for (int i = 0; i < RQ; i++) {
        const int query = q0 + ty * RQ + i;
        if (query >= length) continue;
        const bool blind = (sighted >> i & 1u) == 0;
        // Where all that is seen is -inf, there is no distribution.
        const float sum = most[i] > -INFINITE ? total[i] : most[i] + INFINITE; // -inf + inf
        const float inverse = blind ? 0.0f : 1.0f / sum;
        const i64 row = start + query;
#pragma unroll
        for (int c = 0; c < RD; c++) {
            const int col = tx + 16 * c;
            if (col < width) y[row * at.dim + head * width + col] = o[i][c] * inverse;
        }
        if (tx == 0) {
            stats[2 * (row * at.heads + head)] = blind ? 0.0f : most[i];
            stats[2 * (row * at.heads + head) + 1] = inverse;
        }
    }
}

// delta[row, head] = <dy, y> of the head; a warp each
extern "C" __global__ void attention_delta(const float *dy, const float *y, float *delta, int n, int width) {
    const int own = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (own >= n) return;
    float sum = 0.0f;
    for (int i = lane; i < width; i += 32) sum += dy[(i64)own * width + i] * y[(i64)own * width + i];
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
    if (lane == 0) delta[own] = sum;
}

__device__ void give(float *to, float v, int add) { *to = add != 0 ? *to + v : v; }

// Gradients of the queries of a tile: ds K scale, with ds = p (dropped dp - delta).
template <int D, int R, int C>
__device__ void attention_queries(const Attention &at, const float *dy, const float *stats, const float *delta,
                                  float *dqkv, int add) {
    const int RR = R / 16, RD = D / 16;
    const bool WHOLE = C == D;
    __shared__ float qs[C][R + 4], gs[C][R + 4], ks[C][R + 4], vs[C][R + 4], ds[R][R + 4];
    const u32 *tile = at.tiles + 4 * (i64)blockIdx.x;
    const int start = tile[0], length = tile[1], q0 = tile[2], head = blockIdx.y, width = at.dim / at.heads;
    const u32 position = tile[3] + (u32)head * (u32)length * (u32)length;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const i64 stride = 3 * (i64)at.dim;
    const float *own = at.qkv + start * stride + head * width;
    const float *up = dy + start * (i64)at.dim + head * width, *keys = own + at.dim, *values = own + 2 * (i64)at.dim;
    if (WHOLE) {
        load_rows<C, R>(qs, own, stride, q0, length, width);
        load_rows<C, R>(gs, up, at.dim, q0, length, width);
    }
    float dq[RR][RD];
#pragma unroll
    for (int i = 0; i < RR; i++)
#pragma unroll
        for (int c = 0; c < RD; c++) dq[i][c] = 0.0f;
    const int last = at.causal != 0 && q0 + R < length ? q0 + R : length;
    for (int k0 = 0; k0 < last; k0 += R) {
        float s[RR][RR], dp[RR][RR];
#pragma unroll
        for (int i = 0; i < RR; i++)
#pragma unroll
            for (int j = 0; j < RR; j++) s[i][j] = dp[i][j] = 0.0f;
        for (int d0 = 0; d0 < D; d0 += C) {
            if (!WHOLE) {
                load_rows<C, R>(qs, own + d0, stride, q0, length, width - d0);
                load_rows<C, R>(gs, up + d0, at.dim, q0, length, width - d0);
            }
            load_rows<C, R>(ks, keys + d0, stride, k0, length, width - d0);
            load_rows<C, R>(vs, values + d0, stride, k0, length, width - d0);
            __syncthreads();
#pragma unroll 4
            for (int d = 0; d < C; d++)
#pragma unroll
                for (int i = 0; i < RR; i++)
#pragma unroll
                    for (int j = 0; j < RR; j++) {
                        s[i][j] = fmaf(qs[d][ty * RR + i], ks[d][tx * RR + j], s[i][j]);
                        dp[i][j] = fmaf(gs[d][ty * RR + i], vs[d][tx * RR + j], dp[i][j]);
                    }
            if (!WHOLE) __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < RR; i++) {
            const int query = q0 + ty * RR + i;
            const i64 row = ((i64)start + query) * at.heads + head;
#pragma unroll
            for (int j = 0; j < RR; j++) {
                const int k = k0 + tx * RR + j;
                float v = 0.0f;
                if (sees(at, start, length, query, k)) {
                    const float p = exp_of(s[i][j] * at.scale - stats[2 * row]) * stats[2 * row + 1];
                    float g = dp[i][j];
                    if (at.rate > 0.0f)
                        g *= dropout_factor(at.rate, at.key, position + (u32)query * (u32)length + (u32)k);
                    v = p * (g - delta[row]);
                }
                ds[tx * RR + j][ty * RR + i] = v;
            }
        }
        __syncthreads();
#pragma unroll
        for (int d0 = 0; d0 < D; d0 += C) {
            if (!WHOLE) {
                load_rows<C, R>(ks, keys + d0, stride, k0, length, width - d0);
                __syncthreads();
            }
#pragma unroll 4
            for (int k = 0; k < R; k++)
#pragma unroll
                for (int i = 0; i < RR; i++)
#pragma unroll
                    for (int c = 0; c < C / 16; c++)
                        dq[i][d0 / 16 + c] = fmaf(ds[k][ty * RR + i], ks[tx + 16 * c][k], dq[i][d0 / 16 + c]);
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < RR; i++) {
        const int query = q0 + ty * RR + i;
        if (query >= length) continue;
#pragma unroll
        for (int c = 0; c < RD; c++) {
            const int col = tx + 16 * c;
            if (col < width) give(dqkv + (start + query) * stride + head * width + col, dq[i][c] * at.scale, add);
        }
    }
}

// Gradients of the keys and values of a tile: ds^T Q scale, and dropped p^T dy.
template <int D, int R, int C>
__device__ void attention_keys(const Attention &at, const float *dy, const float *stats, const float *delta,
                               float *dqkv, int add) {
    const int RR = R / 16, RD = D / 16;
    const bool WHOLE = C == D;
    __shared__ float qs[C][R + 4], gs[C][R + 4], ks[C][R + 4], vs[C][R + 4], ds[R][R + 4], ps[R][R + 4];
    const u32 *tile = at.tiles + 4 * (i64)blockIdx.x;
    const int start = tile[0], length = tile[1], k0 = tile[2], head = blockIdx.y, width = at.dim / at.heads;
    const u32 position = tile[3] + (u32)head * (u32)length * (u32)length;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const i64 stride = 3 * (i64)at.dim;
    const float *own = at.qkv + start * stride + head * width;
    const float *up = dy + start * (i64)at.dim + head * width, *keys = own + at.dim, *values = own + 2 * (i64)at.dim;
    if (WHOLE) {
        load_rows<C, R>(ks, keys, stride, k0, length, width);
        load_rows<C, R>(vs, values, stride, k0, length, width);
    }
    float dk[RR][RD], dv[RR][RD];
#pragma unroll
    for (int i = 0; i < RR; i++)
#pragma unroll
        for (int c = 0; c < RD; c++) dk[i][c] = dv[i][c] = 0.0f;
    for (int q0 = at.causal != 0 ? k0 : 0; q0 < length; q0 += R) {
        float s[RR][RR], dp[RR][RR];
#pragma unroll
        for (int i = 0; i < RR; i++)
#pragma unroll
            for (int j = 0; j < RR; j++) s[i][j] = dp[i][j] = 0.0f;
        for (int d0 = 0; d0 < D; d0 += C) {
            load_rows<C, R>(qs, own + d0, stride, q0, length, width - d0);
            load_rows<C, R>(gs, up + d0, at.dim, q0, length, width - d0);
            if (!WHOLE) {
                load_rows<C, R>(ks, keys + d0, stride, k0, length, width - d0);
                load_rows<C, R>(vs, values + d0, stride, k0, length, width - d0);
            }
            __syncthreads();
            // As in the queries' kernel: the same products in the same order.
#pragma unroll 4
            for (int d = 0; d < C; d++)
#pragma unroll
                for (int i = 0; i < RR; i++)
#pragma unroll
                    for (int j = 0; j < RR; j++) {
                        s[i][j] = fmaf(qs[d][tx * RR + j], ks[d][ty * RR + i], s[i][j]);
                        dp[i][j] = fmaf(gs[d][tx * RR + j], vs[d][ty * RR + i], dp[i][j]);
                    }
            if (!WHOLE) __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < RR; i++) {
            const int k = k0 + ty * RR + i;
#pragma unroll
            for (int j = 0; j < RR; j++) {
                const int query = q0 + tx * RR + j;
                const i64 row = ((i64)start + query) * at.heads + head;
                float v = 0.0f, p = 0.0f;
                if (sees(at, start, length, query, k)) {
                    p = exp_of(s[i][j] * at.scale - stats[2 * row]) * stats[2 * row + 1];
                    float factor = 1.0f;
                    if (at.rate > 0.0f)
                        factor = dropout_factor(at.rate, at.key, position + (u32)query * (u32)length + (u32)k);
                    v = p * (dp[i][j] * factor - delta[row]);
                    p *= factor;
                }
                ds[tx * RR + j][ty * RR + i] = v;
                ps[tx * RR + j][ty * RR + i] = p;
            }
        }
        __syncthreads();
#pragma unroll
        for (int d0 = 0; d0 < D; d0 += C) {
            if (!WHOLE) {
                load_rows<C, R>(qs, own + d0, stride, q0, length, width - d0);
                load_rows<C, R>(gs, up + d0, at.dim, q0, length, width - d0);
                __syncthreads();
            }
#pragma unroll 4
            for (int q = 0; q < R; q++)
#pragma unroll
                for (int i = 0; i < RR; i++)
#pragma unroll
                    for (int c = 0; c < C / 16; c++) {
                        const int at_c = d0 / 16 + c;
                        dk[i][at_c] = fmaf(ds[q][ty * RR + i], qs[tx + 16 * c][q], dk[i][at_c]);
                        dv[i][at_c] = fmaf(ps[q][ty * RR + i], gs[tx + 16 * c][q], dv[i][at_c]);
                    }
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < RR; i++) {
        const int k = k0 + ty * RR + i;
        if (k >= length) continue;
#pragma unroll
        for (int c = 0; c < RD; c++) {
            const int col = tx + 16 * c;
            if (col >= width) continue;
            float *to = dqkv + (start + k) * stride + head * width + col;
            give(to + at.dim, dk[i][c] * at.scale, add);
            give(to + 2 * (i64)at.dim, dv[i][c], add);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) attention_forward_16(const Attention at, float *y, float *stats) {
    attention_forward<16, 64, 32, 16>(at, y, stats);
}
extern "C" __global__ void __launch_bounds__(256) attention_forward_32(const Attention at, float *y, float *stats) {
    attention_forward<32, 64, 32, 32>(at, y, stats);
}
extern "C" __global__ void __launch_bounds__(256) attention_forward_64(const Attention at, float *y, float *stats) {
    attention_forward<64, 64, 32, 64>(at, y, stats);
}
extern "C" __global__ void __launch_bounds__(256) attention_forward_128(const Attention at, float *y, float *stats) {
    attention_forward<128, 32, 16, 128>(at, y, stats);
}
extern "C" __global__ void __launch_bounds__(256) attention_forward_256(const Attention at, float *y, float *stats) {
    attention_forward<256, 32, 32, 64>(at, y, stats);
}

extern "C" __global__ void __launch_bounds__(256)
    attention_queries_16(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                         int add) {
    attention_queries<16, 32, 16>(at, dy, stats, delta, dqkv, add);
}
extern "C" __global__ void __launch_bounds__(256)
    attention_keys_16(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                      int add) {
    attention_keys<16, 32, 16>(at, dy, stats, delta, dqkv, add);
}
extern "C" __global__ void __launch_bounds__(256)
    attention_queries_32(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                         int add) {
    attention_queries<32, 32, 32>(at, dy, stats, delta, dqkv, add);
}
extern "C" __global__ void __launch_bounds__(256)
    attention_keys_32(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                      int add) {
    attention_keys<32, 32, 32>(at, dy, stats, delta, dqkv, add);
}
extern "C" __global__ void __launch_bounds__(256)
    attention_queries_64(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                         int add) {
    attention_queries<64, 32, 64>(at, dy, stats, delta, dqkv, add);
}
extern "C" __global__ void __launch_bounds__(256)
    attention_keys_64(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                      int add) {
    attention_keys<64, 32, 64>(at, dy, stats, delta, dqkv, add);
}
extern "C" __global__ void __launch_bounds__(256)
    attention_queries_128(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                         int add) {
    attention_queries<128, 16, 128>(at, dy, stats, delta, dqkv, add);
}
extern "C" __global__ void __launch_bounds__(256)
    attention_keys_128(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                      int add) {
    attention_keys<128, 16, 128>(at, dy, stats, delta, dqkv, add);
}
extern "C" __global__ void __launch_bounds__(256)
    attention_queries_256(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                         int add) {
    attention_queries<256, 16, 128>(at, dy, stats, delta, dqkv, add);
}
extern "C" __global__ void __launch_bounds__(256)
    attention_keys_256(const Attention at, const float *dy, const float *stats, const float *delta, float *dqkv,
                      int add) {
    attention_keys<256, 16, 128>(at, dy, stats, delta, dqkv, add);
}
