//! Numbers on standard input, one a line, to alarms on standard output.
//!
//! ```text
//! cargo run -p mass-cpd --example stdin_alarms < numbers.txt
//! seq 1 300 | awk '{ print ($1 > 200) * 3 + rand() }' | cargo run -p mass-cpd --example stdin_alarms
//! ```
//!
//! One alarm a line: the line number, the value, the probability of a false alarm as strong in 1000 steps, and the
//! line at which the change is thought to have begun. A line that is no finite number is reported on standard error
//! and skipped.

use std::io::{self, BufRead, Write};

use mass_cpd::{CalibratedCusumParams, Detector};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut detector = CalibratedCusumParams::default().check()?;
    // Observations are counted by the detector, lines by the reader; refused lines make the two differ.
    let mut line_of: Vec<usize> = Vec::new();
    let mut out = io::stdout().lock();
    writeln!(out, "line\tvalue\tp_horizon\tonset")?;
    for (number, line) in io::stdin().lock().split(b'\n').enumerate() {
        let number = number + 1;
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let step = match line.trim().parse::<f64>() {
            Ok(x) => detector.update(x),
            Err(e) => {
                eprintln!("line {number}: {:?}: {e}", line.trim());
                continue;
            }
        };
        match step {
            Ok(step) => {
                line_of.push(number);
                if step.alarm {
                    let onset = step.onset.map_or(number, |o| line_of[o as usize - 1]);
                    let p = step.p_horizon.unwrap_or(1.0);
                    writeln!(out, "{number}\t{}\t{p:.3e}\t{onset}", line.trim())?;
                }
            }
            Err(e) => eprintln!("line {number}: {e}"),
        }
    }
    Ok(())
}
