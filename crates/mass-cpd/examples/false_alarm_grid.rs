//! False-alarm probability, power and delay of the detectors on simulated AR(1) streams, as Markdown tables.
//!
//! ```text
//! cargo run --release -p mass-cpd --example false_alarm_grid [STREAMS [TABLE..]]
//! ```
//!
//! `TABLE` is one or more of `level`, `power`, `noise`, `noise-power` and `spread`; without any, all are made. Every stream has `m`
//! observations to learn from and 1000 monitored ones, at alpha = 0.05 per 1000 steps. In `level` and `power` all have unit variance,
//! whatever their autocorrelation `phi`. A change comes right after the `m` observations. Each share has its standard error behind it.

use std::{env, thread};

use mass_cpd::{
    AnyDetector, AnyDetectorParams, CalibratedCusumParams, CpdError, Detector, Direction, Drift,
    Prewhiten, Reference, Scores, Spread, TrainingMonitorParams, Watch, WindowedZParams,
};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use rand_chacha::ChaCha8Rng;

const MONITORED: usize = 1000;
const WARMUPS: [usize; 3] = [50, 200, 1000];
const PHIS: [f64; 3] = [0.0, 0.3, 0.6];

#[derive(Clone, Copy)]
enum Change {
    None,
    Step(f64),
    Trend(f64),
    /// The noise is multiplied.
    Spread(f64),
}

impl Change {
    fn of(self, step: usize, x: f64) -> f64 {
        match self {
            Self::None => x,
            Self::Step(size) => x + size,
            Self::Trend(slope) => x + slope * step as f64,
            Self::Spread(factor) => x * factor,
        }
    }
}

#[derive(Clone, Copy)]
enum Noise {
    Normal,
    /// Student's with three degrees of freedom.
    Student,
    Laplace,
    Uniform,
    Exponential,
    /// `exp(sd z)`
    Lognormal(f64),
}

impl Noise {
    /// Of unit variance.
    fn draw(self, rng: &mut ChaCha8Rng) -> f64 {
        match self {
            Self::Normal => rng.sample(StandardNormal),
            Self::Student => {
                let z: f64 = rng.sample(StandardNormal);
                let square: f64 = (0..3)
                    .map(|_| rng.sample::<f64, _>(StandardNormal).powi(2))
                    .sum();
                z / square.sqrt()
            }
            Self::Laplace => {
                let size = -(1.0 - rng.random::<f64>()).ln() / 2.0f64.sqrt();
                if rng.random() { size } else { -size }
            }
            Self::Uniform => (rng.random::<f64>() - 0.5) * 12.0f64.sqrt(),
            Self::Exponential => -(1.0 - rng.random::<f64>()).ln(),
            Self::Lognormal(sd) => {
                let variance = (sd * sd).exp_m1() * (sd * sd).exp();
                (sd * rng.sample::<f64, _>(StandardNormal)).exp() / variance.sqrt()
            }
        }
    }
}

/// A stationary autoregression.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    phi: [f64; 3],
    noise: Noise,
    /// Of the noise; where it is not 1, so that the stream has unit variance.
    scale: f64,
}

impl Model {
    const fn new(name: &'static str, phi: [f64; 3], noise: Noise) -> Self {
        Self {
            name,
            phi,
            noise,
            scale: 1.0,
        }
    }

    fn ar1(phi: f64) -> Self {
        Self {
            scale: (1.0 - phi * phi).sqrt(),
            ..Self::new("", [phi, 0.0, 0.0], Noise::Normal)
        }
    }
}

/// A stream that has long been running.
struct Source {
    rng: ChaCha8Rng,
    model: Model,
    last: [f64; 3],
}

impl Source {
    fn new(seed: u64, model: Model) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let mut source = Self {
            rng,
            model,
            last: [0.0; 3],
        };
        for _ in 0..200 {
            source.next();
        }
        source
    }

    fn next(&mut self) -> f64 {
        let shock = self.model.scale * self.model.noise.draw(&mut self.rng);
        let [a, b, c] = self.last;
        let [p, q, r] = self.model.phi;
        self.last = [shock + p * a + q * b + r * c, a, b];
        self.last[0]
    }
}

/// Share of streams that alarmed, and the median delay of those that did. Two threads.
fn run(
    fresh: &AnyDetector,
    m: usize,
    model: Model,
    change: Change,
    streams: u64,
) -> Result<(f64, Option<usize>), CpdError> {
    let half = |first: u64| -> Result<Vec<usize>, CpdError> {
        let mut delays = Vec::new();
        for seed in (first..streams).step_by(2) {
            let mut source = Source::new(seed, model);
            let mut detector = fresh.clone();
            for _ in 0..m {
                detector.update(source.next())?;
            }
            for step in 1..=MONITORED {
                if detector.update(change.of(step, source.next()))?.alarm {
                    delays.push(step);
                    break;
                }
            }
        }
        Ok(delays)
    };
    let (even, odd) = thread::scope(|scope| {
        let odd = scope.spawn(|| half(1));
        (half(0), odd.join().expect("no panic"))
    });
    let mut delays = even?;
    delays.extend(odd?);
    delays.sort_unstable();
    let share = delays.len() as f64 / streams as f64;
    Ok((share, delays.get(delays.len() / 2).copied()))
}

/// A cell: a share and its standard error.
fn cell(share: f64, delay: Option<usize>, streams: u64) -> String {
    let error = (share * (1.0 - share) / streams as f64).sqrt();
    match delay {
        Some(delay) => format!("{share:.3} ± {error:.3} ({delay})"),
        None => format!("{share:.3} ± {error:.3}"),
    }
}

fn header(first: &str, columns: &[String]) {
    println!("| {first} | {} |", columns.join(" | "));
    println!("|---|{}", "---|".repeat(columns.len()));
}

fn detectors(m: usize) -> Result<Vec<(&'static str, AnyDetector)>, CpdError> {
    let cusum = CalibratedCusumParams {
        warmup: m,
        ..Default::default()
    };
    let lagged = CalibratedCusumParams {
        reference: Reference::LAGGED,
        ..cusum
    };
    let monitor = TrainingMonitorParams {
        training: m,
        horizon: Some(MONITORED as u64),
        ..Default::default()
    };
    let all: Vec<(&'static str, AnyDetectorParams)> = vec![
        ("calibrated CUSUM (default)", cusum.into()),
        (
            "the same, rises only",
            CalibratedCusumParams {
                direction: Direction::Up,
                ..cusum
            }
            .into(),
        ),
        (
            "the same, drift removed",
            CalibratedCusumParams {
                drift: Drift::Remove,
                ..cusum
            }
            .into(),
        ),
        (
            "the same, not prewhitened",
            CalibratedCusumParams {
                prewhiten: Prewhiten::None,
                ..cusum
            }
            .into(),
        ),
        ("lagged reference", lagged.into()),
        (
            "lagged reference, drift removed",
            CalibratedCusumParams {
                drift: Drift::Remove,
                ..lagged
            }
            .into(),
        ),
        (
            "lagged reference, drift removed, k = 2",
            CalibratedCusumParams {
                drift: Drift::Remove,
                k: 2.0,
                ..lagged
            }
            .into(),
        ),
        ("training sample, long-run variance", monitor.into()),
        (
            "training sample, variance",
            TrainingMonitorParams {
                spread: Spread::Independent,
                ..monitor
            }
            .into(),
        ),
        (
            "windowed z (paper, w = 60)",
            WindowedZParams::paper(m, 60, 0.05).into(),
        ),
    ];
    all.into_iter()
        .map(|(name, params)| Ok((name, params.check()?)))
        .collect()
}

const MODELS: [Model; 14] = [
    Model::new("normal", [0.0; 3], Noise::Normal),
    Model::new("AR(1) .6", [0.6, 0.0, 0.0], Noise::Normal),
    Model::new("AR(1) .9", [0.9, 0.0, 0.0], Noise::Normal),
    Model::new("AR(2) .5, .3", [0.5, 0.3, 0.0], Noise::Normal),
    Model::new("AR(2) 1.2, -.5", [1.2, -0.5, 0.0], Noise::Normal),
    Model::new("AR(3) .4, -.2, .3", [0.4, -0.2, 0.3], Noise::Normal),
    Model::new("uniform", [0.0; 3], Noise::Uniform),
    Model::new("Laplace", [0.0; 3], Noise::Laplace),
    Model::new("Student t, 3 dof", [0.0; 3], Noise::Student),
    Model::new("exponential", [0.0; 3], Noise::Exponential),
    Model::new("lognormal, sd .7", [0.0; 3], Noise::Lognormal(0.7)),
    Model::new("lognormal, sd 1.2", [0.0; 3], Noise::Lognormal(1.2)),
    Model::new(
        "AR(1) .6 of lognormal, sd .7",
        [0.6, 0.0, 0.0],
        Noise::Lognormal(0.7),
    ),
    Model::new("AR(2) .5, .3 of t, 3 dof", [0.5, 0.3, 0.0], Noise::Student),
];

/// The detectors for other noise than that of a first-order autoregression.
fn options(m: usize) -> Result<Vec<(&'static str, AnyDetector)>, CpdError> {
    let default = CalibratedCusumParams {
        warmup: m,
        ..Default::default()
    };
    let with = |prewhiten, scores| CalibratedCusumParams {
        prewhiten,
        scores,
        ..default
    };
    let chosen = Prewhiten::Chosen { most: 4 };
    [
        ("default", default),
        ("`Chosen { most: 4 }`", with(chosen, Scores::Normal)),
        ("`Ranks`, `None`", with(Prewhiten::None, Scores::Ranks)),
        (
            "`Ranks`, `Order(1)`",
            with(Prewhiten::Order(1), Scores::Ranks),
        ),
        ("`Ranks`, `Chosen { most: 4 }`", with(chosen, Scores::Ranks)),
    ]
    .into_iter()
    .map(|(name, params)| Ok((name, params.check()?.into())))
    .collect()
}

/// One row a model, one column an option.
fn by_noise(change: Change, streams: u64, warmups: &[usize]) -> Result<(), CpdError> {
    let mut columns = Vec::new();
    for &m in warmups {
        columns.extend(
            options(m)?
                .into_iter()
                .map(|(name, _)| format!("{name}, m {m}")),
        );
    }
    header("stream", &columns);
    for model in MODELS {
        print!("| {} |", model.name);
        for &m in warmups {
            for (_, detector) in options(m)? {
                let (share, delay) = run(&detector, m, model, change, streams)?;
                let delay = delay.filter(|_| !matches!(change, Change::None));
                print!(" {} |", cell(share, delay, streams));
            }
        }
        println!();
    }
    Ok(())
}

fn by_phi(rows: &[usize], changes: &[(&str, Change)], streams: u64) -> Result<(), CpdError> {
    let columns: Vec<String> = WARMUPS
        .iter()
        .flat_map(|m| PHIS.map(|phi| format!("m {m}, phi {phi}")))
        .collect();
    header("detector", &columns);
    for &row in rows {
        for &(label, change) in changes {
            print!("| {}{label} |", detectors(WARMUPS[0])?[row].0);
            for m in WARMUPS {
                let (_, detector) = &detectors(m)?[row];
                for phi in PHIS {
                    let (share, delay) = run(detector, m, Model::ar1(phi), change, streams)?;
                    let delay = delay.filter(|_| !matches!(change, Change::None));
                    print!(" {} |", cell(share, delay, streams));
                }
            }
            println!();
        }
    }
    Ok(())
}

fn by_spread(streams: u64) -> Result<(), CpdError> {
    let changes = [
        ("no change", Change::None),
        ("spread x 1.5", Change::Spread(1.5)),
        ("spread x 3", Change::Spread(3.0)),
        ("spread x 0.4", Change::Spread(0.4)),
        ("step 1", Change::Step(1.0)),
    ];
    header("stream, m 200", &changes.map(|(name, _)| name.to_owned()));
    let normal = CalibratedCusumParams {
        watch: Watch::Spread,
        warmup: 200,
        ..Default::default()
    };
    let ranks = CalibratedCusumParams {
        scores: Scores::Ranks,
        ..normal
    };
    for (model, params, name) in [
        (Model::ar1(0.0), normal, "normal"),
        (Model::ar1(0.6), normal, "AR(1) .6"),
        (MODELS[8], normal, "Student t, 3 dof"),
        (MODELS[8], ranks, "Student t, 3 dof, `Ranks`"),
    ] {
        let detector = params.check()?.into();
        print!("| {name} |");
        for (_, change) in changes {
            let (share, delay) = run(&detector, 200, model, change, streams)?;
            let delay = delay.filter(|_| !matches!(change, Change::None));
            print!(" {} |", cell(share, delay, streams));
        }
        println!();
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = env::args().skip(1);
    let streams: u64 = arguments.next().map_or(Ok(2000), |s| s.parse())?;
    let tables: Vec<String> = arguments.collect();
    const ALL: [&str; 5] = ["level", "power", "noise", "noise-power", "spread"];
    if let Some(unknown) = tables.iter().find(|t| !ALL.contains(&t.as_str())) {
        return Err(format!("no table {unknown:?}: one of {}", ALL.join(", ")).into());
    }
    let wanted = |table: &str| tables.is_empty() || tables.iter().any(|t| t == table);
    println!("{streams} streams a cell, {MONITORED} monitored steps, alpha = 0.05.");
    if wanted("level") {
        println!("\n### Share of streams without a change that raise an alarm\n");
        let rows: Vec<usize> = (0..detectors(WARMUPS[0])?.len()).collect();
        by_phi(&rows, &[("", Change::None)], streams)?;
    }
    if wanted("power") {
        println!(
            "\n### Share of streams with a change that raise an alarm (median delay of those)\n"
        );
        let changes = [
            (", step 0.5", Change::Step(0.5)),
            (", step 1", Change::Step(1.0)),
            (", step 2", Change::Step(2.0)),
            (", trend -0.003", Change::Trend(-0.003)),
        ];
        by_phi(&[0, 4, 7], &changes, streams)?;
    }
    if wanted("noise") {
        println!("\n### Share of streams without a change that raise an alarm, by their noise\n");
        by_noise(Change::None, streams, &[50])?;
    }
    if wanted("noise-power") {
        println!(
            "\n### The same with a step of one standard deviation of the noise (median delay)\n"
        );
        by_noise(Change::Step(1.0), streams, &[200])?;
    }
    if wanted("spread") {
        println!(
            "\n### Share of streams that raise an alarm where the spread is watched (median delay)\n"
        );
        by_spread(streams)?;
    }
    Ok(())
}
