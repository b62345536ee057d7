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

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use block::{Block, LANES, Rule};

use crate::{
    AfterAlarm, CalibratedCusumParams, CpdError, Direction, Drift, Reference, Step,
    cusum::{
        Calibration,
        lagged::{Lagged, Shape},
        transform, transform_all,
    },
    normal,
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
        )?;
        let mut bank = Bank {
            params: *self,
            ids: Vec::new(),
            next_id: 0,
            blocks: Vec::new(),
            rolling: Vec::new(),
            windows: Vec::new(),
            shape: self.detector.shape(),
            input: Vec::new(),
            hits: Vec::new(),
            alarms: Vec::new(),
            calibration: Calibration::of(&self.detector),
            threshold: f64::INFINITY,
        };
        bank.reserve(self.capacity);
        Ok(bank)
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
    shape: Shape,
    /// Scratch, padded to whole blocks.
    input: Vec<f64>,
    /// Blocks in which a statistic is at the threshold.
    hits: Vec<bool>,
    alarms: Vec<usize>,
    calibration: Arc<Calibration>,
    threshold: f64,
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
            self.windows
                .resize(self.windows.len() + self.shape.capacity(), 0.0);
        }
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
            self.windows.copy_within(last * size.., place * size);
            self.windows.truncate(last * size);
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
                self.input[place] = transform(x, how, count)?;
            }
        }
        self.alarms.clear();
        let rule = self.rule();
        let d = &self.params.detector;
        match (d.reference, d.prewhiten, d.drift == Drift::Remove) {
            (Reference::Lagged { .. }, ..) => self.update_lagged(&rule),
            (Reference::SelfStarting, false, false) => self.update_blocks::<false, false>(&rule),
            (Reference::SelfStarting, false, true) => self.update_blocks::<false, true>(&rule),
            (Reference::SelfStarting, true, false) => self.update_blocks::<true, false>(&rule),
            (Reference::SelfStarting, true, true) => self.update_blocks::<true, true>(&rule),
        }
        Ok(&self.alarms)
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
            let z = block.score[lane];
            let (s, onset) = block.statistic(lane);
            step.statistic = Some(s);
            step.p_value = Some(match self.params.detector.direction {
                Direction::Up => normal::quick_survival(z),
                Direction::Down => normal::quick_survival(-z),
                Direction::Both => 2.0 * normal::quick_survival(z.abs()),
            });
            step.p_horizon = Some(self.calibration.p(s));
            step.onset = (s > 0.0).then_some(onset as u64);
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
        }
        if matches!(self.params.detector.reference, Reference::Lagged { .. }) {
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
            .calibration
            .threshold(self.params.detector.alpha / live);
    }

    fn rule(&self) -> Rule {
        let d = &self.params.detector;
        let watched = |yes: bool| if yes { 1.0 } else { 0.0 };
        Rule {
            k: d.k,
            limit: d.score_limit.unwrap_or(f64::INFINITY),
            warmup: d.warmup as f64,
            up: watched(d.direction != Direction::Down),
            down: watched(d.direction != Direction::Up),
            threshold: self.threshold,
        }
    }

    fn update_blocks<const AR: bool, const DRIFT: bool>(&mut self, rule: &Rule) {
        // With the widest vectors that the processor has; the results are the same bits with any.
        pulp::Arch::new().dispatch(Pass::<AR, DRIFT> {
            blocks: &mut self.blocks,
            input: &self.input,
            rule,
            hits: &mut self.hits,
        });
        for b in 0..self.blocks.len() {
            if self.hits[b] {
                self.raise(b);
            }
        }
    }

    fn update_lagged(&mut self, rule: &Rule) {
        let size = self.shape.capacity();
        for b in 0..self.blocks.len() {
            let (mut z, mut ready) = ([0.0; LANES], [0.0; LANES]);
            for (i, place) in (b * LANES..self.ids.len().min((b + 1) * LANES)).enumerate() {
                let rolling = &mut self.rolling[place];
                let warm = rolling.seen() as f64 >= rule.warmup;
                let values = &mut self.windows[place * size..(place + 1) * size];
                if let Some(score) = rolling.update(values, self.input[place], &self.shape) {
                    z[i] = score;
                    ready[i] = if warm { 1.0 } else { 0.0 };
                }
            }
            if self.blocks[b].add(&z, &ready, rule) {
                self.raise(b);
            }
        }
    }

    /// Notes the alarms of block `b`, and does what is to be done after an alarm.
    #[cold]
    fn raise(&mut self, b: usize) {
        let block = &mut self.blocks[b];
        for i in 0..LANES.min(self.ids.len() - b * LANES) {
            if block.scored[i] == 0.0 || block.statistic(i).0 < self.threshold {
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
                    }
                }
            }
        }
    }
}

/// One observation for every block.
struct Pass<'a, const AR: bool, const DRIFT: bool> {
    blocks: &'a mut [Block],
    input: &'a [f64],
    rule: &'a Rule,
    hits: &'a mut [bool],
}

impl<const AR: bool, const DRIFT: bool> pulp::NullaryFnOnce for Pass<'_, AR, DRIFT> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let rule = *self.rule;
        let (inputs, _) = self.input.as_chunks::<LANES>();
        for ((block, y), hit) in self.blocks.iter_mut().zip(inputs).zip(self.hits) {
            *hit = block.update::<AR, DRIFT>(y, &rule);
        }
    }
}
