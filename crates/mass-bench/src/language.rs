//! Language models on windows of tokens: the task of the synthetic study and of `train`.

use mass_model::growth::LossOn;
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::Gradients;
use mass_model::parallel::Ranks;
use mass_model::{
    Activation, LayerTrace, Masked, ModelError, Parameters, Place, PlacedGradients, TrainPass,
};
use mass_routing::{Combine, RouterConfig};
use ndarray_rand::rand::Rng;
use ndarray_rand::rand_distr::StandardNormal;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::BenchError;
use crate::batch::TokenBatch;
use crate::dynmoe::DynMoeConfig;
use crate::method::Method;
use crate::report::Run;
use crate::rng::{Purpose, stream};
use crate::task::{Active, Finished, Recipe, Scored, Task};

/// Draws the batch of a step.
pub type Draw<'a> = Box<dyn Fn(u64) -> Result<TokenBatch, BenchError> + Send + Sync + 'a>;

/// Scores a trained model: loss and floor, active experts, and what they specialise on.
pub type Judge<'a> =
    Box<dyn Fn(&Place, &LanguageModel, &mut Run) -> Result<(), BenchError> + Sync + 'a>;

/// Writes what became of the kinds of data of a stream into a run, from their losses at its ends.
pub type Tell<'a> = Box<
    dyn Fn(&Place, &LanguageModel, &[(u64, Vec<f64>)], &mut Run) -> Result<(), BenchError>
        + Sync
        + 'a,
>;

/// Data that change in the course of a run.
pub struct Stream<'a> {
    /// Numbers of steps after which a part of it ends, the last that of the run.
    pub ends: Vec<u64>,
    /// Held-out data of each kind.
    pub kinds: &'a [TokenBatch],
    /// What is said of it at the end of the run.
    pub tell: Tell<'a>,
}

/// Predicting the next token.
pub struct Language<'a> {
    /// Where it is trained and scored.
    pub place: Place,
    /// The model.
    pub model: LanguageModelConfig,
    /// How it is trained.
    pub recipe: Recipe,
    /// Seed of the weights.
    pub seed: u64,
    /// Noise in the gradient of each parameter, after every backward pass: normal, and so many times as large as the gradient, by the
    /// root of the mean square of either; 0 for none.
    pub gradient_noise: f32,
    /// Batches, a pure function of the step.
    pub draw: Draw<'a>,
    /// Held-out sequences for the checks of the expansion engine.
    pub probe: &'a TokenBatch,
    /// What the model is scored on in the end.
    pub judge: Judge<'a>,
    /// Sequences that are looked at every so many steps; the run counts as it was when their loss was lowest. `None`: as it is at
    /// the end.
    pub validation: Option<(u64, &'a TokenBatch)>,
    /// How the data change; `None` if they do not.
    pub stream: Option<Stream<'a>>,
}

/// A run as it was when it did best on held-out data.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    step: u64,
    validation: f64,
    judged: Run,
}

/// What looks on the way leave.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Looks {
    best: Option<Best>,
    /// Losses by kind of data at the ends of a stream's parts.
    ends: Vec<(u64, Vec<f64>)>,
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
    type Progress = Looks;

    fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn place(&self) -> &Place {
        &self.place
    }

    fn identity(&self) -> Value {
        let mut identity = json!({ "model": self.model, "seed": self.seed });
        if self.gradient_noise > 0.0 {
            identity["gradient_noise"] = json!(self.gradient_noise);
        }
        identity
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
        step: u64,
    ) -> Result<TrainPass<PlacedGradients>, ModelError> {
        let _ = step;
        model.train_pass_at(&self.place, &batch.inputs, &batch.targets, batch.length)
    }

    fn disturb(
        &self,
        model: &LanguageModel,
        gradients: &mut PlacedGradients,
        step: u64,
    ) -> Result<(), ModelError> {
        if self.gradient_noise > 0.0 {
            let mut rng = stream(self.seed, Purpose::Noise, step);
            disturb(model, gradients, self.gradient_noise, &mut rng)?;
        }
        Ok(())
    }

    fn share(&self, batch: &TokenBatch, ranks: &Ranks) -> Option<(TokenBatch, u64)> {
        let own = batch.rows(ranks.share(batch.rows));
        let targets = own.tokens() as u64;
        Some((own, targets))
    }

    /// Of the batch by token, of the probe by sequence.
    fn losses(
        &self,
        model: &LanguageModel,
        batch: &TokenBatch,
        on: LossOn,
        masked: Option<Masked>,
    ) -> Result<Vec<f64>, ModelError> {
        let place = &self.place;
        let score =
            |of: &TokenBatch| model.score_at(place, &of.inputs, &of.targets, of.length, masked);
        Ok(match on {
            LossOn::Batch => score(batch)?.0.into_iter().map(f64::from).collect(),
            LossOn::Probe => {
                let nll = score(self.probe)?.0;
                nll.chunks(self.probe.length).map(mean).collect()
            }
        })
    }

    fn scores_after(&self, step: u64) -> bool {
        let ends = self.stream.as_ref().is_some_and(|s| s.ends.contains(&step));
        ends || self
            .validation
            .is_some_and(|(every, _)| step.is_multiple_of(every))
    }

    fn score(
        &self,
        model: &LanguageModel,
        step: u64,
        looks: &mut Looks,
    ) -> Result<Option<Scored>, BenchError> {
        if let Some(stream) = self.stream.as_ref().filter(|s| s.ends.contains(&step)) {
            let losses = stream
                .kinds
                .iter()
                .map(|kind| Ok(scored(&self.place, model, kind)?.0));
            let losses = losses.collect::<Result<Vec<f64>, BenchError>>()?;
            let extra = [("loss_by_kind".to_owned(), json!(losses))];
            looks.ends.push((step, losses));
            return Ok(Some(Scored {
                extra: extra.into_iter().collect(),
                ..Scored::default()
            }));
        }
        let best = &mut looks.best;
        let due = self
            .validation
            .filter(|(every, _)| step.is_multiple_of(*every));
        let Some((_, held_out)) = due else {
            return Ok(None);
        };
        let validation = scored(&self.place, model, held_out)?.0;
        let mut test = None;
        if best.as_ref().is_none_or(|b| validation < b.validation) {
            let mut judged = Run::new("", self.seed);
            self.judge(model, &mut judged)?;
            test = judged.test_loss;
            *best = Some(Best {
                step,
                validation,
                judged,
            });
        }
        Ok(Some(Scored {
            test_loss: test,
            extra: [("validation_loss".to_owned(), json!(validation))]
                .into_iter()
                .collect(),
            stop: false,
        }))
    }

    fn finish(&self, end: &Finished<'_, Self>, run: &mut Run) -> Result<(), BenchError> {
        match &end.progress.best {
            Some(best) => {
                let judged = best.judged.clone();
                *run = Run {
                    experts: judged.experts,
                    active_per_token: judged.active_per_token,
                    test_loss: judged.test_loss,
                    bayes_loss: judged.bayes_loss,
                    jsd_entity: judged.jsd_entity,
                    jsd_property: judged.jsd_property,
                    nmi: judged.nmi,
                    usage: judged.usage,
                    ..std::mem::take(run)
                };
            }
            None => self.judge(end.model, run)?,
        }
        match &self.stream {
            Some(stream) => (stream.tell)(&self.place, end.model, &end.progress.ends, run),
            None => Ok(()),
        }
    }
}

impl Language<'_> {
    fn judge(&self, model: &LanguageModel, run: &mut Run) -> Result<(), BenchError> {
        run.experts = experts(model);
        (self.judge)(&self.place, model, run)
    }
}

/// Adds noise to the gradient of each parameter; see [`Language::gradient_noise`].
fn disturb(
    model: &impl Parameters,
    gradients: &mut impl Gradients,
    times: f32,
    rng: &mut impl Rng,
) -> Result<(), ModelError> {
    let mut outcome = Ok(());
    model.visit("", &mut |_, parameter| {
        let mut share = || match gradients.copy(parameter)? {
            Some(mut values) => {
                let squares: f64 = values.iter().map(|g| f64::from(*g).powi(2)).sum();
                let size = times * (squares / values.len() as f64).sqrt() as f32;
                values.fill_with(|| size * rng.sample::<f32, _>(StandardNormal));
                gradients.add(parameter, &values)
            }
            None => Ok(()),
        };
        if outcome.is_ok() {
            outcome = share();
        }
    });
    outcome
}

/// The largest pool of a model.
fn experts(model: &LanguageModel) -> Option<usize> {
    use mass_model::growth::Mixtures;
    let layers = 0..model.mixtures();
    layers.map(|l| model.mixture(l).ids().len()).max()
}

/// Mean loss on a batch, and what every mixture layer did with it.
pub(crate) fn scored(
    place: &Place,
    model: &LanguageModel,
    batch: &TokenBatch,
) -> Result<(f64, Vec<LayerTrace>), BenchError> {
    let scored = model.score_at(place, &batch.inputs, &batch.targets, batch.length, None);
    let (nll, layers) = scored.map_err(|e| BenchError::failed("scoring held-out data", e))?;
    Ok((mean(&nll), layers))
}

/// Scores a model on some batches, telling `each` what every mixture layer did with a batch, and writes mean loss and mean experts
/// a token into a run. Returns the number of tokens.
pub(crate) fn judge(
    place: &Place,
    model: &LanguageModel,
    run: &mut Run,
    batches: impl Iterator<Item = TokenBatch>,
    mut each: impl FnMut(usize, &LayerTrace) -> Result<(), BenchError>,
) -> Result<usize, BenchError> {
    let (mut total, mut tokens) = (0.0, 0);
    let mut active = Active::default();
    for (index, batch) in batches.enumerate() {
        let (loss, layers) = scored(place, model, &batch)?;
        total += loss * batch.tokens() as f64;
        tokens += batch.tokens();
        active.add(&layers);
        layers.iter().try_for_each(|layer| each(index, layer))?;
    }
    run.test_loss = Some(total / tokens as f64);
    run.active_per_token = active.mean();
    Ok(tokens)
}

/// Mean of negative log-likelihoods.
fn mean(nll: &[f32]) -> f64 {
    nll.iter().map(|&x| f64::from(x)).sum::<f64>() / nll.len() as f64
}

#[cfg(test)]
mod tests {
    use mass_model::seeded_rng;

    use super::*;
    use crate::report::Usage;
    use crate::study::synthetic::Regime;

    /// Figures of one model: not the loss of the best and the specialisation of the last.
    #[test]
    fn a_run_that_is_judged_at_its_best_has_all_its_figures_from_there() {
        let mut held_out = TokenBatch::with_capacity(1, 8);
        held_out.push(&[1u32, 2, 3, 4, 5, 6, 7, 8, 9]);
        let task = Language {
            place: Place::Cpu,
            model: dense(50, 8, 8, 8),
            recipe: Regime::BASE.recipe(),
            seed: 0,
            gradient_noise: 0.0,
            draw: Box::new(|_| Ok(TokenBatch::with_capacity(0, 8))),
            probe: &held_out,
            judge: Box::new(|place, model, run| {
                run.test_loss = Some(scored(place, model, &held_out)?.0);
                (run.nmi, run.jsd_entity) = (run.test_loss, run.test_loss);
                run.usage = Some(Usage::default());
                Ok(())
            }),
            validation: Some((1, &held_out)),
            stream: None,
        };
        let made = |seed| LanguageModel::new(&task.model, &mut seeded_rng(seed)).unwrap();
        let (first, last) = (made(1), made(2));
        let mut looks = Looks::default();
        for (step, model) in [(1, &first), (2, &last)] {
            task.score(model, step, &mut looks).unwrap();
        }
        let losses = [&first, &last].map(|m| scored(&task.place, m, &held_out).unwrap().0);
        let best = losses[0].min(losses[1]);
        let worst = if best == losses[0] { &last } else { &first };
        let mut run = Run::new("static", 0);
        let end = Finished {
            model: worst,
            progress: &looks,
            waiting: None,
        };
        task.finish(&end, &mut run).unwrap();
        assert_eq!(run.method, "static");
        let found = [run.test_loss, run.nmi, run.jsd_entity];
        assert_eq!(found, [Some(best); 3]);
        assert_ne!(losses[0], losses[1]);
        assert!(run.usage.is_some());
    }

    #[test]
    fn noise_has_the_size_it_is_said_to_have_and_comes_again() {
        let model = LanguageModel::new(&dense(50, 8, 32, 64), &mut seeded_rng(1)).unwrap();
        let tokens: Vec<u32> = (0..33).map(|t| t * 7 % 50).collect();
        let gradients = |noise: Option<(f32, u64)>| {
            let pass = model.train_pass(&tokens[..32], &tokens[1..], 8);
            let mut gradients = pass.unwrap().gradients;
            if let Some((times, seed)) = noise {
                disturb(&model, &mut gradients, times, &mut seeded_rng(seed)).unwrap();
            }
            let mut found: Vec<(String, Vec<f32>)> = Vec::new();
            model.visit("", &mut |name, p| {
                let gradient = p.find_gradient(&mut gradients).unwrap();
                found.extend(gradient.map(|g| (name.to_owned(), g.clone())));
            });
            found
        };
        let (plain, noisy) = (gradients(None), gradients(Some((3.0, 5))));
        assert_eq!(noisy, gradients(Some((3.0, 5))));
        assert_ne!(noisy, gradients(Some((3.0, 6))));
        let mean_square = |values: &[f32]| {
            let squares = values.iter().map(|v| f64::from(*v).powi(2));
            squares.sum::<f64>() / values.len() as f64
        };
        let mut seen = 0;
        for ((name, plain), (_, noisy)) in plain.iter().zip(&noisy) {
            let noise: Vec<f32> = plain.iter().zip(noisy).map(|(a, b)| b - a).collect();
            let times = (mean_square(&noise) / mean_square(plain)).sqrt();
            // Of a sample of n, the deviation is known to 1 / sqrt(2 n).
            let reach = 3.0 * 5.0 / (2.0 * plain.len() as f64).sqrt();
            if plain.len() > 500 && mean_square(plain) > 0.0 {
                assert!((times - 3.0).abs() < reach, "{name}: {times}");
                seen += 1;
            }
        }
        assert!(seen >= 4, "{seen}");
    }
}
