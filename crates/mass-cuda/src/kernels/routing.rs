//! From logits to a routing plan and back, as mass-routing does it: same ties, same order.

use super::moe_ffn::Grouped;
use super::{given, grid_y, int, product, rows_of};
use crate::driver::Arguments;
use crate::{Buffer, CudaError, Device, View, ViewMut};

/// How a token's experts are chosen.
#[derive(Clone, Copy, Debug)]
pub enum Router<'a> {
    /// The smallest set of experts whose probabilities sum to `p`, in (0, 1].
    TopP {
        /// The mass.
        p: f32,
        /// Whether weights are divided by their sum.
        renormalise: bool,
    },
    /// The `k` largest logits.
    TopK {
        /// Experts a token.
        k: usize,
        /// Whether weights are divided by their sum.
        renormalise: bool,
    },
    /// Every expert whose score `sigmoid(logit)` passes `bounds`, one an expert, the sigmoid of its threshold;
    /// weights `1/k`. Without any such, and unless training, the one with the largest logit.
    TopAny {
        /// Sigmoid of the thresholds, one an expert.
        bounds: View<'a, f32>,
        /// Whether a token may go nowhere.
        training: bool,
    },
}

/// How weights depend on the logits, for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    Raw = 0,
    Renormalised = 1,
    StraightThrough = 2,
    StraightToSoftmax = 3,
}

/// Tokens grouped by expert, on the device: the arrays of mass-routing's `RoutingPlan`.
#[derive(Debug)]
pub struct Plan {
    /// Number of tokens.
    pub num_tokens: usize,
    /// Number of experts, masked ones included.
    pub num_experts: usize,
    /// Expert e owns assignments `expert_offsets[e]..expert_offsets[e + 1]`; on the host, where products are laid
    /// out.
    pub expert_offsets: Vec<u32>,
    /// The same on the device.
    pub expert_offsets_on_device: Buffer<u32>,
    /// Token of each assignment, ascending within an expert.
    pub tokens: Buffer<u32>,
    /// Routing weight of each assignment.
    pub weights: Buffer<f32>,
    /// Token t owns entries `token_offsets[t]..token_offsets[t + 1]` of the next two.
    pub token_offsets: Buffer<u32>,
    /// Assignments of each token, ascending.
    pub token_assignments: Buffer<u32>,
    /// Experts of each token, ascending.
    pub token_experts: Buffer<u32>,
    /// `[tokens, experts]`: the softmax, zero at masked experts; for top-any the score of an active expert, otherwise
    /// zero.
    pub scores: Buffer<f32>,
    rule: Rule,
}

impl Plan {
    /// Number of assignments.
    pub fn num_assignments(&self) -> usize {
        self.tokens.len()
    }

    /// The same with the gradient of raw weights, whatever the weights are: straight-through renormalised ones.
    ///
    /// # Errors
    /// [`CudaError::Setting`] for a plan of top-any, whose gradient goes straight through to its scores.
    pub fn straight_through(mut self) -> Result<Self, CudaError> {
        if self.rule == Rule::StraightThrough {
            return Err(CudaError::Setting {
                what: "router of the plan",
                got: "top-any".into(),
                wanted: "one with a softmax",
            });
        }
        self.rule = Rule::StraightToSoftmax;
        Ok(self)
    }

    /// Checks that the arrays, which anybody may have changed, are those of a plan.
    fn check(&self, device: &Device) -> Result<(), CudaError> {
        let (n, k, assigned) = (self.num_tokens, self.num_experts, self.num_assignments());
        let offsets = &self.expert_offsets_on_device;
        given(
            device,
            &[
                ("plan's tokens", &self.tokens, assigned),
                ("plan's weights", &self.weights, assigned),
                ("plan's offsets of tokens", &self.token_offsets, n + 1),
                (
                    "plan's assignments of tokens",
                    &self.token_assignments,
                    assigned,
                ),
                ("plan's experts of tokens", &self.token_experts, assigned),
                ("plan's scores", &self.scores, product("scores", &[n, k])?),
                (
                    "plan's offsets of experts",
                    offsets,
                    offsets.len().max(k + 1),
                ),
            ],
        )?;
        int("tokens", n)?;
        int("experts", k)?;
        Ok(())
    }

    /// What the layer's kernels need.
    pub fn grouped(&self) -> Grouped<'_> {
        Grouped {
            expert_offsets: &self.expert_offsets,
            expert_offsets_on_device: self.expert_offsets_on_device.view(),
            tokens: self.tokens.view(),
            weights: self.weights.view(),
            token_offsets: self.token_offsets.view(),
            token_assignments: self.token_assignments.view(),
        }
    }
}

/// Routes `logits: [tokens, experts]`. `in_use` says of each expert whether it may be chosen (not 0); all may
/// without. Waits for the device once: the host has to know the number of assignments.
///
/// # Errors
/// [`CudaError::NonFiniteLogit`] for a logit in use that is NaN or infinite, [`CudaError::Setting`] for a mass
/// outside (0, 1] or a `k` outside 1..=experts, [`CudaError::AllExpertsMasked`] if none is in use and
/// [`CudaError::TooFewExperts`] if fewer than `k` are, even without tokens, [`CudaError::Length`], [`CudaError::TooLarge`], [`CudaError::OutOfMemory`], [`CudaError::Call`],
/// [`CudaError::OtherDevice`].
pub fn route(
    device: &Device,
    logits: View<'_, f32>,
    experts: usize,
    in_use: Option<View<'_, u32>>,
    router: Router<'_>,
) -> Result<Plan, CudaError> {
    check(device, experts, in_use, router)?;
    let n = rows_of("logits", logits.len(), experts)?;
    given(device, &[("logits", &logits, logits.len())])?;
    let (tokens, k) = (int("tokens", n)?, int("experts", experts)?);
    grid_y("experts in blocks", experts.div_ceil(256))?;
    let cells = product("logits", &[n, experts])?;
    if u32::try_from(cells).is_err() {
        return Err(CudaError::TooLarge {
            what: "tokens times experts",
            got: cells,
            most: u32::MAX as usize,
        });
    }
    let mut scores = Buffer::<f32>::uninitialised(device, cells)?;
    let mut chosen = Buffer::<f32>::uninitialised(device, cells)?;
    let mut bad = Buffer::<u32>::uninitialised(device, n)?;
    let mut counts = Buffer::<u32>::uninitialised(device, n)?;
    let blocks = n.div_ceil(256);
    let by_token = |kernel: &str, arguments: &Arguments| match n {
        0 => Ok(()),
        _ => device.launch(kernel, (blocks as u32, 1), 256, arguments),
    };
    let softmax = |scores: &mut Buffer<f32>, bad: &mut Buffer<u32>| {
        let arguments = Arguments::new()
            .view(logits)
            .view_or_null(in_use)
            .view_mut(&scores.view_mut())
            .view_mut(&bad.view_mut());
        by_token("routing_softmax", &arguments.int(tokens).int(k))
    };
    // Of a top-k router, how many experts must be in use.
    let mut least = 1;
    let rule = match router {
        Router::TopP { p, renormalise } => {
            softmax(&mut scores, &mut bad)?;
            let arguments = Arguments::new()
                .view(scores.view())
                .view(bad.view())
                .view_mut(&chosen.view_mut())
                .view_mut(&counts.view_mut());
            by_token(
                "routing_top_p",
                &arguments
                    .int(tokens)
                    .int(k)
                    .float(p)
                    .int(renormalise.into()),
            )?;
            if renormalise {
                Rule::Renormalised
            } else {
                Rule::Raw
            }
        }
        Router::TopK {
            k: want,
            renormalise,
        } => {
            least = want;
            softmax(&mut scores, &mut bad)?;
            let arguments = Arguments::new()
                .view(logits)
                .view(scores.view())
                .view_or_null(in_use)
                .view(bad.view());
            let arguments = arguments
                .view_mut(&chosen.view_mut())
                .view_mut(&counts.view_mut())
                .int(tokens)
                .int(k);
            by_token(
                "routing_top_k",
                &arguments
                    .int(int("experts of a token", want)?)
                    .int(renormalise.into()),
            )?;
            if renormalise {
                Rule::Renormalised
            } else {
                Rule::Raw
            }
        }
        Router::TopAny { bounds, training } => {
            let arguments = Arguments::new()
                .view(logits)
                .view(bounds)
                .view_or_null(in_use)
                .view_mut(&scores.view_mut());
            let arguments = arguments
                .view_mut(&bad.view_mut())
                .view_mut(&chosen.view_mut())
                .view_mut(&counts.view_mut());
            by_token(
                "routing_top_any",
                &arguments.int(tokens).int(k).int(training.into()),
            )?;
            Rule::StraightThrough
        }
    };
    let there = (in_use, least);
    group(
        device,
        (n, experts),
        there,
        &chosen,
        &counts,
        &bad,
        scores,
        rule,
    )
}

fn check(
    device: &Device,
    experts: usize,
    in_use: Option<View<'_, u32>>,
    router: Router<'_>,
) -> Result<(), CudaError> {
    let wrong = |what, got: String, wanted| Err(CudaError::Setting { what, got, wanted });
    if experts == 0 {
        return wrong("number of experts", "0".into(), "at least 1");
    }
    if let Some(in_use) = &in_use {
        given(device, &[("experts in use", in_use, experts)])?;
    }
    match router {
        Router::TopP { p, .. } if !(p > 0.0 && p <= 1.0) => {
            wrong("mass p", p.to_string(), "in (0, 1]")
        }
        Router::TopK { k, .. } if k == 0 || k > experts => wrong(
            "experts of a token",
            k.to_string(),
            "from 1 to the number of experts",
        ),
        Router::TopAny { bounds, .. } => given(device, &[("bounds", &bounds, experts)]),
        _ => Ok(()),
    }
}

/// Groups the chosen by expert, if as many as `least` are in use.
#[allow(clippy::too_many_arguments)]
fn group(
    device: &Device,
    (n, experts): (usize, usize),
    (in_use, least): (Option<View<'_, u32>>, usize),
    chosen: &Buffer<f32>,
    counts: &Buffer<u32>,
    bad: &Buffer<u32>,
    scores: Buffer<f32>,
    rule: Rule,
) -> Result<Plan, CudaError> {
    let (tokens, k) = (int("tokens", n)?, int("experts", experts)?);
    let blocks = n.div_ceil(256);
    let grid = (
        blocks as u32,
        grid_y("experts in blocks", experts.div_ceil(256))?,
    );
    let cells = product("experts in blocks", &[blocks, experts])?;
    let mut by_block = Buffer::<u32>::uninitialised(device, cells)?;
    let mut of_tokens = Buffer::<u32>::uninitialised(device, blocks)?;
    let mut first_bad = Buffer::<u32>::uninitialised(device, blocks)?;
    if n > 0 {
        let arguments = Arguments::new()
            .view(chosen.view())
            .view(counts.view())
            .view(bad.view())
            .view_mut(&by_block.view_mut());
        let arguments = arguments
            .view_mut(&of_tokens.view_mut())
            .view_mut(&first_bad.view_mut())
            .int(tokens)
            .int(k);
        device.launch("group_count", grid, 256, &arguments)?;
    }
    let mut outcome = Buffer::<u32>::uninitialised(device, experts + 3)?;
    let arguments = Arguments::new()
        .view_mut(&by_block.view_mut())
        .view_mut(&of_tokens.view_mut())
        .view(first_bad.view())
        .view_or_null(in_use);
    let arguments = arguments
        .view_mut(&outcome.view_mut())
        .int(blocks as u32)
        .int(k);
    device.launch("group_scan", (1, 1), 256, &arguments)?;
    let mut expert_offsets = outcome.to_vec()?;
    let available = expert_offsets.pop().map_or(0, |count| count as usize);
    if available == 0 {
        return Err(CudaError::AllExpertsMasked { experts });
    }
    if available < least {
        return Err(CudaError::TooFewExperts {
            k: least,
            available,
        });
    }
    if let Some(token) = expert_offsets.pop().filter(|&token| token != u32::MAX) {
        return Err(CudaError::NonFiniteLogit {
            token: token as usize,
        });
    }
    let assigned = expert_offsets[experts] as usize;
    let mut plan = Plan {
        num_tokens: n,
        num_experts: experts,
        expert_offsets,
        expert_offsets_on_device: outcome,
        tokens: Buffer::uninitialised(device, assigned)?,
        weights: Buffer::uninitialised(device, assigned)?,
        token_offsets: Buffer::zeros(device, n + 1)?,
        token_assignments: Buffer::uninitialised(device, assigned)?,
        token_experts: Buffer::uninitialised(device, assigned)?,
        scores,
        rule,
    };
    if n > 0 {
        let mut places = Buffer::<u32>::uninitialised(device, n * experts)?;
        let arguments = Arguments::new()
            .view(chosen.view())
            .view(by_block.view())
            .view(plan.expert_offsets_on_device.view());
        let arguments = arguments
            .view_mut(&plan.tokens.view_mut())
            .view_mut(&plan.weights.view_mut());
        device.launch(
            "group_fill",
            grid,
            256,
            &arguments.view_mut(&places.view_mut()).int(tokens).int(k),
        )?;
        let arguments = Arguments::new()
            .view(chosen.view())
            .view(counts.view())
            .view(of_tokens.view())
            .view(places.view());
        let arguments = arguments
            .view_mut(&plan.token_offsets.view_mut())
            .view_mut(&plan.token_assignments.view_mut());
        let arguments = arguments
            .view_mut(&plan.token_experts.view_mut())
            .int(tokens)
            .int(k);
        device.launch("group_inverse", (blocks as u32, 1), 256, &arguments)?;
    }
    Ok(plan)
}

/// Adds to `dlogits: [tokens, experts]` the gradient for that of the weights, one an assignment. The choice itself is
/// not differentiated; for top-any the gradient goes straight through to the scores.
///
/// # Errors
/// [`CudaError::Length`] if lengths do not fit the plan, [`CudaError::Call`], [`CudaError::OtherDevice`].
pub fn backward(
    device: &Device,
    plan: &Plan,
    d_weights: View<'_, f32>,
    dlogits: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    plan.check(device)?;
    given(
        device,
        &[
            ("d_weights", &d_weights, plan.num_assignments()),
            ("dlogits", &dlogits, plan.scores.len()),
        ],
    )?;
    if plan.num_tokens == 0 {
        return Ok(());
    }
    let arguments = Arguments::new()
        .view(plan.scores.view())
        .view(plan.weights.view())
        .view(d_weights);
    let arguments = arguments
        .view(plan.token_offsets.view())
        .view(plan.token_assignments.view())
        .view(plan.token_experts.view());
    let arguments = arguments
        .view_mut(&dlogits)
        .int(plan.num_tokens as u32)
        .int(plan.num_experts as u32)
        .int(plan.rule as u32);
    device.launch(
        "routing_backward",
        (plan.num_tokens.div_ceil(256) as u32, 1),
        256,
        &arguments,
    )
}

/// Adds to `dthresholds`, one an expert, the gradient of top-any's thresholds, whose sigmoids are `bounds`.
///
/// # Errors
/// As [`backward`], and [`CudaError::Setting`] for the plan of another router.
pub fn backward_thresholds(
    device: &Device,
    plan: &Plan,
    d_weights: View<'_, f32>,
    bounds: View<'_, f32>,
    dthresholds: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    plan.check(device)?;
    if plan.rule != Rule::StraightThrough {
        return Err(CudaError::Setting {
            what: "router of the plan",
            got: format!("{:?}", plan.rule),
            wanted: "top-any, which alone has thresholds",
        });
    }
    given(
        device,
        &[
            ("d_weights", &d_weights, plan.num_assignments()),
            ("bounds", &bounds, plan.num_experts),
            ("dthresholds", &dthresholds, plan.num_experts),
        ],
    )?;
    let arguments = Arguments::new()
        .view(plan.scores.view())
        .view(plan.weights.view())
        .view(d_weights);
    let arguments = arguments
        .view(plan.expert_offsets_on_device.view())
        .view(plan.tokens.view())
        .view(bounds);
    let arguments = arguments
        .view_mut(&dthresholds)
        .int(plan.num_experts as u32);
    device.launch(
        "thresholds_backward",
        (plan.num_experts as u32, 1),
        256,
        &arguments,
    )
}
