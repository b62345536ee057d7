//! Eight streams side by side.
//!
//! Every quantity is an array over the streams, so that one pass over a block is straight-line vector code: no branch
//! depends on a stream's values. Where one of the eight needs a branch, all go the way of a single detector.

use serde::{Deserialize, Serialize};

use crate::cusum::{
    bounded,
    score::FAR,
    self_starting::SelfStarting,
    sum::{Sum, of_size},
};

/// Streams of a block.
pub(super) const LANES: usize = 8;

pub(super) type Lanes = [f64; LANES];

/// A struct of numbers as a struct of arrays of them.
macro_rules! lanes {
    ($(#[$doc:meta])* $name:ident of $one:ident { $($field:ident),* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(super) struct $name {
            $($field: Lanes,)*
        }

        impl $name {
            #[inline(always)]
            pub(super) fn get(&self, i: usize) -> $one {
                $one { $($field: self.$field[i],)* }
            }

            #[inline(always)]
            pub(super) fn set(&mut self, i: usize, one: $one) {
                $(self.$field[i] = one.$field;)*
            }
        }
    };
}

lanes! {
    /// One side of the charts.
    Sums of Sum { s, onset, number, scores, base, total }
}
lanes! {
    /// The self-starting references.
    References of SelfStarting {
        seen, odd, previous, raw, unsure, mean_y, mean_l, yy, yl, ll, time, mean_t, tt, yt, lt
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Block {
    /// Steps since the stream was added.
    pub(super) count: Lanes,
    pub(super) up: Sums,
    pub(super) down: Sums,
    /// The last score; NaN would not survive JSON, so zero stands for none while `scored` is zero.
    pub(super) score: Lanes,
    /// 1 once the last observation had a score.
    pub(super) scored: Lanes,
    pub(super) reference: References,
}

/// All of one stream, to be put in another place.
pub(super) struct Stream {
    count: f64,
    up: Sum,
    down: Sum,
    score: f64,
    scored: f64,
    reference: SelfStarting,
}

/// What all streams share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// Of each side.
    pub(super) k: [f64; 2],
    /// Of a score, and of a certain one.
    pub(super) limits: (f64, f64),
    pub(super) warmup: f64,
    /// Whether the spread is watched.
    pub(super) spread: bool,
    pub(super) threshold: f64,
}

/// What came of the observations of a block.
pub(super) struct Judgement {
    pub(super) y: Lanes,
    pub(super) z: Lanes,
    /// 1 where the score counts.
    pub(super) ready: Lanes,
    /// Level and slope of the references before.
    pub(super) level: Lanes,
    pub(super) slope: Lanes,
}

impl Judgement {
    pub(super) fn of(y: &Lanes) -> Self {
        let zero = [0.0; LANES];
        Self {
            y: *y,
            z: zero,
            ready: zero,
            level: zero,
            slope: zero,
        }
    }
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
        let mut share = [0.0; LANES];
        let mut seen = Judgement::of(y);
        let mut plain = true;
        for i in 0..LANES {
            let state = self.reference.get(i);
            let ready = state.seen >= rule.warmup;
            seen.ready[i] = if ready { 1.0 } else { 0.0 };
            (seen.level[i], seen.slope[i]) = state.line::<DRIFT>();
            let judged;
            (judged, share[i]) = state.judge::<AR, DRIFT>(y[i], state.previous);
            seen.z[i] = judged.near();
            plain &= (judged.ratio < FAR)
                & state.is_usual::<AR>()
                & ((seen.z[i].abs() <= rule.limits.0) | !ready);
        }
        if plain {
            for i in 0..LANES {
                let mut state = self.reference.get(i);
                state.learn::<AR, DRIFT>(y[i], share[i]);
                self.reference.set(i, state);
            }
        } else {
            for (i, &y) in y.iter().enumerate() {
                let mut state = self.reference.get(i);
                seen.z[i] = state.update::<AR, DRIFT>(y, rule.limits.0, rule.warmup);
                self.reference.set(i, state);
            }
        }
        self.add(&seen, rule)
    }

    /// The same where some streams have no observation.
    pub(super) fn update_some<const AR: bool, const DRIFT: bool>(
        &mut self,
        y: &Lanes,
        present: &[bool; LANES],
        rule: &Rule,
    ) -> bool {
        let mut seen = Judgement::of(y);
        for (i, &y) in y.iter().enumerate() {
            let mut state = self.reference.get(i);
            if present[i] {
                seen.ready[i] = if state.seen >= rule.warmup { 1.0 } else { 0.0 };
                (seen.level[i], seen.slope[i]) = state.line::<DRIFT>();
                seen.z[i] = state.update::<AR, DRIFT>(y, rule.limits.0, rule.warmup);
            } else {
                state.skip::<AR, DRIFT>();
            }
            self.reference.set(i, state);
        }
        self.add(&seen, rule)
    }

    /// Adds scores to the sums, where they are ready.
    #[inline(always)]
    pub(super) fn add(&mut self, seen: &Judgement, rule: &Rule) -> bool {
        let mut z = seen.z;
        if rule.spread {
            z = z.map(of_size);
        }
        let mut highest = [0.0; LANES];
        for i in 0..LANES {
            self.count[i] += 1.0;
            let count = self.count[i];
            let bounded = bounded(z[i], rule.limits);
            let ready = seen.ready[i] > 0.0;
            let line = (seen.level[i], seen.slope[i]);
            let (mut up, mut down) = (self.up.get(i), self.down.get(i));
            up.add(bounded, bounded, rule.k[0], seen.y[i], count, line);
            down.add(bounded, -bounded, rule.k[1], seen.y[i], count, line);
            let up = either(ready, up, self.up.get(i));
            let down = either(ready, down, self.down.get(i));
            self.up.set(i, up);
            self.down.set(i, down);
            self.score[i] = if ready { z[i] } else { 0.0 };
            self.scored[i] = seen.ready[i];
            let s = if up.s >= down.s { up.s } else { down.s };
            highest[i] = if ready { s } else { 0.0 };
        }
        // Without a short cut, which would stop the loop from being vectorised.
        highest
            .iter()
            .fold(false, |any, &s| any | (s >= rule.threshold))
    }

    /// The larger sum of stream `i`.
    pub(super) fn statistic(&self, i: usize) -> f64 {
        self.up.s[i].max(self.down.s[i])
    }

    /// Sets the sums of stream `i` back to zero.
    pub(super) fn restart(&mut self, i: usize) {
        self.up.set(i, Sum::default());
        self.down.set(i, Sum::default());
    }

    /// Forgets what was learned of stream `i`, but not its count.
    pub(super) fn relearn(&mut self, i: usize) {
        self.restart(i);
        self.reference.set(i, SelfStarting::default());
    }

    /// Forgets all of stream `i`.
    pub(super) fn clear(&mut self, i: usize) {
        self.relearn(i);
        self.count[i] = 0.0;
        self.score[i] = 0.0;
        self.scored[i] = 0.0;
    }

    pub(super) fn take(&self, i: usize) -> Stream {
        Stream {
            count: self.count[i],
            up: self.up.get(i),
            down: self.down.get(i),
            score: self.score[i],
            scored: self.scored[i],
            reference: self.reference.get(i),
        }
    }

    pub(super) fn put(&mut self, i: usize, stream: Stream) {
        self.count[i] = stream.count;
        self.up.set(i, stream.up);
        self.down.set(i, stream.down);
        self.score[i] = stream.score;
        self.scored[i] = stream.scored;
        self.reference.set(i, stream.reference);
    }

    /// Whether a deserialised stream could have come from finite observations.
    pub(super) fn is_valid(&self, i: usize) -> bool {
        let count = self.count[i];
        let reference = self.reference.get(i);
        (0.0..=crate::error::MOST as f64).contains(&count)
            && count.fract() == 0.0
            && reference.is_valid()
            && reference.seen.max(reference.time) <= count
            && [self.up.get(i), self.down.get(i)]
                .iter()
                .all(|sum| sum.is_valid(count as u64))
            && self.score[i].is_finite()
            && (self.scored[i] == 0.0 || self.scored[i] == 1.0)
    }
}

/// Field by field, so that it is a select and not a branch.
#[inline(always)]
fn either(first: bool, a: Sum, b: Sum) -> Sum {
    let one = |a, b| if first { a } else { b };
    Sum {
        s: one(a.s, b.s),
        onset: one(a.onset, b.onset),
        number: one(a.number, b.number),
        scores: one(a.scores, b.scores),
        base: one(a.base, b.base),
        total: one(a.total, b.total),
    }
}
