//! L2R-style gate: low-rank, norm-bounded scores with several anchors per expert.

use ndarray::{Array2, ArrayView2, Zip};

use super::{finite, finite_logits, norm, same};
use crate::RoutingError;

/// Scores whose Lipschitz constant is bounded, in a space of low rank.
///
/// # Formula
/// `q = W_q x`, anchors `k_{e,a}` (`A` for each expert), `s_{e,a} = c phi(|q|) psi(|k_{e,a}|) cos(q, k_{e,a})`,
/// `logit_e = ln sum_a exp(s_{e,a})`, with the saturating `phi(u) = tanh(u / c_q)` and `psi(u) = tanh(u / c_k)` and a scale `c`.
/// `|s| <= c` whatever the norms, so long as f32 holds `q`. Public sources disagree on `phi` and `psi`; the hyperbolic tangent is
/// this crate's choice, and so is the scale, without which all logits would lie within 2 of each other.
///
/// | array | shape |
/// |---|---|
/// | `x` | `N x d` |
/// | `query` `W_q` | `r x d`, `r << d` |
/// | `anchors` | `(K A) x r`; expert `e` owns the rows `e A..(e + 1) A` |
/// | logits | `N x K` |
///
/// # Source
/// L2R, arXiv 2601.21349.
///
/// # Examples
/// ```
/// use mass_routing::LowRankGate;
/// use ndarray::array;
///
/// let query = array![[1.0_f32, 0.0, 0.0], [0.0, 1.0, 0.0]];
/// let anchors = array![[1.0_f32, 0.0], [0.0, 1.0]];
/// let gate = LowRankGate::new(query.view(), anchors.view(), 1)?.with_scale(4.0)?;
/// let forward = gate.forward(array![[100.0_f32, 0.0, 7.0]].view())?;
/// assert!((forward.logits()[(0, 0)] - 4.0 * 1.0_f32.tanh()).abs() < 1e-5);
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone)]
pub struct LowRankGate<'a> {
    query: ArrayView2<'a, f32>,
    anchors: ArrayView2<'a, f32>,
    per_expert: usize,
    scale: f32,
    saturation: (f32, f32),
}

/// Logits, and what the backward pass needs.
#[derive(Debug, Clone)]
pub struct LowRankForward {
    logits: Array2<f32>,
    q: Array2<f32>,
    scores: Array2<f32>,
}

impl LowRankForward {
    /// The logits, `N x K`.
    pub fn logits(&self) -> ArrayView2<'_, f32> {
        self.logits.view()
    }
}

/// Gradients of everything that goes into a [`LowRankGate`].
#[derive(Debug, Clone)]
pub struct LowRankGradients {
    /// Of the tokens, `N x d`.
    pub x: Array2<f32>,
    /// Of the query projection, `r x d`.
    pub query: Array2<f32>,
    /// Of the anchors, `(K A) x r`.
    pub anchors: Array2<f32>,
}

impl<'a> LowRankGate<'a> {
    /// A gate with `per_expert` anchors for each expert, scale 1 and saturation at 1.
    ///
    /// # Errors
    /// No experts, shapes that do not fit, or an entry that is NaN or infinite.
    pub fn new(
        query: ArrayView2<'a, f32>,
        anchors: ArrayView2<'a, f32>,
        per_expert: usize,
    ) -> Result<Self, RoutingError> {
        if anchors.nrows() == 0 {
            return Err(RoutingError::NoExperts);
        }
        if per_expert == 0 || !anchors.nrows().is_multiple_of(per_expert) {
            let expected = "a positive divisor of the number of anchors";
            return Err(RoutingError::InvalidParameter {
                name: "anchors per expert",
                expected,
                value: per_expert as f64,
            });
        }
        same("rank of the anchors", query.nrows(), anchors.ncols())?;
        finite("query projection", &query)?;
        finite("anchors", &anchors)?;
        Ok(Self {
            query,
            anchors,
            per_expert,
            scale: 1.0,
            saturation: (1.0, 1.0),
        })
    }

    /// Sets the scale `c`, the largest absolute score.
    ///
    /// # Errors
    /// The scale is not positive and finite, or subnormal.
    pub fn with_scale(mut self, scale: f32) -> Result<Self, RoutingError> {
        self.scale = positive("scale", scale)?;
        Ok(self)
    }

    /// Sets the norms `c_q` and `c_k` at which queries and anchors saturate.
    ///
    /// # Errors
    /// One is not positive and finite, or subnormal.
    pub fn with_saturation(mut self, query: f32, anchor: f32) -> Result<Self, RoutingError> {
        self.saturation = (
            positive("query saturation", query)?,
            positive("anchor saturation", anchor)?,
        );
        Ok(self)
    }

    /// The logits of `x`, `N x d`.
    ///
    /// # Errors
    /// A width that does not fit, or an entry that is NaN or infinite; [`RoutingError::NonFiniteLogit`] where the projection (or a
    /// score of the largest scales) overflows.
    pub fn forward(&self, x: ArrayView2<'_, f32>) -> Result<LowRankForward, RoutingError> {
        same("width of the tokens", self.query.ncols(), x.ncols())?;
        finite("token representations", &x)?;
        let q = x.dot(&self.query.t());
        let scores = saturate(q.view(), self.saturation.0)
            .dot(&saturate(self.anchors, self.saturation.1).t())
            * self.scale;
        let (n, anchors) = scores.dim();
        let logits = Array2::from_shape_fn((n, anchors / self.per_expert), |(t, e)| {
            let own = (0..self.per_expert).map(|a| scores[(t, e * self.per_expert + a)]);
            let max = own.clone().fold(f32::NEG_INFINITY, f32::max);
            max + own.map(|s| (s - max).exp()).sum::<f32>().ln()
        });
        // Where the projection of finite tokens overflowed.
        finite_logits(logits.view(), None)?;
        Ok(LowRankForward { logits, q, scores })
    }

    /// The gradients, given that of the logits, `N x K`.
    ///
    /// # Errors
    /// Shapes that do not fit the forward pass.
    pub fn backward(
        &self,
        x: ArrayView2<'_, f32>,
        forward: &LowRankForward,
        d_logits: ArrayView2<'_, f32>,
    ) -> Result<LowRankGradients, RoutingError> {
        let (n, k) = forward.logits.dim();
        same("tokens of the forward pass", n, x.nrows())?;
        same("width of the tokens", self.query.ncols(), x.ncols())?;
        let own = (self.anchors.nrows(), self.query.nrows(), self.per_expert);
        let (anchors, rank) = (forward.scores.ncols(), forward.q.ncols());
        same("anchors of the forward pass", anchors, own.0)?;
        same("rank of the forward pass", rank, own.1)?;
        same("anchors per expert of the forward pass", anchors / k, own.2)?;
        same("rows of d_logits (tokens)", n, d_logits.nrows())?;
        same("columns of d_logits (experts)", k, d_logits.ncols())?;
        let d_scores = Array2::from_shape_fn(forward.scores.dim(), |(t, a)| {
            let e = a / self.per_expert;
            self.scale * d_logits[(t, e)] * (forward.scores[(t, a)] - forward.logits[(t, e)]).exp()
        });
        let d_saturated = d_scores.dot(&saturate(self.anchors, self.saturation.1));
        let d_q = saturate_backward(forward.q.view(), self.saturation.0, d_saturated);
        let d_saturated = d_scores
            .t()
            .dot(&saturate(forward.q.view(), self.saturation.0));
        let anchors = saturate_backward(self.anchors, self.saturation.1, d_saturated);
        Ok(LowRankGradients {
            x: d_q.dot(&self.query),
            query: d_q.t().dot(&x),
            anchors,
        })
    }
}

fn positive(name: &'static str, value: f32) -> Result<f32, RoutingError> {
    // The inverse of a subnormal number may overflow.
    if value > 0.0 && value.is_normal() {
        Ok(value)
    } else {
        Err(RoutingError::InvalidParameter {
            name,
            expected: "positive, finite and not subnormal",
            value: value.into(),
        })
    }
}

/// `tanh(n / c) / n`, continued by `1 / c` at `n = 0`.
fn ratio(n: f64, c: f64) -> f64 {
    if n < 1e-6 * c {
        c.recip()
    } else {
        (n / c).tanh() / n
    }
}

/// Each row `v` as `tanh(|v| / c) v / |v|`.
fn saturate(rows: ArrayView2<'_, f32>, c: f32) -> Array2<f32> {
    let mut out = rows.to_owned();
    for mut row in out.outer_iter_mut() {
        let factor = ratio(norm(row.view()), c.into());
        row.mapv_inplace(|v| (f64::from(v) * factor) as f32);
    }
    out
}

/// Gradient of the rows, given that of the saturated rows.
fn saturate_backward(rows: ArrayView2<'_, f32>, c: f32, mut d: Array2<f32>) -> Array2<f32> {
    let c = f64::from(c);
    for (mut d, v) in d.outer_iter_mut().zip(rows.outer_iter()) {
        let n = norm(v);
        let across = ratio(n, c);
        // Along v the derivative is that of tanh, across it the ratio; at the origin both are the same.
        let unit = |v: f32| f64::from(v) / n.max(f64::MIN_POSITIVE);
        let along = (n / c).cosh().powi(2).recip() / c;
        let component: f64 = (d.iter().zip(v).map(|(&d, &v)| f64::from(d) * unit(v))).sum();
        let turned = component * (along - across);
        Zip::from(&mut d)
            .and(&v)
            .for_each(|d, &v| *d = (f64::from(*d) * across + turned * unit(v)) as f32);
    }
    d
}
