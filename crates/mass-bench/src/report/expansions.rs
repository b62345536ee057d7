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

#[cfg(test)]
mod tests {
    use mass_expand::{SplitOperator, Watched};

    use super::*;

    #[test]
    fn a_split_has_the_smallest_p_value_of_the_alarms_that_concern_it() {
        let flag = |step, layer, expert: Option<u32>, p| Event {
            step,
            layer,
            kind: EventKind::Flag {
                watched: Watched::Expert,
                expert: expert.map(ExpertId),
                value: 1.0,
                statistic: None,
                p_value: Some(p),
                p_horizon: None,
                onset_age: None,
            },
        };
        let split = Event {
            step: 7,
            layer: Some(0),
            kind: EventKind::Split {
                source: ExpertId(2),
                new: ExpertId(9),
                operator: SplitOperator::Bisect,
                p_value: Some(0.5),
                p_horizon: None,
                cosine: Some(0.1),
                experts: 7,
            },
        };
        let alarms = [
            flag(6, Some(0), Some(2), 1e-9),
            flag(7, Some(0), Some(2), 0.02),
            flag(7, Some(0), Some(3), 0.001),
            flag(7, Some(1), Some(2), 0.0001),
            flag(7, None, None, 0.01),
        ];
        let found = expansions(&[&alarms[..], &[split]].concat());
        assert_eq!(found.len(), 1);
        let of = |e: &Expansion| (e.step, e.layer, e.source, e.new, e.p_value, e.cosine);
        assert_eq!(of(&found[0]), (7, 0, 2, 9, Some(0.01), Some(0.1)));
        assert_eq!(expansions(&[split])[0].p_value, Some(0.5));
    }
}
