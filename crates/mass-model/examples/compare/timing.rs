//! Taking turns, and what to say about the times.

use std::error::Error;
use std::time::Instant;

use crate::peer::Peer;

/// First quartile, median, third quartile.
#[derive(Clone, Copy)]
pub(crate) struct Quartiles(pub(crate) [f64; 3]);

impl Quartiles {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self([1, 2, 3].map(|q| values[(values.len() - 1) * q / 4]))
    }

    pub(crate) fn median(self) -> f64 {
        self.0[1]
    }

    /// `median [first, third]`, each times `factor`.
    pub(crate) fn show(self, factor: f64, digits: usize) -> String {
        let [a, m, b] = self.0.map(|x| x * factor);
        format!("{m:.digits$} [{a:.digits$}, {b:.digits$}]")
    }
}

/// Times of both sides in seconds, turn by turn; `theirs` is empty without a peer.
pub(crate) struct Turns {
    pub(crate) ours: Vec<f64>,
    pub(crate) theirs: Vec<f64>,
    pub(crate) active: f64,
}

impl Turns {
    /// Quartiles of theirs / ours, turn by turn.
    pub(crate) fn ratio(&self) -> Option<Quartiles> {
        let pairs = self.theirs.iter().zip(&self.ours);
        (!self.theirs.is_empty()).then(|| Quartiles::of(pairs.map(|(t, o)| t / o).collect()))
    }

    pub(crate) fn ours(&self) -> Quartiles {
        Quartiles::of(self.ours.clone())
    }

    pub(crate) fn theirs(&self) -> Option<Quartiles> {
        (!self.theirs.is_empty()).then(|| Quartiles::of(self.theirs.clone()))
    }
}

/// `rounds` turns after two to warm up.
pub(crate) fn take_turns(
    peer: Option<&mut Peer>,
    rounds: usize,
    mut ours: impl FnMut(),
) -> Result<Turns, Box<dyn Error>> {
    let mut peer = peer;
    let mut turns = Turns {
        ours: Vec::new(),
        theirs: Vec::new(),
        active: 0.0,
    };
    for round in 0..rounds + 2 {
        let start = Instant::now();
        ours();
        let own = start.elapsed().as_secs_f64();
        let other = peer.as_mut().map(|p| p.go()).transpose()?;
        if round < 2 {
            continue;
        }
        turns.ours.push(own);
        if let Some((seconds, active)) = other {
            turns.theirs.push(seconds);
            turns.active = active;
        }
    }
    Ok(turns)
}
