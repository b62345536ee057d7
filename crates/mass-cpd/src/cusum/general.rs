//! The self-starting reference with an autoregression of any order, and scores by rank.

use serde::{Deserialize, Serialize};

use super::{
    autoregression::{Autoregression, Model},
    ranks::Ranks,
};
use crate::{CalibratedCusumParams, Scores};

/// What has been learned of a stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct General {
    filter: Box<Autoregression>,
    ranks: Option<Ranks>,
}

impl General {
    /// `None` where the parameters ask for no more than the first order and normal scores.
    pub(crate) fn new(params: &CalibratedCusumParams) -> Option<Self> {
        params.general().map(|_| Self {
            filter: Box::default(),
            ranks: (params.scores == Scores::Ranks).then(Ranks::new),
        })
    }

    pub(crate) fn clear(&mut self) {
        *self.filter = Autoregression::default();
        if let Some(ranks) = &mut self.ranks {
            ranks.clear();
        }
    }

    pub(crate) fn seen(&self) -> u64 {
        self.filter.seen()
    }

    /// The score of `y`, which is learned. What is beyond the limit is learned as if it were at it.
    pub(crate) fn update(&mut self, y: f64, limit: f64, model: &Model) -> f64 {
        let (z, error) = self.filter.update(y, limit, model);
        let Some(ranks) = &mut self.ranks else {
            return z;
        };
        // Without a regression the observation itself, whose ranks no estimate touches.
        let plain = model.order == 0 && !model.drift;
        match if plain { Some(y) } else { error } {
            Some(error) => ranks.score(error),
            None => 0.0,
        }
    }

    pub(crate) fn skip(&mut self, model: &Model) {
        self.filter.skip(model);
    }

    /// The level expected if nothing were known of the last observations, and its slope.
    pub(crate) fn line(&self, model: &Model) -> (f64, f64) {
        self.filter.line(model)
    }

    /// Whether a deserialised state could have come from finite observations under these parameters.
    pub(crate) fn revive(&mut self, params: &CalibratedCusumParams) -> bool {
        self.filter.is_valid()
            && self.ranks.is_some() == (params.scores == Scores::Ranks)
            && self.ranks.as_mut().is_none_or(Ranks::revive)
    }
}
