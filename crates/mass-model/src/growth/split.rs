//! Experts split and taken out: weights, gate rows, gradients.

use mass_expand::{ExpandError, ExpertId, SplitOperator, bisect, divide_gradient, preserve_mass};
use ndarray::Array2;

use super::BISECT_NEEDS;
use super::shift::{self, GateShift};
use crate::error::ModelError;
use crate::nn::{GateConfig, MoeLayer};
use crate::ops::MoeExpert;
use crate::optim::Gradients;
use crate::parallel::Ranks;
use crate::pass::LayerTrace;

/// Splits an expert in two and returns what that did to the gate, with the id of the newcomer, which stands last in the layer.
///
/// The newcomer gets the source's weights, biases, gate row, full gradient and what its router has learned of it (a balancing
/// bias). What happens to the source's gradient and to the gate is the operator's: see `mass_expand::SplitOperator`. A
/// `Bisect` of tokens that do not spread in any direction falls back to a clone that preserves the pair's routing mass.
///
/// # Errors
/// [`ModelError::NoSuchExpert`] if the source is not in the pool, [`ModelError::Shape`] if it has other sizes than the layer's
/// experts, or its tokens are to be bisected and it came after the trace, [`ModelError::Config`] if the layer has no id left, for a
/// `Bisect` without a linear gate and for an operator that is not known here, [`ModelError::NonFinite`] for a logit offset that is
/// NaN or infinite, [`ModelError::Expand`] for gradients that are not finite. The layer and its gradients are then as they were.
pub fn split_expert(
    layer: &mut MoeLayer,
    source: ExpertId,
    operator: SplitOperator,
    trace: &LayerTrace,
    gradients: &mut impl Gradients,
) -> Result<GateShift, ModelError> {
    let alone = Ranks::default();
    split_expert_among(&alone, layer, source, operator, trace, gradients)
}

/// [`split_expert`] on one of several ranks, whose tokens are bisected together.
pub(super) fn split_expert_among(
    ranks: &Ranks,
    layer: &mut MoeLayer,
    source: ExpertId,
    operator: SplitOperator,
    trace: &LayerTrace,
    gradients: &mut impl Gradients,
) -> Result<GateShift, ModelError> {
    let index = layer.index_of(source)?;
    let linear_gate = layer.config().gate == GateConfig::Linear;
    // All that is read below, before anything is changed: it may lie on a device that has failed.
    let old = &layer.experts()[index];
    old.gate.try_values()?;
    let divides = |operator: &SplitOperator| match operator {
        SplitOperator::Clone { decomposition, .. } => decomposition.is_some(),
        _ => false,
    };
    if divides(&operator) {
        old.network.fc1.0.try_values()?;
    }
    let inputs = match operator {
        SplitOperator::Bisect(_) if linear_gate && index < trace.plan.num_experts() => {
            Some(tokens_of(ranks, index, trace)?)
        }
        _ => None,
    };
    let mut newcomer = layer.experts()[index].offspring();
    layer.check_newcomer(&newcomer)?;
    let matrix = (layer.config().hidden, layer.config().dim);
    let (row, offset) = (newcomer.gate.values().to_vec(), newcomer.logit_offset);
    let old = layer.expert_mut(source)?;
    match operator {
        SplitOperator::Clone {
            decomposition,
            preserve_mass: preserve,
        } => {
            // The paper and the authors' code both cut down fc1 and the gate row; the rest keeps its gradient.
            let cut = [
                (&old.network.fc1.0, &newcomer.network.fc1.0, matrix),
                (&old.gate, &newcomer.gate, (1, old.gate.len())),
            ];
            // All that may be refused, before anything is changed.
            let mut divided = Vec::new();
            for (a, b, shape) in cut.into_iter().filter(|_| decomposition.is_some()) {
                let Some(mut whole) = gradients.copy(a)? else {
                    continue;
                };
                let (mut copy, rows) = (vec![0.0; whole.len()], a.try_values()?);
                divide_gradient(&mut whole, &mut copy, rows, shape, decomposition)?;
                divided.extend([(b, copy), (a, whole)]);
            }
            let mut offset = old.logit_offset;
            if preserve {
                newcomer.logit_offset = preserve_mass(&mut offset)?;
            }
            copy_gradients(old, &newcomer, gradients, decomposition.is_none())?;
            for (param, gradient) in divided {
                gradients.set(param, gradient)?;
            }
            old.logit_offset = offset;
        }
        SplitOperator::Bisect(_) if !linear_gate => {
            return Err(ModelError::Config(BISECT_NEEDS.into()));
        }
        SplitOperator::Bisect(_) if index >= trace.plan.num_experts() => {
            let traced = trace.plan.num_experts();
            return Err(ModelError::shape("experts traced", &[index + 1], &[traced]));
        }
        SplitOperator::Bisect(params) => {
            copy_gradients(old, &newcomer, gradients, true)?;
            let inputs = inputs.unwrap_or_default();
            match bisect(inputs.view(), old.gate.values(), old.logit_offset, params) {
                Ok(halves) => {
                    old.gate.move_to(&halves.source_row)?;
                    newcomer.gate.move_to(&halves.newcomer_row)?;
                    old.logit_offset = halves.source_offset;
                    newcomer.logit_offset = halves.newcomer_offset;
                }
                Err(ExpandError::NoSpread { .. } | ExpandError::Empty { .. }) => {
                    newcomer.logit_offset = preserve_mass(&mut old.logit_offset)?;
                }
                Err(e) => return Err(e.into()),
            }
        }
        other => {
            return Err(ModelError::Config(format!(
                "split operator {other:?} is not known here"
            )));
        }
    }
    let halves = [&*old, &newcomer];
    let (rows, offsets) = shift::between(&row, offset, halves);
    Ok(GateShift {
        source,
        newcomer: layer.push_split(newcomer, source)?,
        rows,
        offsets,
    })
}

/// Takes an expert out of a layer. What the split by which it came about did to the gate of its other half, `shift`, is undone.
///
/// # Errors
/// [`ModelError::NoSuchExpert`] if it is not in the pool, [`ModelError::Config`] if it is the last one, or the shift is that of
/// another expert, [`ModelError::Shape`] if the shift is that of a gate of another width, [`ModelError::Routing`] if the router
/// takes more experts than would be left. The layer is then as it was.
pub fn remove_expert(
    layer: &mut MoeLayer,
    expert: ExpertId,
    shift: Option<&GateShift>,
) -> Result<(), ModelError> {
    layer.check_removal(expert)?;
    if let Some(shift) = shift {
        let Some(other) = shift.other(expert) else {
            let what = format!("the split of another expert than {expert}");
            return Err(ModelError::Config(what));
        };
        if layer.index_of(other).is_ok() {
            shift.undo(layer, other)?;
        }
    }
    layer.remove(expert)?;
    Ok(())
}

fn copy_gradients(
    from: &MoeExpert,
    to: &MoeExpert,
    gradients: &mut impl Gradients,
    with_fc1_and_gate: bool,
) -> Result<(), ModelError> {
    let mut pairs = vec![
        (&from.network.fc1.1, &to.network.fc1.1),
        (&from.network.fc2.0, &to.network.fc2.0),
        (&from.network.fc2.1, &to.network.fc2.1),
    ];
    if let (Some(a), Some(b)) = (&from.threshold, &to.threshold) {
        pairs.push((a, b));
    }
    if let (Some(a), Some(b)) = (&from.network.up, &to.network.up) {
        pairs.extend([(&a.0, &b.0), (&a.1, &b.1)]);
    }
    if with_fc1_and_gate {
        pairs.extend([
            (&from.network.fc1.0, &to.network.fc1.0),
            (&from.gate, &to.gate),
        ]);
    }
    for (a, b) in pairs {
        gradients.hand_on(a, b)?;
    }
    Ok(())
}

/// The gate inputs of the tokens routed to an expert, on whatever rank.
fn tokens_of(ranks: &Ranks, index: usize, trace: &LayerTrace) -> Result<Array2<f32>, ModelError> {
    let tokens = &trace.plan.tokens()[trace.plan.segment(index)];
    let (rows, dim) = (trace.gate_input.rows(tokens)?, trace.gate_input.shape().1);
    let rows = ranks.gather(rows)?;
    let (found, shape) = (rows.len(), (rows.len() / dim.max(1), dim));
    Array2::from_shape_vec(shape, rows)
        .map_err(|_| ModelError::shape("gate inputs", &[shape.0, shape.1], &[found]))
}
