//! Feeds damaged checkpoints to the reader, on stable Rust and the same ones every time.
//!
//!     cargo run --release -p mass-model --example fuzz_checkpoint -- --inputs 1000000 [--first N]
//!
//! Ends with code 1 and the number of the input at the first panic, so that `--first N --inputs 1` repeats it.

use std::process::ExitCode;
use std::time::Instant;

use checkpoint::{Harness, Outcome};

#[path = "../tests/fuzz/checkpoint.rs"]
mod checkpoint;
#[path = "../tests/fuzz/mutate.rs"]
mod mutate;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (mut inputs, mut first) = (10_000, 0);
    for pair in arguments.chunks(2) {
        let number = pair.get(1).and_then(|n| n.parse().ok());
        match (pair[0].as_str(), number) {
            ("--inputs", Some(n)) => inputs = n,
            ("--first", Some(n)) => first = n,
            _ => {
                eprintln!("usage: fuzz_checkpoint [--inputs N] [--first N]");
                return ExitCode::from(2);
            }
        }
    }
    let start = Instant::now();
    let mut harness = Harness::new();
    let (mut read, mut slowest) = (0u64, (0.0, 0));
    for number in first..first + inputs {
        let input = checkpoint::input(&harness, number);
        let begun = Instant::now();
        let run = || harness.run(&input);
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
            Ok(outcome) => read += u64::from(outcome == Outcome::Read),
            Err(_) => {
                eprintln!("input {number} is to blame");
                return ExitCode::FAILURE;
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        if seconds > slowest.0 {
            slowest = (seconds, number);
        }
    }
    println!(
        "{inputs} inputs in {:.1} s: {read} read, {} refused; the slowest, {}, took {:.1} ms{}",
        start.elapsed().as_secs_f64(),
        inputs - read,
        slowest.1,
        slowest.0 * 1e3,
        peak().map_or(String::new(), |mib| format!("; {mib} MiB at the peak")),
    );
    ExitCode::SUCCESS
}

/// Largest resident set of this process so far, in MiB, where the system tells.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib / 1024)
}
