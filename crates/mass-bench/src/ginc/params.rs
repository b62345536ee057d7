use serde::{Deserialize, Serialize};

use super::GincError;

/// What makes a GINC instance; unchecked.
///
/// [`GincParams::new`] gives the published setting: 5 concepts, 10 entities, 10 properties,
/// transition temperature 0.1, start temperature 10, entity persistence 0.9, seed 1111. The original
/// draws ten concepts and keeps the last five apart for out-of-distribution prompts: the first five
/// are the same either way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GincParams {
    /// Token ids, the delimiter 0 included; at least 2, at most 2^20. The original's default is 50.
    pub vocab: usize,
    /// Hidden Markov models in the mixture.
    pub concepts: usize,
    /// Entities v.
    pub entities: usize,
    /// Properties s, the delimiter's column included; at least 2.
    pub properties: usize,
    /// Temperature of the weights that mix permutations.
    pub transition_temperature: f64,
    /// Temperature of the start distributions.
    pub start_temperature: f64,
    /// Weight of the identity in the entities' transition matrix V, in [0, 1].
    pub entity_persistence: f64,
    /// Fixes the instance, not the documents. Instances differ: over seeds, the Bayes floor of
    /// vocabulary 50 has a standard deviation of 0.13 nats.
    pub seed: u32,
}

/// States beyond this make the dense transition matrices larger than 1 GiB.
const MAX_ENTRIES: usize = 1 << 27;

/// Tokens that a vocabulary has at most: a filter holds a list for each.
pub(super) const MAX_VOCAB: usize = 1 << 20;

impl GincParams {
    /// The published setting with this vocabulary.
    #[must_use]
    pub fn new(vocab: usize) -> Self {
        Self {
            vocab,
            concepts: 5,
            entities: 10,
            properties: 10,
            transition_temperature: 0.1,
            start_temperature: 10.0,
            entity_persistence: 0.9,
            seed: 1111,
        }
    }

    /// Another instance of the same form.
    #[must_use]
    pub fn seed(mut self, seed: u32) -> Self {
        self.seed = seed;
        self
    }

    /// Checks every range once.
    ///
    /// # Errors
    /// [`GincError::Parameter`] naming the first parameter out of range.
    pub fn check(self) -> Result<ValidGincParams, GincError> {
        let bad = |name, value: String, range| Err(GincError::Parameter { name, value, range });
        if !(2..=MAX_VOCAB).contains(&self.vocab) {
            return bad("vocab", self.vocab.to_string(), "2 to 2^20");
        }
        if self.concepts == 0 {
            return bad("concepts", "0".into(), "at least 1");
        }
        if self.entities == 0 {
            return bad("entities", "0".into(), "at least 1");
        }
        if self.properties < 2 {
            return bad("properties", self.properties.to_string(), "at least 2");
        }
        let entries = self
            .entities
            .checked_mul(self.properties)
            .and_then(|states| states.checked_mul(states))
            .and_then(|entries| entries.checked_mul(self.concepts));
        if entries.is_none_or(|entries| entries > MAX_ENTRIES) {
            return bad(
                "concepts x (entities x properties)^2",
                format!(
                    "{} x ({} x {})^2",
                    self.concepts, self.entities, self.properties
                ),
                "at most 2^27",
            );
        }
        for (name, value) in [
            ("transition_temperature", self.transition_temperature),
            ("start_temperature", self.start_temperature),
        ] {
            // Close to 0 a reciprocal is not finite.
            if !(value.is_finite() && value >= 1e-300) {
                return bad(name, value.to_string(), "finite and at least 1e-300");
            }
        }
        if !(0.0..=1.0).contains(&self.entity_persistence) {
            return bad(
                "entity_persistence",
                self.entity_persistence.to_string(),
                "in [0, 1]",
            );
        }
        Ok(ValidGincParams(self))
    }
}

/// [`GincParams`] whose ranges have been checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "GincParams", into = "GincParams")]
pub struct ValidGincParams(GincParams);

impl ValidGincParams {
    /// The values.
    #[must_use]
    pub fn params(&self) -> &GincParams {
        &self.0
    }
}

impl TryFrom<GincParams> for ValidGincParams {
    type Error = GincError;

    fn try_from(params: GincParams) -> Result<Self, GincError> {
        params.check()
    }
}

impl From<ValidGincParams> for GincParams {
    fn from(valid: ValidGincParams) -> Self {
        valid.0
    }
}
