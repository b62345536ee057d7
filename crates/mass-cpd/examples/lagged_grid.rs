//! How often the lagged reference alarms without a change, against what it promises, as Markdown tables.
//!
//! ```text
//! cargo run --release -p mass-cpd --example lagged_grid [STREAMS [HORIZON]]
//! ```
//!
//! AR(1) streams of Gaussian innovations, `HORIZON` of them scored after the reference is full (1000 where it is not given).
//! All charts of a row see the same streams, and a share at 0.005 is of the same streams as that at 0.05.

use std::env;

use mass_cpd::{
    AfterAlarm, CalibratedCusumParams, CpdError, Detector, Direction, Drift, Prewhiten, Reference,
};
use ndarray_rand::{
    rand::{Rng, SeedableRng},
    rand_distr::StandardNormal,
};
use rand_chacha::ChaCha8Rng;

const KS: [f64; 3] = [0.5, 1.0, 2.0];
const LIMITS: [Option<f64>; 4] = [Some(3.0), Some(4.0), Some(6.0), None];
const ALPHAS: [f64; 2] = [0.05, 0.005];

/// A reference, and the autocorrelation of the streams it is tried on.
#[derive(Clone, Copy)]
struct Row {
    window: usize,
    gap: usize,
    drift: Drift,
    prewhiten: Prewhiten,
    phi: f64,
}

/// A CUSUM of the row's scores, and how high it came.
struct Chart {
    k: f64,
    limit: f64,
    two: bool,
    up: f64,
    down: f64,
    highest: f64,
}

impl Chart {
    fn add(&mut self, z: f64) {
        let z = z.clamp(-self.limit, self.limit);
        self.up = (self.up + z - self.k).max(0.0);
        if self.two {
            self.down = (self.down - z - self.k).max(0.0);
        }
        self.highest = self.highest.max(self.up).max(self.down);
    }
}

/// For each direction, allowance and limit the shares that alarm at each of the levels.
fn shares(row: Row, streams: u64, horizon: u64) -> Result<Vec<[f64; 2]>, CpdError> {
    let base = CalibratedCusumParams {
        reference: Reference::Lagged {
            window: row.window,
            gap: row.gap,
        },
        drift: row.drift,
        prewhiten: row.prewhiten,
        after_alarm: AfterAlarm::Hold,
        warmup: 8,
        horizon,
        ..Default::default()
    };
    let mut kinds = Vec::new();
    for direction in [Direction::Up, Direction::Both] {
        for k in KS {
            for score_limit in LIMITS {
                kinds.push(CalibratedCusumParams {
                    direction,
                    k,
                    score_limit,
                    ..base
                });
            }
        }
    }
    let calibrated = kinds
        .iter()
        .map(|kind| kind.check())
        .collect::<Result<Vec<_>, _>>()?;
    let mut alarms = vec![[0u32; 2]; kinds.len()];
    let fresh = base.check()?;
    for seed in 0..streams {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut x = rng.sample::<f64, _>(StandardNormal) / (1.0 - row.phi * row.phi).sqrt();
        let mut charts: Vec<Chart> = kinds
            .iter()
            .map(|kind| Chart {
                k: kind.k,
                limit: kind.score_limit.unwrap_or(f64::INFINITY),
                two: kind.direction == Direction::Both,
                up: 0.0,
                down: 0.0,
                highest: 0.0,
            })
            .collect();
        let mut detector = fresh.clone();
        for _ in 0..row.window as u64 + row.gap as u64 + horizon {
            detector.update(x)?;
            if let Some(z) = detector.last_score() {
                charts.iter_mut().for_each(|chart| chart.add(z));
            }
            x = row.phi * x + rng.sample::<f64, _>(StandardNormal);
        }
        for ((chart, detector), alarms) in charts.iter().zip(&calibrated).zip(&mut alarms) {
            let p = detector.p_horizon(chart.highest);
            for (alarms, alpha) in alarms.iter_mut().zip(ALPHAS) {
                *alarms += u32::from(p <= alpha);
            }
        }
    }
    Ok(alarms
        .iter()
        .map(|a| a.map(|a| f64::from(a) / streams as f64))
        .collect())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = env::args().skip(1);
    let streams: u64 = args.next().map_or(Ok(4000), |s| s.parse())?;
    let horizon: u64 = args.next().map_or(Ok(1000), |s| s.parse())?;
    println!("{streams} streams a row, {horizon} scores each.");
    for (i, alpha) in ALPHAS.into_iter().enumerate() {
        let error = (alpha * (1.0 - alpha) / streams as f64).sqrt();
        println!(
            "The standard error of a share near {alpha} is {error:.4} (column {}).",
            i + 1
        );
    }
    let limit = |l: Option<f64>| l.map_or("none".to_owned(), |l| l.to_string());
    print!("\n| window, gap | line | phi | sides |");
    for k in KS {
        for l in LIMITS {
            print!(" k {k}, limit {} |", limit(l));
        }
    }
    let charts = KS.len() * LIMITS.len();
    println!("\n|---|---|---|---|{}", "---|".repeat(charts));
    let mut all = Vec::new();
    for window in [64, 128, 256] {
        for gap in [0, 16] {
            for drift in [Drift::Keep, Drift::Remove] {
                for (prewhiten, phi) in [
                    (Prewhiten::None, 0.0),
                    (Prewhiten::Order(1), 0.0),
                    (Prewhiten::Order(1), 0.3),
                    (Prewhiten::Order(1), 0.6),
                ] {
                    let row = Row {
                        window,
                        gap,
                        drift,
                        prewhiten,
                        phi,
                    };
                    let found = shares(row, streams, horizon)?;
                    let line = if drift == Drift::Remove {
                        "removed"
                    } else {
                        "kept"
                    };
                    let label = if prewhiten != Prewhiten::None {
                        phi.to_string()
                    } else {
                        "not fitted".to_owned()
                    };
                    for (sides, found) in ["one", "two"].into_iter().zip(found.chunks(charts)) {
                        print!("| {window}, {gap} | {line} | {label} | {sides} |");
                        for [often, rare] in found {
                            print!(" {often:.3} {rare:.4} |");
                        }
                        println!();
                    }
                    all.push((row, found));
                }
            }
        }
    }

    println!("\nLeast, median and largest of these shares, one- and two-sided.\n");
    println!("| rows | k | limit | at 0.05 | at 0.005 |\n|---|---|---|---|---|");
    type Chosen = fn(&Row) -> bool;
    let groups: [(&str, Chosen); 4] = [
        ("no gap", |row| row.gap == 0),
        ("gap 16, window 128 or 256, phi up to 0.3", |row| {
            row.gap > 0 && row.window > 64 && row.phi < 0.5
        }),
        ("gap 16, window 128 or 256, phi 0.6", |row| {
            row.gap > 0 && row.window > 64 && row.phi > 0.5
        }),
        ("gap 16, window 64", |row| row.gap > 0 && row.window == 64),
    ];
    for (name, chosen) in groups {
        for chart in 0..charts {
            let (k, l) = (KS[chart / LIMITS.len()], LIMITS[chart % LIMITS.len()]);
            print!("| {name} | {k} | {} |", limit(l));
            for (level, digits) in [(0, 3), (1, 4)] {
                let mut shares: Vec<f64> = all
                    .iter()
                    .filter(|(row, _)| chosen(row))
                    .flat_map(|(_, found)| [found[chart][level], found[charts + chart][level]])
                    .collect();
                shares.sort_by(f64::total_cmp);
                let (least, middle, most) = (
                    shares[0],
                    shares[shares.len() / 2],
                    shares[shares.len() - 1],
                );
                print!(" {least:.digits$}, {middle:.digits$}, {most:.digits$} |");
            }
            println!();
        }
    }
    Ok(())
}
