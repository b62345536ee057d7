//! Training steps on a GPU, beside what the card can do: `cargo run --release -p mass-model --features cuda --example
//! cuda_steps [RUNS] [small]`.
//!
//! A mixture layer alone is measured by `speed` of mass-cuda. Here it is in models: a language model of one layer, and one of the
//! sizes of BERT-large with a mixture in layer 10. A step is the forward and the backward pass and AdamW. With `small`, sizes that an
//! emulated device can do. Medians of so many steps, 50 unless said, after three that do not count.

use std::time::Instant;

use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
use mass_model::lm::{LanguageModel, LanguageModelConfig};
use mass_model::mass_cuda::kernels::ceiling;
use mass_model::mass_cuda::{Buffer, Device};
use mass_model::nn::{BlockConfig, MoeConfig};
use mass_model::optim::{AdamW, AdamWConfig};
use mass_model::{Activation, DropoutKeys, ModelError, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};

/// Median time of a step, in seconds.
fn median(
    device: &Device,
    runs: usize,
    mut step: impl FnMut(u64) -> Result<f32, ModelError>,
) -> Result<f64, ModelError> {
    let mut times = Vec::with_capacity(runs);
    for i in 0..runs as u64 + 3 {
        device.synchronise()?;
        let start = Instant::now();
        step(i)?;
        device.synchronise()?;
        if i >= 3 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn main() -> Result<(), ModelError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let small = arguments.iter().any(|a| a == "small");
    let runs = arguments.iter().find_map(|a| a.parse().ok());
    let runs = runs.unwrap_or(50).max(1);
    let device = Device::open(0)?;
    let (major, minor) = device.compute_capability();
    println!(
        "{}, compute capability {major}.{minor}; medians of {runs} steps",
        device.name()
    );
    let (blocks, loops) = match small {
        true => (16, 100),
        false => (device.multiprocessors() * 16, 20_000),
    };
    let mut y = Buffer::uninitialised(&device, blocks * 256)?;
    let time = median(&device, runs.min(20), |_| {
        ceiling::multiply_adds(&device, loops, 0.999, y.view_mut())?;
        Ok(0.0)
    })?;
    let most = 2.0 * (blocks * 256 * loops * ceiling::CHAINS) as f64 / time;
    println!("multiply-adds in registers {:.2} GFLOP/s", most / 1e9);
    drop(y);

    language_model(&device, runs, small, most)?;
    bert_large(&device, runs, small, most)
}

/// Six operations a weight that a token meets: two forward, four backward. Attention's own products are left out.
fn told(name: &str, time: f64, tokens: usize, weights_met: f64, most: f64) {
    let rate = 6.0 * tokens as f64 * weights_met / time;
    println!(
        "{name:<46} {:9.3} ms {:10.2} GFLOP/s {:5.1} % {:11.0} tokens/s",
        time * 1e3,
        rate / 1e9,
        100.0 * rate / most,
        tokens as f64 / time
    );
}

/// Vocabulary 64, one layer of width 128, 4 heads, 12 experts of 256, top 2; 32 sequences of 64.
fn language_model(device: &Device, runs: usize, small: bool, most: f64) -> Result<(), ModelError> {
    let (batch, seq) = if small { (2, 16) } else { (32, 64) };
    let (vocab, dim, hidden, experts, k) = (64, 128, 256, 12, 2);
    let combine = Combine::Renormalised;
    let config = LanguageModelConfig {
        vocab,
        max_seq: seq,
        layers: 1,
        embedding_std: 0.02,
        block: BlockConfig {
            heads: 4,
            layer_norm_eps: 1e-5,
            moe: MoeConfig::new(
                dim,
                hidden,
                experts,
                Activation::GeluErf,
                RouterConfig::TopK { k, combine },
            ),
        },
    };
    let mut model = LanguageModel::new(&config, &mut seeded_rng(0))?;
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let tokens: Vec<u32> = (0..batch * seq)
        .map(|i| (i * 7919 % vocab) as u32)
        .collect();
    let time = median(device, runs, |_| {
        let mut pass = model.train_pass_on(device, &tokens, &tokens, seq)?;
        optimizer.step(&mut model, &mut pass.gradients, 1e-3)?;
        Ok(pass.loss)
    })?;
    let met = 4 * dim * dim + k * 2 * dim * hidden + experts * dim + vocab * dim;
    let name = format!("language model of one layer, {batch} x {seq}");
    told(&name, time, batch * seq, met as f64, most);
    Ok(())
}

/// BERT-large with a mixture of 8 experts in layer 10, top 2: a step of fine-tuning on 32 sequences of 128.
fn bert_large(device: &Device, runs: usize, small: bool, most: f64) -> Result<(), ModelError> {
    let (config, sequences, length, layer) = match small {
        true => {
            let config = BertConfig {
                vocab_size: 100,
                hidden_size: 32,
                num_hidden_layers: 2,
                num_attention_heads: 2,
                intermediate_size: 64,
                ..BertConfig::large_cased()
            };
            (config, 2, 8, 1)
        }
        false => (BertConfig::large_cased(), 32, 128, 10),
    };
    let mut rng = seeded_rng(0);
    let mut model = BertClassifier::new(&config, 2, &mut rng)?;
    let combine = Combine::Renormalised;
    model.convert(layer, 8, RouterConfig::TopK { k: 2, combine }, &mut rng)?;
    let rows = sequences * length;
    let ids = (0..rows).map(|i| (1 + i * 7919 % (config.vocab_size - 1)) as u32);
    let offsets = (0..=sequences).map(|i| i * length).collect();
    let batch = TextBatch::packed(ids.collect(), vec![0; rows], offsets);
    let labels: Vec<u32> = (0..sequences as u32).map(|i| i % 2).collect();
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let time = median(device, runs, |step| {
        let keys = &mut DropoutKeys::new(0, step);
        let targets = Targets::Classes(&labels);
        let mut pass = model.train_pass_on(device, &batch, targets, Some(keys))?;
        optimizer.step(&mut model, &mut pass.gradients, 2e-5)?;
        Ok(pass.loss)
    })?;
    let (d, h) = (config.hidden_size as f64, config.intermediate_size as f64);
    let layers = config.num_hidden_layers as f64;
    // One layer has two networks of eight.
    let met = layers * 4.0 * d * d + (layers + 1.0) * 2.0 * d * h;
    let millions = model.num_values() as f64 / 1e6;
    let name = format!("BERT, {millions:.0} M parameters, {sequences} x {length}");
    told(&name, time, rows, met, most);
    Ok(())
}
