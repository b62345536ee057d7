use std::collections::BTreeMap;

use super::Gradients;
use crate::error::ModelError;
use crate::mirror::Mirror;
use crate::param::{Parameters, check_names};

/// Mean of the gradients of several micro-batches, for batches larger than memory allows.
///
/// With weights `n_i` (rows or tokens that the loss of micro-batch i is a mean over), [`mean_into`](Self::mean_into) gives
/// `Σ n_i g_i / Σ n_i`: the gradient of the mean over all of them. It is kept as a running mean, so that one micro-batch
/// alone passes through without a change of a bit.
///
/// Gradients are kept by parameter name. A parameter without a gradient in some micro-batches (an expert that was just split
/// off, or one that they do not read) counts as zero there; one without a gradient in all of them has none afterwards. What
/// vanishes from the model is dropped.
///
/// ```
/// use mass_model::optim::GradientAccumulator;
/// use mass_model::{CpuGradients, nn::LayerNorm};
///
/// let model = LayerNorm::new(2, 1e-5)?;
/// let mut gradients = CpuGradients::leaky();
/// let mut accumulator = GradientAccumulator::new();
/// for (rows, g) in [(3.0, 1.0), (1.0, 5.0)] {
///     model.weight.set_gradient(&mut gradients, vec![g; 2])?; // a backward pass in real life
///     accumulator.add(&model, &mut gradients, rows)?;
/// }
/// accumulator.mean_into(&model, &mut gradients)?;
/// assert_eq!(*model.weight.gradient(&mut gradients)?, [2.0, 2.0]); // (3 * 1 + 1 * 5) / 4
/// # Ok::<(), mass_model::ModelError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct GradientAccumulator {
    means: BTreeMap<String, Mirror>,
    weight: f64,
    batches: u64,
}

impl GradientAccumulator {
    /// Nothing accumulated yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Micro-batches taken in since the last [`mean_into`](Self::mean_into).
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// Takes in the gradients of a micro-batch whose loss is a mean over `weight` rows. It does not look for NaN or infinities
    /// among them: the mean has them then, and [`AdamW::step`](super::AdamW::step) refuses it.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a weight that is not positive and finite, also in sum with those before, and for two parameters
    /// of one name; [`ModelError::Shape`] if a parameter has changed its size, that of a device without memory. Nothing is taken
    /// in then.
    pub fn add<M: Parameters + ?Sized, G: Gradients>(
        &mut self,
        model: &M,
        gradients: &mut G,
        weight: f64,
    ) -> Result<(), ModelError> {
        let total = self.weight + weight;
        if !(weight > 0.0 && total.is_finite()) {
            return Err(ModelError::Config(format!(
                "weight of a micro-batch is {weight}, in sum {total}; each must be a positive number"
            )));
        }
        // After an error the accumulator is as it was.
        self.check(model)?;
        // And room.
        let (mut outcome, mut new) = (Ok(()), BTreeMap::new());
        model.visit("", &mut |name, param| {
            if outcome.is_ok() {
                match gradients.mean_room(param, self.means.get_mut(&name)) {
                    Ok(Some(room)) => drop(new.insert(name, room)),
                    Ok(None) => {}
                    Err(e) => outcome = Err(e),
                }
            }
        });
        outcome?;
        self.weight = total;
        self.batches += 1;
        let mut share = (weight / total) as f32;
        if self.batches > 1 {
            // Rounded to one it would overwrite the mean so far, and a NaN in it.
            share = share.min(1.0 - f32::EPSILON / 2.0);
        }
        let mut before = std::mem::take(&mut self.means);
        before.append(&mut new);
        let mut outcome = Ok(());
        model.visit("", &mut |name, param| {
            if let (Ok(()), Some(mut mean)) = (&outcome, before.remove(&name)) {
                outcome = gradients.mean_add(param, &mut mean, share);
                self.means.insert(name, mean);
            }
        });
        outcome
    }

    /// Replaces `gradients` by the mean of what was taken in, and begins anew.
    ///
    /// # Errors
    /// [`ModelError::Config`] if nothing was taken in, or two parameters have one name; [`ModelError::Shape`] if a parameter has
    /// changed its size. The accumulator is as it was then. That of a device that has failed.
    pub fn mean_into<M: Parameters + ?Sized, G: Gradients>(
        &mut self,
        model: &M,
        gradients: &mut G,
    ) -> Result<(), ModelError> {
        if self.batches == 0 {
            return Err(ModelError::Config(
                "no micro-batch to take the mean gradient of".into(),
            ));
        }
        self.check(model)?;
        let (mut outcome, mut means) = (Ok(()), std::mem::take(self).means);
        model.visit("", &mut |name, param| {
            if outcome.is_ok() {
                outcome = gradients.replace(param, means.remove(&name));
            }
        });
        outcome
    }

    /// Refuses a model of other sizes than what was taken in, or with two parameters of one name.
    fn check<M: Parameters + ?Sized>(&self, model: &M) -> Result<(), ModelError> {
        check_names(model)?;
        let mut outcome = Ok(());
        model.visit("", &mut |name, param| {
            if let (Ok(()), Some(mean)) = (&outcome, self.means.get(&name))
                && mean.len() != param.len()
            {
                let what = format!("accumulated gradient of {name}");
                outcome = Err(ModelError::shape(what, &[param.len()], &[mean.len()]));
            }
        });
        outcome
    }
}
