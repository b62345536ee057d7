//! False-alarm probability, power and delay of the detectors on simulated AR(1) streams, as Markdown tables.
//!
//! ```text
//! cargo run --release -p mass-cpd --example false_alarm_grid [STREAMS]
//! ```
//!
//! Every stream has `m` observations to learn from and 1000 monitored ones, at alpha = 0.05 per 1000 steps. All have
//! unit variance, whatever their autocorrelation `phi`. A change comes right after the `m` observations.

use std::env;

use mass_cpd::{
    AnyDetector, AnyDetectorParams, CalibratedCusumParams, CpdError, Detector, Direction, Drift,
    Reference, Spread, TrainingMonitorParams, WindowedZParams,
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
}

impl Change {
    fn at(self, step: usize) -> f64 {
        match self {
            Self::None => 0.0,
            Self::Step(size) => size,
            Self::Trend(slope) => slope * step as f64,
        }
    }
}

/// An AR(1) stream of unit variance.
struct Ar1 {
    rng: ChaCha8Rng,
    phi: f64,
    last: f64,
}

impl Ar1 {
    fn new(seed: u64, phi: f64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let last = rng.sample(StandardNormal);
        Self { rng, phi, last }
    }

    fn next(&mut self) -> f64 {
        let shock: f64 = self.rng.sample(StandardNormal);
        self.last = self.phi * self.last + (1.0 - self.phi * self.phi).sqrt() * shock;
        self.last
    }
}

/// Share of streams that alarmed, and the median delay of those that did.
fn run(
    fresh: &AnyDetector,
    m: usize,
    phi: f64,
    change: Change,
    streams: u64,
) -> Result<(f64, Option<usize>), CpdError> {
    let mut delays = Vec::new();
    for seed in 0..streams {
        let mut source = Ar1::new(seed, phi);
        let mut detector = fresh.clone();
        for _ in 0..m {
            detector.update(source.next())?;
        }
        for step in 1..=MONITORED {
            if detector.update(source.next() + change.at(step))?.alarm {
                delays.push(step);
                break;
            }
        }
    }
    delays.sort_unstable();
    let share = delays.len() as f64 / streams as f64;
    Ok((share, delays.get(delays.len() / 2).copied()))
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
                prewhiten: false,
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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let streams: u64 = env::args().nth(1).map_or(Ok(2000), |s| s.parse())?;
    println!("{streams} streams a cell, {MONITORED} monitored steps, alpha = 0.05.\n");

    println!("### Share of streams without a change that raise an alarm\n");
    print!("| detector |");
    for m in WARMUPS {
        for phi in PHIS {
            print!(" m {m}, phi {phi} |");
        }
    }
    println!("\n|---|{}", "---|".repeat(WARMUPS.len() * PHIS.len()));
    for row in 0..detectors(WARMUPS[0])?.len() {
        for (column, m) in WARMUPS.into_iter().enumerate() {
            let (name, detector) = &detectors(m)?[row];
            if column == 0 {
                print!("| {name} |");
            }
            for phi in PHIS {
                print!(" {:.3} |", run(detector, m, phi, Change::None, streams)?.0);
            }
        }
        println!();
    }

    let changes = [
        ("step 0.5", Change::Step(0.5)),
        ("step 1", Change::Step(1.0)),
        ("step 2", Change::Step(2.0)),
        ("trend -0.003", Change::Trend(-0.003)),
    ];
    println!("\n### Share of streams with a change that raise an alarm (median delay of those)\n");
    print!("| detector, change |");
    for m in WARMUPS {
        for phi in PHIS {
            print!(" m {m}, phi {phi} |");
        }
    }
    println!("\n|---|{}", "---|".repeat(WARMUPS.len() * PHIS.len()));
    for row in [0, 4, 7] {
        for (label, change) in changes {
            for (column, m) in WARMUPS.into_iter().enumerate() {
                let (name, detector) = &detectors(m)?[row];
                if column == 0 {
                    print!("| {name}, {label} |");
                }
                for phi in PHIS {
                    let (power, delay) = run(detector, m, phi, change, streams)?;
                    match delay {
                        Some(delay) => print!(" {power:.3} ({delay}) |"),
                        None => print!(" {power:.3} |"),
                    }
                }
            }
            println!();
        }
    }
    Ok(())
}
