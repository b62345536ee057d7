//! What segmentation finds in simulated series whose changes are known, as Markdown tables.
//!
//! ```text
//! cargo run --release -p mass-cpd --features offline --example segmentation_grid [SERIES] [none|changes]
//! ```
//!
//! Noise is AR(1) of unit variance, whatever its autocorrelation `phi`, but for the rows that say otherwise. `SERIES` is the
//! number of series a cell (100); cells without a change have five times as many. The second argument picks one of the
//! tables.

use std::env;

use mass_cpd::{
    CpdError,
    offline::{BinarySegmentationParams, PeltParams, Penalty},
};
use ndarray::{Array1, ArrayView1};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::{StandardNormal, StudentT},
};
use rand_chacha::ChaCha8Rng;

/// How far from the change a change point may be and still be right.
const MARGIN: usize = 5;

/// Which method, and for the known noise its long-run variance.
#[derive(Clone, Copy)]
enum Method {
    Pelt,
    Binary,
    /// PELT with so many `log n` times the true long-run variance: what cannot be known in practice.
    Known(f64),
}

impl Method {
    fn cut(self, series: ArrayView1<'_, f64>, long_run: f64) -> Result<Vec<usize>, CpdError> {
        let found = match self {
            Self::Pelt => PeltParams::default().check()?.segment(series)?,
            Self::Binary => BinarySegmentationParams::default()
                .check()?
                .segment(series)?,
            Self::Known(factor) => {
                let penalty = Penalty::Value(factor * (series.len() as f64).ln() * long_run);
                let params = PeltParams {
                    penalty,
                    ..PeltParams::default()
                };
                params.check()?.segment(series)?
            }
        };
        Ok(found.indices())
    }
}

fn normal(rng: &mut ChaCha8Rng) -> f64 {
    rng.sample(StandardNormal)
}

fn autoregression(rng: &mut ChaCha8Rng, n: usize, phi: f64) -> Vec<f64> {
    let mut last = normal(rng);
    (0..n)
        .map(|_| {
            last = phi * last + (1.0 - phi * phi).sqrt() * normal(rng);
            last
        })
        .collect()
}

fn long_run(phi: f64) -> f64 {
    (1.0 + phi) / (1.0 - phi)
}

/// `share` of `number` series, with its standard error.
fn share(count: usize, number: u64) -> String {
    let p = count as f64 / number as f64;
    let error = (p * (1.0 - p) / number as f64).sqrt();
    format!("{p:.3} ± {error:.3}")
}

/// A row of shares of series in which anything was found.
fn row_without(
    name: &str,
    number: u64,
    methods: &[Method],
    phi: f64,
    series: impl Fn(&mut ChaCha8Rng) -> Vec<f64>,
) -> Result<(), CpdError> {
    print!("| {name} |");
    for method in methods {
        let mut with = 0;
        for seed in 0..number {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let y = Array1::from(series(&mut rng));
            with += usize::from(!method.cut(y.view(), long_run(phi))?.is_empty());
        }
        print!(" {} |", share(with, number));
    }
    println!();
    Ok(())
}

/// Where the level changes, and what it is.
struct Plan {
    name: &'static str,
    level: fn(usize) -> f64,
}

const PLANS: [Plan; 2] = [
    Plan {
        name: "square wave",
        level: |i| (i % 2) as f64,
    },
    Plan {
        name: "staircase",
        level: |i| i as f64,
    },
];

fn header(first: &str, columns: &[&str]) {
    println!("| {first} | {} |", columns.join(" | "));
    println!("|---|{}", "---|".repeat(columns.len()));
}

fn without_a_change(number: u64) -> Result<(), CpdError> {
    let methods = [
        Method::Pelt,
        Method::Binary,
        Method::Known(2.0),
        Method::Known(2.75),
    ];
    println!("#### Share of series without a change in which one is found\n");
    header(
        "noise",
        &[
            "PELT (default)",
            "binary segmentation (0.05)",
            "PELT, noise known, 2 log n",
            "PELT, noise known, 2.75 log n",
        ],
    );
    for n in [100, 300, 1000] {
        for phi in [0.0, 0.3, 0.6, 0.9] {
            let name = format!("n {n}, phi {phi}");
            row_without(&name, number, &methods, phi, |rng| {
                autoregression(rng, n, phi)
            })?;
        }
        let name = format!("n {n}, Student t3");
        row_without(&name, number, &methods[..2], 0.0, |rng| {
            let Ok(t3) = StudentT::new(3.0) else {
                return Vec::new();
            };
            (0..n).map(|_| rng.sample(t3)).collect()
        })?;
    }
    println!("\n#### The same of series that are neither level nor noise\n");
    header(
        "series of 300",
        &["PELT (default)", "binary segmentation (0.05)"],
    );
    let n = 300;
    let cycle = |t: usize| (t as f64 * std::f64::consts::PI / 6.0).sin();
    let rise = |t: usize| 3.46 * t as f64 / n as f64;
    row_without(
        "season of 12 and noise of sd 0.3",
        number,
        &methods[..2],
        0.0,
        |rng| (0..n).map(|t| cycle(t) + 0.3 * normal(rng)).collect(),
    )?;
    row_without(
        "line of sd 1 and noise of sd 0.3",
        number,
        &methods[..2],
        0.0,
        |rng| (0..n).map(|t| rise(t) + 0.3 * normal(rng)).collect(),
    )?;
    row_without("random walk", number, &methods[..2], 0.0, |rng| {
        let mut level = 0.0;
        (0..n)
            .map(|_| {
                level += normal(rng);
                level
            })
            .collect()
    })?;
    println!();
    Ok(())
}

/// Share of series in which exactly the changes are found, and the mean number found.
fn with_changes(number: u64) -> Result<(), CpdError> {
    println!(
        "#### Share of series in which all changes are found and nothing else (mean number found)\n"
    );
    let methods = [
        Method::Pelt,
        Method::Binary,
        Method::Known(2.0),
        Method::Known(2.75),
        Method::Known(3.0),
    ];
    header(
        "n, changes, step, phi",
        &[
            "PELT (default)",
            "binary segmentation",
            "noise known, 2 log n",
            "2.75 log n",
            "3 log n",
        ],
    );
    for plan in &PLANS {
        for (n, changes) in [(100, 1), (300, 2), (400, 9), (600, 19)] {
            let segment = n / (changes + 1);
            for size in [1.5, 3.0, 10.0] {
                for phi in [0.0, 0.3, 0.6] {
                    print!("| {}, {n}, {changes}, {size}, {phi} |", plan.name);
                    for method in methods {
                        let (mut right, mut found) = (0, 0);
                        for seed in 0..number {
                            let mut rng = ChaCha8Rng::seed_from_u64(seed);
                            let y: Array1<f64> = autoregression(&mut rng, n, phi)
                                .iter()
                                .enumerate()
                                .map(|(t, e)| e + size * (plan.level)(t / segment))
                                .collect();
                            let cuts = method.cut(y.view(), long_run(phi))?;
                            found += cuts.len();
                            right += usize::from(
                                cuts.len() == changes
                                    && cuts
                                        .iter()
                                        .enumerate()
                                        .all(|(i, c)| c.abs_diff((i + 1) * segment) <= MARGIN),
                            );
                        }
                        let mean = found as f64 / number as f64;
                        print!(" {} ({mean:.1}) |", share(right, number));
                    }
                    println!();
                }
            }
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let number: u64 = env::args().nth(1).map_or(Ok(100), |a| a.parse())?;
    println!(
        "{} series a cell without a change, {number} with changes; share ± standard error.\n",
        5 * number
    );
    match env::args().nth(2).as_deref() {
        None => {
            without_a_change(5 * number)?;
            with_changes(number)?;
        }
        Some("none") => without_a_change(5 * number)?,
        Some("changes") => with_changes(number)?,
        Some(other) => return Err(format!("{other} is neither `none` nor `changes`").into()),
    }
    Ok(())
}
