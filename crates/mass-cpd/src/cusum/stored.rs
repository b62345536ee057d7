//! What is stored of a detector, and its check when it is read back.

use serde::{Deserialize, Serialize};

use super::{
    CalibratedCusum, CalibratedCusumParams, Reference,
    detector::State,
    sum::{Sides, Sum},
};
use crate::{CpdError, error::MOST};

/// All but what follows from the parameters.
#[derive(Serialize, Deserialize)]
#[serde(rename = "CalibratedCusum", deny_unknown_fields)]
pub(super) struct Stored {
    params: CalibratedCusumParams,
    reference: State,
    up: Sum,
    down: Sum,
    count: u64,
    last_score: Option<f64>,
}

impl From<CalibratedCusum> for Stored {
    fn from(d: CalibratedCusum) -> Self {
        Self {
            params: d.params,
            reference: d.reference,
            up: d.sides.get(0),
            down: d.sides.get(1),
            count: d.count,
            last_score: d.last_score,
        }
    }
}

impl TryFrom<Stored> for CalibratedCusum {
    type Error = CpdError;

    fn try_from(mut stored: Stored) -> Result<Self, CpdError> {
        let params = stored.params;
        params.validate()?;
        let state = |reason| CpdError::State { reason };
        match (&mut stored.reference, params.reference) {
            (State::General(general), Reference::SelfStarting) => {
                if params.general().is_none()
                    || !general.revive(&params)
                    || general.seen() > stored.count
                {
                    return Err(state("the reference does not fit the parameters"));
                }
            }
            (State::SelfStarting(s), Reference::SelfStarting) if params.general().is_none() => {
                if !s.is_valid() || s.seen.max(s.time) > stored.count as f64 {
                    return Err(state("the moments are impossible"));
                }
            }
            (
                State::Lagged {
                    rolling, values, ..
                },
                Reference::Lagged { .. },
            ) => {
                if !rolling.is_valid(values, &params.shape()) || rolling.seen() > stored.count {
                    return Err(state("the reference window does not fit the parameters"));
                }
            }
            _ => {
                return Err(state(
                    "the reference is not of the kind that the parameters name",
                ));
            }
        }
        for side in [stored.up, stored.down] {
            if !side.is_valid(stored.count) {
                return Err(state("a sum of scores is impossible"));
            }
        }
        if stored.last_score.is_some_and(|z| !z.is_finite()) {
            return Err(state("the last score is not finite"));
        }
        if stored.count > MOST {
            return Err(state("more observations are counted than there can be"));
        }
        Ok(Self {
            reference: stored.reference,
            sides: Sides::new([stored.up, stored.down]),
            count: stored.count,
            last_score: stored.last_score,
            ..Self::new(params)
        })
    }
}
