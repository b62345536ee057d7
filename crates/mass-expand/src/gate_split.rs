//! What happens to the gate when an expert splits: mass that is preserved, and halves that divide the tokens.
//!
//! # Formulas
//! A copied gate row makes two equal logits, so the pair's softmax weight grows from `e^z` to `2 e^z`. An offset of
//! `-ln 2` on both logits keeps the sum at `e^z`.
//!
//! Bisection: with `u` the first principal component of the source's gate inputs, `m` and `s` the mean and the standard
//! deviation of `u . x` over them and `a = strength / s`, the halves get the rows `w + a u` and `w - a u` and the offsets
//! `o - a m` and `o + a m`, so their logits are `z + t` and `z - t` with `t = a (u . x - m)`: equal at the mean,
//! `2 strength` apart one standard deviation from it.
//!
//! # Which variant does what
//! `paper` and `reference` copy the row and let the mass double. `clone` can have the offset, and there is `bisect`.

use ndarray::ArrayView2;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::{ExpandError, sweep};

/// Moves `-ln 2` onto the source's logit offset and returns the newcomer's, which is the same.
///
/// Offsets accumulate: an expert split twice carries `-2 ln 2`.
///
/// # Errors
/// [`ExpandError::NonFinite`] if the offset is not finite.
///
/// # Examples
/// ```
/// let mut source = 0.0;
/// let newcomer = mass_expand::preserve_mass(&mut source)?;
/// assert_eq!(source.exp() + newcomer.exp(), 1.0);
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn preserve_mass(source_offset: &mut f32) -> Result<f32, ExpandError> {
    if !source_offset.is_finite() {
        return Err(ExpandError::NonFinite {
            what: "logit offset",
        });
    }
    *source_offset -= std::f32::consts::LN_2;
    Ok(*source_offset)
}

/// Gives a removed expert's mass to another: the offset becomes `ln(e^kept + e^removed)`.
///
/// Exact while both gate rows are equal, so it undoes [`preserve_mass`] when the newcomer of a split is taken back.
///
/// # Errors
/// [`ExpandError::NonFinite`] if an offset is not finite.
///
/// # Examples
/// ```
/// let mut source = 0.5;
/// let newcomer = mass_expand::preserve_mass(&mut source)?;
/// mass_expand::absorb_mass(&mut source, newcomer)?;
/// assert!((source - 0.5).abs() < 1e-6);
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn absorb_mass(kept_offset: &mut f32, removed_offset: f32) -> Result<(), ExpandError> {
    if !(kept_offset.is_finite() && removed_offset.is_finite()) {
        return Err(ExpandError::NonFinite {
            what: "logit offset",
        });
    }
    let high = kept_offset.max(removed_offset);
    let low = kept_offset.min(removed_offset);
    *kept_offset = high + (low - high).exp().ln_1p();
    Ok(())
}

/// Along which direction a source's tokens are divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BisectDirection {
    /// The first principal component of the tokens.
    Principal,
    /// Any: uniform on the sphere, drawn anew for every gate row (ablation).
    Random,
    /// The source's own gate row (ablation).
    GateRow,
}

/// Settings of [`bisect`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BisectParams {
    /// `a s`: how many nats a token one standard deviation off the boundary moves each half's logit; positive.
    pub strength: f64,
    /// `u`.
    pub direction: BisectDirection,
    /// Lower both offsets by the tokens' mean of `ln(e^t + e^-t)`, so that the pair's log mass is unchanged on average.
    /// Off, the pair gains mass.
    pub preserve_mass: bool,
    /// Bound on the power iterations, at least 1.
    pub max_iterations: usize,
}

impl Default for BisectParams {
    fn default() -> Self {
        Self {
            strength: 3.0,
            direction: BisectDirection::Principal,
            preserve_mass: false,
            max_iterations: 100,
        }
    }
}

impl BisectParams {
    pub(crate) fn validate(&self) -> Result<(), ExpandError> {
        if !(self.strength.is_finite() && self.strength > 0.0) {
            return Err(ExpandError::Parameter {
                name: "strength",
                value: self.strength,
                expected: "a positive finite number",
            });
        }
        if self.max_iterations == 0 {
            return Err(ExpandError::Parameter {
                name: "max_iterations",
                value: 0.0,
                expected: "at least 1",
            });
        }
        Ok(())
    }
}

/// The two halves of a gate row, and how they came about.
#[derive(Debug, Clone, PartialEq)]
pub struct Bisection {
    /// Along which the tokens are divided, of unit length; the largest entry of a principal component is positive.
    pub direction: Vec<f32>,
    /// Mean of `u . x`: where the boundary lies.
    pub mean: f64,
    /// Standard deviation of `u . x`.
    pub std: f64,
    /// Share of the tokens' variance that lies along `u`.
    pub explained: f64,
    /// Gate row of the source: `w + a u`.
    pub source_row: Vec<f32>,
    /// Logit offset of the source.
    pub source_offset: f32,
    /// Gate row of the newcomer: `w - a u`.
    pub newcomer_row: Vec<f32>,
    /// Logit offset of the newcomer.
    pub newcomer_offset: f32,
}

/// Divides a source's tokens along the first principal component of their gate inputs, or another [`BisectDirection`].
///
/// `inputs` are the gate inputs of the tokens that were routed to the source, tokens x dimension; `gate_row` and
/// `offset` are the source's.
///
/// # Errors
/// [`ExpandError::NoSpread`] with fewer than two tokens, tokens that are all the same, or along a gate row of zeros;
/// [`ExpandError::Shape`], [`ExpandError::Empty`], [`ExpandError::NonFinite`], [`ExpandError::Parameter`].
///
/// # Examples
/// ```
/// use mass_expand::{BisectParams, bisect};
/// use ndarray::arr2;
/// let tokens = arr2(&[[-2.0, 0.1], [-1.0, -0.1], [1.0, -0.1], [2.0, 0.1f32]]);
/// let halves = bisect(tokens.view(), &[0.5, 0.5], 0.0, BisectParams::default())?;
/// let logit = |row: &[f32], offset: f32, x: [f32; 2]| row[0] * x[0] + row[1] * x[1] + offset;
/// for (token, right) in [([-1.0, -0.1], false), ([1.0, -0.1], true)] {
///     let source = logit(&halves.source_row, halves.source_offset, token);
///     let newcomer = logit(&halves.newcomer_row, halves.newcomer_offset, token);
///     assert_eq!(source > newcomer, right);
/// }
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn bisect(
    inputs: ArrayView2<'_, f32>,
    gate_row: &[f32],
    offset: f32,
    params: BisectParams,
) -> Result<Bisection, ExpandError> {
    let (tokens, dim) = inputs.dim();
    check(&params, gate_row, offset, tokens, dim)?;
    let centred = Centred::new(inputs)?;
    let direction = match params.direction {
        BisectDirection::Principal => centred.principal_component(params.max_iterations),
        BisectDirection::Random => random_direction(gate_row),
        BisectDirection::GateRow => {
            let mut row: Vec<f64> = gate_row.iter().copied().map(f64::from).collect();
            if !normalise(&mut row) {
                return Err(ExpandError::NoSpread { tokens });
            }
            row
        }
    };
    let projections: Vec<f64> = centred
        .rows()
        .map(|row| sweep::dot(row, &direction))
        .collect();
    let power: f64 = projections.iter().map(|t| t * t).sum();
    let std = (power / (tokens - 1) as f64).sqrt();
    if !(std > 0.0 && (params.strength / std).is_finite()) {
        return Err(ExpandError::NoSpread { tokens });
    }
    let mean: f64 = direction
        .iter()
        .zip(&centred.mean)
        .map(|(u, m)| u * m)
        .sum();
    let a = params.strength / std;
    let gained = if params.preserve_mass {
        // ln(e^t + e^-t) = |t| + ln(1 + e^(-2|t|)), which does not overflow.
        let log_mass = |t: &f64| (a * t).abs() + (-2.0 * (a * t).abs()).exp().ln_1p();
        projections.iter().map(log_mass).sum::<f64>() / tokens as f64
    } else {
        0.0
    };
    let row = |a: f64| -> Vec<f32> {
        gate_row
            .iter()
            .zip(&direction)
            .map(|(&w, u)| (f64::from(w) + a * u) as f32)
            .collect()
    };
    let half = |a: f64| (f64::from(offset) - a * mean - gained) as f32;
    let (source_row, newcomer_row) = (row(a), row(-a));
    let (source_offset, newcomer_offset) = (half(a), half(-a));
    let rows = source_row.iter().chain(&newcomer_row);
    if !rows
        .chain([&source_offset, &newcomer_offset])
        .all(|v| v.is_finite())
    {
        // So little spread that the boundary is steeper than f32 holds.
        return Err(ExpandError::NoSpread { tokens });
    }
    Ok(Bisection {
        source_row,
        source_offset,
        newcomer_row,
        newcomer_offset,
        direction: direction.iter().map(|&u| u as f32).collect(),
        mean,
        std,
        explained: power / centred.power,
    })
}

/// [`bisect`] on a plain slice of gate inputs, token by token, each as long as the gate row.
///
/// # Errors
/// As there, and [`ExpandError::Shape`] if the inputs are not whole tokens.
///
/// # Examples
/// ```
/// use mass_expand::{BisectParams, bisect_slice};
/// let tokens = [-2.0, 0.1, -1.0, -0.1, 1.0, -0.1, 2.0, 0.1];
/// let halves = bisect_slice(&tokens, &[0.5, 0.5], 0.0, BisectParams::default())?;
/// assert!(halves.direction[0] > 0.99);
/// # Ok::<(), mass_expand::ExpandError>(())
/// ```
pub fn bisect_slice(
    inputs: &[f32],
    gate_row: &[f32],
    offset: f32,
    params: BisectParams,
) -> Result<Bisection, ExpandError> {
    let dim = gate_row.len();
    let tokens = inputs.len().checked_div(dim);
    let tokens = tokens.ok_or(ExpandError::Empty { what: "gate row" })?;
    match ArrayView2::from_shape((tokens, dim), inputs) {
        // A view would take a slice that is longer than it.
        Ok(view) if view.len() == inputs.len() => bisect(view, gate_row, offset, params),
        _ => Err(ExpandError::Shape {
            what: "gate inputs (whole tokens, each as long as the gate row)",
            got: inputs.len(),
            expected: tokens * dim,
        }),
    }
}

fn check(
    params: &BisectParams,
    gate_row: &[f32],
    offset: f32,
    tokens: usize,
    dim: usize,
) -> Result<(), ExpandError> {
    params.validate()?;
    if gate_row.is_empty() {
        return Err(ExpandError::Empty { what: "gate row" });
    }
    if dim != gate_row.len() {
        return Err(ExpandError::Shape {
            what: "gate input",
            got: dim,
            expected: gate_row.len(),
        });
    }
    if tokens < 2 {
        return Err(ExpandError::NoSpread { tokens });
    }
    if gate_row.iter().any(|w| !w.is_finite()) {
        return Err(ExpandError::NonFinite { what: "gate row" });
    }
    if !offset.is_finite() {
        return Err(ExpandError::NonFinite {
            what: "logit offset",
        });
    }
    Ok(())
}

/// The tokens with their mean taken out, tokens x dimension, row-major.
struct Centred {
    mean: Vec<f64>,
    values: Vec<f32>,
    /// Sum of squares of `values`.
    power: f64,
}

impl Centred {
    fn new(inputs: ArrayView2<'_, f32>) -> Result<Self, ExpandError> {
        let (tokens, dim) = inputs.dim();
        let mut mean = vec![0.0f64; dim];
        for row in inputs.rows() {
            for (m, &x) in mean.iter_mut().zip(row) {
                *m += f64::from(x);
            }
        }
        if mean.iter().any(|m| !m.is_finite()) {
            return Err(ExpandError::NonFinite {
                what: "gate inputs",
            });
        }
        for m in &mut mean {
            *m /= tokens as f64;
        }
        let mut values = Vec::with_capacity(tokens * dim);
        let mut power = 0.0;
        for row in inputs.rows() {
            for (m, &x) in mean.iter().zip(row) {
                let value = f64::from(x) - m;
                power += value * value;
                values.push(value as f32);
            }
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(ExpandError::NonFinite {
                what: "spread of the gate inputs",
            });
        }
        if power > 0.0 {
            Ok(Self {
                mean,
                values,
                power,
            })
        } else {
            Err(ExpandError::NoSpread { tokens })
        }
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.mean.len())
    }

    /// Power iteration on the covariance, one pass over the tokens each.
    ///
    /// The start is a fixed pseudo-random vector: a data-driven start such as the farthest token can be exactly
    /// orthogonal to the answer in symmetric data.
    fn principal_component(&self, max_iterations: usize) -> Vec<f64> {
        let mut generator = ChaCha8Rng::seed_from_u64(0);
        let mut direction: Vec<f64> = self
            .mean
            .iter()
            .map(|_| f64::from(generator.next_u32()) / f64::from(u32::MAX) - 0.5)
            .collect();
        normalise(&mut direction);
        for _ in 0..max_iterations {
            let mut next = vec![0.0; direction.len()];
            for row in self.rows() {
                sweep::accumulate(row, sweep::dot(row, &direction), &mut next);
            }
            if !normalise(&mut next) {
                break;
            }
            let agreement: f64 = next.iter().zip(&direction).map(|(a, b)| a * b).sum();
            direction = next;
            if 1.0 - agreement < 1e-13 {
                break;
            }
        }
        let largest =
            direction.iter().copied().fold(
                0.0f64,
                |best, u| if u.abs() > best.abs() { u } else { best },
            );
        if largest < 0.0 {
            direction.iter_mut().for_each(|u| *u = -*u);
        }
        direction
    }
}

/// Uniform on the sphere, from a generator that the bits of the gate row seed.
fn random_direction(gate_row: &[f32]) -> Vec<f64> {
    let seed = gate_row.iter().fold(0u64, |seed, w| {
        (seed ^ u64::from(w.to_bits())).wrapping_mul(0x0100_0000_01b3)
    });
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    // In (0, 1], since a logarithm is taken of it.
    let mut uniform = || (f64::from(generator.next_u32()) + 1.0) / 4_294_967_296.0;
    let normal = |_| (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    let mut direction: Vec<f64> = gate_row.iter().map(normal).collect();
    normalise(&mut direction);
    direction
}

/// Scales to unit length; false if the vector is zero or too small to scale.
fn normalise(vector: &mut [f64]) -> bool {
    // Largest entry first: squares of tiny entries would vanish.
    let largest = vector.iter().fold(0.0f64, |best, v| best.max(v.abs()));
    if !(largest > 0.0 && largest.is_finite()) {
        return false;
    }
    vector.iter_mut().for_each(|v| *v /= largest);
    let norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
    vector.iter_mut().for_each(|v| *v /= norm);
    true
}
