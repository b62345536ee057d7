//! How many observations a detector says it needs, against how many it takes.

use mass_cpd::*;

#[test]
fn a_detector_first_judges_the_observation_that_it_names() {
    let lagged = |window, gap, warmup| CalibratedCusumParams {
        reference: Reference::Lagged { window, gap },
        warmup,
        ..CalibratedCusumParams::default()
    };
    let all: Vec<AnyDetectorParams> = vec![
        WindowedZParams::paper(30, 60, 0.01).into(),
        WindowedZParams::reference(60, 30, 0.01).into(),
        WindowedZParams::paper(1, 2, 0.01).into(),
        CalibratedCusumParams::default().into(),
        CalibratedCusumParams::training(3).into(),
        lagged(64, 8, 64).into(),
        lagged(64, 0, 8).into(),
        lagged(20, 5, 100).into(),
        TrainingMonitorParams::default().into(),
        TrainingMonitorParams {
            training: 20,
            ..TrainingMonitorParams::default()
        }
        .into(),
    ];
    for params in all {
        let mut detector = params.check().unwrap();
        let mut noise = 0.3;
        let mut first = None;
        for _ in 0..1000 {
            noise = 3.99 * noise * (1.0 - noise);
            let step = detector.update(1.0 + noise).unwrap();
            if step.statistic.is_some() || step.p_value.is_some() {
                first = Some(step.count);
                break;
            }
        }
        assert_eq!(first, Some(params.observations_needed()), "{params:?}");
    }
}
