//! From pixels to tokens: patches, class token and position embeddings.

use dfdx::prelude::{Cpu, HasShape, NoneTape, PutTape, ReshapeTo, SplitTape, Tape, TensorFromVec};

use crate::error::ModelError;
use crate::kernels::vector;
use crate::ops::{Rows, expect_width, read, take_gradient};
use crate::param::Param;

/// Images of one size, `[batch, channels, height, width]`, as the rows of their patches: `[batch * patches, channels *
/// side * side]`, each in the order of a convolution's weight.
pub(super) fn patch_rows(
    pixels: &[f32],
    channels: usize,
    (height, width): (usize, usize),
    side: usize,
) -> Result<Rows<NoneTape>, ModelError> {
    let image = channels
        .checked_mul(height)
        .and_then(|n| n.checked_mul(width));
    let whole = height.is_multiple_of(side) && width.is_multiple_of(side);
    let image = match image {
        Some(n) if n > 0 && whole => n,
        _ => {
            return Err(ModelError::Config(format!(
                "images of {height} x {width} are not made of patches of {side} x {side}"
            )));
        }
    };
    if pixels.is_empty() || !pixels.len().is_multiple_of(image) {
        let what = "pixels of the images";
        return Err(ModelError::shape(
            what,
            &[1, channels, height, width],
            &[pixels.len()],
        ));
    }
    if let Some(i) = pixels.iter().position(|x| !x.is_finite()) {
        return Err(ModelError::NonFinite(format!("pixel value {i}")));
    }
    let mut rows = Vec::with_capacity(pixels.len());
    for image in pixels.chunks_exact(image) {
        for top in (0..height).step_by(side) {
            for left in (0..width).step_by(side) {
                for channel in image.chunks_exact(height * width) {
                    for y in top..top + side {
                        rows.extend_from_slice(&channel[y * width + left..][..side]);
                    }
                }
            }
        }
    }
    let cols = channels * side * side;
    let shape = (rows.len() / cols, cols);
    Ok(Cpu::default().try_tensor_from_vec(rows, shape)?)
}

/// Bicubic interpolation of a square grid of vectors to another grid, as weights of the old ones.
///
/// Output i along an axis of `n` old and `m` new places is at `(i + 1/2) n / m - 1/2` and weighs its four neighbours by
/// Keys' cubic convolution with a = -3/4; past the border the outermost place counts again. That is PyTorch's
/// `interpolate(mode="bicubic", align_corners=False, antialias=False)`, by which DINOv2 and ViT in Hugging Face's
/// transformers fit position embeddings to an image.
#[derive(Clone, Debug)]
pub(super) struct Interpolation {
    /// For each output place the old ones, row-major, and their weights.
    taps: Vec<Vec<(usize, f32)>>,
}

impl Interpolation {
    /// From `old` x `old` places to `rows` x `cols`.
    pub(super) fn new(old: usize, (rows, cols): (usize, usize)) -> Self {
        if (rows, cols) == (old, old) {
            let taps = (0..old * old).map(|i| vec![(i, 1.0)]).collect();
            return Self { taps };
        }
        let (vertical, horizontal) = (axis(old, rows), axis(old, cols));
        let taps = vertical.iter().flat_map(|v| {
            horizontal.iter().map(move |h| {
                let pairs = v
                    .iter()
                    .flat_map(|&(y, a)| h.iter().map(move |&(x, b)| (y * old + x, a * b)));
                pairs.collect()
            })
        });
        Self {
            taps: taps.collect(),
        }
    }
}

/// The four neighbours of each new place along an axis, with their weights.
fn axis(old: usize, new: usize) -> Vec<[(usize, f32); 4]> {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let scale = old as f32 / new as f32;
    (0..new)
        .map(|i| {
            let source = scale * (i as f32 + 0.5) - 0.5;
            let (first, t) = (source.floor(), source - source.floor());
            let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
            std::array::from_fn(|k| {
                let place = first as i64 + k as i64 - 1;
                (place.clamp(0, old as i64 - 1) as usize, weights[k])
            })
        })
        .collect()
}

/// Tokens `[batch * (1 + patches), d]`: the class token, then the embedded patches, plus the position of each.
///
/// `class: [d]`, `positions: [1 + old patches, d]`, of which the first is the class token's and the others a grid.
pub(super) fn assemble<T: Tape<f32, Cpu>>(
    embedded: Rows<T>,
    class: &Param,
    positions: &Param,
    grid: Interpolation,
) -> Result<Rows<T>, ModelError> {
    let (d, patches) = (class.len(), grid.taps.len());
    expect_width("embedded patches", &embedded, d)?;
    let (embedded, mut tape) = embedded.try_contiguous()?.split_tape();
    let batch = embedded.shape().0 / patches;
    let input = read(&embedded);

    // The tokens of an image without its patches, which are the same for all images.
    let table = positions.values();
    let mut common = vec![0.0; (1 + patches) * d];
    let (first, others) = common.split_at_mut(d);
    first.copy_from_slice(class.values());
    vector::add_assign(first, &table[..d]);
    for (row, taps) in others.chunks_exact_mut(d).zip(&grid.taps) {
        for &(place, weight) in taps {
            let old = &table[(1 + place) * d..][..d];
            row.iter_mut().zip(old).for_each(|(y, x)| *y += weight * x);
        }
    }
    let mut y = Vec::with_capacity(batch * common.len());
    for image in input.chunks_exact(patches * d) {
        let start = y.len();
        y.extend_from_slice(&common);
        vector::add_assign(&mut y[start + d..], image);
    }
    let shape = (batch * (1 + patches), d);
    let y = embedded.device().try_tensor_from_vec(y, shape)?;
    if T::OWNS_TAPE {
        let (x_ghost, y_ghost) = (embedded.ghost(), y.ghost());
        let (class, positions) = (class.handle(), positions.handle());
        tape.add_backward_op(move |g| {
            let dy = take_gradient!(g, y_ghost);
            let mut common = vec![0.0; (1 + patches) * d];
            let dx = g.get_or_alloc_mut(&x_ghost)?;
            let images = dy.chunks_exact((1 + patches) * d);
            for (dy, dx) in images.zip(dx.chunks_exact_mut(patches * d)) {
                vector::add_assign(&mut common, dy);
                vector::add_assign(dx, &dy[d..]);
            }
            let (first, others) = common.split_at(d);
            let mut dclass = class.take(g)?;
            vector::add_assign(&mut dclass, first);
            class.put(g, dclass)?;
            let mut dpositions = positions.take(g)?;
            vector::add_assign(&mut dpositions[..d], first);
            for (row, taps) in others.chunks_exact(d).zip(&grid.taps) {
                for &(place, weight) in taps {
                    let old = &mut dpositions[(1 + place) * d..][..d];
                    old.iter_mut().zip(row).for_each(|(x, y)| *x += weight * y);
                }
            }
            positions.put(g, dpositions)
        });
    }
    Ok(y.put_tape(tape))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_in_the_order_of_a_convolution() {
        // Two channels of 2 x 4 pixels, patches of 2 x 2.
        let pixels: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let rows = patch_rows(&pixels, 2, (2, 4), 2).unwrap();
        assert_eq!(*rows.shape(), (2, 8));
        let first = [0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 12.0, 13.0];
        let second = [2.0, 3.0, 6.0, 7.0, 10.0, 11.0, 14.0, 15.0];
        assert_eq!(read(&rows).to_vec(), [first, second].concat());
    }

    #[test]
    fn interpolation_keeps_constants_and_its_own_grid() {
        let same = Interpolation::new(3, (3, 3));
        assert!(same.taps.iter().enumerate().all(|(i, t)| *t == [(i, 1.0)]));
        for size in [(2, 5), (7, 1), (6, 6)] {
            let other = Interpolation::new(3, size);
            assert_eq!(other.taps.len(), size.0 * size.1);
            for taps in &other.taps {
                let sum: f32 = taps.iter().map(|t| t.1).sum();
                assert!((sum - 1.0).abs() < 1e-6);
                assert!(taps.iter().all(|t| t.0 < 9));
            }
        }
        // By hand: from two places to four, the first new one is at -1/4: t = 3/4 past the border's repetition. The
        // weights of the four neighbours are those of Keys' kernel with a = -3/4 at distances 7/4, 3/4, 1/4, 5/4.
        let first = axis(2, 4)[0];
        let weights = [-0.035_156_25, 0.261_718_75, 0.878_906_25, -0.105_468_75];
        assert_eq!(first.map(|t| t.0), [0, 0, 0, 1]);
        assert_eq!(first.map(|t| t.1), weights);
    }
}
