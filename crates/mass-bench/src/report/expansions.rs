use mass_expand::{Event, EventKind, ExpertId};

use super::Expansion;

/// The splits among the events, each with the p-value of the alarm that set it off: the smallest among the detectors of
/// its source, its layer and the loss that raised one in that step.
#[must_use]
pub fn expansions(events: &[Event]) -> Vec<Expansion> {
    let alarm = |at: &Event, split: ExpertId| {
        let of = |event: &Event| match event.kind {
            EventKind::Flag {
                expert, p_value, ..
            } if event.step == at.step
                && (event.layer.is_none() || event.layer == at.layer)
                && expert.is_none_or(|e| e == split) =>
            {
                p_value
            }
            _ => None,
        };
        events.iter().filter_map(of).reduce(f64::min)
    };
    let split = |event: &Event| match event.kind {
        EventKind::Split {
            source,
            new,
            p_value,
            cosine,
            ..
        } => Some(Expansion {
            step: event.step,
            layer: event.layer.unwrap_or(0),
            source: source.0 as usize,
            new: new.0 as usize,
            p_value: alarm(event, source).or(p_value),
            cosine,
        }),
        _ => None,
    };
    events.iter().filter_map(split).collect()
}
