use dfdx::prelude::{Cpu, Tape};

use super::{Activations, expect_width};
use crate::error::ModelError;
use crate::kernels::gemm::Store;
use crate::kernels::scratch::Scratch;
use crate::kernels::vector;
use crate::param::Param;

/// For each place of a grid the places of another one, and their weights.
pub(crate) type Taps = Vec<Vec<(usize, f32)>>;

/// Tokens `[batch * (1 + patches), d]`: the class token, then the embedded patches, plus the position of each.
///
/// `class: [d]`, `positions: [1 + old patches, d]`, of which the first is the class token's and the others a grid, which `taps`
/// interpolate to that of the patches.
///
/// # Errors
/// [`ModelError::Shape`] if the patches have another width than the class token.
pub(super) fn run<T: Tape<f32, Cpu>>(
    tape: &mut T,
    embedded: Activations,
    class: &Param,
    positions: &Param,
    taps: Taps,
) -> Result<Activations, ModelError> {
    let (d, patches) = (class.len(), taps.len());
    expect_width("embedded patches", embedded.shape(), d)?;
    let batch = embedded.shape().0 / patches;

    // The tokens of an image without its patches, which are the same for all images.
    let table = positions.try_values()?;
    let mut common = vec![0.0; (1 + patches) * d];
    let (first, others) = common.split_at_mut(d);
    first.copy_from_slice(class.try_values()?);
    vector::add_assign(first, &table[..d]);
    for (row, taps) in others.chunks_exact_mut(d).zip(&taps) {
        for &(place, weight) in taps {
            let old = &table[(1 + place) * d..][..d];
            row.iter_mut().zip(old).for_each(|(y, x)| *y += weight * x);
        }
    }
    let mut y = Scratch::take(batch * common.len());
    let images = embedded.chunks_exact(patches * d);
    for (y, image) in y.chunks_exact_mut(common.len()).zip(images) {
        y.copy_from_slice(&common);
        vector::add_assign(&mut y[d..], image);
    }
    let shape = (batch * (1 + patches), d);
    let (class, positions) = (class.handle(), positions.handle());
    Activations::output(tape, y, shape, move |g, dy| {
        let mut common = vec![0.0; (1 + patches) * d];
        for dy in dy.chunks_exact((1 + patches) * d) {
            vector::add_assign(&mut common, dy);
        }
        embedded.add_gradient(g, |dx, store| {
            let images = dy.chunks_exact((1 + patches) * d);
            for (dy, dx) in images.zip(dx.chunks_exact_mut(patches * d)) {
                match store {
                    Store::Replace => dx.copy_from_slice(&dy[d..]),
                    Store::Add => vector::add_assign(dx, &dy[d..]),
                }
            }
        })?;
        let (first, others) = common.split_at(d);
        let mut dclass = class.take(g)?;
        vector::add_assign(&mut dclass, first);
        class.put(g, dclass)?;
        let mut dpositions = positions.take(g)?;
        vector::add_assign(&mut dpositions[..d], first);
        for (row, taps) in others.chunks_exact(d).zip(&taps) {
            for &(place, weight) in taps {
                let old = &mut dpositions[(1 + place) * d..][..d];
                old.iter_mut().zip(row).for_each(|(x, y)| *x += weight * y);
            }
        }
        positions.put(g, dpositions)
    })
}
