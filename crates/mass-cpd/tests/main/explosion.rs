//! Jumps of any size, gaps and every configuration together.
//!
//! Nothing that a detector holds may run away from what it has seen.
//! Predictions come back as predecessors, over gaps and in cleaned observations.
//! A jump makes the fit to them explosive.

use mass_cpd::{
    AfterAlarm, AnyDetector, AnyDetectorParams, Bank, BankParams, CalibratedCusumParams, Detector,
    Direction, Drift, Prewhiten, Reference, Scores, Shift, Step, TrainingMonitorParams, Transform,
    Watch, WindowedZParams,
};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use proptest::{prelude::*, sample::select};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

/// Step after which the series changes.
const CHANGE: usize = 300;

/// What happens from there on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Jump,
    Spike,
    Spikes,
    Alternating,
    /// Tenfold at each step, up to the full size.
    Explosion,
    /// There and back.
    Return,
}

/// Where observations are missing.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gaps {
    None,
    Every(usize),
    /// This share, at random.
    Random(f64),
    /// So many at a time, so long after the change.
    Long(usize, usize),
}

fn series(seed: u64, shape: Shape, size: f64, gaps: Gaps) -> Vec<Option<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut out = Vec::new();
    for t in 0..CHANGE + 300 {
        let noise: f64 = rng.sample(StandardNormal);
        let chance: f64 = rng.random();
        let since = t.checked_sub(CHANGE);
        let level = match (shape, since) {
            (_, None) => 0.0,
            (Shape::Jump, _) => size,
            (Shape::Spike, Some(k)) => [size, 0.0][k.min(1)],
            (Shape::Spikes, Some(k)) => [size, 0.0][(k % 23).min(1)],
            (Shape::Alternating, Some(k)) => [size, -size][k % 2],
            (Shape::Explosion, Some(k)) => {
                let grown = 10f64.powi(k.min(100) as i32);
                grown.min(size.abs()).copysign(size)
            }
            (Shape::Return, Some(k)) => [size, 0.0][k / 100 % 2],
        };
        let missing = match gaps {
            Gaps::None | Gaps::Long(..) => false,
            Gaps::Every(period) => t % period == period - 1,
            Gaps::Random(share) => chance < share,
        };
        if let (Gaps::Long(length, after), Some(k)) = (gaps, since)
            && k == after
        {
            out.extend(vec![None; length]);
        }
        out.push((!missing).then_some(level + noise));
    }
    out
}

fn shapes() -> impl Strategy<Value = Shape> {
    select(vec![
        Shape::Jump,
        Shape::Jump,
        Shape::Spike,
        Shape::Spikes,
        Shape::Alternating,
        Shape::Explosion,
        Shape::Return,
    ])
}

fn gaps() -> impl Strategy<Value = Gaps> {
    prop_oneof![
        Just(Gaps::None),
        (30usize..90).prop_map(Gaps::Every),
        (0.001..0.05f64).prop_map(Gaps::Random),
        (1usize..4000, 0usize..60).prop_map(|(length, after)| Gaps::Long(length, after)),
    ]
}

/// Sizes of either sign, in standard deviations.
fn sizes() -> impl Strategy<Value = f64> {
    (3.0..39.5f64, any::<bool>())
        .prop_map(|(power, up)| 10f64.powf(power) * if up { 1.0 } else { -1.0 })
}

fn cusums() -> impl Strategy<Value = CalibratedCusumParams> {
    let prewhiten = select(vec![
        Prewhiten::None,
        Prewhiten::Order(1),
        Prewhiten::Order(2),
        Prewhiten::Order(3),
        Prewhiten::Order(8),
        Prewhiten::Chosen { most: 2 },
        Prewhiten::Chosen { most: 4 },
        Prewhiten::Chosen { most: 8 },
    ]);
    let after = select(vec![
        AfterAlarm::Relearn,
        AfterAlarm::Restart,
        AfterAlarm::Hold,
    ]);
    let direction = select(vec![
        Direction::Both,
        Direction::Both,
        Direction::Up,
        Direction::Down,
    ]);
    let limit = select(vec![Some(4.0), Some(4.0), None]);
    (
        (prewhiten, after, direction, limit),
        (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
    )
        .prop_map(
            |((prewhiten, after_alarm, direction, score_limit), (drift, ranks, spread, lagged))| {
                let general = ranks || !matches!(prewhiten, Prewhiten::None | Prewhiten::Order(1));
                CalibratedCusumParams {
                    prewhiten,
                    after_alarm,
                    direction,
                    score_limit,
                    drift: if drift { Drift::Remove } else { Drift::Keep },
                    scores: if ranks { Scores::Ranks } else { Scores::Normal },
                    watch: if spread { Watch::Spread } else { Watch::Level },
                    reference: if lagged && !general {
                        Reference::Lagged { window: 32, gap: 4 }
                    } else {
                        Reference::SelfStarting
                    },
                    ..Default::default()
                }
            },
        )
}

/// The largest number under one of these names, infinite where one is not finite.
fn largest(value: &Value, names: &[&str], named: bool) -> f64 {
    match value {
        // What is ranked are errors, and not past observations.
        Value::Object(map) => map
            .iter()
            .filter(|(name, _)| *name != "ranks")
            .map(|(name, inner)| largest(inner, names, named || names.contains(&name.as_str())))
            .fold(0.0, f64::max),
        Value::Array(items) => items
            .iter()
            .map(|inner| largest(inner, names, named))
            .fold(0.0, f64::max),
        Value::Number(number) if named => number.as_f64().map_or(f64::INFINITY, f64::abs),
        // JSON has no other way to write a number that is not finite.
        Value::Null if named => f64::INFINITY,
        _ => 0.0,
    }
}

/// What is held of past observations.
const PAST: [&str; 4] = ["previous", "raw", "lags", "values"];

/// Runs `detector`, and asserts of every step and of the state that they are finite.
/// Past observations may be held as no more than `reach`.
fn watched(detector: &mut AnyDetector, xs: &[Option<f64>], reach: f64) -> Vec<Step> {
    let mut steps = Vec::with_capacity(xs.len());
    for (t, x) in xs.iter().enumerate() {
        let step = match *x {
            Some(x) => detector.update(x).expect("finite"),
            None => detector.skip(),
        };
        for value in [step.statistic, step.size, step.size_in_deviations] {
            assert!(value.is_none_or(f64::is_finite), "{step:?}");
        }
        for p in [step.p_value, step.p_horizon].into_iter().flatten() {
            assert!((0.0..=1.0).contains(&p), "{step:?}");
        }
        assert!(
            step.onset.is_none_or(|o| (1..=step.count).contains(&o)),
            "{step:?}"
        );
        steps.push(step);
        if t % 64 == 63 || t + 1 == xs.len() {
            let state = serde_json::to_value(&*detector).expect("serialises");
            let past = largest(&state, &PAST, false);
            assert!(past <= reach, "{past:e} is held after step {t}: {state}");
            // Whatever is not finite is not read back.
            let read = serde_json::from_value::<AnyDetector>(state.clone());
            assert_eq!(
                read.as_ref().ok(),
                Some(&*detector),
                "after step {t}: {state}"
            );
        }
    }
    steps
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_jump_and_no_gap_makes_a_cusum_run_away(
        seed in any::<u64>(), shape in shapes(), size in sizes(), gaps in gaps(),
        params in cusums(),
    ) {
        let xs = series(seed, shape, size, gaps);
        let mut detector: AnyDetector = AnyDetectorParams::from(params).check().expect("valid");
        // A line that is taken off leads on through a gap.
        let far = if params.drift == Drift::Remove { 1e5 } else { 10.0 };
        let steps = watched(&mut detector, &xs, far * size.abs());
        // Judged, and not begun anew, by the last observation before.
        let last = xs[..CHANGE].iter().rposition(Option::is_some).expect("some are there");
        let ready = steps[last].statistic.is_some() && !steps[last].alarm;
        let seen = match params.direction {
            _ if params.watch == Watch::Spread => params.direction != Direction::Down,
            Direction::Both => true,
            Direction::Up => size > 0.0,
            Direction::Down => size < 0.0,
        };
        // Of a jump of the level the spread sees the errors until it is learned: each smaller than those before, and of a lower rank.
        let seen = seen && (params.watch == Watch::Level || params.scores == Scores::Normal);
        if shape == Shape::Jump && seen && ready && params.score_limit.is_some() {
            // Three certain scores are an alarm, and so are a few of the highest ranks.
            let most = if params.scores == Scores::Ranks { 8 } else { 3 };
            let scored = steps[CHANGE..].iter().filter(|s| s.statistic.is_some());
            let alarm = scored.take(most).find(|s| s.alarm);
            prop_assert!(alarm.is_some(), "no alarm");
            if params.watch == Watch::Level {
                let way = if size > 0.0 { Shift::Up } else { Shift::Down };
                prop_assert_eq!(alarm.and_then(|s| s.direction), Some(way));
                // An explosive fit goes further than the jump, and takes the rest for a fall; and so does a line or an autoregression
                // through a jump, where it leads on through a long gap.
                if !matches!(gaps, Gaps::Long(..))
                    && params.scores == Scores::Normal
                    && params.reference == Reference::SelfStarting
                    && params.after_alarm != AfterAlarm::Relearn
                {
                    let certain = |s: &&Step| s.alarm && s.p_value < Some(1e-15);
                    let mut certain = steps[CHANGE..].iter().filter(certain);
                    prop_assert_eq!(certain.find(|s| s.direction != Some(way)), None);
                }
            }
        }
    }

    /// Streams beside one another take the same way as single ones.
    #[test]
    fn no_jump_and_no_gap_makes_a_bank_run_away(
        seed in any::<u64>(), params in cusums(),
        shapes in prop::collection::vec((shapes(), sizes(), gaps()), 3),
    ) {
                let mut bank = BankParams { detector: params, capacity: 3 }.check().expect("valid");
        let mut singles = Vec::new();
        let mut streams = Vec::new();
        for (i, &(shape, size, gaps)) in (0u64..).zip(&shapes) {
            bank.add();
            singles.push(params.among(3.0).check().expect("valid"));
            streams.push(series(seed.wrapping_add(i), shape, size, gaps));
        }
        let longest = streams.iter().map(Vec::len).max().unwrap_or(0);
        for t in 0..longest {
            let xs: Vec<_> = streams.iter().map(|s| s.get(t).copied().flatten()).collect();
            let alarms = bank.update_some(&xs).expect("finite").to_vec();
            for (place, x) in xs.iter().enumerate() {
                let step = match *x {
                    Some(x) => singles[place].update(x).expect("finite"),
                    None => singles[place].skip(),
                };
                prop_assert_eq!(step.alarm, alarms.contains(&place), "stream {} at {}", place, t);
            }
        }
        let stored = serde_json::to_string(&bank).expect("serialises");
        let read: Bank = serde_json::from_str(&stored).expect("a finite state");
        prop_assert_eq!(serde_json::to_string(&read).expect("serialises"), stored);
    }

    #[test]
    fn no_jump_and_no_gap_makes_another_detector_run_away(
        seed in any::<u64>(), shape in shapes(), size in sizes(), gaps in gaps(),
        direction in select(vec![Direction::Both, Direction::Up, Direction::Down]),
    ) {
        let xs = series(seed, shape, size, gaps);
        let monitor = TrainingMonitorParams { direction, training: 100, ..Default::default() };
        let wide = WindowedZParams::paper(20, 50, 0.01);
        let narrow = WindowedZParams { window: 5, ..wide };
        for params in [AnyDetectorParams::from(monitor), wide.into(), narrow.into()] {
            watched(&mut params.check().expect("valid"), &xs, f64::INFINITY);
        }
        // The windowed z takes any finite number.
        let huge: Vec<_> = xs.iter().map(|x| x.map(|x| x * (1e307 / size.abs()))).collect();
        watched(&mut AnyDetectorParams::from(wide).check().expect("valid"), &huge, f64::INFINITY);
    }

    /// Logarithms take any positive number.
    #[test]
    fn no_jump_and_no_gap_makes_a_cusum_of_logarithms_run_away(
        seed in any::<u64>(), shape in shapes(), size in -640.0..640.0f64, gaps in gaps(),
        params in cusums(),
    ) {
        let params = CalibratedCusumParams { transform: Transform::Log, ..params };
        let xs: Vec<_> = series(seed, shape, size, gaps).iter().map(|x| x.map(f64::exp)).collect();
        let mut detector = AnyDetectorParams::from(params).check().expect("valid");
        watched(&mut detector, &xs, 1e5 * size.abs().max(10.0));
    }
}
