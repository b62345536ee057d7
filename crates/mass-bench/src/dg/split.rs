//! Leave-one-domain-out splits, and the batches that are drawn from them.

use ndarray_rand::rand::Rng;
use ndarray_rand::rand::seq::SliceRandom;

use super::DgError;
use super::images::DomainImages;
use crate::rng::{Purpose, stream};

/// One domain left out for the test, a part of each other held out for choosing a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// The domain that no training image is from, if one is left out.
    pub target: Option<usize>,
    /// Training images of each source domain.
    pub train: Vec<Vec<usize>>,
    /// Images of all source domains that choose the model.
    pub held_out: Vec<usize>,
    /// Images of all source domains that judge new experts; empty unless asked for.
    pub probe: Vec<usize>,
    /// The images of the target domain.
    pub test: Vec<usize>,
}

impl Split {
    /// Holds out `held_out` (a part in (0, 1)) of each domain but the target, drawn at random by the seed; of every domain if there is
    /// no target.
    ///
    /// # Errors
    /// [`DgError::Split`] if there is no such target, or a domain is too small to give to both sides.
    pub fn of(
        images: &DomainImages,
        target: Option<usize>,
        held_out: f64,
        seed: u64,
    ) -> Result<Self, DgError> {
        let domains = images.domains.len();
        if let Some(target) = target.filter(|&target| target >= domains) {
            return Err(DgError::Split(format!(
                "there is no domain {target}, there are {domains}"
            )));
        }
        let mut split = Self {
            target,
            train: Vec::new(),
            held_out: Vec::new(),
            probe: Vec::new(),
            test: target.map_or_else(Vec::new, |target| images.of_domain(target)),
        };
        for source in (0..domains).filter(|&d| Some(d) != target) {
            let mut members = images.of_domain(source);
            members.shuffle(&mut stream(seed, Purpose::Evaluation, source as u64));
            let held = (members.len() as f64 * held_out) as usize;
            if held == 0 || held >= members.len() {
                return Err(DgError::Split(format!(
                    "domain {} has {} images; {held_out} of them held out leaves nothing on one side",
                    images.domains[source],
                    members.len()
                )));
            }
            split.train.push(members.split_off(held));
            split.held_out.extend(members);
        }
        Ok(split)
    }

    /// Takes up to `count` training images of each of the first `domains` source domains, never more than a quarter of them, for
    /// judging new experts.
    #[must_use]
    pub fn with_probe(mut self, domains: usize, count: usize) -> Self {
        for members in self.train.iter_mut().take(domains) {
            let left = members.len() - count.min(members.len() / 4);
            self.probe.extend(members.split_off(left));
        }
        self
    }

    /// The images of a step: `per_domain` of each source domain, drawn with replacement as by DomainBed's loaders.
    ///
    /// A function of seed and step alone.
    #[must_use]
    pub fn batch(&self, seed: u64, step: u64, per_domain: usize) -> Vec<usize> {
        let mut rng = stream(seed, Purpose::Batches, step);
        let mut batch = Vec::with_capacity(self.train.len() * per_domain);
        for members in &self.train {
            batch.extend((0..per_domain).map(|_| members[rng.random_range(0..members.len())]));
        }
        batch
    }
}
