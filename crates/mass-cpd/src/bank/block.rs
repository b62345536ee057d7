//! Eight streams side by side.
//!
//! Every quantity is an array over the streams, so that one pass over a block is straight-line vector code: no branch
//! depends on a stream's values.

use serde::{Deserialize, Serialize};

use crate::cusum::{
    bounded,
    score::{FAR, Judged},
    self_starting::SelfStarting,
};

/// Streams of a block.
pub(super) const LANES: usize = 8;

type Lanes = [f64; LANES];

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Block {
    /// Observations since the stream was added.
    pub(super) count: Lanes,
    pub(super) up: Lanes,
    pub(super) up_onset: Lanes,
    pub(super) down: Lanes,
    pub(super) down_onset: Lanes,
    /// The last score; NaN would not survive JSON, so zero stands for none while `scored` is zero.
    pub(super) score: Lanes,
    /// 1 once the last observation had a score.
    pub(super) scored: Lanes,
    seen: Lanes,
    previous: Lanes,
    mean_y: Lanes,
    mean_l: Lanes,
    yy: Lanes,
    yl: Lanes,
    ll: Lanes,
    yt: Lanes,
    lt: Lanes,
}

/// What all streams share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) k: f64,
    pub(super) limit: f64,
    pub(super) warmup: f64,
    /// 1 where the side is watched, 0 where not.
    pub(super) up: f64,
    pub(super) down: f64,
    pub(super) threshold: f64,
}

impl Block {
    /// One observation of each stream, judged and learned by the self-starting reference. Says whether any of the
    /// statistics is at the threshold.
    #[inline(always)]
    pub(super) fn update<const AR: bool, const DRIFT: bool>(
        &mut self,
        y: &Lanes,
        rule: &Rule,
    ) -> bool {
        let mut judged = [Judged::NONE; LANES];
        let (mut z, mut ready) = ([0.0; LANES], [0.0; LANES]);
        let mut far = false;
        for i in 0..LANES {
            ready[i] = if self.seen[i] >= rule.warmup {
                1.0
            } else {
                0.0
            };
            let mut state = self.reference(i);
            judged[i] = state.update::<AR, DRIFT>(y[i]);
            self.set_reference(i, state);
            z[i] = judged[i].near();
            far |= judged[i].ratio >= FAR;
        }
        if far {
            for (z, judged) in z.iter_mut().zip(&judged) {
                *z = judged.score();
            }
        }
        self.add(&z, &ready, rule)
    }

    /// Adds scores to the sums, where they are ready.
    #[inline(always)]
    pub(super) fn add(&mut self, z: &Lanes, ready: &Lanes, rule: &Rule) -> bool {
        let positive = |v: f64| if v > 0.0 { v } else { 0.0 };
        let mut highest = [0.0; LANES];
        for i in 0..LANES {
            self.count[i] += 1.0;
            let bounded = bounded(z[i], rule.limit);
            let is_ready = ready[i] > 0.0;
            let starts = |s: f64, onset: f64| {
                if is_ready && s == 0.0 {
                    self.count[i]
                } else {
                    onset
                }
            };
            self.up_onset[i] = starts(self.up[i], self.up_onset[i]);
            self.down_onset[i] = starts(self.down[i], self.down_onset[i]);
            let up = positive(self.up[i] + (bounded - rule.k)) * rule.up;
            let down = positive(self.down[i] + (-bounded - rule.k)) * rule.down;
            self.up[i] = if is_ready { up } else { self.up[i] };
            self.down[i] = if is_ready { down } else { self.down[i] };
            self.score[i] = if is_ready { z[i] } else { 0.0 };
            self.scored[i] = ready[i];
            let s = if self.up[i] >= self.down[i] {
                self.up[i]
            } else {
                self.down[i]
            };
            highest[i] = if is_ready { s } else { 0.0 };
        }
        // Without a short cut, which would stop the loop from being vectorised.
        highest
            .iter()
            .fold(false, |any, &s| any | (s >= rule.threshold))
    }

    #[inline(always)]
    fn reference(&self, i: usize) -> SelfStarting {
        SelfStarting {
            seen: self.seen[i],
            previous: self.previous[i],
            mean_y: self.mean_y[i],
            mean_l: self.mean_l[i],
            yy: self.yy[i],
            yl: self.yl[i],
            ll: self.ll[i],
            yt: self.yt[i],
            lt: self.lt[i],
        }
    }

    #[inline(always)]
    fn set_reference(&mut self, i: usize, s: SelfStarting) {
        self.seen[i] = s.seen;
        self.previous[i] = s.previous;
        self.mean_y[i] = s.mean_y;
        self.mean_l[i] = s.mean_l;
        self.yy[i] = s.yy;
        self.yl[i] = s.yl;
        self.ll[i] = s.ll;
        self.yt[i] = s.yt;
        self.lt[i] = s.lt;
    }

    /// The larger sum of stream `i`, and the step at which it began.
    pub(super) fn statistic(&self, i: usize) -> (f64, f64) {
        if self.up[i] >= self.down[i] {
            (self.up[i], self.up_onset[i])
        } else {
            (self.down[i], self.down_onset[i])
        }
    }

    /// Sets the sums of stream `i` back to zero.
    pub(super) fn restart(&mut self, i: usize) {
        for field in [
            &mut self.up,
            &mut self.up_onset,
            &mut self.down,
            &mut self.down_onset,
        ] {
            field[i] = 0.0;
        }
    }

    /// Forgets what was learned of stream `i`, but not its count.
    pub(super) fn relearn(&mut self, i: usize) {
        self.restart(i);
        self.set_reference(i, SelfStarting::default());
    }

    /// Forgets all of stream `i`.
    pub(super) fn clear(&mut self, i: usize) {
        for field in self.fields() {
            field[i] = 0.0;
        }
    }

    /// All of stream `i`, to be put in another place.
    pub(super) fn take(&mut self, i: usize) -> [f64; FIELDS] {
        self.fields().map(|field| field[i])
    }

    pub(super) fn put(&mut self, i: usize, stream: [f64; FIELDS]) {
        for (field, value) in self.fields().into_iter().zip(stream) {
            field[i] = value;
        }
    }

    fn fields(&mut self) -> [&mut Lanes; FIELDS] {
        [
            &mut self.count,
            &mut self.up,
            &mut self.up_onset,
            &mut self.down,
            &mut self.down_onset,
            &mut self.score,
            &mut self.scored,
            &mut self.seen,
            &mut self.previous,
            &mut self.mean_y,
            &mut self.mean_l,
            &mut self.yy,
            &mut self.yl,
            &mut self.ll,
            &mut self.yt,
            &mut self.lt,
        ]
    }

    /// Whether a deserialised stream could have come from finite observations.
    pub(super) fn is_valid(&self, i: usize) -> bool {
        let (count, up, down) = (self.count[i], self.up[i], self.down[i]);
        let whole = |v: f64| v >= 0.0 && v.fract() == 0.0 && v <= count;
        self.reference(i).is_valid()
            && count <= crate::error::MOST as f64
            && [count, self.seen[i], self.up_onset[i], self.down_onset[i]]
                .into_iter()
                .all(whole)
            && [up, down].iter().all(|s| s.is_finite() && *s >= 0.0)
            && self.score[i].is_finite()
            && (self.scored[i] == 0.0 || self.scored[i] == 1.0)
    }
}

const FIELDS: usize = 16;
