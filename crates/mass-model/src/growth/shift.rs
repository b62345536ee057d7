use mass_expand::ExpertId;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::nn::MoeLayer;
use crate::ops::MoeExpert;

/// What a split did to the gates of its two halves, so that the half that is left can have it undone when the other is removed.
///
/// It is a difference, which is taken off again: what the half has learnt since, and later splits of it, stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateShift {
    /// The expert that was split.
    pub source: ExpertId,
    /// The expert that it was split into, beside itself.
    pub newcomer: ExpertId,
    /// What was added to the gate rows of source and newcomer; empty where rows were copied.
    pub(super) rows: [Vec<f32>; 2],
    /// What was added to their logit offsets.
    pub(super) offsets: [f32; 2],
}

/// The differences of both halves' rows and offsets from those before the split.
pub(super) fn between(
    row: &[f32],
    offset: f32,
    halves: [&MoeExpert; 2],
) -> ([Vec<f32>; 2], [f32; 2]) {
    let rows = halves.map(|half| {
        let pairs = half.gate.values().iter().zip(row);
        let differences: Vec<f32> = pairs.map(|(now, before)| now - before).collect();
        match differences.iter().any(|d| *d != 0.0) {
            true => differences,
            false => Vec::new(),
        }
    });
    (rows, halves.map(|half| half.logit_offset - offset))
}

impl GateShift {
    pub(super) fn is_finite(&self) -> bool {
        let mut values = self.rows.iter().flatten().chain(&self.offsets);
        values.all(|value| value.is_finite())
    }

    /// The other half, if `expert` is one.
    pub fn other(&self, expert: ExpertId) -> Option<ExpertId> {
        if expert == self.source {
            Some(self.newcomer)
        } else {
            (expert == self.newcomer).then_some(self.source)
        }
    }

    /// Takes the shift off the gate of one half.
    pub(super) fn undo(&self, layer: &mut MoeLayer, half: ExpertId) -> Result<(), ModelError> {
        let expert = layer.expert_mut(half)?;
        let (row, offset) = self.without(half, expert)?;
        if let Some(row) = row {
            expert.gate.move_to(&row)?;
        }
        expert.logit_offset = offset;
        Ok(())
    }

    /// Gate row (where the shift is in it) and offset of one half without the shift.
    pub(super) fn without(
        &self,
        half: ExpertId,
        expert: &MoeExpert,
    ) -> Result<(Option<Vec<f32>>, f32), ModelError> {
        let which = usize::from(half != self.source);
        let row = &self.rows[which];
        let offset = expert.logit_offset - self.offsets[which];
        if row.is_empty() {
            return Ok((None, offset));
        }
        if row.len() != expert.gate.len() {
            let (expected, actual) = ([expert.gate.len()], [row.len()]);
            return Err(ModelError::shape("shift of a gate row", &expected, &actual));
        }
        let pairs = expert.gate.try_values()?.iter().zip(row);
        Ok((Some(pairs.map(|(w, d)| w - d).collect()), offset))
    }
}
