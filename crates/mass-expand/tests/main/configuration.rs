//! Configurations as text: what is misspelt is refused, wherever it stands.

use mass_cpd::WindowedZParams;
use mass_expand::*;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Detectors are another crate's, and so is the generator; of an event no field is decided upon.
const PASSED_OVER: &[&str] = &[
    "windowed_z",
    "calibrated_cusum",
    "training_monitor",
    "generator",
    "events",
    "recent",
];

/// Adds a field that does not exist to one object after the other and says where that was taken.
fn taken(whole: &Value, at: &str, refuses: &impl Fn(&Value) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    let Some(here) = whole.pointer(at) else {
        return found;
    };
    let children: Vec<String> = match here {
        Value::Object(fields) => {
            let mut misspelt = whole.clone();
            misspelt.pointer_mut(at).unwrap()["alhpa"] = 0.01.into();
            if !refuses(&misspelt) {
                found.push(at.to_owned());
            }
            fields.keys().cloned().collect()
        }
        Value::Array(items) => (0..items.len()).map(|i| i.to_string()).collect(),
        _ => Vec::new(),
    };
    for child in children {
        if !PASSED_OVER.contains(&child.as_str()) {
            found.extend(taken(whole, &format!("{at}/{child}"), refuses));
        }
    }
    found
}

fn assert_strict<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T) {
    let written = serde_json::to_value(value).unwrap();
    assert_eq!(
        &serde_json::from_value::<T>(written.clone()).unwrap(),
        value
    );
    let refuses = |text: &Value| serde_json::from_value::<T>(text.clone()).is_err();
    assert_eq!(taken(&written, "", &refuses), [""; 0], "{written}");
}

#[test]
fn a_field_that_does_not_exist_is_refused_in_every_configuration() {
    let pruning = Pruning {
        min_experts: 1,
        min_age: 1,
        unused: Some(PruneUnused {
            share: 0.1,
            steps: 5,
        }),
        redundant: Some(PruneRedundant {
            every: 5,
            margin: 0.0,
            z: 1.0,
        }),
    };
    let mut all = vec![
        ControllerParams::paper(2, 3, 6, 1000),
        ControllerParams::reference(2, 3, 6, 1000),
        ControllerParams::calibrated(2, 3, 6, 1000).continual(0.01, 500),
        ControllerParams::calibrated(2, 3, 6, 1000).with_schedule(5, 5),
        ControllerParams::paper(2, 3, 6, 1000).on_plateau(50, 0.01),
        ControllerParams {
            trigger: Trigger::Schedule {
                first: 5,
                every: 5,
                splits: 3,
            },
            ..ControllerParams::paper(2, 3, 6, 1000)
        },
    ];
    all[0].pruning = Some(pruning);
    all[1].alignment = AlignmentThreshold::Scaled { c0: 2.0 };
    all[1].watch = Watch::experts(WindowedZParams::paper(5, 5, 0.1));
    for params in &all {
        assert_strict(params);
        assert_strict(&params.phase);
        assert_strict(&params.watch);
        assert_strict(&params.trigger);
        assert_strict(&params.operator);
        assert_strict(&params.stop);
        assert_strict(&params.alignment);
    }
    assert_strict(&pruning);
    assert_strict(&pruning.unused.unwrap());
    assert_strict(&pruning.redundant.unwrap());
    assert_strict(&BisectParams::default());
    let patience = StopRule::Patience {
        patience: 1,
        checks_after_expansions: 1,
    };
    assert_strict(&patience);

    // A rule that does not exist is none either.
    let mut params = serde_json::to_value(&all[0]).unwrap();
    params["stop"] = serde_json::json!({ "consecutiv": { "gamma": 3 } });
    assert!(serde_json::from_value::<ControllerParams>(params).is_err());
}

/// Rules stored before the length of the run was among them.
#[test]
fn the_length_of_the_run_may_be_absent() {
    let params = ControllerParams::paper(1, 2, 4, 1000);
    let mut stored = serde_json::to_value(&params).unwrap();
    stored.as_object_mut().unwrap().remove("steps");
    let read: ControllerParams = serde_json::from_value(stored).unwrap();
    assert_eq!(
        read,
        ControllerParams {
            steps: None,
            ..params
        }
    );
}

/// In the middle of a step, with all that a state can have; a part that is always written may not be missing.
#[test]
fn a_stored_state_has_its_fields_and_no_others() {
    let alarming = WindowedZParams::paper(1, 2, 0.99);
    let mut params = crate::drive::every_step(2, 9).on_plateau(2, 0.5);
    params.watch = Watch {
        layer: Some(alarming.into()),
        loss: Some(alarming.into()),
        ..Watch::experts(alarming)
    };
    params.alignment = AlignmentThreshold::Absolute(0.5);
    params.stop = StopRule::Consecutive { gamma: 3 };
    params.trace = 3;
    let figures = crate::drive::Figures::new(0);
    for trigger in [Trigger::DetectorAndAlignment, params.trigger] {
        params.trigger = trigger;
        let mut controller = params.check().unwrap();
        for step in 0..6 {
            figures.step(&mut controller, step);
        }
        let asked = figures.begin(&mut controller, 6).unwrap();
        assert!(controller.expansions(0) > 0 && !asked.is_empty());
        assert_strict(&controller);
        controller.answer(figures.answer(6, asked[0])).unwrap();
        assert_strict(&controller);

        let written = serde_json::to_value(&controller).unwrap();
        for (at, part) in [
            ("", "signs"),
            ("/layers/0", "signs"),
            ("/layers/0/experts/0", "averaged_steps"),
        ] {
            let mut state = written.clone();
            let object = state.pointer_mut(at).unwrap().as_object_mut().unwrap();
            object.remove(part).unwrap();
            assert!(serde_json::from_value::<Controller>(state).is_err());
        }
    }
}
