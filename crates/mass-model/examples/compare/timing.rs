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

/// Times of all sides in seconds, round by round.
pub(crate) struct Turns {
    ours: Vec<f64>,
    /// Each of the peer's variants with its times; empty without a peer.
    theirs: Vec<(String, Vec<f64>)>,
}

impl Turns {
    pub(crate) fn ours(&self) -> Quartiles {
        Quartiles::of(self.ours.clone())
    }

    /// The variant with the lowest median.
    fn best(&self) -> Option<&(String, Vec<f64>)> {
        let median = |times: &[f64]| Quartiles::of(times.to_vec()).median();
        self.theirs
            .iter()
            .min_by(|a, b| median(&a.1).total_cmp(&median(&b.1)))
    }

    /// Every variant's milliseconds, the best one's in bold.
    pub(crate) fn show_theirs(&self) -> String {
        let best = self.best().map(|best| &best.0);
        let cells = self.theirs.iter().map(|(name, times)| {
            let cell = format!("{name} {}", Quartiles::of(times.clone()).show(1e3, 1));
            if Some(name) == best {
                format!("**{cell}**")
            } else {
                cell
            }
        });
        let cells: Vec<String> = cells.collect();
        if cells.is_empty() {
            "-".to_owned()
        } else {
            cells.join("; ")
        }
    }

    /// Quartiles of the best variant / ours, round by round.
    pub(crate) fn show_ratio(&self) -> String {
        let Some((_, theirs)) = self.best() else {
            return "-".to_owned();
        };
        let ratios = theirs.iter().zip(&self.ours).map(|(t, o)| t / o);
        Quartiles::of(ratios.collect()).show(1.0, 2)
    }
}

/// `rounds` rounds after two to warm up; in each, this crate and every variant that the peer has built make one step.
pub(crate) fn take_turns(
    peer: Option<&mut Peer>,
    rounds: usize,
    mut ours: impl FnMut(),
) -> Result<Turns, Box<dyn Error>> {
    let mut peer = peer;
    let names = peer.as_ref().map_or(Vec::new(), |p| p.variants.clone());
    let mut turns = Turns {
        ours: Vec::new(),
        theirs: names.into_iter().map(|name| (name, Vec::new())).collect(),
    };
    for round in 0..rounds + 2 {
        let start = Instant::now();
        ours();
        let own = start.elapsed().as_secs_f64();
        if round >= 2 {
            turns.ours.push(own);
        }
        let Some(peer) = &mut peer else { continue };
        for (name, times) in &mut turns.theirs {
            let seconds = peer.go(name)?;
            if round >= 2 {
                times.push(seconds);
            }
        }
    }
    Ok(turns)
}
