//! Cosine gate: GMoE's with a projection and a learned temperature, DynMoE's without.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use super::{column_sums, finite, finite_logits, same, unit_rows, unit_rows_backward};
use crate::RoutingError;

/// The largest scale: `exp(log_scale)` is clamped here.
const MAX_SCALE: f32 = 100.0;

/// Cosine similarity of tokens and experts as logits.
///
/// # Formula
/// `h = x P^T + b` (or `h = x` without a projection), `logit_{t,e} = exp(min(ln 100, log_scale)) cos(h_t, s_e)` with `s_e` the columns of
/// `experts`; norms below 1e-12 count as 1e-12.
///
/// | array | shape |
/// |---|---|
/// | `x` | `N x d` |
/// | projection `P`, `b` | `r x d`, `r` |
/// | `experts` | `r x K` (`d x K` without a projection) |
/// | logits | `N x K` |
///
/// # Source
/// Li et al., "Sparse Mixture-of-Experts are Domain Generalizable Learners" (GMoE), arXiv 2206.04046: projection to 256, scale `1 / 0.5` at
/// the start. Guo et al. (DynMoE), arXiv 2405.14297: neither projection nor scale.
///
/// # Examples
/// ```
/// use mass_routing::CosineGate;
/// use ndarray::array;
///
/// let experts = array![[1.0_f32, 0.0], [0.0, 2.0]]; // columns are experts
/// let x = array![[3.0_f32, 0.0], [1.0, 1.0]];
/// let gate = CosineGate::new(experts.view())?;
/// let forward = gate.forward(x.view())?;
/// assert_eq!(forward.logits()[(0, 0)], 1.0);
/// let d_logits = array![[1.0_f32, 0.0], [0.0, 0.0]];
/// let gradients = gate.backward(x.view(), &forward, d_logits.view())?;
/// assert_eq!(gradients.experts.dim(), (2, 2));
/// # Ok::<(), mass_routing::RoutingError>(())
/// ```
#[derive(Debug, Clone)]
pub struct CosineGate<'a> {
    experts: ArrayView2<'a, f32>,
    projection: Option<(ArrayView2<'a, f32>, ArrayView1<'a, f32>)>,
    log_scale: Option<f32>,
}

/// Logits, and what the backward pass needs.
#[derive(Debug, Clone)]
pub struct CosineForward {
    logits: Array2<f32>,
    unit_tokens: Array2<f32>,
    token_norms: Vec<f64>,
    unit_experts: Array2<f32>,
    expert_norms: Vec<f64>,
}

impl CosineForward {
    /// The logits, `N x K`.
    pub fn logits(&self) -> ArrayView2<'_, f32> {
        self.logits.view()
    }
}

/// Gradients of everything that goes into a [`CosineGate`].
#[derive(Debug, Clone)]
pub struct CosineGradients {
    /// Of the tokens, `N x d`.
    pub x: Array2<f32>,
    /// Of the expert columns, `r x K`.
    pub experts: Array2<f32>,
    /// Of the projection, `r x d`, and its bias, `r`, if there is one.
    pub projection: Option<(Array2<f32>, Array1<f32>)>,
    /// Of the logarithm of the scale, if there is one; zero where it is clamped.
    pub log_scale: Option<f32>,
}

impl<'a> CosineGate<'a> {
    /// A gate without projection and with scale one.
    ///
    /// # Errors
    /// No experts, or an entry that is NaN or infinite.
    pub fn new(experts: ArrayView2<'a, f32>) -> Result<Self, RoutingError> {
        if experts.ncols() == 0 {
            return Err(RoutingError::NoExperts);
        }
        finite("expert embeddings", &experts)?;
        Ok(Self {
            experts,
            projection: None,
            log_scale: None,
        })
    }

    /// Projects tokens first: `weight` is `r x d`, `bias` is `r`.
    ///
    /// # Errors
    /// Shapes that do not fit the experts, or an entry that is NaN or infinite.
    pub fn with_projection(
        mut self,
        weight: ArrayView2<'a, f32>,
        bias: ArrayView1<'a, f32>,
    ) -> Result<Self, RoutingError> {
        same(
            "rows of the projection",
            self.experts.nrows(),
            weight.nrows(),
        )?;
        same("bias of the projection", self.experts.nrows(), bias.len())?;
        finite("projection", &weight)?;
        finite("projection bias", &bias)?;
        self.projection = Some((weight, bias));
        Ok(self)
    }

    /// Scales the cosines by `exp(log_scale)`, at most 100.
    ///
    /// # Errors
    /// `log_scale` is NaN or infinite.
    pub fn with_log_scale(mut self, log_scale: f32) -> Result<Self, RoutingError> {
        if !log_scale.is_finite() {
            return Err(RoutingError::NonFinite {
                what: "log_scale",
                index: 0,
                value: log_scale.into(),
            });
        }
        self.log_scale = Some(log_scale);
        Ok(self)
    }

    fn scale(&self) -> f32 {
        self.log_scale.map_or(1.0, |s| s.min(MAX_SCALE.ln()).exp())
    }

    fn width(&self) -> usize {
        self.projection
            .map_or(self.experts.nrows(), |(weight, _)| weight.ncols())
    }

    /// The logits of `x`, `N x d`.
    ///
    /// # Errors
    /// A width that does not fit, or an entry that is NaN or infinite; [`RoutingError::NonFiniteLogit`] where the projection
    /// overflows.
    pub fn forward(&self, x: ArrayView2<'_, f32>) -> Result<CosineForward, RoutingError> {
        same("width of the tokens", self.width(), x.ncols())?;
        finite("token representations", &x)?;
        let projected = self
            .projection
            .map(|(weight, bias)| x.dot(&weight.t()) + bias);
        let (unit_tokens, token_norms) = unit_rows(projected.as_ref().map_or(x, |h| h.view()));
        let (unit_experts, expert_norms) = unit_rows(self.experts.t());
        let logits = unit_tokens.dot(&unit_experts.t()) * self.scale();
        // Where the projection of finite tokens overflowed.
        finite_logits(logits.view(), None)?;
        Ok(CosineForward {
            logits,
            unit_tokens,
            token_norms,
            unit_experts,
            expert_norms,
        })
    }

    /// The gradients, given that of the logits, `N x K`.
    ///
    /// # Errors
    /// Shapes that do not fit the forward pass.
    pub fn backward(
        &self,
        x: ArrayView2<'_, f32>,
        forward: &CosineForward,
        d_logits: ArrayView2<'_, f32>,
    ) -> Result<CosineGradients, RoutingError> {
        let (n, k) = forward.logits.dim();
        same("tokens of the forward pass", n, x.nrows())?;
        same("width of the tokens", self.width(), x.ncols())?;
        same("experts of the forward pass", k, self.experts.ncols())?;
        same(
            "width of the gate of the forward pass",
            self.experts.nrows(),
            forward.unit_experts.ncols(),
        )?;
        same("rows of d_logits (tokens)", n, d_logits.nrows())?;
        same("columns of d_logits (experts)", k, d_logits.ncols())?;
        let d_cosine = &d_logits * self.scale();
        let d_tokens = unit_rows_backward(
            &forward.unit_tokens,
            &forward.token_norms,
            d_cosine.dot(&forward.unit_experts),
        );
        let d_experts = d_cosine.t().dot(&forward.unit_tokens);
        let d_experts = unit_rows_backward(&forward.unit_experts, &forward.expert_norms, d_experts);
        let log_scale = self.log_scale.map(|s| {
            let free = s <= MAX_SCALE.ln();
            if free {
                (&d_logits * &forward.logits).sum()
            } else {
                0.0
            }
        });
        let (x, projection) = match self.projection {
            None => (d_tokens, None),
            Some((weight, _)) => (
                d_tokens.dot(&weight),
                Some((d_tokens.t().dot(&x), column_sums(&d_tokens))),
            ),
        };
        Ok(CosineGradients {
            x,
            experts: d_experts.reversed_axes(),
            projection,
            log_scale,
        })
    }
}
