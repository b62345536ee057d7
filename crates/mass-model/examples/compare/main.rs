//! Layers and training steps beside PyTorch, turn by turn in one run on the same number of threads. Prints Markdown tables.
//!
//! ```text
//! MASS_PEER_PYTHON=venv/bin/python cargo run --release -p mass-model --example compare -- moe
//! ```
//!
//! Tasks: `moe [NUMBER]` (all three shapes, or one of them), `step` (a one-layer transformer), `bert` (six layers), `vit` (the
//! last four blocks of a ViT-S), `trunk` (its first eight, forward only), `memory` (peak resident size of both steps, each in a
//! process of its own), `overhead` (what watching the experts costs a step).
//! Without `MASS_PEER_PYTHON` only this crate is measured. PyTorch runs in several variants (`benches/peer.py`), and in each
//! round this crate and every variant make one step. Times are medians with quartiles in brackets; a ratio is the best variant's
//! time by this crate's, round by round. A variant that does not run is named on standard error.

use std::error::Error;

mod ceiling;
mod machine;
mod memory;
mod moe;
mod overhead;
mod peer;
mod timing;
mod train;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let task = arguments.next().unwrap_or_default();
    let threads = rayon::current_num_threads();
    let peer = || -> Result<_, Box<dyn Error>> {
        let peer = peer::Peer::start(threads)?;
        let version = peer.as_ref().map(|p| p.version.as_str());
        println!("{}\n", machine::line(threads, version));
        Ok(peer)
    };
    match task.as_str() {
        "moe" => {
            let only = arguments.next().map(|n| n.parse()).transpose()?;
            moe::run(peer()?, only)
        }
        "step" => train::run("one-layer transformer", peer()?, train::transformer()?),
        "bert" => train::run("6-layer BERT, 32 x 64 tokens", peer()?, train::bert()?),
        "vit" => train::run(
            "last 4 blocks of ViT-S, 48 x 50 tokens",
            peer()?,
            train::vit()?,
        ),
        "trunk" => train::run(
            "forward, first 8 blocks of ViT-S, 32 x 50 tokens",
            peer()?,
            train::trunk()?,
        ),
        "memory" => {
            // This one only tells its version: each measurement has a fresh process.
            drop(peer()?);
            memory::run(threads)
        }
        "own-memory" => memory::own(&arguments.next().unwrap_or_default()),
        "overhead" => {
            println!("{}\n", machine::line(threads, None));
            overhead::run()
        }
        other => Err(format!(
            "unknown task {other:?}; there are: moe, step, bert, vit, trunk, memory, overhead"
        )
        .into()),
    }
}
