//! How to grow a mixture in a model of your own.
//!
//! You have a training loop, in whatever framework, with a mixture-of-experts layer in it: a gate, a pool of experts, and an
//! optimizer. This guide adds growth to it. It takes this crate, which decides, and `mass-routing`, which routes; neither has
//! tensors. The same loop in candle and in burn is in the repository's
//! [`crates/interop`](https://github.com/mass-moe/mass/tree/main/crates/interop); with dfdx nothing of this has to be written,
//! since `mass-model` has it.
//!
//! # 1. A pool that can change
//!
//! Keep the experts in a list, each with its gate row, its weights, its optimizer moments and its [`ExpertId`]. The list has
//! the order of [`Controller::active`]: newcomers go to the end, and whoever is behind a removed expert moves up. Stack the gate
//! rows when you need them; do not keep them in one matrix that an optimizer owns. Name things in checkpoints and logs by id and
//! not by place.
//!
//! # 2. Routing
//!
//! Logits go to a `Router` as a slice, and what comes back is a plan: the tokens of each expert, one expert after the other, and
//! their weights. Take rows by `plan.tokens()`, compute, multiply by `plan.weights()`, and add the rows up again. For the gate's
//! gradient, give `backward_slice` the gradient of each weight, which is the product of the gradient of the layer's output row
//! with the expert's output row; or compute the softmax in your framework and let the plan only choose.
//!
//! Take `Combine::StraightThrough` (or raw weights) where tokens may have one expert: a renormalised weight of one expert is 1
//! whatever the gate does, and teaches it nothing.
//!
//! # 3. What the controller is told
//!
//! At every step, after the backward pass and before the optimizer: [`Controller::begin_step`] with the loss and, for each
//! expert, what its [`ExpertObservation`] has. The norm of its gradient and its load are always needed. `loss_share` is
//! `plan.loss_shares(..)`; [`Choice::LossShare`] needs it, which `ours` and `calibrated` use.
//!
//! # 4. What the controller asks
//!
//! `begin_step` returns [`Request`]s, and [`Controller::answer`] may return more. `ours` asks for nothing.
//!
//! | request | answer |
//! |---|---|
//! | [`Request::Alignment`] | [`alignment`](crate::alignment()) of the gradient and the weights of the expert's first matrix |
//! | [`Request::MaskedLoss`] | the loss of the same batch, with the expert masked and without |
//! | [`Request::ProbeLoss`] | [`Answer::probe`] of held-out losses, with the expert masked and without, and dropout off |
//!
//! A router takes a mask of experts; masked logits are ignored.
//!
//! # 5. What the controller wants done
//!
//! [`Controller::finish_step`] returns [`Action`]s, to be carried out in their order, before the optimizer's step.
//!
//! | | weights | gate row | gradient | moments |
//! |---|---|---|---|---|
//! | [`SplitOperator::Bisect`] | copied | both from [`bisect_slice`], given the gate inputs of the source's tokens | copied, or none in this step | [`Moments`] |
//! | [`SplitOperator::Clone`] | copied | copied; with `preserve_mass`, [`preserve_mass`](crate::preserve_mass()) on the offsets | [`divide_gradient`] | [`Moments`] |
//!
//! A bisection needs two tokens that differ: on [`ExpandError::NoSpread`] clone instead, with `preserve_mass`. Gates without
//! an offset can have it as the weight of an input that is always one, as below. A router that adapts (`BiasBalanced`, `TopAny`) is
//! told by `Router::split_expert` and `remove_expert`.
//!
//! [`Action::Remove`] takes an expert out. If its split changed the gate, its other half gets the gate row back that it had:
//! keep that row until the newcomer has been judged.
//!
//! # 6. In the log and in checkpoints
//!
//! [`Controller::drain_events`] has every split with the alarm behind it. The controller is saved and restored with serde, at any
//! point of a run. [`ControllerParams::reach`] says before a run whether a split can come at all, [`Controller::diagnoses`] after
//! it what went wrong.
//!
//! # What goes wrong in frameworks
//!
//! - A clone of a parameter is often the same parameter: it shares the gradient (dfdx, burn) or the values (candle, PyTorch). A
//!   newcomer needs new tensors, made of copied values.
//! - An optimizer that was given its parameters at the start does not know the newcomer. Add a group (PyTorch's
//!   `add_param_group`), or have an optimizer for each expert.
//! - An expert without tokens has no gradient, or one of zero. Many frameworks refuse tensors without rows: leave it out of the
//!   forward pass, and tell the controller a norm and a load of zero.
//!
//! # The whole loop
//!
//! Six tasks, and a mixture of two linear experts `y = sum of w[e] (v[e] . x)` that grows to eight, with plain gradient descent
//! on plain slices.
//!
//! ```
//! use mass_expand::*;
//! use mass_routing::{Combine, Router, RoutingPlan, TopP};
//!
//! const DIM: usize = 3;
//! #[derive(Clone)]
//! struct Expert { id: ExpertId, gate: Vec<f32>, weights: Vec<f32> }
//! let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
//!
//! // Tokens around six points of a circle, the last entry one; at each point another linear target.
//! let mut state = 1u64;
//! let mut uniform = || {
//!     state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
//!     (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
//! };
//! let token = |t: usize, [a, b]: [f32; 2]| {
//!     let at = (t % 6) as f32;
//!     let x = [3.0 * at.cos() + a, 3.0 * at.sin() + b, 1.0];
//!     let slope = [2.0, -1.0, 3.0, -3.0, 1.0, -2.0][t % 6];
//!     (x, slope * (x[0] - x[1]))
//! };
//!
//! let mut router = TopP::new(0.6, Combine::StraightThrough)?;
//! let mut plan = RoutingPlan::default();
//! let mut controller = ControllerParams::ours(1, 2, 8, 400).check()?;
//! let new = |&id: &ExpertId| {
//!     let gate = if id.0 == 0 { 0.1 } else { -0.1 };
//!     Expert { id, gate: vec![gate; DIM], weights: vec![0.0; DIM] }
//! };
//! let mut pool: Vec<Expert> = controller.active(0).iter().map(new).collect();
//! let mut losses = Vec::new();
//! for step in 0..400 {
//!     let batch: Vec<_> = (0..120).map(|t| token(t, [uniform(), uniform()])).collect();
//!
//!     // Forward: route, then every expert its tokens.
//!     let logits: Vec<f32> = batch.iter().flat_map(|(x, _)| pool.iter().map(|e| dot(&e.gate, x))).collect();
//!     router.route_slice(&logits, pool.len(), None, &mut plan)?;
//!     let mut y = vec![0.0; batch.len()];
//!     for (e, expert) in pool.iter().enumerate() {
//!         for a in plan.segment(e) {
//!             let t = plan.tokens()[a] as usize;
//!             y[t] += plan.weights()[a] * dot(&expert.weights, &batch[t].0);
//!         }
//!     }
//!     let errors: Vec<f32> = y.iter().zip(&batch).map(|(y, (_, target))| y - target).collect();
//!     let token_losses: Vec<f32> = errors.iter().map(|e| e * e).collect();
//!     let loss = token_losses.iter().sum::<f32>() / batch.len() as f32;
//!     losses.push(loss);
//!
//!     // Backward: gradients of the weights of experts and of routing, and through these of the logits.
//!     let mut gradients = vec![vec![0.0; DIM]; pool.len()];
//!     let mut d_weights = vec![0.0; plan.num_assignments()];
//!     for (e, expert) in pool.iter().enumerate() {
//!         for a in plan.segment(e) {
//!             let t = plan.tokens()[a] as usize;
//!             let (dy, x) = (2.0 * errors[t] / batch.len() as f32, &batch[t].0);
//!             d_weights[a] = dy * dot(&expert.weights, x);
//!             gradients[e].iter_mut().zip(x).for_each(|(g, x)| *g += plan.weights()[a] * dy * x);
//!         }
//!     }
//!     let mut d_logits = vec![0.0; logits.len()];
//!     router.backward_slice(&plan, &d_weights, &mut d_logits)?;
//!
//!     // Growth, between backward pass and optimizer.
//!     let shares = plan.loss_shares(&token_losses)?;
//!     let observed: Vec<ExpertObservation> = (0..pool.len())
//!         .map(|e| {
//!             let norm = dot(&gradients[e], &gradients[e]).sqrt();
//!             let seen = ExpertObservation::new(pool[e].id, norm.into(), plan.load(e) as u64);
//!             ExpertObservation { loss_share: shares[e], ..seen }
//!         })
//!         .collect();
//!     let layers = [LayerObservation::new(&observed, 1, DIM)];
//!     let requests = controller.begin_step(&StepObservation::new(step, loss.into(), &layers))?;
//!     assert!(requests.is_empty());
//!     let mut newcomers = Vec::new();
//!     for action in controller.finish_step()? {
//!         if let Action::Split { source, newcomer, operator: SplitOperator::Bisect(cut), .. } = action {
//!             let e = pool.iter().position(|expert| expert.id == source).expect("an active expert");
//!             let own = plan.segment(e).flat_map(|a| batch[plan.tokens()[a] as usize].0);
//!             let row = &pool[e].gate;
//!             let halves = match bisect_slice(&own.collect::<Vec<f32>>(), row, 0.0, cut) {
//!                 Ok(h) => [(h.source_row, h.source_offset), (h.newcomer_row, h.newcomer_offset)],
//!                 // Tokens that do not differ cannot be divided: each half gets the row, and half of its mass.
//!                 Err(ExpandError::NoSpread { .. }) => [0, 1].map(|_| (row.clone(), -std::f32::consts::LN_2)),
//!                 Err(e) => return Err(e.into()),
//!             };
//!             let [old, new] = halves.map(|(mut gate, offset)| { gate[DIM - 1] += offset; gate });
//!             newcomers.push(Expert { id: newcomer, gate: new, ..pool[e].clone() });
//!             pool[e].gate = old;
//!         }
//!     }
//!
//!     // The optimizer's step.
//!     let experts = pool.len();
//!     for (e, expert) in pool.iter_mut().enumerate() {
//!         expert.weights.iter_mut().zip(&gradients[e]).for_each(|(w, g)| *w -= 0.05 * g);
//!         for (t, (x, _)) in batch.iter().enumerate() {
//!             let d = d_logits[t * experts + e];
//!             expert.gate.iter_mut().zip(x).for_each(|(g, x)| *g -= 0.05 * d * x);
//!         }
//!     }
//!     pool.extend(newcomers);
//! }
//! assert_eq!(pool.len(), 8);
//! assert!(losses[399] < 0.1 * losses[0], "{} -> {}", losses[0], losses[399]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![allow(unused_imports)] // Names for the links above.

use crate::{
    Action, Answer, Choice, Controller, ControllerParams, ExpandError, ExpertId, ExpertObservation,
    Moments, Request, SplitOperator, bisect_slice, divide_gradient,
};
