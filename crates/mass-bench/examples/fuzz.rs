//! Feeds damaged files to every reader of outside files, on stable Rust and the same ones every time.
//!
//!     cargo run --release -p mass-bench --example fuzz -- [PARSER] [--inputs N] [--first N]
//!
//! Ends with code 1 and the number of the input at the first panic, so that `PARSER --first N --inputs 1` repeats it.
//! Checkpoints: `-p mass-model --example fuzz_checkpoint`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

#[path = "../tests/fuzz/parsers.rs"]
mod parsers;

fn main() -> ExitCode {
    let (mut inputs, mut first, mut wanted) = (10_000, 0, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|n| n.parse().ok());
        let known = match &argument[..] {
            "--inputs" => number().map(|n| inputs = n),
            "--first" => number().map(|n| first = n),
            name => (!name.starts_with('-')).then(|| wanted = Some(name.to_owned())),
        };
        if known.is_none() {
            eprintln!("usage: fuzz [PARSER] [--inputs N] [--first N]");
            return ExitCode::from(2);
        }
    }
    let parsers = parsers::parsers();
    let names: Vec<&str> = parsers.iter().map(|parser| parser.name).collect();
    if let Some(name) = wanted.as_deref().filter(|name| !names.contains(name)) {
        eprintln!("there is no parser {name}; there are: {}", names.join(", "));
        return ExitCode::from(2);
    }
    for parser in parsers {
        if wanted.as_deref().is_some_and(|name| name != parser.name) {
            continue;
        }
        let start = Instant::now();
        let (mut read, mut slowest) = (0u64, (0.0, 0));
        for number in first..first + inputs {
            let (which, bytes) = parser.input(number);
            let begun = Instant::now();
            match catch_unwind(AssertUnwindSafe(|| parser.run(which, &bytes))) {
                Ok(taken) => read += u64::from(taken),
                Err(_) => {
                    eprintln!("{}: input {number} is to blame", parser.name);
                    return ExitCode::FAILURE;
                }
            }
            let seconds = begun.elapsed().as_secs_f64();
            if seconds > slowest.0 {
                slowest = (seconds, number);
            }
        }
        println!(
            "{}: {inputs} inputs in {:.1} s, {read} read, {} refused; the slowest, {}, took {:.1} ms",
            parser.name,
            start.elapsed().as_secs_f64(),
            inputs - read,
            slowest.1,
            slowest.0 * 1e3,
        );
    }
    ExitCode::SUCCESS
}
