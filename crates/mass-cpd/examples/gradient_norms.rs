//! Watches the training loss and the gradient norms of a mixture-of-experts layer, exported from any framework.
//!
//! ```text
//! cargo run -p mass-cpd --example gradient_norms -- FILE.csv
//! ```
//!
//! The file has a header and one row a training step that was logged; the columns `step` (without it rows are counted from
//! 0), `loss` and `norm_0`, `norm_1`, .. are used. In PyTorch such a row is
//!
//! ```python
//! row = [step, loss.item()] + [expert.fc1.weight.grad.norm().item() for expert in layer.experts]
//! ```
//!
//! All streams, and the norm of all experts together, share a false-alarm probability of 0.05 in 1000 steps. An
//! expert that got no token has a norm of zero, which is no observation.

use std::{env, fs};

use mass_cpd::{CalibratedCusum, CalibratedCusumParams, Detector};

struct Stream {
    name: String,
    detector: CalibratedCusum,
    /// The step of each observation that was not skipped.
    steps: Vec<usize>,
}

impl Stream {
    /// The alarm that an observation raises, in words.
    fn update(&mut self, step: usize, x: f64) -> Result<Option<String>, mass_cpd::CpdError> {
        if x == 0.0 {
            return Ok(None);
        }
        let seen = self.detector.update(x)?;
        self.steps.push(step);
        if !seen.alarm {
            return Ok(None);
        }
        let onset = seen.onset.map_or(step, |o| self.steps[o as usize - 1]);
        let p = seen.p_horizon.unwrap_or(1.0);
        let name = &self.name;
        Ok(Some(format!(
            "step {step}: {name} changed, probably at step {onset} (p = {p:.1e})"
        )))
    }
}

/// The alarms in the text of a file.
pub(crate) fn alarms(text: &str) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let mut lines = text.lines();
    let header = lines.next().ok_or("the file is empty")?;
    let header: Vec<&str> = header.split(',').map(str::trim).collect();
    let watched: Vec<usize> = (0..header.len())
        .filter(|&i| header[i] == "loss" || header[i].starts_with("norm_"))
        .collect();
    if watched.is_empty() {
        return Err(format!("no column `loss` or `norm_*` in {header:?}").into());
    }
    let steps = header.iter().position(|name| *name == "step");
    let detector = CalibratedCusumParams::training(watched.len() + 1).check()?;
    let stream = |name: &str| Stream {
        name: name.to_owned(),
        detector: detector.clone(),
        steps: Vec::new(),
    };
    let mut streams: Vec<Stream> = watched.iter().map(|&i| stream(header[i])).collect();
    let mut layer = stream("layer");
    let mut alarms = Vec::new();
    for (row, line) in lines.enumerate() {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        if fields.len() != header.len() {
            let (found, needed) = (fields.len(), header.len());
            return Err(format!("row {row}: {found} fields, not {needed}").into());
        }
        let step = match steps.map(|column| fields[column]) {
            Some(text) => text
                .parse()
                .map_err(|e| format!("row {row}, step: {text:?}: {e}"))?,
            None => row,
        };
        let mut square = 0.0;
        for (stream, &column) in streams.iter_mut().zip(&watched) {
            let (name, field) = (header[column], fields[column]);
            let refused = |why: String| format!("step {step}, {name}: {field:?}: {why}");
            let value: f64 = field.parse().map_err(|e| refused(format!("{e}")))?;
            alarms.extend(
                stream
                    .update(step, value)
                    .map_err(|e| refused(e.to_string()))?,
            );
            if name.starts_with("norm_") {
                square += value * value;
            }
        }
        if square > 0.0 {
            alarms.extend(layer.update(step, square.sqrt())?);
        }
    }
    Ok(alarms)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = env::args().nth(1).ok_or("usage: gradient_norms FILE.csv")?;
    let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    for alarm in alarms(&text).map_err(|e| format!("{path}: {e}"))? {
        println!("{alarm}");
    }
    Ok(())
}
