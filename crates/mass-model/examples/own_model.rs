//! A model of one's own: its parameters and mixtures in two lines, its checkpoint form in one small trait.
//!
//!     cargo run --release -p mass-model --example own_model

use dfdx::prelude::{Cpu, NoneTape, OwnedTape, PutTape, Tape, TensorFromVec};
use mass_expand::ControllerParams;
use mass_model::checkpoint::{self, Checkpointed, Snapshot};
use mass_model::growth::{Grower, GrowerConfig};
use mass_model::nn::{Linear, MoeConfig, MoeLayer};
use mass_model::ops::{Rows, cross_entropy, token_losses};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{Activation, LayerTrace, Masked, ModelError, TrainPass};
use mass_routing::{Combine, RouterConfig};

struct Model {
    input: Linear,
    mixture: MoeLayer,
    head: Linear,
    config: MoeConfig,
}

mass_model::parameters!(Model {
    input,
    mixture,
    head
});
mass_model::mixtures!(Model { mixture });

impl Checkpointed for Model {
    const KIND: &'static str = "a mixture between linear layers";
    type Config = MoeConfig;

    fn checkpoint_config(&self) -> &MoeConfig {
        &self.config
    }

    fn from_checkpoint_config(config: &MoeConfig) -> Result<Self, ModelError> {
        let rng = &mut mass_model::seeded_rng(0);
        Ok(Self {
            input: Linear::new(2, config.dim, true, rng)?,
            mixture: MoeLayer::new(config, rng)?,
            head: Linear::new(config.dim, 4, true, rng)?,
            config: config.clone(),
        })
    }
}

impl Model {
    fn forward<T: Tape<f32, Cpu>>(
        &self,
        x: Rows<T>,
        masked: Option<Masked>,
        traces: &mut Vec<LayerTrace>,
    ) -> Result<Rows<T>, ModelError> {
        let h = self.input.try_forward(x)?;
        let h = self.mixture.forward_traced(h, masked, traces)?;
        self.head.try_forward(h)
    }
}

fn main() -> Result<(), ModelError> {
    let (p, combine) = (0.6, Combine::StraightThrough);
    let router = RouterConfig::TopP { p, combine };
    let config = MoeConfig::new(16, 24, 2, Activation::GeluErf, router);
    let mut model = Model::from_checkpoint_config(&config)?;
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let controller = ControllerParams::ours(1, 2, 4, 60);
    let mut grower = Grower::new(GrowerConfig::new(controller))?;
    // Points of a spiral, and the quarter of it that they are in.
    let point = |t: f32| [t * t.sin() / 16.0, t * t.cos() / 16.0];
    let points = (0..256).flat_map(|i| point(i as f32 / 16.0)).collect();
    let classes: Vec<u32> = (0..256).map(|i| i / 64).collect();
    let x: Rows<NoneTape> = Cpu::default().try_tensor_from_vec(points, (256, 2))?;
    let losses_of = |m: &Model, _, masked| {
        let each = token_losses(m.forward(x.clone(), masked, &mut Vec::new())?, &classes)?;
        Ok(each.into_iter().map(f64::from).collect())
    };
    let mut losses = Vec::new();
    for step in 0..60 {
        let mut traces = Vec::new();
        let logits = model.forward(x.clone().put_tape(OwnedTape::default()), None, &mut traces)?;
        let (loss, each) = cross_entropy(logits, &classes)?;
        let mut pass = TrainPass::new(loss, each, traces)?;
        losses.push(pass.loss);
        grower.step(step, &mut model, &mut optimizer, &mut pass, losses_of)?;
        optimizer.step(&mut model, &mut pass.gradients, 1e-2)?;
    }
    let (first, last, experts) = (losses[0], losses[59], model.mixture.ids());
    println!("loss {first:.3} -> {last:.3}, experts {experts:?}");
    assert!(last < 0.5 * first && experts.len() > 2);
    let dir = std::env::temp_dir().join(format!("mass-own-model-{}", std::process::id()));
    checkpoint::save(&dir, &Snapshot::new(60, &model, &optimizer, &grower))?;
    let restored: Model = checkpoint::load_model(&dir)?;
    let logits = |m: &Model| m.forward(x.clone(), None, &mut Vec::new());
    assert_eq!(logits(&restored)?.as_vec(), logits(&model)?.as_vec());
    std::fs::remove_dir_all(&dir).map_err(|source| ModelError::Io { path: dir, source })
}
