//! Numbers on standard input, one a line, to alarms on standard output.
//!
//! ```text
//! cargo run -p mass-cpd --example stdin_alarms < numbers.txt
//! seq 1 300 | awk '{ print ($1 > 200) * 3 + rand() }' | cargo run -p mass-cpd --example stdin_alarms
//! ```
//!
//! One alarm a line: the line number, the value, the probability of a false alarm as strong in 1000 steps, the line at which the change
//! is thought to have begun, which way it goes, and its size. An empty line, `NA`, `NaN`, `null`, `None`, `-` and `?` are missing
//! observations: time passes. A line that is neither is reported on standard error at once and counts as missing; the lines after it
//! are read all the same, and at the end the exit status is 2.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;

use mass_cpd::{CalibratedCusumParams, Detector, Shift};

/// What stands for a missing number.
const MISSING: [&str; 7] = ["", "na", "nan", "null", "none", "-", "?"];

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut detector = CalibratedCusumParams::default().check()?;
    let mut out = io::stdout().lock();
    let mut unreadable = 0;
    writeln!(out, "line\tvalue\tp_horizon\tonset\tdirection\tsize")?;
    for (number, line) in io::stdin().lock().split(b'\n').enumerate() {
        let number = number + 1;
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let text = line.trim();
        if MISSING.contains(&text.to_ascii_lowercase().as_str()) {
            detector.skip();
            continue;
        }
        let step = match text.parse::<f64>() {
            Ok(x) => detector.update(x).map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        match step {
            Ok(step) if step.alarm => {
                // The detector counts each line, gaps too.
                let onset = step.onset.unwrap_or(step.count);
                let p = step.p_horizon.unwrap_or(1.0);
                let direction = match step.direction {
                    Some(Shift::Up) => "up",
                    Some(Shift::Down) => "down",
                    None => "",
                };
                let size = step.size.unwrap_or(f64::NAN);
                writeln!(
                    out,
                    "{number}\t{text}\t{p:.3e}\t{onset}\t{direction}\t{size:.4}"
                )?;
            }
            Ok(_) => {}
            Err(e) => {
                eprintln!("line {number}: {text:?}: {e}");
                detector.skip();
                unreadable += 1;
            }
        }
    }
    if unreadable > 0 {
        eprintln!("lines that are neither numbers nor missing: {unreadable}");
        return Ok(ExitCode::from(2));
    }
    Ok(ExitCode::SUCCESS)
}
