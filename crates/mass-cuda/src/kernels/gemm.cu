// Matrix products, many at a time: c (+)= epilogue(alpha a b).

struct Job {
    const float *a, *b;
    float *c;
    const float *bias;   // one a column, or null
    float *slope;        // receives the activation's derivative, or null
    float *factor;       // with `gate`: receives what c held before; or null
    const u32 *rows;     // row i of a is row rows[i] of what `a` points at, or null
    const float *weight; // one a row, multiplies the result, or null
    int m, n, k;
    int a_row, a_col, b_row, b_col, c_row; // strides in elements; those of slope and factor are c's
    int first_tile;                        // tiles of the jobs before
    int add;                               // 0: replace, 1: add
    int act;                               // nonlinearity, 0: none
    int gate;                              // 1: c and slope are multiplied by the result
    float alpha;
    int unused;
};

// One float4 of a tile of SIDE x DEPTH for each of 256 threads. `side` are the rows of a or the columns of b, `depth`
// is k. The four values lie along k, or where the matrix is stored the other way, along the side. What can be had from
// the job again is not kept: registers are what a product is short of.
template <int SIDE, int DEPTH> struct Loader {
    const float *p; // the own four values of the first tile
    int until;      // the own k is there as long as the tile begins before this

    __device__ static bool by_depth(const u32 *rows, int s_side, int s_depth) {
        return s_depth == 1 || s_side != 1 || rows != 0;
    }
    __device__ static int side(bool by_depth, int tid) { return by_depth ? tid / (DEPTH / 4) : tid % (SIDE / 4) * 4; }
    __device__ static int depth(bool by_depth, int tid) { return by_depth ? tid % (DEPTH / 4) * 4 : tid / (SIDE / 4); }

    __device__ void prepare(const float *base, const u32 *rows, int side0, int sides, int depths, int s_side,
                            int s_depth, int tid) {
        const bool deep = by_depth(rows, s_side, s_depth);
        i64 line = side0 + side(deep, tid);
        const bool there = line < sides;
        if (rows != 0) line = there ? (i64)rows[line] : 0;
        p = base + line * s_side + (i64)depth(deep, tid) * s_depth;
        until = there ? depths - depth(deep, tid) : 0;
    }
    __device__ float4 load(int first, const float *base, const u32 *rows, int side0, int sides, int s_side, int s_depth,
                           int tid) const {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first >= until) return v;
        const bool deep = by_depth(rows, s_side, s_depth);
        const float *q = p + (i64)first * s_depth;
        const int left = deep ? until - first : sides - side0 - side(false, tid);
        // A float4 wants every line to begin at a multiple of 16 bytes.
        const bool vector =
            (((int)(u64)base & 15) | ((deep ? s_side : s_depth) & 3)) == 0 && (deep ? s_depth : s_side) == 1;
        if (vector && left >= 4) return *(const float4 *)q;
        const i64 step = deep ? s_depth : s_side;
        v.x = q[0];
        if (left > 1) v.y = q[step];
        if (left > 2) v.z = q[2 * step];
        if (left > 3) v.w = q[3 * step];
        return v;
    }
    __device__ static void store(float (*tile)[SIDE + 4], float4 v, bool deep, int tid) {
        float *to = &tile[0][0] + depth(deep, tid) * (SIDE + 4) + side(deep, tid);
        if (deep) {
            to[0] = v.x;
            to[SIDE + 4] = v.y;
            to[2 * (SIDE + 4)] = v.z;
            to[3 * (SIDE + 4)] = v.w;
        } else {
            *(float4 *)to = v;
        }
    }
};

// V neighbouring values of a tile.
template <int V> __device__ void fragment(const float *from, float *to) {
    if (V == 4) {
        float4 v = *(const float4 *)from;
        to[0] = v.x;
        to[1] = v.y;
        to[2] = v.z;
        to[3] = v.w;
    } else {
        float2 v = *(const float2 *)from;
        to[0] = v.x;
        to[1] = v.y;
    }
}

// What follows a product, for one value of it.
__device__ void finish(const Job &job, int row, int col, float v) {
    const i64 at = (i64)row * job.c_row + col;
    if (job.bias != 0) v += job.bias[col];
    if (job.weight != 0) v *= job.weight[row];
    if (job.gate != 0) {
        const float before = job.c[at];
        if (job.slope != 0) job.slope[at] *= v;
        if (job.factor != 0) job.factor[at] = before;
        job.c[at] = v * before;
        return;
    }
    if (job.act != 0) {
        const float2 both = activation(job.act, v);
        v = both.x;
        if (job.slope != 0) job.slope[at] = both.y;
    }
    if (job.add != 0) v += job.c[at];
    job.c[at] = v;
}

// One tile of TILE x TILE by 256 threads, T x T values each, in two buffers of shared memory. Each value is one chain
// of fused multiply-adds over k, whatever the tile.
template <int TILE> __device__ void gemm_tile(const Job &job, int tile) {
    const int T = TILE / 16, V = T < 4 ? T : 4, DEPTH = 1024 / TILE;
    __shared__ __align__(16) float as[2][DEPTH][TILE + 4];
    __shared__ __align__(16) float bs[2][DEPTH][TILE + 4];
    const int tiles_n = (job.n + TILE - 1) / TILE;
    const int m0 = tile / tiles_n * TILE, n0 = tile % tiles_n * TILE;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    // A warp has TILE/4 x TILE/2 values; its lanes lie 4 x 8.
    const int row0 = warp / 2 * (TILE / 4) + lane / 8 * V, col0 = warp % 2 * (TILE / 2) + lane % 8 * V;
    Loader<TILE, DEPTH> a, b;
    a.prepare(job.a, job.rows, m0, job.m, job.k, job.a_row, job.a_col, tid);
    b.prepare(job.b, 0, n0, job.n, job.k, job.b_col, job.b_row, tid);
    const bool deep_a = Loader<TILE, DEPTH>::by_depth(job.rows, job.a_row, job.a_col);
    const bool deep_b = Loader<TILE, DEPTH>::by_depth(0, job.b_col, job.b_row);
#define LOAD_A(first) a.load(first, job.a, job.rows, m0, job.m, job.a_row, job.a_col, tid)
#define LOAD_B(first) b.load(first, job.b, 0, n0, job.n, job.b_col, job.b_row, tid)
    float acc[T][T];
#pragma unroll
    for (int i = 0; i < T; i++)
#pragma unroll
        for (int j = 0; j < T; j++) acc[i][j] = 0.0f;
    a.store(as[0], LOAD_A(0), deep_a, tid);
    b.store(bs[0], LOAD_B(0), deep_b, tid);
    __syncthreads();
    int now = 0;
    for (int k0 = 0; k0 < job.k; k0 += DEPTH) {
        const bool more = k0 + DEPTH < job.k;
        float4 next_a, next_b;
        if (more) {
            next_a = LOAD_A(k0 + DEPTH);
            next_b = LOAD_B(k0 + DEPTH);
        }
// More at once would spill.
#pragma unroll 2
        for (int k = 0; k < DEPTH; k++) {
            float x[T], y[T];
#pragma unroll
            for (int g = 0; g < T / V; g++) {
                fragment<V>(&as[now][k][row0 + g * 4 * V], x + g * V);
                fragment<V>(&bs[now][k][col0 + g * 8 * V], y + g * V);
            }
#pragma unroll
            for (int i = 0; i < T; i++)
#pragma unroll
                for (int j = 0; j < T; j++) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
        }
        if (more) {
            a.store(as[now ^ 1], next_a, deep_a, tid);
            b.store(bs[now ^ 1], next_b, deep_b, tid);
        }
        __syncthreads();
        now ^= 1;
    }
    // Sixteen rows at a time go through shared memory: what follows a product is then compact, and writes neighbouring
    // values.
    float (*stage)[TILE + 4] = as[0];
#pragma unroll 1
    for (int step = 0; step < T; step++) {
        const int own = warp / 2 * 4 + lane / 8;
#pragma unroll
        for (int i = 0; i < T; i++)
            if (i == step)
#pragma unroll
                for (int g = 0; g < T / V; g++)
#pragma unroll
                    for (int j = 0; j < V; j++) stage[own][col0 + g * 8 * V + j] = acc[i][g * V + j];
        __syncthreads();
#pragma unroll 1
        for (int e = tid; e < 16 * TILE; e += 256) {
            const int line = e / TILE, col = n0 + e % TILE;
            const int row = m0 + line / 4 * (TILE / 4) + line % 4 * V + step / V * 4 * V + step % V;
            if (row < job.m && col < job.n) finish(job, row, col, job.alpha * stage[line][e % TILE]);
        }
        __syncthreads();
    }
}

// In shared memory a job takes no registers.
template <int TILE> __device__ void gemm_of_job(const Job *from) {
    __shared__ Job job;
    if (threadIdx.x < sizeof(Job) / 4) ((u32 *)&job)[threadIdx.x] = ((const u32 *)from)[threadIdx.x];
    __syncthreads();
    gemm_tile<TILE>(job, blockIdx.x - job.first_tile);
}

template <int TILE> __device__ void gemm_of_value(const Job &value) {
    __shared__ Job job;
    if (threadIdx.x == 0) job = value;
    __syncthreads();
    gemm_tile<TILE>(job, blockIdx.x);
}

// The tile of the block, and its job: the last that begins at or before it.
template <int TILE> __device__ void gemm_of_jobs(const Job *jobs, int count) {
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (jobs[middle].first_tile <= (int)blockIdx.x) low = middle;
        else high = middle - 1;
    }
    gemm_of_job<TILE>(jobs + low);
}

extern "C" __global__ void __launch_bounds__(256, 2) gemm_jobs_128(const Job *jobs, int count) {
    gemm_of_jobs<128>(jobs, count);
}
extern "C" __global__ void __launch_bounds__(256) gemm_jobs_64(const Job *jobs, int count) {
    gemm_of_jobs<64>(jobs, count);
}
extern "C" __global__ void __launch_bounds__(256) gemm_jobs_32(const Job *jobs, int count) {
    gemm_of_jobs<32>(jobs, count);
}
extern "C" __global__ void __launch_bounds__(256, 2) gemm_128(const Job job) { gemm_of_value<128>(job); }
extern "C" __global__ void __launch_bounds__(256) gemm_64(const Job job) { gemm_of_value<64>(job); }
extern "C" __global__ void __launch_bounds__(256) gemm_32(const Job job) { gemm_of_value<32>(job); }
