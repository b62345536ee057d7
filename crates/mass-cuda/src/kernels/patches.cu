// Tokens of an image: class token, patches, positions.

// common[0] = class + positions[0]; common[1 + i] = sum of weight positions[1 + place] over the taps of place i
extern "C" __global__ void patches_common(const float *own_class, const float *positions, const u32 *starts,
                                          const u32 *places, const float *weights, float *common, i64 n, int d) {
    EACH(i, n) {
        const int row = (int)(i / d), col = (int)(i % d);
        float v;
        if (row == 0) v = own_class[col] + positions[col];
        else {
            v = 0.0f;
            for (u32 tap = starts[row - 1]; tap < starts[row]; tap++)
                v += weights[tap] * positions[(1 + places[tap]) * (i64)d + col];
        }
        common[i] = v;
    }
}

// y[image, row] = common[row], plus embedded[image, row - 1] of a patch
extern "C" __global__ void patches_forward(const float *common, const float *embedded, float *y, i64 n, int rows,
                                           int d) {
    EACH(i, n) {
        const i64 image = i / ((i64)rows * d), in_image = i % ((i64)rows * d);
        float v = common[in_image];
        if (in_image >= d) v += embedded[image * (rows - 1) * d + in_image - d];
        y[i] = v;
    }
}

// dembedded[image, patch] (+)= dy[image, 1 + patch]
extern "C" __global__ void patches_backward(const float *dy, float *dembedded, i64 n, int patches, int d, int add) {
    EACH(i, n) {
        const i64 image = i / ((i64)patches * d), in_image = i % ((i64)patches * d);
        float v = dy[image * (patches + 1) * d + d + in_image];
        dembedded[i] = add != 0 ? dembedded[i] + v : v;
    }
}

// common = sum over images of dy
extern "C" __global__ void patches_common_backward(const float *dy, float *common, i64 n, int images) {
    EACH(i, n) {
        float sum = 0.0f;
        for (int image = 0; image < images; image++) sum += dy[image * n + i];
        common[i] = sum;
    }
}

// Adds the gradients of the class token and of the positions; `starts` and `rows` list of each old place where it is a
// tap.
extern "C" __global__ void patches_positions_backward(const float *common, const u32 *starts, const u32 *rows,
                                                      const float *weights, float *dclass, float *dpositions, i64 n,
                                                      int d) {
    EACH(i, n) {
        const int place = (int)(i / d), col = (int)(i % d);
        float sum = dpositions[i];
        if (place == 0) {
            dclass[col] += common[col];
            sum += common[col];
        } else
            for (u32 tap = starts[place - 1]; tap < starts[place]; tap++)
                sum += weights[tap] * common[(1 + rows[tap]) * (i64)d + col];
        dpositions[i] = sum;
    }
}
