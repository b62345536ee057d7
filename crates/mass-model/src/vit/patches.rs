//! From pixels to tokens: patches, class token and position embeddings.

use super::Resampling;
use crate::error::ModelError;
use crate::kernels::scratch::Scratch;
use crate::ops::Taps;

/// Rows and columns of the patches of an image.
pub(super) fn patch_grid(
    (height, width): (usize, usize),
    side: usize,
) -> Result<(usize, usize), ModelError> {
    let whole = height.is_multiple_of(side) && width.is_multiple_of(side);
    if height == 0 || width == 0 || !whole {
        return Err(ModelError::Config(format!(
            "images of {height} x {width} are not made of patches of {side} x {side}"
        )));
    }
    Ok((height / side, width / side))
}

/// Images of one size, `[batch, channels, height, width]`, as the rows of their patches: `[batch * patches, channels *
/// side * side]`, each in the order of a convolution's weight.
pub(super) fn patch_rows(
    pixels: &[f32],
    channels: usize,
    (height, width): (usize, usize),
    side: usize,
) -> Result<(Scratch, (usize, usize)), ModelError> {
    patch_grid((height, width), side)?;
    let image = channels
        .checked_mul(height)
        .and_then(|n| n.checked_mul(width))
        .ok_or_else(|| {
            ModelError::Config(format!(
                "images of {height} x {width} do not fit into memory"
            ))
        })?;
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
    let mut rows = Scratch::take(pixels.len());
    let mut pieces = rows.chunks_exact_mut(side);
    for image in pixels.chunks_exact(image) {
        for top in (0..height).step_by(side) {
            for left in (0..width).step_by(side) {
                for channel in image.chunks_exact(height * width) {
                    for y in top..top + side {
                        let piece = pieces
                            .next()
                            .expect("patches have as many values as the images");
                        piece.copy_from_slice(&channel[y * width + left..][..side]);
                    }
                }
            }
        }
    }
    let cols = channels * side * side;
    let shape = (rows.len() / cols, cols);
    Ok((rows, shape))
}

/// Interpolation of a square grid of vectors, `old` x `old`, to another one of `rows` x `cols`, row-major: see [`Resampling`].
pub(super) fn interpolation(old: usize, (rows, cols): (usize, usize), how: Resampling) -> Taps {
    if (rows, cols) == (old, old) {
        return (0..old * old).map(|i| vec![(i, 1.0)]).collect();
    }
    let axis = match how {
        Resampling::Bicubic => plain_axis,
        Resampling::BicubicAntialias => antialiased_axis,
    };
    let (vertical, horizontal) = (axis(old, rows), axis(old, cols));
    let taps = vertical.iter().flat_map(|v| {
        horizontal.iter().map(move |h| {
            let pairs = v
                .iter()
                .flat_map(|&(y, a)| h.iter().map(move |&(x, b)| (y * old + x, a * b)));
            pairs.collect()
        })
    });
    taps.collect()
}

/// Keys' cubic kernel.
fn keys(a: f32, x: f32) -> f32 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    } else {
        0.0
    }
}

/// The four neighbours of each new place along an axis, with their weights.
fn plain_axis(old: usize, new: usize) -> Vec<Vec<(usize, f32)>> {
    let scale = old as f32 / new as f32;
    let place = |i| {
        let source = scale * (i as f32 + 0.5) - 0.5;
        let (first, t) = (source.floor() as i64, source - source.floor());
        let near = |k: i64| {
            let at = (first + k).clamp(0, old as i64 - 1);
            (at as usize, keys(-0.75, k as f32 - t))
        };
        (-1..=2).map(near).collect()
    };
    (0..new).map(place).collect()
}

/// The places within the kernel's reach of each new place along an axis, with their weights.
fn antialiased_axis(old: usize, new: usize) -> Vec<Vec<(usize, f32)>> {
    let scale = old as f32 / new as f32;
    let wider = scale.max(1.0);
    let place = |i| {
        let (center, reach) = (scale * (i as f32 + 0.5), 2.0 * wider);
        let first = (center - reach + 0.5).max(0.0) as usize;
        let end = ((center + reach + 0.5) as usize).min(old);
        let weight = |x: usize| keys(-0.5, (x as f32 + 0.5 - center) / wider);
        let total: f32 = (first..end).map(weight).sum();
        (first..end).map(|x| (x, weight(x) / total)).collect()
    };
    (0..new).map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_in_the_order_of_a_convolution() {
        // Two channels of 2 x 4 pixels, patches of 2 x 2.
        let pixels: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let (rows, shape) = patch_rows(&pixels, 2, (2, 4), 2).unwrap();
        assert_eq!(shape, (2, 8));
        let first = [0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 12.0, 13.0];
        let second = [2.0, 3.0, 6.0, 7.0, 10.0, 11.0, 14.0, 15.0];
        assert_eq!(rows.to_vec(), [first, second].concat());
    }

    #[test]
    fn interpolation_keeps_constants_and_its_own_grid() {
        for how in [Resampling::Bicubic, Resampling::BicubicAntialias] {
            let same = interpolation(3, (3, 3), how);
            assert!(same.iter().enumerate().all(|(i, t)| *t == [(i, 1.0)]));
            for size in [(2, 5), (7, 1), (6, 6)] {
                let other = interpolation(3, size, how);
                assert_eq!(other.len(), size.0 * size.1);
                for taps in &other {
                    let sum: f32 = taps.iter().map(|t| t.1).sum();
                    assert!((sum - 1.0).abs() < 1e-6);
                    assert!(taps.iter().all(|t| t.0 < 9));
                }
            }
        }
        // By hand: from two places to four, the first new one is at -1/4: t = 3/4 past the border's repetition. The
        // weights of the four neighbours are those of Keys' kernel with a = -3/4 at distances 7/4, 3/4, 1/4, 5/4.
        let first = &plain_axis(2, 4)[0];
        let weights = [-0.035_156_25, 0.261_718_75, 0.878_906_25, -0.105_468_75];
        assert!(first.iter().map(|t| t.0).eq([0, 0, 0, 1]));
        assert!(first.iter().map(|t| t.1).eq(weights));
    }

    #[test]
    fn interpolation_agrees_with_pytorch() {
        // torch.nn.functional.interpolate(x, size, mode="bicubic", align_corners=False, antialias=...), PyTorch 2.15.
        let x: [f32; 16] = [
            3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, -6.0, 5.0, 3.0, -5.0, 8.0, 9.0, 7.0, -9.0, 3.0,
        ];
        type Case<'a> = (Resampling, (usize, usize), &'a [f32]);
        let cases: [Case<'_>; 6] = [
            (
                Resampling::Bicubic,
                (2, 3),
                &[
                    -0.988896, 5.418945, -2.756329, 7.645148, -3.293945, 4.526009,
                ],
            ),
            (
                Resampling::Bicubic,
                (3, 6),
                &[
                    1.777103, 0.799877, 0.984275, 3.696162, 2.102323, -0.602041, -1.792318,
                    3.457031, 6.062716, -0.23329, -0.988281, 0.996961, 8.797259, 8.854638,
                    3.772879, -7.538761, -3.687393, 5.046415,
                ],
            ),
            (
                Resampling::Bicubic,
                (1, 4),
                &[-1.125, 6.5625, -1.3125, 0.8125],
            ),
            (
                Resampling::BicubicAntialias,
                (2, 3),
                &[0.513115, 3.422218, -0.547346, 6.397091, -0.688171, 0.976286],
            ),
            (
                Resampling::BicubicAntialias,
                (3, 6),
                &[
                    0.361075, 0.969579, 2.20826, 3.98485, 1.150761, -1.888595, -0.858835, 3.148749,
                    5.648065, -0.569621, -0.630071, 1.084808, 8.775321, 8.039845, 3.649, -7.529085,
                    -2.12034, 5.921384,
                ],
            ),
            (
                Resampling::BicubicAntialias,
                (1, 4),
                &[2.580831, 4.709584, -1.930138, 1.430139],
            ),
        ];
        for (how, size, wanted) in cases {
            let taps = interpolation(4, size, how);
            assert_eq!(taps.len(), wanted.len());
            for (taps, wanted) in taps.iter().zip(wanted) {
                let y: f32 = taps.iter().map(|&(i, w)| w * x[i]).sum();
                assert!(
                    (y - wanted).abs() < 1e-5,
                    "{how:?}, {size:?}: {y} for {wanted}"
                );
            }
        }
    }
}
