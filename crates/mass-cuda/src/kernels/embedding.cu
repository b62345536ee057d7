// Rows of tables, and their gradients without atomics: the rows that share an index are listed, and added in order.

// y (+)= table[ids]
extern "C" __global__ void embedding_forward(const float *table, const u32 *ids, float *y, i64 n, int d, int add) {
    EACH(i, n) {
        float v = table[ids[i / d] * (i64)d + i % d];
        y[i] = add != 0 ? y[i] + v : v;
    }
}

// Sums of the rows of one piece of a list: parts[piece] = sum of dy[list[starts[piece]..starts[piece + 1]]].
extern "C" __global__ void embedding_parts(const float *dy, const u32 *list, const u32 *starts, float *parts, int d) {
    const int col = blockIdx.y * 256 + threadIdx.x;
    if (col >= d) return;
    float sum = 0.0f;
    for (u32 i = starts[blockIdx.x]; i < starts[blockIdx.x + 1]; i++) sum += dy[list[i] * (i64)d + col];
    parts[(i64)blockIdx.x * d + col] = sum;
}

// dtable[entries[e]] += the parts pieces[e]..pieces[e + 1], in order
extern "C" __global__ void embedding_sums(const float *parts, const u32 *entries, const u32 *pieces, float *dtable,
                                          int d) {
    const int col = blockIdx.y * 256 + threadIdx.x;
    if (col >= d) return;
    const i64 at = entries[blockIdx.x] * (i64)d + col;
    float sum = dtable[at];
    for (u32 i = pieces[blockIdx.x]; i < pieces[blockIdx.x + 1]; i++) sum += parts[(i64)i * d + col];
    dtable[at] = sum;
}
