//! Generates GINC instances and prints the least loss that any model can reach on them.
//! Seed 1111 is the instance that GINC's authors released.
//!
//! ```text
//! cargo run --release -p mass-bench --example ginc_floor [-- VOCAB [SEEDS [LENGTH]]]
//! ```
//!

use mass_bench::ginc::{
    BayesFilter, Ginc, GincError, GincParams, Windows, bayes_floor, ngram_floors,
};
use mass_bench::rng::{Purpose, stream};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |a| a.parse());
    let (vocab, seeds, length) = (number(50)?, number(5)?, number(64)?);

    println!("GINC, vocabulary {vocab}, windows of {length} tokens, 100 a concept; nats a token");
    println!(
        "{:>6} {:>8} {:>8} {:>10} {:>16}",
        "seed", "unigram", "bigram", "two tokens", "full context"
    );
    let mut rows = Vec::new();
    for seed in 1111..1111 + seeds as u32 {
        let ginc = Ginc::generate(&GincParams::new(vocab).seed(seed).check()?);
        let row = floors(&ginc, length)?;
        println!(
            "{seed:>6} {:>8.3} {:>8.3} {:>10.3} {:>7.3} +- {:.3}",
            row[0], row[1], row[2], row[3], row[4]
        );
        rows.push(row);
    }
    if seeds > 1 {
        let n = seeds as f64;
        let mean = |c: usize| rows.iter().map(|r| r[c]).sum::<f64>() / n;
        let std = |c: usize| {
            (rows.iter().map(|r| (r[c] - mean(c)).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()
        };
        for (name, of) in [("mean", &mean as &dyn Fn(usize) -> f64), ("std", &std)] {
            println!(
                "{name:>6} {:>8.3} {:>8.3} {:>10.3} {:>7.3}",
                of(0),
                of(1),
                of(2),
                of(3)
            );
        }
    }
    Ok(())
}

/// Unigram, bigram, two tokens, Bayes and the standard error of the last.
fn floors(ginc: &Ginc, length: usize) -> Result<[f64; 5], GincError> {
    let ngram = ngram_floors(ginc, length)?;
    let windows = Windows::sample(ginc, 100, length, &mut stream(0, Purpose::Evaluation, 0))?;
    let bayes = bayes_floor(&BayesFilter::of(ginc), &windows)?;
    Ok([
        ngram.unigram,
        ngram.bigram,
        ngram.two_tokens,
        bayes.mean,
        bayes.standard_error,
    ])
}
