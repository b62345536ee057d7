//! A model of dfdx with a mixture of experts inside: dfdx's Adam trains the rest, ours the mixture, whose pool grows.
//!
//!     cargo run --release -p mass-model --example in_dfdx
//!
//! A function that is another in each corner of a square is learnt by `Linear, ReLU, x + mixture(x), Linear`. What is shown: one
//! set of gradients for both optimisers, in dfdx's own loop; experts that are split while they train; a checkpoint that gives
//! back what was saved. Without growth the mixture may stand in dfdx's tuples, `Residual` and the like as it is.

use dfdx::nn::modules::{Linear, ReLU};
use dfdx::optim::{Adam, AdamConfig};
use dfdx::prelude::*;
use mass_expand::{ControllerParams, EventKind};
use mass_model::checkpoint::{self, Checkpointed, Snapshot};
use mass_model::growth::{Grower, GrowerConfig};
use mass_model::nn::{MoeConfig, MoeLayer};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{Activation, LayerTrace, Masked, ModelError, TrainPass, seeded_rng};
use mass_model::{mixtures, parameters};
use mass_routing::{Combine, RouterConfig};

const WIDTH: usize = 16;
const STEPS: u64 = 150;

/// dfdx's part: what comes before the mixture, and what after it.
type Rest = (
    (Linear<2, WIDTH, f32, Cpu>, ReLU),
    Linear<WIDTH, 1, f32, Cpu>,
);
type Points<T = NoneTape> = Tensor<(usize, Const<2>), f32, Cpu, T>;
type Values<T = NoneTape> = Tensor<(usize, Const<1>), f32, Cpu, T>;

struct Model {
    rest: Rest,
    mixture: MoeLayer,
    config: MoeConfig,
}

// What our optimiser, growth and checkpoints see of it.
parameters!(Model { mixture });
mixtures!(Model { mixture });

impl Checkpointed for Model {
    const KIND: &'static str = "mixture in a model of dfdx";
    type Config = MoeConfig;

    fn checkpoint_config(&self) -> &MoeConfig {
        &self.config
    }

    fn from_checkpoint_config(config: &MoeConfig) -> Result<Self, ModelError> {
        let dev = Cpu::seed_from_u64(0);
        type Built = (builders::Below, builders::Above);
        Ok(Self {
            rest: dev.try_build_module::<Built, f32>()?,
            mixture: MoeLayer::new(config, &mut seeded_rng(0))?,
            config: config.clone(),
        })
    }
}

mod builders {
    use dfdx::nn::builders::{Linear, ReLU};

    pub(super) type Below = (Linear<2, { super::WIDTH }>, ReLU);
    pub(super) type Above = Linear<{ super::WIDTH }, 1>;
}

impl Model {
    /// `y = above(h + mixture(h))` with `h = below(x)`; the mixture's trace is appended to `traces`.
    fn forward<T: Tape<f32, Cpu> + Merge<T>>(
        &self,
        x: Points<T>,
        masked: Option<Masked>,
        traces: &mut Vec<LayerTrace>,
    ) -> Result<Values<T>, ModelError> {
        let h = self.rest.0.try_forward(x)?;
        let experts = self
            .mixture
            .forward_traced(h.with_empty_tape(), masked, traces)?;
        Ok(self.rest.1.try_forward(experts.try_add(h)?)?)
    }

    /// Values of dfdx's tensors, which checkpoints keep as state of the caller's own.
    fn rest_values(&self) -> [Vec<f32>; 4] {
        let ((below, _), above) = &self.rest;
        let (first, last) = (below.bias.as_vec(), above.bias.as_vec());
        [below.weight.as_vec(), first, above.weight.as_vec(), last]
    }

    fn set_rest_values(&mut self, [w1, b1, w2, b2]: &[Vec<f32>; 4]) {
        let ((below, _), above) = &mut self.rest;
        below.weight.copy_from(w1);
        below.bias.copy_from(b1);
        above.weight.copy_from(w2);
        above.bias.copy_from(b2);
    }
}

/// Points of a square, and the function there.
fn data(dev: &Cpu, rows: usize) -> (Points, Values) {
    let x: Points = dev.sample_uniform_like(&(rows, Const)) * 2.0 - 1.0;
    let corner = |p: &[f32]| match (p[0] > 0.0, p[1] > 0.0) {
        (true, true) => (4.0 * p[0]).sin(),
        (true, false) => p[1] * p[1],
        (false, true) => -p[0],
        (false, false) => (3.0 * p[1]).cos(),
    };
    let y = x.as_vec().chunks_exact(2).map(corner).collect();
    (x, dev.tensor_from_vec(y, (rows, Const)))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let router = RouterConfig::TopP {
        p: 0.6,
        combine: Combine::StraightThrough,
    };
    let config = MoeConfig::new(WIDTH, 24, 2, Activation::GeluErf, router);
    let mut model = Model::from_checkpoint_config(&config)?;
    let mut adam = Adam::new(
        &model.rest,
        AdamConfig {
            lr: 1e-2,
            ..AdamConfig::default()
        },
    );
    let mut adamw = AdamW::new(AdamWConfig::default())?;
    // The pool has grown in a tenth of the run; see `ControllerParams` for rules that watch.
    let controller = ControllerParams::ours(1, 2, 5, STEPS);
    let mut grower = Grower::new(GrowerConfig::new(controller))?;

    let (x, target) = data(&Cpu::seed_from_u64(1), 512);
    let squares = |y: Values| (y - target.clone()).square().as_vec();
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    let score = |model: &Model| -> Result<f32, ModelError> {
        Ok(mean(&squares(model.forward(
            x.clone(),
            None,
            &mut Vec::new(),
        )?)))
    };
    let before = score(&model)?;
    let mut gradients = model.rest.alloc_grads();
    for step in 0..STEPS {
        let mut traces = Vec::new();
        let y = model.forward(x.clone().trace(gradients), None, &mut traces)?;
        let losses = (y - target.clone()).square();
        let each = losses.as_vec();
        let mut pass = TrainPass::new(losses.mean(), each, traces)?;

        let events = grower.step(step, &mut model, &mut adamw, &mut pass, |m, _, masked| {
            let y = m.forward(x.clone(), masked, &mut Vec::new())?;
            Ok(squares(y).into_iter().map(f64::from).collect())
        })?;
        for event in events {
            if let EventKind::Split { source, new, .. } = event.kind {
                println!("step {step}: expert {source} is split, {new} is new");
            }
        }
        adam.update(&mut model.rest, &pass.gradients)?;
        adamw.step(&mut model, &mut pass.gradients, 1e-2)?;
        gradients = pass.gradients;
        model.rest.zero_grads(&mut gradients);
    }
    let (after, experts) = (score(&model)?, model.mixture.ids().len());
    println!("loss {before:.4} -> {after:.4}, experts 2 -> {experts}");
    assert!(after < 0.2 * before && experts > 2);

    let dir = std::env::temp_dir().join(format!("mass-in-dfdx-{}", std::process::id()));
    let state = (model.rest_values(), &grower);
    checkpoint::save(&dir, &Snapshot::new(STEPS, &model, &adamw, &state))?;
    let restored = checkpoint::load::<Model, ([Vec<f32>; 4], Grower)>(&dir);
    std::fs::remove_dir_all(&dir)?;
    let mut restored = restored?;
    restored.model.set_rest_values(&restored.state.0);
    assert_eq!(score(&restored.model)?.to_bits(), after.to_bits());
    println!("the checkpoint gives back the same loss");
    Ok(())
}
