//! Thousands of calibrated CUSUMs side by side.
//!
//! A bank gives for each of its streams exactly what a [`CalibratedCusum`](crate::CalibratedCusum) of its own would
//! give, faster: the state of all streams lies in one piece, streams are updated eight at a time, and p-values are
//! computed only when asked for. No update allocates.
//!
//! # Family-wise level
//! `alpha` is the probability that *any* live stream raises a false alarm within the horizon. With `L` live
//! streams each is tested at `alpha / L` (Bonferroni: right whatever the dependence between streams), and `L` follows
//! as streams come and go.

mod block;
mod stored;

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use block::{Block, Judgement, LANES, Lanes, Rule};

use crate::{
    AfterAlarm, CalibratedCusumParams, CpdError, Drift, Prewhiten, Reference, Step, Watch,
    cusum::{
        Calibration, General,
        lagged::{Lagged, Shape},
        sum::{Sides, report},
        transform, transform_all,
    },
};

/// The name of a stream: never used again within a bank, even when the stream has been removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StreamId(u64);

impl StreamId {
    /// The name as a number.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

/// Unchecked parameters of a [`Bank`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BankParams {
    /// The detector of every stream; its `alpha` is the level of the whole bank.
    pub detector: CalibratedCusumParams,
    /// Streams for which room is made at the start; more make it grow.
    pub capacity: usize,
}

impl BankParams {
    /// Makes an empty bank.
    ///
    /// # Errors
    /// As [`CalibratedCusumParams::check`]; [`CpdError::Parameter`] when `capacity` is over 2^24, or the windows of so many streams
    /// would hold more than 2^30 values.
    pub fn check(&self) -> Result<Bank, CpdError> {
        self.validate()?;
        Ok(self.make(self.capacity))
    }

    fn validate(&self) -> Result<(), CpdError> {
        self.detector.validate()?;
        crate::error::require(
            self.capacity <= 1 << 24,
            "capacity",
            self.capacity as f64,
            "at most 2^24",
        )?;
        crate::error::require(
            self.capacity
                .saturating_mul(self.detector.shape().capacity())
                <= 1 << 30,
            "capacity",
            self.capacity as f64,
            "at most 2^30 over the length of a stream's window and gap",
        )
    }

    /// A bank with room for so many streams, whatever the capacity.
    fn make(&self, room: usize) -> Bank {
        let mut bank = Bank {
            params: *self,
            ids: Vec::new(),
            next_id: 0,
            blocks: Vec::new(),
            rolling: Vec::new(),
            windows: Vec::new(),
            gaps: Vec::new(),
            general: Vec::new(),
            shape: self.detector.shape(),
            input: Scratch::default(),
            present: Scratch::default(),
            hits: Scratch::default(),
            alarms: Vec::new(),
            calibration: Calibration::of(&self.detector),
            threshold: f64::INFINITY,
        };
        bank.reserve(room);
        bank
    }
}

/// Many streams under one false-alarm probability; see the [module's documentation](self).
///
/// # Examples
/// ```
/// use mass_cpd::{BankParams, CalibratedCusumParams};
///
/// let mut bank = BankParams { detector: CalibratedCusumParams::default(), capacity: 3 }.check()?;
/// let first = bank.add();
/// let second = bank.add();
/// let mut noise = [0.3f64, 0.6];
/// let mut found = Vec::new();
/// for t in 1..=400 {
///     for n in &mut noise {
///         *n = (*n * 3.99) * (1.0 - *n);
///     }
///     let shift = if t > 300 { 1.0 } else { 0.0 };
///     for &place in bank.update(&[noise[0], noise[1] + shift])? {
///         found.push((t, place));
///     }
/// }
/// assert_eq!(found.len(), 1);
/// assert!(found[0].0 > 300 && bank.ids()[found[0].1] == second);
///
/// bank.remove(first)?; // the rest is now tested at the full level
/// assert_eq!(bank.ids(), [second]);
/// # Ok::<(), mass_cpd::CpdError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "stored::Stored", into = "stored::Stored")]
pub struct Bank {
    params: BankParams,
    /// Live streams, by place.
    ids: Vec<StreamId>,
    next_id: u64,
    /// Eight streams each; places beyond the last stream are all zero but for their counts.
    blocks: Vec<Block>,
    /// For the lagged reference: rolling sums, and each stream's window in one piece.
    rolling: Vec<Lagged>,
    windows: Vec<f64>,
    /// Whether the observation before is missing.
    gaps: Vec<bool>,
    /// For an autoregression beyond the first order, and for ranks.
    general: Vec<General>,
    shape: Shape,
    /// Padded to whole blocks; zero beyond the last stream.
    input: Scratch<f64>,
    /// Which streams have an observation, while some have none.
    present: Scratch<bool>,
    /// Blocks in which a statistic is at the threshold.
    hits: Scratch<bool>,
    alarms: Vec<usize>,
    calibration: Arc<Calibration>,
    threshold: f64,
}

/// What an update writes before it reads: no part of the state, so that any two are equal.
#[derive(Clone, Debug, Default)]
struct Scratch<T>(Vec<T>);

impl<T> PartialEq for Scratch<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Deref for Scratch<T> {
    type Target = Vec<T>;

    fn deref(&self) -> &Vec<T> {
        &self.0
    }
}

impl<T> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut Vec<T> {
        &mut self.0
    }
}

impl Bank {
    /// The parameters it was made with.
    #[must_use]
    pub fn params(&self) -> &BankParams {
        &self.params
    }

    /// Number of live streams.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no live stream.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The live streams in the order in which [`update`](Self::update) takes their observations.
    #[must_use]
    pub fn ids(&self) -> &[StreamId] {
        &self.ids
    }

    /// Where in that order a stream is.
    #[must_use]
    pub fn place(&self, id: StreamId) -> Option<usize> {
        self.ids.iter().position(|&i| i == id)
    }

    /// The statistic from which on a stream raises an alarm, at the present number of streams.
    #[must_use]
    pub fn threshold(&self) -> f64 {
        self.threshold
    }

    /// Adds a stream, which takes the last place and begins its warm-up.
    pub fn add(&mut self) -> StreamId {
        let id = StreamId(self.next_id);
        self.next_id += 1;
        let place = self.ids.len();
        self.reserve(place + 1);
        self.ids.push(id);
        if place / LANES == self.blocks.len() {
            self.blocks.push(Block::default());
        }
        // An unused place has been counting along.
        self.blocks[place / LANES].clear(place % LANES);
        if matches!(self.params.detector.reference, Reference::Lagged { .. }) {
            self.rolling.push(Lagged::default());
            self.gaps.push(false);
            self.windows
                .resize(self.windows.len() + self.shape.capacity(), 0.0);
        }
        self.general.extend(General::new(&self.params.detector));
        self.relevel();
        id
    }

    /// Removes a stream; the one in the last place takes over its place.
    ///
    /// # Errors
    /// [`CpdError::UnknownStream`] when there is none of that name.
    pub fn remove(&mut self, id: StreamId) -> Result<(), CpdError> {
        let place = self.place(id).ok_or(CpdError::UnknownStream { id: id.0 })?;
        let last = self.ids.len() - 1;
        let moved = self.blocks[last / LANES].take(last % LANES);
        self.blocks[place / LANES].put(place % LANES, moved);
        self.blocks[last / LANES].clear(last % LANES);
        // Nothing for the place that is free to learn.
        self.input[last] = 0.0;
        self.ids.swap_remove(place);
        self.alarms.retain(|&alarm| alarm != place);
        for alarm in &mut self.alarms {
            *alarm = if *alarm == last { place } else { *alarm };
        }
        self.alarms.sort_unstable();
        self.blocks.truncate(last.div_ceil(LANES));
        if !self.rolling.is_empty() {
            let size = self.shape.capacity();
            self.rolling.swap_remove(place);
            self.gaps.swap_remove(place);
            self.windows.copy_within(last * size.., place * size);
            self.windows.truncate(last * size);
        }
        if !self.general.is_empty() {
            self.general.swap_remove(place);
        }
        self.relevel();
        Ok(())
    }

    /// Takes one observation of each live stream, in the order of [`ids`](Self::ids), and returns the places of
    /// those that raise an alarm.
    ///
    /// # Errors
    /// [`CpdError::BatchLength`] when there is not one for each stream; [`CpdError::NonFinite`],
    /// [`CpdError::NonPositive`] or [`CpdError::TooLarge`] for the first that cannot be monitored. No stream is then
    /// changed.
    pub fn update(&mut self, xs: &[f64]) -> Result<&[usize], CpdError> {
        let n = self.ids.len();
        if xs.len() != n {
            return Err(CpdError::BatchLength {
                got: xs.len(),
                expected: n,
            });
        }
        let how = self.params.detector.transform;
        if !transform_all(xs, &mut self.input[..n], how) {
            // At least one is refused, or needs the slow path.
            for (place, &x) in xs.iter().enumerate() {
                let count = self.blocks[place / LANES].count[place % LANES] as u64;
                self.input[place] = match transform(x, how, count) {
                    Ok(y) => y,
                    Err(refused) => {
                        // What is refused does not lie where a stream that has gone would leave it to be learned.
                        self.input.fill(0.0);
                        return Err(refused);
                    }
                };
            }
        }
        self.present.clear();
        self.advance();
        Ok(&self.alarms)
    }

    /// The same where some streams have no observation, as [`Detector::skip`](crate::Detector::skip) is for one.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    ///
    /// # Examples
    /// ```
    /// use mass_cpd::BankParams;
    ///
    /// let mut bank = BankParams::default().check()?;
    /// bank.add();
    /// bank.add();
    /// assert!(bank.update_some(&[Some(1.0), None])?.is_empty());
    /// # Ok::<(), mass_cpd::CpdError>(())
    /// ```
    pub fn update_some(&mut self, xs: &[Option<f64>]) -> Result<&[usize], CpdError> {
        let n = self.ids.len();
        if xs.len() != n {
            return Err(CpdError::BatchLength {
                got: xs.len(),
                expected: n,
            });
        }
        for (place, x) in xs.iter().enumerate() {
            let count = self.blocks[place / LANES].count[place % LANES] as u64;
            self.input[place] = match *x {
                Some(x) => transform(x, self.params.detector.transform, count)?,
                None => 0.0,
            };
        }
        self.present.clear();
        self.present.extend(xs.iter().map(Option::is_some));
        self.present.resize(self.blocks.len() * LANES, false);
        self.advance();
        Ok(&self.alarms)
    }

    /// Lets every stream take what is in `input`, or a gap where it is not `present`.
    fn advance(&mut self) {
        self.alarms.clear();
        let rule = self.rule();
        let d = &self.params.detector;
        let prewhiten = d.prewhiten != Prewhiten::None;
        if matches!(d.reference, Reference::Lagged { .. }) {
            self.update_lagged(&rule);
        } else if !self.general.is_empty() {
            self.update_general(&rule);
        } else {
            match (prewhiten, d.drift == Drift::Remove) {
                (false, false) => self.update_blocks::<false, false>(&rule),
                (false, true) => self.update_blocks::<false, true>(&rule),
                (true, false) => self.update_blocks::<true, false>(&rule),
                (true, true) => self.update_blocks::<true, true>(&rule),
            }
        }
    }

    /// What the last observation did to the stream at `place`, with its p-values. Where the stream raised an alarm
    /// and began anew, the statistic is the one after that.
    ///
    /// [`Step::p_horizon`] is the stream's own; the family's is at most the number of streams times that.
    #[must_use]
    pub fn step(&self, place: usize) -> Option<Step> {
        if place >= self.ids.len() {
            return None;
        }
        let (block, lane) = (&self.blocks[place / LANES], place % LANES);
        let mut step = Step::silent(block.count[lane] as u64);
        if block.scored[lane] > 0.0 {
            let sides = Sides::new([block.up.get(lane), block.down.get(lane)]);
            report(&self.params.detector, &mut step, &sides, block.score[lane]);
            step.p_horizon = step.statistic.map(|s| self.calibration.p(s));
            step.alarm = self.alarms.contains(&place);
        }
        Some(step)
    }

    fn reserve(&mut self, streams: usize) {
        let blocks = streams.div_ceil(LANES);
        self.ids.reserve(streams.saturating_sub(self.ids.len()));
        self.blocks
            .reserve(blocks.saturating_sub(self.blocks.len()));
        self.alarms.reserve(streams);
        if self.input.len() < blocks * LANES {
            self.input.resize(blocks * LANES, 0.0);
            self.hits.resize(blocks, false);
            self.present.reserve(blocks * LANES);
        }
        if matches!(self.params.detector.reference, Reference::Lagged { .. }) {
            self.gaps.reserve(streams.saturating_sub(self.gaps.len()));
            self.rolling
                .reserve(streams.saturating_sub(self.rolling.len()));
            let values = streams * self.shape.capacity();
            self.windows
                .reserve(values.saturating_sub(self.windows.len()));
        }
    }

    fn relevel(&mut self) {
        let live = self.ids.len().max(1) as f64;
        self.threshold = self
            .params
            .detector
            .among(live)
            .threshold(&self.calibration);
    }

    fn rule(&self) -> Rule {
        let d = &self.params.detector;
        Rule {
            k: d.allowances(),
            limits: d.limits(self.threshold),
            warmup: d.warmup as f64,
            spread: d.watch == Watch::Spread,
            threshold: self.threshold,
        }
    }

    fn update_blocks<const AR: bool, const DRIFT: bool>(&mut self, rule: &Rule) {
        let (inputs, _) = self.input.as_chunks::<LANES>();
        let (present, _) = self.present.as_chunks::<LANES>();
        if present.is_empty() {
            // With the widest vectors that the processor has; the results are the same bits with any.
            pulp::Arch::new().dispatch(Pass::<AR, DRIFT> {
                blocks: &mut self.blocks,
                inputs,
                rule,
                hits: &mut self.hits,
            });
        } else {
            for (((block, y), present), hit) in self
                .blocks
                .iter_mut()
                .zip(inputs)
                .zip(present)
                .zip(self.hits.iter_mut())
            {
                *hit = block.update_some::<AR, DRIFT>(y, present, rule);
            }
        }
        for b in 0..self.blocks.len() {
            if self.hits[b] {
                self.raise(b);
            }
        }
    }

    /// Updates each stream by itself: `one` gives its score, and level and slope of its reference before.
    fn update_each(
        &mut self,
        rule: &Rule,
        one: impl Fn(&mut Self, usize, Option<f64>) -> (Option<f64>, (f64, f64)),
    ) {
        let arch = pulp::Arch::new();
        for b in 0..self.blocks.len() {
            let places = b * LANES..self.ids.len().min((b + 1) * LANES);
            let mut y: Lanes = [0.0; LANES];
            y[..places.len()].copy_from_slice(&self.input[places.clone()]);
            let mut seen = Judgement::of(&y);
            for (i, place) in places.enumerate() {
                let present = self.present.get(place).copied().unwrap_or(true);
                let (score, line) = one(self, place, present.then_some(y[i]));
                (seen.level[i], seen.slope[i]) = line;
                if let Some(z) = score {
                    seen.z[i] = z;
                    seen.ready[i] = 1.0;
                }
            }
            let scored = Add {
                block: &mut self.blocks[b],
                seen: &seen,
                rule,
            };
            if arch.dispatch(scored) {
                self.raise(b);
            }
        }
    }

    fn update_lagged(&mut self, rule: &Rule) {
        let size = self.shape.capacity();
        let warmup = self.params.detector.warmup as u64;
        self.update_each(rule, |bank, place, y| {
            let Some(y) = y else {
                bank.gaps[place] = true;
                return (None, (0.0, 0.0));
            };
            let rolling = &mut bank.rolling[place];
            let values = &mut bank.windows[place * size..(place + 1) * size];
            let gap = std::mem::take(&mut bank.gaps[place]);
            let ready = rolling.seen() >= warmup && !(gap && bank.shape.prewhiten);
            let line = rolling.line(values, &bank.shape);
            let score = rolling.update(values, y, &bank.shape);
            (score.filter(|_| ready), line)
        });
    }

    fn update_general(&mut self, rule: &Rule) {
        let Some(model) = self.params.detector.general() else {
            return;
        };
        let warmup = self.params.detector.warmup as u64;
        let limit = rule.limits.0;
        self.update_each(rule, |bank, place, y| {
            let general = &mut bank.general[place];
            let Some(y) = y else {
                general.skip(&model);
                return (None, (0.0, 0.0));
            };
            let ready = general.seen() >= warmup;
            let line = general.line(&model);
            let z = general.update(y, if ready { limit } else { f64::INFINITY }, &model);
            (ready.then_some(z), line)
        });
    }

    /// Notes the alarms of block `b`, and does what is to be done after an alarm.
    #[cold]
    fn raise(&mut self, b: usize) {
        let block = &mut self.blocks[b];
        for i in 0..LANES.min(self.ids.len() - b * LANES) {
            if block.scored[i] == 0.0 || block.statistic(i) < self.threshold {
                continue;
            }
            let place = b * LANES + i;
            self.alarms.push(place);
            match self.params.detector.after_alarm {
                AfterAlarm::Hold => {}
                AfterAlarm::Restart => block.restart(i),
                AfterAlarm::Relearn => {
                    block.relearn(i);
                    if let Some(rolling) = self.rolling.get_mut(place) {
                        *rolling = Lagged::default();
                        self.gaps[place] = false;
                    }
                    if let Some(general) = self.general.get_mut(place) {
                        general.clear();
                    }
                }
            }
        }
    }
}

/// One observation for every block.
struct Pass<'a, const AR: bool, const DRIFT: bool> {
    blocks: &'a mut [Block],
    inputs: &'a [Lanes],
    rule: &'a Rule,
    hits: &'a mut [bool],
}

impl<const AR: bool, const DRIFT: bool> pulp::NullaryFnOnce for Pass<'_, AR, DRIFT> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let rule = *self.rule;
        for ((block, y), hit) in self.blocks.iter_mut().zip(self.inputs).zip(self.hits) {
            *hit = block.update::<AR, DRIFT>(y, &rule);
        }
    }
}

/// Scores that were found one by one, for one block.
struct Add<'a> {
    block: &'a mut Block,
    seen: &'a Judgement,
    rule: &'a Rule,
}

impl pulp::NullaryFnOnce for Add<'_> {
    type Output = bool;

    #[inline(always)]
    fn call(self) -> bool {
        self.block.add(self.seen, self.rule)
    }
}
