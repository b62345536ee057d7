//! Layers and training steps beside PyTorch, turn by turn in one run on the same number of threads. Prints Markdown tables.
//!
//! ```text
//! MASS_PEER_PYTHON=venv/bin/python cargo run --release -p mass-model --example compare -- moe
//! ```
//!
//! Tasks: `moe [NUMBER]` (all three shapes, or one of them). Without `MASS_PEER_PYTHON` only this crate is measured. Times are medians with quartiles in brackets; a
//! ratio is taken turn by turn.

use std::error::Error;

mod moe;
mod peer;
mod timing;
mod train;

fn main() -> Result<(), Box<dyn Error>> {
    let task = std::env::args().nth(1).unwrap_or_default();
    let threads = rayon::current_num_threads();
    let peer = peer::Peer::start(threads)?;
    match &peer {
        Some(peer) => println!("{threads} threads; PyTorch {}\n", peer.version),
        None => println!("{threads} threads\n"),
    }
    match task.as_str() {
        "moe" => {
            let only = std::env::args().nth(2).map(|n| n.parse()).transpose()?;
            moe::run(peer, only)
        }
        "step" => train::run("one-layer transformer", peer, train::transformer()?),
        "bert" => train::run("6-layer BERT, 32 x 64 tokens", peer, train::bert()?),
        other => Err(format!("unknown task {other:?}; there are: moe, step, bert").into()),
    }
}
