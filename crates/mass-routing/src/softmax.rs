//! Softmax of one row, in f32 with the maximum subtracted.

/// `out = softmax(logits)`; entries of minus infinity get exactly zero.
pub(crate) fn softmax_row(logits: &[f32], out: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0_f32;
    for (o, &l) in out.iter_mut().zip(logits) {
        *o = (l - max).exp();
        sum += *o;
    }
    let scale = 1.0 / sum;
    out.iter_mut().for_each(|o| *o *= scale);
}
