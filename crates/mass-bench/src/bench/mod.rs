//! Short timings of what this crate does itself: generating data and computing its floors.
//!
//! Kernels, routing and detectors are timed by the criterion benches of their own crates
//! (`cargo bench -p mass-routing`, for example).

use std::{
    fmt::Write,
    hint::black_box,
    time::{Duration, Instant},
};

use crate::{
    BenchError,
    ginc::{BayesFilter, Ginc, GincError, GincParams, Windows, bayes_floor},
    rng::{Purpose, stream},
};

/// Something that is timed.
#[derive(Debug, Clone, Copy)]
pub struct Bench {
    /// Name on the command line.
    pub name: &'static str,
    /// What one repetition does.
    pub about: &'static str,
    /// Tokens that one repetition handles.
    pub tokens: u64,
    /// One repetition after set-up: its time.
    time: fn() -> Result<Duration, GincError>,
}

/// Repetitions of which the median is taken.
const REPETITIONS: usize = 11;

/// Everything that can be timed.
pub const BENCHES: &[Bench] = &[
    Bench {
        name: "ginc-sampling",
        about: "400 GINC documents of 10240 tokens, hidden states kept",
        tokens: 400 * 10_240,
        time: || {
            let ginc = Ginc::generate(&GincParams::new(50).check()?);
            let mut rng = stream(0, Purpose::Training, 0);
            let begin = Instant::now();
            black_box(ginc.sample_corpus(400, 10_240, &mut rng)?);
            Ok(begin.elapsed())
        },
    },
    Bench {
        name: "bayes-filter",
        about: "Bayes floor of 500 windows of 65 tokens",
        tokens: 500 * 65,
        time: || floor(100, 64),
    },
    Bench {
        name: "bayes-filter-long",
        about: "Bayes floor of 100 windows of 1025 tokens",
        tokens: 100 * 1025,
        time: || floor(20, 1024),
    },
];

fn floor(per_concept: usize, length: usize) -> Result<Duration, GincError> {
    let ginc = Ginc::generate(&GincParams::new(50).check()?);
    let mut rng = stream(0, Purpose::Evaluation, 0);
    let windows = Windows::sample(&ginc, per_concept, length, &mut rng)?;
    let filter = BayesFilter::of(&ginc);
    let begin = Instant::now();
    black_box(bayes_floor(&filter, &windows)?);
    Ok(begin.elapsed())
}

/// Times one bench, or all, and returns a table of medians with the least and greatest time.
///
/// # Errors
/// [`BenchError::Usage`] for an unknown name, and for `peers`: none of these has a rival to time.
pub fn run(name: Option<&str>, peers: bool) -> Result<String, BenchError> {
    let names = || {
        BENCHES
            .iter()
            .map(|b| b.name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let chosen: Vec<&Bench> = match name {
        None => BENCHES.iter().collect(),
        Some(name) => match BENCHES.iter().find(|b| b.name == name) {
            Some(bench) => vec![bench],
            None => {
                return Err(BenchError::Usage(format!(
                    "unknown bench `{name}`; there are: {}",
                    names()
                )));
            }
        },
    };
    if peers {
        return Err(BenchError::Usage(format!(
            "--peers: no rival is known for {}; drop --peers",
            name.map_or_else(names, str::to_owned)
        )));
    }
    let mut text = format!(
        "{:<18} {:>10} {:>10} {:>10} {:>12}  (median of {REPETITIONS}, one thread)\n",
        "bench", "median ms", "least", "greatest", "tokens/s"
    );
    for bench in chosen {
        (bench.time)()?; // warms caches and the allocator
        let mut times = (0..REPETITIONS)
            .map(|_| (bench.time)().map(|t| t.as_secs_f64()))
            .collect::<Result<Vec<f64>, _>>()?;
        times.sort_by(f64::total_cmp);
        let median = times[REPETITIONS / 2];
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:<18} {:>10.2} {:>10.2} {:>10.2} {:>12.3e}  {}",
            bench.name,
            median * 1e3,
            times[0] * 1e3,
            times[REPETITIONS - 1] * 1e3,
            bench.tokens as f64 / median,
            bench.about
        );
    }
    Ok(text)
}
