#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

use std::f32::consts::LN_2;

use mass_expand::*;
use mass_routing::RoutingPlan;

/// Tokens in a batch.
pub const TOKENS: usize = 256;
/// Steps of training.
pub const STEPS: u64 = 600;
/// Width of an expert.
pub const HIDDEN: usize = 8;
/// Entries of a token. The last is one, so that a gate row ends with the offset of its logit.
pub const DIM: usize = 3;

/// Pseudo-random numbers, uniform in [-1, 1): the high bits of a linear congruential generator.
pub fn uniform(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// The batch of a step: `TOKENS x DIM` entries of tokens around six points of a circle, and their targets, at each point
/// another linear function of the token.
#[must_use]
pub fn batch(step: u64) -> (Vec<f32>, Vec<f32>) {
    let noise: Vec<f32> = uniform(step + 1).take(2 * TOKENS).collect();
    let token = |t: usize| {
        let (sin, cos) = ((t % 6) as f32).sin_cos();
        let (x, y) = (3.0 * cos + noise[2 * t], 3.0 * sin + noise[2 * t + 1]);
        let slope = [2.0, -1.0, 3.0, -3.0, 1.0, -2.0][t % 6];
        ([x, y, 1.0], slope * (x - y))
    };
    let (tokens, targets): (Vec<_>, Vec<_>) = (0..TOKENS).map(token).unzip();
    (tokens.concat(), targets)
}

/// An expert to be split. Its newcomer goes to the end of the pool, with a copy of its weights.
#[derive(Debug)]
pub struct Split {
    /// The expert's place in the pool.
    pub source: usize,
    /// Its gate row from now on.
    pub source_gate: Vec<f32>,
    /// The newcomer's.
    pub newcomer_gate: Vec<f32>,
}

/// The controller, and the loss of each step.
#[derive(Debug)]
pub struct Growth {
    controller: Controller,
    losses: Vec<f64>,
}

impl Growth {
    /// From two experts to eight. These settings bisect and ask for nothing; others want requests answered too.
    ///
    /// # Errors
    /// Settings that the controller refuses.
    pub fn new() -> Result<Self, ExpandError> {
        let controller = ControllerParams::ours(1, 2, 8, STEPS).check()?;
        Ok(Self { controller, losses: Vec::new() })
    }

    /// Between backward pass and optimizer: tells the controller of a step, and says what it wants split.
    ///
    /// `gates` and `gradient_norms` have an entry for each expert of the pool, `losses` one for each token of `x`.
    ///
    /// # Errors
    /// What the controller, the plan or the bisection refuses.
    pub fn step(
        &mut self,
        plan: &RoutingPlan,
        x: &[f32],
        losses: &[f32],
        gates: &[Vec<f32>],
        gradient_norms: &[f64],
    ) -> Result<Vec<Split>, Box<dyn std::error::Error>> {
        let ids = self.controller.active(0).to_vec();
        let shares = plan.loss_shares(losses)?;
        let observe = |(e, &id)| {
            let observed = ExpertObservation::new(id, gradient_norms[e], plan.load(e) as u64);
            ExpertObservation { loss_share: shares[e], ..observed }
        };
        let experts: Vec<_> = ids.iter().enumerate().map(observe).collect();
        let layers = [LayerObservation::new(&experts, HIDDEN, DIM)];
        let loss = losses.iter().copied().map(f64::from).sum::<f64>() / losses.len() as f64;
        let step = StepObservation::new(self.losses.len() as u64, loss, &layers);
        self.losses.push(loss);
        let requests = self.controller.begin_step(&step)?;
        assert!(requests.is_empty(), "nothing is asked for");

        let mut splits = Vec::new();
        for action in self.controller.finish_step()? {
            let Action::Split { source, newcomer, operator, .. } = action else {
                continue; // `Stop`: the pool is as large as it may be.
            };
            println!("step {}, loss {loss:.1}: {source} is split, {newcomer} is new", step.step);
            let SplitOperator::Bisect(params) = operator else {
                return Err(format!("only bisections are shown here, not {operator:?}").into());
            };
            let source = ids.iter().position(|&id| id == source).expect("an active expert");
            let own = plan.tokens()[plan.segment(source)].iter().map(|&t| t as usize * DIM);
            let inputs: Vec<f32> = own.flat_map(|at| &x[at..at + DIM]).copied().collect();
            let row = &gates[source];
            let halves = match bisect_slice(&inputs, row, 0.0, params) {
                Ok(h) => [(h.source_row, h.source_offset), (h.newcomer_row, h.newcomer_offset)],
                // Tokens that do not differ cannot be divided: each half gets the row, and half of its mass.
                Err(ExpandError::NoSpread { .. }) => [0, 1].map(|_| (row.clone(), -LN_2)),
                Err(e) => return Err(e.into()),
            };
            let [source_gate, newcomer_gate] = halves.map(|(mut row, offset)| {
                row[DIM - 1] += offset;
                row
            });
            splits.push(Split { source, source_gate, newcomer_gate });
        }
        Ok(splits)
    }

    /// Says what came of it.
    ///
    /// # Panics
    /// If the pool has not grown, or the loss is not a tenth of what it was.
    pub fn finish(&self) {
        let experts = self.controller.active(0).len();
        let (first, last) = (self.losses[0], self.losses[self.losses.len() - 1]);
        println!("{experts} experts, loss {first:.1} -> {last:.2}");
        assert!(experts == 8 && last < 0.1 * first);
    }
}
