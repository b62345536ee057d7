use mass_expand::{Event, EventKind};

use super::Expansion;

/// The splits among the events, each with the alarm that set it off.
#[must_use]
pub fn expansions(events: &[Event]) -> Vec<Expansion> {
    let split = |event: &Event| match event.kind {
        EventKind::Split {
            source,
            new,
            watched,
            flagged,
            p_value,
            cosine,
            ..
        } => Some(Expansion {
            step: event.step,
            layer: event.layer.unwrap_or(0),
            source: source.0 as usize,
            new: new.0 as usize,
            watched,
            flagged: flagged.map(|expert| expert.0 as usize),
            p_value,
            cosine,
        }),
        _ => None,
    };
    events.iter().filter_map(split).collect()
}

#[cfg(test)]
mod tests {
    use mass_expand::{BisectParams, ExpertId, SplitOperator, Watched};

    use super::*;

    #[test]
    fn a_split_has_the_alarm_that_its_event_names() {
        let split = |watched, flagged: Option<u32>, p_value| Event {
            step: 7,
            layer: Some(1),
            kind: EventKind::Split {
                source: ExpertId(2),
                new: ExpertId(9),
                operator: SplitOperator::Bisect(BisectParams::default()),
                watched,
                flagged: flagged.map(ExpertId),
                p_value,
                p_horizon: None,
                cosine: Some(0.1),
                experts: 7,
            },
        };
        let stop = Event {
            kind: EventKind::ContinualPhase,
            ..split(None, None, None)
        };
        let by_neighbour = split(Some(Watched::Expert), Some(4), Some(0.01));
        let found = expansions(&[stop, by_neighbour, split(None, None, None)]);
        let of = |e: &Expansion| (e.step, e.layer, e.source, e.new, e.cosine);
        assert!(found.iter().all(|e| of(e) == (7, 1, 2, 9, Some(0.1))));
        let alarm = |e: &Expansion| (e.watched, e.flagged, e.p_value);
        let [one, other] = &found[..] else {
            panic!("{found:?}");
        };
        assert_eq!(alarm(one), (Some(Watched::Expert), Some(4), Some(0.01)));
        assert_eq!(alarm(other), (None, None, None));
    }
}
