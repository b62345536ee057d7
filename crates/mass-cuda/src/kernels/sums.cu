// Sums in two stages of one fixed order.

struct Columns {
    const float *x, *other; // other: multiplied with x, or null
    float *y;
    int rows, cols, stride, add;
    int first_block, first_part; // of blocks and of partial sums before
};

#define COLUMN_ROWS 256

// Partial sums of the columns of 256 rows, by jobs; a block for 256 columns and 256 rows.
extern "C" __global__ void column_parts(const Columns *jobs, int count, float *parts) {
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (jobs[middle].first_block <= (int)blockIdx.x) low = middle;
        else high = middle - 1;
    }
    const Columns job = jobs[low];
    const int wide = (job.cols + 255) / 256, own = blockIdx.x - job.first_block;
    const int part = own / wide, col = own % wide * 256 + threadIdx.x;
    if (col >= job.cols) return;
    const int first = part * COLUMN_ROWS;
    const int end = first + COLUMN_ROWS < job.rows ? first + COLUMN_ROWS : job.rows;
    float sum = 0.0f;
    for (int row = first; row < end; row++) {
        i64 at = (i64)row * job.stride + col;
        sum += job.other != 0 ? job.x[at] * job.other[at] : job.x[at];
    }
    parts[job.first_part + (i64)part * job.cols + col] = sum;
}

// y (+)= the partial sums, in order; a block for 256 columns of a job, jobs in the second dimension of the grid.
extern "C" __global__ void column_sums(const Columns *jobs, const float *parts) {
    const Columns job = jobs[blockIdx.y];
    const int col = blockIdx.x * 256 + threadIdx.x;
    if (col >= job.cols) return;
    float sum = job.add != 0 ? job.y[col] : 0.0f;
    for (int part = 0; part < (job.rows + COLUMN_ROWS - 1) / COLUMN_ROWS; part++)
        sum += parts[job.first_part + (i64)part * job.cols + col];
    job.y[col] = sum;
}

struct Segment {
    const float *a, *b;
    i64 n;
    int first_block, unused;
};

#define DOT_BLOCK 4096
#define DOT_PIECE 64

// Inner products of 4096 values each, in single precision as mass-model's `vector::dot`; a warp for each.
extern "C" __global__ void dot_parts(const Segment *segments, int count, int blocks, double *parts) {
    const int block = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (block >= blocks) return;
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (segments[middle].first_block <= block) low = middle;
        else high = middle - 1;
    }
    const Segment own = segments[low];
    const i64 first = (i64)(block - own.first_block) * DOT_BLOCK;
    const int n = own.n - first < DOT_BLOCK ? (int)(own.n - first) : DOT_BLOCK;
    const float *a = own.a + first, *b = own.b + first;
    float whole = 0.0f, rest = 0.0f;
    for (int i = lane; i < n / 32 * 32; i += 32) whole += a[i] * b[i];
    if (n / 32 * 32 + lane < n) rest = a[n / 32 * 32 + lane] * b[n / 32 * 32 + lane];
    const float total = fold_row(whole, rest, n);
    if (lane == 0) parts[block] = total;
}

// Of each segment, the sum of its parts in double precision: of pieces of 64 parts, then of the pieces. A block a
// segment.
extern "C" __global__ void dot_sums(const Segment *segments, const double *parts, double *sums) {
    __shared__ double pieces[256];
    const Segment own = segments[blockIdx.x];
    const int blocks = (int)((own.n + DOT_BLOCK - 1) / DOT_BLOCK);
    double total = 0.0;
    for (int start = 0; start < blocks; start += 256 * DOT_PIECE) {
        const int first = start + threadIdx.x * DOT_PIECE;
        const int end = first + DOT_PIECE < blocks ? first + DOT_PIECE : blocks;
        double piece = 0.0;
        for (int i = first; i < end; i++) piece += parts[own.first_block + i];
        pieces[threadIdx.x] = piece;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < 256 && start + i * DOT_PIECE < blocks; i++) total += pieces[i];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}
