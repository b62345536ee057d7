//! Language models on windows of tokens: the task of the synthetic study and of `train`.

use mass_model::growth::LossOn;
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::{Activation, LayerTrace, Masked, ModelError, TrainPass};
use mass_routing::{Combine, RouterConfig};
use serde_json::{Value, json};

use crate::BenchError;
use crate::batch::TokenBatch;
use crate::dynmoe::DynMoeConfig;
use crate::method::Method;
use crate::report::Run;
use crate::rng::{Purpose, stream};
use crate::task::{Finished, Recipe, Task};

/// Draws the batch of a step.
pub type Draw<'a> = Box<dyn Fn(u64) -> Result<TokenBatch, BenchError> + Send + Sync + 'a>;

/// Scores a trained model.
pub type Judge<'a> = Box<dyn Fn(&LanguageModel, &mut Run) -> Result<(), BenchError> + Sync + 'a>;

/// Predicting the next token.
pub struct Language<'a> {
    /// The model.
    pub model: LanguageModelConfig,
    /// How it is trained.
    pub recipe: Recipe,
    /// Seed of the weights.
    pub seed: u64,
    /// Batches, a pure function of the step.
    pub draw: Draw<'a>,
    /// Held-out sequences for the checks of the expansion engine.
    pub probe: &'a TokenBatch,
    /// What the model is scored on in the end.
    pub judge: Judge<'a>,
}

/// A pre-norm decoder of one block whose dense network is a pool of one expert, which every token takes as it is.
pub(crate) fn dense(vocab: usize, length: usize, dim: usize, hidden: usize) -> LanguageModelConfig {
    let combine = Combine::Raw;
    let router = RouterConfig::TopK { k: 1, combine };
    LanguageModelConfig {
        vocab,
        max_seq: length,
        layers: 1,
        embedding_std: 0.1,
        block: BlockConfig {
            heads: 4,
            layer_norm_eps: 1e-5,
            moe: MoeConfig::new(dim, hidden, 1, Activation::GeluErf, router),
        },
    }
}

/// The same model with a method's mixtures.
pub(crate) fn with(
    mut model: LanguageModelConfig,
    method: &Method,
    seed: u64,
) -> LanguageModelConfig {
    let moe = &mut model.block.moe;
    if let Some(mixture) = method.mixture(moe.dim, moe.hidden, moe.activation, seed) {
        *moe = mixture;
    }
    model
}

impl Task for Language<'_> {
    type Model = LanguageModel;
    type Batch = TokenBatch;
    type Progress = ();

    fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn identity(&self) -> Value {
        json!({ "model": self.model, "seed": self.seed })
    }

    fn model(&self) -> Result<LanguageModel, ModelError> {
        LanguageModel::new(&self.model, &mut stream(self.seed, Purpose::Weights, 0))
    }

    /// Data without epochs: a tenth of the run takes their place.
    fn dynmoe(&self, experts_max: usize) -> DynMoeConfig {
        DynMoeConfig::language((self.recipe.schedule.steps / 10).max(1), experts_max)
    }

    fn batches(&self) -> Box<dyn FnMut(u64) -> Result<TokenBatch, BenchError> + Send + '_> {
        Box::new(|step| (self.draw)(step))
    }

    fn tokens(&self, batch: &TokenBatch) -> u64 {
        batch.tokens() as u64
    }

    fn pass(
        &self,
        model: &LanguageModel,
        batch: &TokenBatch,
        _: u64,
    ) -> Result<TrainPass, ModelError> {
        model.train_pass(&batch.inputs, &batch.targets, batch.length)
    }

    /// Of the batch by token, of the probe by sequence.
    fn losses(
        &self,
        model: &LanguageModel,
        batch: &TokenBatch,
        on: LossOn,
        masked: Option<Masked>,
    ) -> Result<Vec<f64>, ModelError> {
        let score = |of: &TokenBatch| model.score(&of.inputs, &of.targets, of.length, masked);
        Ok(match on {
            LossOn::Batch => score(batch)?.0.into_iter().map(f64::from).collect(),
            LossOn::Probe => {
                let nll = score(self.probe)?.0;
                nll.chunks(self.probe.length).map(mean).collect()
            }
        })
    }

    fn finish(&self, end: &Finished<'_, Self>, run: &mut Run) -> Result<(), BenchError> {
        use mass_model::growth::Mixtures;
        let layers = 0..end.model.mixtures();
        run.experts = layers.map(|l| end.model.mixture(l).ids().len()).max();
        (self.judge)(end.model, run)
    }
}

/// Scores a model on some batches, telling `each` what every mixture layer did with a batch, and writes mean loss and mean experts
/// a token into a run. Returns the number of tokens.
pub(crate) fn judge(
    model: &LanguageModel,
    run: &mut Run,
    batches: impl Iterator<Item = TokenBatch>,
    mut each: impl FnMut(usize, &LayerTrace) -> Result<(), BenchError>,
) -> Result<usize, BenchError> {
    let (mut total, mut tokens) = (0.0, 0);
    let (mut assignments, mut routed) = (0, 0);
    for (index, batch) in batches.enumerate() {
        let (nll, layers) = model
            .score(&batch.inputs, &batch.targets, batch.length, None)
            .map_err(|e| BenchError::failed("scoring held-out data", e))?;
        total += mean(&nll) * nll.len() as f64;
        tokens += nll.len();
        for layer in &layers {
            assignments += layer.plan.num_assignments();
            routed += layer.plan.num_tokens();
            each(index, layer)?;
        }
    }
    run.test_loss = Some(total / tokens as f64);
    run.active_per_token = Some(assignments as f64 / routed as f64);
    Ok(tokens)
}

/// Mean of negative log-likelihoods.
fn mean(nll: &[f32]) -> f64 {
    nll.iter().map(|&x| f64::from(x)).sum::<f64>() / nll.len() as f64
}
