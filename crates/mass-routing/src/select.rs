//! Which experts of a row: the smallest set of a given mass, or the k largest.

/// Appends the smallest set of experts whose probabilities reach `p`, ascending; ties go to the lower index.
pub(crate) fn top_p(r: &[f32], p: f32, out: &mut Vec<u32>) {
    if p >= 1.0 {
        out.extend((0..r.len() as u32).filter(|&e| r[e as usize] > 0.0));
        return;
    }
    let from = out.len();
    let mut order: Vec<u32> = (0..r.len() as u32).collect();
    order.sort_by(|&a, &b| r[b as usize].total_cmp(&r[a as usize]));
    let mut mass = 0.0_f64;
    for e in order {
        if mass >= f64::from(p) || r[e as usize] == 0.0 {
            break;
        }
        mass += f64::from(r[e as usize]);
        out.push(e);
    }
    out[from..].sort_unstable();
}

/// Appends the `k` experts of largest logit, ascending; ties go to the lower index.
pub(crate) fn top_k(logits: &[f32], k: usize, out: &mut Vec<u32>) {
    let from = out.len();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    out.extend_from_slice(&order[..k]);
    out[from..].sort_unstable();
}
