//! Routing time against one pass over the logits and, if `MASS_PEER_PYTHON` names a Python with PyTorch, against the gate of the
//! method's authors, in one run on the same number of threads. Prints a Markdown table.
//!
//! ```text
//! MASS_PEER_PYTHON=venv/bin/python cargo run --release -p mass-routing --example compare_gate
//! ```
//!
//! With `plot FILE` it measures 2^20 logits cut into rows of 8 to 4096 experts instead, and draws the time per logit as an SVG.
//!
//! Logits are standard normal, p = 0.5, renormalised weights. Times are medians, with quartiles in brackets.

use std::process::Command;
use std::time::{Duration, Instant};

use mass_routing::{Combine, Router, RoutingPlan, TopP};
use ndarray::Array2;
use ndarray_rand::RandomExt;
use ndarray_rand::rand::SeedableRng;
use ndarray_rand::rand_distr::StandardNormal;
use rayon::prelude::*;

const SIZES: [(usize, usize); 3] = [(4096, 16), (16384, 64), (65536, 256)];
const P: f32 = 0.5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = rayon::current_num_threads();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [] => table(threads),
        [plot, file] if plot == "plot" => curve(threads, file),
        _ => Err("usage: compare [plot FILE]".into()),
    }
}

fn table(threads: usize) -> Result<(), Box<dyn std::error::Error>> {
    let peer = peer(threads, &SIZES)?;
    println!(
        "p = {P}, standard normal logits, {threads} threads; microseconds, median [quartiles]\n"
    );
    println!(
        "| tokens x experts | mean k | one pass over cold logits | plan only | plan + probabilities | plan / pass | PyTorch | PyTorch / plan + probabilities |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (i, (n, k)) in SIZES.into_iter().enumerate() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
        // Enough copies that none is still in the last-level cache when its turn comes again.
        let copies = (128_usize << 20).div_ceil(n * k * 4).clamp(2, 256);
        let logits: Vec<Array2<f32>> = (0..copies)
            .map(|_| Array2::random_using((n, k), StandardNormal, &mut rng))
            .collect();
        let pass = time(copies, |c| {
            let all = logits[c].as_slice().unwrap_or_default();
            let part = all.len().div_ceil(threads);
            let total: f32 = all
                .par_chunks(part)
                .map(largest)
                .reduce(|| f32::MIN, f32::max);
            assert!(total.is_finite());
        });
        let mut plan = RoutingPlan::default();
        let mut router = TopP::new(P, Combine::Renormalised)?;
        let kept = time(copies, |c| {
            router
                .route(logits[c].view(), None, &mut plan)
                .expect("finite logits")
        });
        let mut router = router.with_probabilities(false);
        let bare = time(copies, |c| {
            router
                .route(logits[c].view(), None, &mut plan)
                .expect("finite logits")
        });
        let show =
            |q: [f64; 3]| format!("{:.0} [{:.0}, {:.0}]", q[1] * 1e6, q[0] * 1e6, q[2] * 1e6);
        let (theirs, ratio) = match peer.get(i) {
            Some(q) => (show(*q), format!("{:.1}", q[1] / kept[1])),
            None => ("-".to_owned(), "-".to_owned()),
        };
        println!(
            "| {n} x {k} | {:.2} | {} | {} | {} | {:.1} | {theirs} | {ratio} |",
            plan.mean_k(),
            show(pass),
            show(bare),
            show(kept),
            bare[1] / pass[1],
        );
    }
    Ok(())
}

/// Time per logit against the number of experts, as a table and a log-log plot.
fn curve(threads: usize, file: &str) -> Result<(), Box<dyn std::error::Error>> {
    let sizes: Vec<(usize, usize)> = (3..=12)
        .map(|log| ((1 << 20) >> log, 1_usize << log))
        .collect();
    let theirs = peer(threads, &sizes)?;
    let mut ours = Vec::new();
    for &(n, k) in &sizes {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
        let logits: Array2<f32> = Array2::random_using((n, k), StandardNormal, &mut rng);
        let mut plan = RoutingPlan::default();
        let mut router = TopP::new(P, Combine::Renormalised)?;
        ours.push(time(1, |_| {
            router
                .route(logits.view(), None, &mut plan)
                .expect("finite logits")
        }));
    }
    println!(
        "p = {P}, standard normal logits, {threads} threads; ns per logit (medians), 2^20 logits\n"
    );
    println!("| experts | this crate | PyTorch |\n|---|---|---|");
    let per_logit = |q: &[f64; 3]| q[1] * 1e9 / (1 << 20) as f64;
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 640 400\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"640\" height=\"400\" fill=\"white\"/>\n\
         <text x=\"320\" y=\"392\" text-anchor=\"middle\">experts K</text>\n\
         <text x=\"10\" y=\"20\">ns per logit</text>\n",
    );
    // One decade is 110 high, from 0.1 ns at y = 360; one doubling of K is 55 wide.
    let y = |ns: f64| 360.0 - 110.0 * (ns * 10.0).log10();
    let x = |i: usize| 70.0 + 55.0 * i as f64;
    for ns in [0.1, 1.0, 10.0, 100.0] {
        svg += &format!(
            "<path d=\"M70 {0:.1}H570\" stroke=\"#ddd\"/><text x=\"62\" y=\"{0:.1}\" text-anchor=\"end\">{ns}</text>\n",
            y(ns)
        );
    }
    let mut lines = [
        ("this crate", "#0a6", String::new()),
        ("PyTorch", "#c40", String::new()),
    ];
    for (i, (&(_, k), q)) in sizes.iter().zip(&ours).enumerate() {
        let values = [Some(per_logit(q)), theirs.get(i).map(per_logit)];
        let show = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.2}"));
        println!("| {k} | {} | {} |", show(values[0]), show(values[1]));
        svg += &format!(
            "<text x=\"{:.1}\" y=\"376\" text-anchor=\"middle\">{k}</text>\n",
            x(i)
        );
        for (line, value) in lines.iter_mut().zip(values) {
            if let Some(ns) = value {
                line.2 += &format!(
                    "{}{:.1} {:.1}",
                    if line.2.is_empty() { "M" } else { "L" },
                    x(i),
                    y(ns)
                );
            }
        }
    }
    for (i, (name, colour, path)) in lines
        .iter()
        .enumerate()
        .filter(|(_, line)| !line.2.is_empty())
    {
        svg +=
            &format!("<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n");
        svg += &format!(
            "<text x=\"470\" y=\"{}\" fill=\"{colour}\">{name}</text>\n",
            40 + 18 * i
        );
    }
    std::fs::write(file, svg + "</svg>\n")?;
    Ok(())
}

/// Largest value, a vector of sixteen at a time: as fast as memory delivers.
fn largest(values: &[f32]) -> f32 {
    let (whole, rest) = values.as_chunks::<16>();
    let mut best = [f32::MIN; 16];
    for v in whole {
        for i in 0..16 {
            best[i] = if v[i] > best[i] { v[i] } else { best[i] };
        }
    }
    best.into_iter()
        .chain(rest.iter().copied())
        .fold(f32::MIN, f32::max)
}

fn time(copies: usize, mut f: impl FnMut(usize)) -> [f64; 3] {
    (0..copies.min(3)).for_each(&mut f);
    let start = Instant::now();
    let mut times = Vec::new();
    for c in (0..copies).cycle() {
        let t = Instant::now();
        f(c);
        times.push(t.elapsed().as_secs_f64());
        if times.len() >= 15 && start.elapsed() > Duration::from_millis(1500) {
            break;
        }
    }
    times.sort_by(f64::total_cmp);
    [
        times[times.len() / 4],
        times[times.len() / 2],
        times[3 * times.len() / 4],
    ]
}

/// Quartiles in seconds per size, in the order of `sizes`; empty without a Python.
fn peer(
    threads: usize,
    sizes: &[(usize, usize)],
) -> Result<Vec<[f64; 3]>, Box<dyn std::error::Error>> {
    let Some(python) = std::env::var_os("MASS_PEER_PYTHON") else {
        return Ok(Vec::new());
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peer.py");
    let mut command = Command::new(python);
    command
        .arg(script)
        .arg(threads.to_string())
        .arg(P.to_string());
    command.args(sizes.iter().map(|(n, k)| format!("{n}x{k}")));
    let output = command.output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let lines = String::from_utf8(output.stdout)?;
    lines
        .lines()
        .map(|line| {
            Ok(serde_json::from_value(
                serde_json::from_str::<serde_json::Value>(line)?["quartiles"].take(),
            )?)
        })
        .collect()
}
