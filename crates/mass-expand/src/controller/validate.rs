//! Checks of [`ControllerParams`].

use mass_cpd::{AnyDetectorParams, Transform};

use super::params::{ControllerParams, SplitOperator, StopRule, Trigger, Unused};
use super::watch::Watch;
use crate::ExpandError;

/// Of all layers at the start, each of which a state is made for.
pub(super) const MOST_EXPERTS: usize = 1 << 20;

fn require(
    ok: bool,
    name: &'static str,
    value: f64,
    expected: &'static str,
) -> Result<(), ExpandError> {
    if ok {
        Ok(())
    } else {
        Err(ExpandError::Parameter {
            name,
            value,
            expected,
        })
    }
}

fn at_least_one(name: &'static str, value: u64) -> Result<(), ExpandError> {
    require(value >= 1, name, value as f64, "at least 1")
}

fn not_negative(name: &'static str, value: f64) -> Result<(), ExpandError> {
    require(
        value.is_finite() && value >= 0.0,
        name,
        value,
        "finite and at least 0",
    )
}

pub(super) fn validate(params: &ControllerParams) -> Result<(), ExpandError> {
    if params.experts.is_empty() {
        return Err(ExpandError::Empty {
            what: "list of layers",
        });
    }
    for &experts in &params.experts {
        require(
            experts >= 1 && experts <= params.k_max,
            "experts",
            experts as f64,
            "at least 1 and at most k_max",
        )?;
    }
    let all = params
        .experts
        .iter()
        .copied()
        .fold(0, usize::saturating_add);
    require(
        all <= MOST_EXPERTS,
        "experts",
        all as f64,
        "at most 2^20 in all layers together",
    )?;
    require(
        u32::try_from(params.k_max).is_ok(),
        "k_max",
        params.k_max as f64,
        "below 2^32",
    )?;
    require(
        params.phase.live_from < params.phase.live_until,
        "live_until",
        params.phase.live_until as f64,
        "after live_from",
    )?;
    require(
        params.averaging_steps.is_finite() && params.averaging_steps >= 1.0,
        "averaging_steps",
        params.averaging_steps,
        "finite and at least 1",
    )?;
    require(
        params.trace <= 1000,
        "trace",
        params.trace as f64,
        "at most 1000",
    )?;
    params.alignment.validate()?;
    if let SplitOperator::Bisect(bisect) = &params.operator {
        bisect.validate()?;
    }
    match params.trigger_in(false) {
        Trigger::Schedule { every, splits, .. } => {
            at_least_one("every", every)?;
            require(
                (1..=every).contains(&splits),
                "splits",
                splits as f64,
                "at least 1 and at most every",
            )?;
        }
        Trigger::Plateau {
            patience,
            threshold,
        } => {
            at_least_one("patience", patience)?;
            not_negative("threshold", threshold)?;
        }
        _ => {}
    }
    stop(&params.stop)?;
    pruning(params)?;
    watch(params, &params.watch, false)?;
    if params.phase.continual.is_none()
        && matches!(params.trigger, Trigger::ScheduleThenDetector { .. })
    {
        return Err(ExpandError::Empty {
            what: "continual phase, which the trigger needs",
        });
    }
    if let Some(continual) = &params.phase.continual {
        watch(params, continual, true)?;
    }
    Ok(())
}

fn stop(rule: &StopRule) -> Result<(), ExpandError> {
    match *rule {
        StopRule::Consecutive { gamma } => at_least_one("gamma", gamma.into()),
        StopRule::HeldOut {
            margin,
            z,
            wait,
            patience,
            ..
        } => {
            not_negative("margin", margin)?;
            not_negative("z", z)?;
            at_least_one("wait", wait)?;
            at_least_one("patience", patience.into())
        }
        StopRule::Never | StopRule::Patience { .. } => Ok(()),
    }
}

fn pruning(params: &ControllerParams) -> Result<(), ExpandError> {
    let Some(pruning) = &params.pruning else {
        return Ok(());
    };
    require(
        pruning.min_experts >= 1 && pruning.min_experts <= params.k_max,
        "min_experts",
        pruning.min_experts as f64,
        "at least 1 and at most k_max",
    )?;
    at_least_one("min_age", pruning.min_age)?;
    if let Some(unused) = pruning.unused {
        require(
            unused.share > 0.0 && unused.share < 1.0,
            "share",
            unused.share,
            "in (0, 1)",
        )?;
        at_least_one("steps", unused.steps)?;
    }
    if let Some(redundant) = pruning.redundant {
        at_least_one("every", redundant.every)?;
        not_negative("margin", redundant.margin)?;
        not_negative("z", redundant.z)?;
    }
    Ok(())
}

fn watch(params: &ControllerParams, watch: &Watch, continual: bool) -> Result<(), ExpandError> {
    let detects = matches!(
        params.trigger_in(continual),
        Trigger::DetectorOnly | Trigger::DetectorAndAlignment
    );
    if detects && watch.kinds() == 0 {
        return Err(ExpandError::Empty {
            what: "list of watched streams, which the trigger needs",
        });
    }
    if params.unused == Unused::ObserveZero && watch.expert.as_ref().is_some_and(logarithmic) {
        return Err(ExpandError::Parameter {
            name: "unused",
            value: 0.0,
            expected: "skip, because the experts' detector takes logarithms",
        });
    }
    if let Some(expert) = &watch.expert {
        let experts: u64 = params.experts.iter().map(|&n| n as u64).sum();
        let values = experts.saturating_mul(expert.observations_needed());
        require(
            values <= 1 << 30,
            "watch.expert",
            values as f64,
            "at most 2^30 observations to begin with, over all experts",
        )?;
    }
    // Making one of each finds what the detectors themselves refuse, before a layer needs it.
    watch.make_expert(params)?;
    watch.make_layer(params)?;
    watch.make_loss(params)?;
    Ok(())
}

pub(super) fn logarithmic(params: &AnyDetectorParams) -> bool {
    let transform = match params {
        AnyDetectorParams::CalibratedCusum(p) => p.transform,
        AnyDetectorParams::TrainingMonitor(p) => p.transform,
        _ => Transform::Identity,
    };
    transform == Transform::Log
}
