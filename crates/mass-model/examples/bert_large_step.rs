//! One training step of a model of the sizes of BERT-large, with random weights and a mixture in layer 10.
//!
//!     cargo run --release -p mass-model --example bert_large_step [SEQUENCES] [LENGTH]
//!     cargo run --release -p mass-model --features cuda --example bert_large_step -- --device cuda [SEQUENCES] [LENGTH]

use std::time::Instant;

use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{DropoutKeys, ModelError, Parameters, Place, seeded_rng};
use mass_routing::{Combine, RouterConfig};

fn main() -> Result<(), ModelError> {
    let mut arguments = std::env::args().skip(1).peekable();
    let place = match arguments.next_if(|a| a == "--device") {
        Some(_) => Place::open(&arguments.next().unwrap_or_default())?,
        None => Place::Cpu,
    };
    println!("on {place}");
    let mut arguments = arguments.map(|a| a.parse::<usize>());
    let mut size = |default| match arguments.next() {
        None => Ok(default),
        Some(Ok(n)) if n > 0 => Ok(n),
        Some(_) => {
            let usage = "usage: [--device DEVICE] [SEQUENCES] [LENGTH]";
            Err(ModelError::Config(usage.into()))
        }
    };
    let (sequences, length) = (size(8)?, size(128)?);

    let config = BertConfig::large_cased();
    let mut rng = seeded_rng(0);
    let start = Instant::now();
    let mut model = BertClassifier::new(&config, 2, &mut rng)?;
    let router = RouterConfig::TopP {
        p: 0.5,
        combine: Combine::Renormalised,
    };
    model.convert(10, 8, router, &mut rng)?;
    let millions = model.num_values() as f64 / 1e6;
    println!(
        "{millions:.1} million parameters in {:.1} s",
        start.elapsed().as_secs_f64()
    );

    let rows = sequences * length;
    let ids = (0..rows).map(|i| (1 + i * 7919 % (config.vocab_size - 1)) as u32);
    let offsets = (0..=sequences).map(|i| i * length).collect();
    let batch = TextBatch::packed(ids.collect(), vec![0; rows], offsets);
    let labels: Vec<u32> = (0..sequences as u32).map(|i| i % 2).collect();
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    for step in 0..2 {
        let start = Instant::now();
        let keys = &mut DropoutKeys::new(0, step);
        let mut pass =
            model.train_pass_at(&place, &batch, Targets::Classes(&labels), Some(keys))?;
        let passed = start.elapsed().as_secs_f64();
        optimizer.step(&mut model, &mut pass.gradients, 2e-5)?;
        let all = start.elapsed().as_secs_f64();
        println!(
            "step {step}: loss {:.4}, {sequences} sequences of {length}: {passed:.1} s, with the update {all:.1} s",
            pass.loss
        );
    }
    match peak_rss_mib() {
        Some(mib) => println!("peak resident memory {mib} MiB"),
        None => println!("peak resident memory unknown on this system"),
    }
    Ok(())
}

fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}
