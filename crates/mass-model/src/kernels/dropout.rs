//! Dropout whose mask is a function of a key and the element's position.
//!
//! Nothing is stored between the forward and the backward pass, and the mask does not depend on the number of threads.

use rayon::prelude::*;

use super::gemm::Store;
use super::vectorised;
use crate::error::ModelError;

/// Elements handled by one task.
const BLOCK: usize = 1 << 14;

/// The mask of one dropout operation: each element is dropped with probability `rate`, the others are divided by `1 - rate`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    rate: f32,
    key: u64,
}

#[cfg(feature = "cuda")]
impl From<Dropout> for mass_cuda::kernels::Dropout {
    fn from(Dropout { rate, key }: Dropout) -> Self {
        Self { rate, key }
    }
}

/// Hands out the keys of one forward pass: the same for the same seed and step, another for every operation.
///
/// Random state is no more than these two numbers, so a resumed run drops what an uninterrupted one would have dropped.
///
/// ```
/// use mass_model::DropoutKeys;
/// let masks = |step| {
///     let mut keys = DropoutKeys::new(7, step);
///     Ok::<_, mass_model::ModelError>([keys.next(0.1)?, keys.next(0.1)?])
/// };
/// assert_eq!(masks(0)?, masks(0)?);
/// assert_ne!(masks(0)?[0], masks(0)?[1]);
/// assert_ne!(masks(0)?, masks(1)?);
/// # Ok::<(), mass_model::ModelError>(())
/// ```
#[derive(Clone, Debug)]
pub struct DropoutKeys {
    seed: u64,
    site: u64,
}

impl DropoutKeys {
    /// The keys of a step of a run.
    pub fn new(seed: u64, step: u64) -> Self {
        Self {
            seed: mix(mix(seed) ^ step),
            site: 0,
        }
    }

    /// The mask of the next dropout operation; `None` at a rate of zero, and at one everything is dropped.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a rate outside [0, 1]; the next key is as it was then.
    pub fn next(&mut self, rate: f32) -> Result<Option<Dropout>, ModelError> {
        if !(0.0..=1.0).contains(&rate) {
            let what = format!("a dropout rate of {rate}, which is not in [0, 1]");
            return Err(ModelError::Config(what));
        }
        self.site += 1;
        Ok((rate > 0.0).then(|| Dropout {
            rate,
            key: mix(self.seed ^ self.site.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        }))
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Dropout {
    /// Factor of element `i`, counted modulo 2³²: zero or `1 / (1 - rate)`.
    #[inline(always)]
    pub(crate) fn factor(&self, i: u32) -> f32 {
        // Wellons' lowbias32 around the two halves of the key: 32-bit operations only, so that it vectorises.
        let mut h = i ^ self.key as u32;
        h = (h ^ (h >> 16)).wrapping_mul(0x7feb_352d) ^ (self.key >> 32) as u32;
        h = (h ^ (h >> 15)).wrapping_mul(0x846c_a68b);
        h ^= h >> 16;
        // 24 bits are exact in f32.
        let uniform = (h >> 8) as f32 * (1.0 / 16_777_216.0);
        if uniform < self.rate {
            0.0
        } else {
            1.0 / (1.0 - self.rate)
        }
    }

    /// `row[i] *= factor(first + i)`.
    #[inline(always)]
    pub(crate) fn scale(&self, row: &mut [f32], first: usize) {
        for (i, x) in row.iter_mut().enumerate() {
            *x *= self.factor((first + i) as u32);
        }
    }
}

/// `y = x ⊙ mask`, or the same added to it; without a mask, all of `x`.
pub fn masked(dropout: Option<Dropout>, x: &[f32], y: &mut [f32], store: Store) {
    y.par_chunks_mut(BLOCK)
        .zip(x.par_chunks(BLOCK))
        .enumerate()
        .for_each(|(block, (y, x))| masked_block(dropout, block, x, y, store));
}

/// `y = a + x ⊙ mask`.
pub fn sum(a: &[f32], dropout: Option<Dropout>, x: &[f32], y: &mut [f32]) {
    y.par_chunks_mut(BLOCK)
        .zip(a.par_chunks(BLOCK))
        .zip(x.par_chunks(BLOCK))
        .enumerate()
        .for_each(|(block, ((y, a), x))| {
            y.copy_from_slice(a);
            masked_block(dropout, block, x, y, Store::Add);
        });
}

fn masked_block(dropout: Option<Dropout>, block: usize, x: &[f32], y: &mut [f32], store: Store) {
    let first = block * BLOCK;
    vectorised(
        #[inline(always)]
        || match (dropout, store) {
            (None, Store::Replace) => y.copy_from_slice(x),
            (None, Store::Add) => super::vector::add_assign(y, x),
            (Some(dropout), Store::Replace) => {
                for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
                    *y = x * dropout.factor((first + i) as u32);
                }
            }
            (Some(dropout), Store::Add) => {
                for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
                    *y += x * dropout.factor((first + i) as u32);
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_dropped_as_asked_for_and_neighbours_are_independent() {
        for rate in [0.1f32, 0.5] {
            let mut keys = DropoutKeys::new(3, 5);
            let mask = keys.next(rate).unwrap().unwrap();
            let n = 1 << 20;
            let kept: Vec<bool> = (0..n).map(|i| mask.factor(i) > 0.0).collect();
            let share = kept.iter().filter(|k| !**k).count() as f64 / f64::from(n);
            assert!((share - f64::from(rate)).abs() < 2e-3, "{share}");
            for lag in [1, 2, 64, 384] {
                let both = kept.windows(lag + 1).filter(|w| !w[0] && !w[lag]).count();
                let share = both as f64 / f64::from(n);
                assert!(
                    (share - f64::from(rate * rate)).abs() < 2e-3,
                    "lag {lag}: {share}"
                );
            }
        }
        let keys = &mut DropoutKeys::new(0, 0);
        assert_eq!(keys.next(0.0).unwrap(), None);
        let mask = keys.next(1.0).unwrap().unwrap();
        assert!((0..1 << 10).all(|i| mask.factor(i) == 0.0));
        for rate in [-0.1, f32::NAN, 1.1] {
            assert!(keys.next(rate).is_err(), "{rate}");
        }
    }
}
