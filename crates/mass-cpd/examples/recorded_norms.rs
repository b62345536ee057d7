//! What recorded gradient norms are like, and how often detectors alarm on them, as Markdown tables.
//!
//! ```text
//! cargo run --release -p mass-cpd --example recorded_norms -- FOLDER [PREFIX [FROM [TO]]]
//! ```
//!
//! Every `PREFIX*.csv` of the folder has a header and one row a training step; the columns `norm_*` are used, from row `FROM` (200) to
//! before row `TO` (the end). A norm of zero (no token) is no observation. The runs are meant to have no change in those rows.
//!
//! Of each file, on logarithms freed from a straight line in blocks of 128: kurtosis (3 for a normal distribution), the share of blocks in which
//! Schwarz's criterion takes an autoregression of order 0, 1, or more, and autocorrelations of the whole stream.
//! Then the streams' alarms under settings like `CalibratedCusumParams::training`, beside the number to expect at 0.05 in 1000 steps.

use std::{env, fs, path::Path};

use mass_cpd::{CalibratedCusumParams, Detector, Drift, Reference};

type Error = Box<dyn std::error::Error>;

const BLOCK: usize = 128;
const LAGS: usize = 8;

/// The `norm_*` columns of a file.
fn norms(path: &Path, from: usize, to: usize) -> Result<Vec<Vec<f64>>, Error> {
    let text = fs::read_to_string(path)?;
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().ok_or("an empty file")?.split(',').collect();
    let used: Vec<usize> = (0..header.len())
        .filter(|&i| header[i].starts_with("norm_"))
        .collect();
    let mut columns = vec![Vec::new(); used.len()];
    for line in lines.take(to).skip(from) {
        let fields: Vec<&str> = line.split(',').collect();
        for (column, &i) in columns.iter_mut().zip(&used) {
            column.push(fields.get(i).ok_or("a short row")?.parse()?);
        }
    }
    Ok(columns)
}

fn without_line(y: &[f64]) -> Vec<f64> {
    let n = y.len() as f64;
    let mean = y.iter().sum::<f64>() / n;
    let place = |i: usize| i as f64 - 0.5 * (n - 1.0);
    let (mut ty, mut tt) = (0.0, 0.0);
    for (i, v) in y.iter().enumerate() {
        ty += place(i) * v;
        tt += place(i) * place(i);
    }
    y.iter()
        .enumerate()
        .map(|(i, v)| v - mean - ty / tt * place(i))
        .collect()
}

fn autocorrelations(y: &[f64], lags: usize) -> Vec<f64> {
    let square: f64 = y.iter().map(|v| v * v).sum();
    let product = |lag: usize| y.iter().zip(&y[lag..]).map(|(a, b)| a * b).sum::<f64>();
    (0..=lags).map(|lag| product(lag) / square).collect()
}

/// The order of autoregression with the least `n ln(residual variance) + order ln n` (Levinson's recursion).
fn order(r: &[f64], n: usize) -> usize {
    let (mut a, mut variance) = (Vec::<f64>::new(), 1.0);
    let mut best = (0.0, 0);
    for k in 1..r.len() {
        let rest = r[k]
            - a.iter()
                .enumerate()
                .map(|(j, a)| a * r[k - 1 - j])
                .sum::<f64>();
        let last = rest / variance;
        let mut next: Vec<f64> = a
            .iter()
            .zip(a.iter().rev())
            .map(|(x, y)| x - last * y)
            .collect();
        next.push(last);
        a = next;
        variance *= 1.0 - last * last;
        let criterion = n as f64 * f64::ln(variance) + k as f64 * (n as f64).ln();
        if criterion < best.0 {
            best = (criterion, k);
        }
    }
    best.1
}

fn alarms(params: &CalibratedCusumParams, stream: &[f64]) -> Result<usize, Error> {
    let mut detector = params.check()?;
    let mut found = 0;
    for &x in stream.iter().filter(|x| **x > 0.0) {
        found += usize::from(detector.update(x)?.alarm);
    }
    Ok(found)
}

fn main() -> Result<(), Error> {
    let mut args = env::args().skip(1);
    let folder = args
        .next()
        .ok_or("usage: recorded_norms FOLDER [PREFIX [FROM [TO]]]")?;
    let prefix = args.next().unwrap_or_default();
    let from = args.next().map_or(Ok(200), |s| s.parse())?;
    let to = args.next().map_or(Ok(usize::MAX), |s| s.parse())?;
    let mut paths: Vec<_> = fs::read_dir(&folder)?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|p| {
            let name = p.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            name.starts_with(&prefix) && name.ends_with(".csv")
        })
        .collect();
    paths.sort();
    println!(
        "| file | streams | no token | kurtosis | order 0 / 1 / more | autocorrelation at 1, 5, 20 |"
    );
    println!("|---|---|---|---|---|---|");
    let mut streams = Vec::new();
    for path in &paths {
        let columns = norms(path, from, to)?;
        let rows: usize = columns.iter().map(Vec::len).sum();
        let logs: Vec<Vec<f64>> = columns
            .iter()
            .map(|c| c.iter().filter(|x| **x > 0.0).map(|x| x.ln()).collect())
            .collect();
        let seen: usize = logs.iter().map(Vec::len).sum();
        let (mut fourth, mut count, mut orders) = (0.0, 0.0, [0usize; 3]);
        for block in logs.iter().flat_map(|log| log.chunks_exact(BLOCK)) {
            let rest = without_line(block);
            let variance = rest.iter().map(|v| v * v).sum::<f64>() / BLOCK as f64;
            fourth += rest.iter().map(|v| (v * v / variance).powi(2)).sum::<f64>();
            count += BLOCK as f64;
            orders[order(&autocorrelations(&rest, LAGS), BLOCK).min(2)] += 1;
        }
        let long: Vec<Vec<f64>> = logs
            .iter()
            .filter(|log| log.len() > BLOCK)
            .map(|log| autocorrelations(&without_line(log), 20))
            .collect();
        let mean = |lag: usize| long.iter().map(|r| r[lag]).sum::<f64>() / long.len() as f64;
        let blocks = orders.iter().sum::<usize>() as f64;
        println!(
            "| {} | {} | {:.3} | {:.2} | {:.2} / {:.2} / {:.2} | {:.2}, {:.2}, {:.2} |",
            path.file_stem()
                .and_then(|n| n.to_str())
                .unwrap_or_default(),
            columns.len(),
            1.0 - seen as f64 / rows.max(1) as f64,
            fourth / count,
            orders[0] as f64 / blocks,
            orders[1] as f64 / blocks,
            orders[2] as f64 / blocks,
            mean(1),
            mean(5),
            mean(20),
        );
        streams.extend(columns);
    }
    let reference = |window, gap| Reference::Lagged { window, gap };
    let base = CalibratedCusumParams {
        warmup: 8,
        ..CalibratedCusumParams::training(1)
    };
    println!("\n| window, gap | k | limit | line | alarms | expected |\n|---|---|---|---|---|---|");
    for (window, gap) in [(128, 16), (64, 8)] {
        for drift in [Drift::Remove, Drift::Keep] {
            for k in [0.5, 1.0, 2.0] {
                for score_limit in [Some(3.0), Some(4.0), None] {
                    let params = CalibratedCusumParams {
                        reference: reference(window, gap),
                        drift,
                        k,
                        score_limit,
                        ..base
                    };
                    let (mut found, mut judged) = (0, 0);
                    for stream in &streams {
                        found += alarms(&params, stream)?;
                        let seen = stream.iter().filter(|x| **x > 0.0).count();
                        judged += seen.saturating_sub(window + gap);
                    }
                    // Up to three fifths of the level is lost where it falls into a jump of p at a limit of 4 and k = 2.
                    let expected = -(1.0f64 - 0.05).ln() * judged as f64 / 1000.0;
                    let limit = score_limit.map_or("none".to_owned(), |l| l.to_string());
                    let line = if drift == Drift::Remove {
                        "removed"
                    } else {
                        "kept"
                    };
                    println!(
                        "| {window}, {gap} | {k} | {limit} | {line} | {found} | {expected:.1} |"
                    );
                }
            }
        }
    }
    Ok(())
}
