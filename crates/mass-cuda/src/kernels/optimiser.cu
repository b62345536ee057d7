// AdamW over many parameters in one launch.

struct Update {
    float *theta;
    const float *g;
    float *m, *v;
    i64 n;
    float lr, beta1, beta2, take1, take2, eps, weight_decay, bias1, bias2, gradient_scale;
    int first_block, unused;
};

extern "C" __global__ void adamw(const Update *updates, int count) {
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (updates[middle].first_block <= (int)blockIdx.x) low = middle;
        else high = middle - 1;
    }
    const Update u = updates[low];
    const float keep = 1.0f - u.lr * u.weight_decay, rate = u.lr / u.bias1, root = sqrtf(u.bias2);
    const i64 first = (i64)(blockIdx.x - u.first_block) * 1024;
    for (i64 i = first + threadIdx.x; i < first + 1024 && i < u.n; i += 256) {
        const float g = u.g[i] * u.gradient_scale;
        const float m = u.beta1 * u.m[i] + u.take1 * g, v = u.beta2 * u.v[i] + u.take2 * g * g;
        u.m[i] = m;
        u.v[i] = v;
        u.theta[i] = u.theta[i] * keep - rate * m / (sqrtf(v) / root + u.eps);
    }
}
