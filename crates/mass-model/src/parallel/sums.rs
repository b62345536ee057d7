//! Sums over ranks, of gradients above all: after a backward pass, or in the course of it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use dfdx::tensor::CpuError;

use super::shared::Kind;
use super::{BUCKET, ParallelError, Ranks, part};
use crate::error::{ModelError, into_dfdx};
use crate::gradients::CpuGradients;
use crate::ops::Pass;
use crate::param::{ParamHandle, Parameters};

/// A parameter's gradient on its way.
pub(super) struct Travelling {
    place: ParamHandle,
    /// None if this rank has none, and after the sum if no rank has.
    pub(super) values: Option<Vec<f32>>,
    /// Whether any rank has one.
    pub(super) found: bool,
    /// Other ranks hold other parameters of that name: it is no part of the sum.
    pub(super) divided: bool,
}

impl Travelling {
    /// Takes a gradient out.
    pub(super) fn take(
        place: ParamHandle,
        divided: bool,
        gradients: &mut CpuGradients,
    ) -> Result<Self, CpuError> {
        let values = place.take_found(gradients)?;
        Ok(Self {
            place,
            found: values.is_some(),
            values,
            divided,
        })
    }

    /// Puts the sum back.
    pub(super) fn arrive(self, gradients: &mut CpuGradients) -> Result<ParamHandle, CpuError> {
        if let Some(values) = self.values {
            self.place.put(gradients, values)?;
        }
        Ok(self.place)
    }
}

/// Makes gradients means over the ranks, weighted by `weight`, the number of targets of each. Returns the sum of `loss` over ranks,
/// and that of the weights.
///
/// Small gradients travel together, large ones alone: none is copied that does not have to be.
pub(super) fn sum(
    ranks: &Ranks,
    (loss, weight): (f64, u64),
    all: &mut [Travelling],
) -> Result<(f64, u64), ModelError> {
    let mut own = Vec::with_capacity(16 + all.len() / 8);
    own.extend(loss.to_le_bytes());
    own.extend(weight.to_le_bytes());
    let bits = |of: &[Travelling]| {
        let found = of.iter().rev().map(|t| u8::from(t.found));
        found.fold(0, |byte, bit| byte << 1 | bit)
    };
    own.extend(all.chunks(8).map(bits));
    let (mut loss, mut total, mut weights) = (0.0, 0_u64, Vec::with_capacity(ranks.size()));
    for (rank, other) in ranks.gather_bytes(&own)?.iter().enumerate() {
        if other.len() != own.len() {
            let what = format!("parameters in {} bytes, not {}", other.len(), own.len());
            return Err(ParallelError::OutOfStep { rank, what }.into());
        }
        let eight = |at: usize| other[at..at + 8].try_into().expect("eight bytes");
        loss += f64::from_le_bytes(eight(0));
        let weight = u64::from_le_bytes(eight(8));
        weights.push(weight as f64);
        let what = "more targets of all ranks than 64 bits count";
        let sum = total.checked_add(weight);
        total = sum.ok_or_else(|| ModelError::Config(what.into()))?;
        for (i, one) in all.iter_mut().enumerate() {
            one.found |= other[16 + i / 8] >> (i % 8) & 1 == 1;
        }
    }
    if total == 0 {
        return Err(ModelError::shape("targets of all ranks", &[1], &[0]));
    }
    weights.iter_mut().for_each(|w| *w /= total as f64);
    let (mut bucket, mut inside) = (Vec::new(), Vec::new());
    for one in all.iter_mut().filter(|t| t.found && !t.divided) {
        let n = one.place.len();
        let values = one.values.get_or_insert_with(|| vec![0.0; n]);
        if n >= BUCKET {
            ranks.weighted_sum(values, &weights)?;
            continue;
        }
        if bucket.len() + n > BUCKET {
            together(ranks, &weights, &mut bucket, &mut inside)?;
        }
        bucket.extend_from_slice(values);
        inside.push(values);
    }
    if !inside.is_empty() {
        together(ranks, &weights, &mut bucket, &mut inside)?;
    }
    Ok((loss, total))
}

/// Sums what lies in a bucket, and empties it into the gradients that it came from.
fn together(
    ranks: &Ranks,
    weights: &[f64],
    bucket: &mut Vec<f32>,
    inside: &mut Vec<&mut Vec<f32>>,
) -> Result<(), ModelError> {
    ranks.weighted_sum(bucket, weights)?;
    let mut rest = &bucket[..];
    for values in inside.drain(..) {
        let (own, others) = rest.split_at(values.len());
        values.copy_from_slice(own);
        rest = others;
    }
    bucket.clear();
    Ok(())
}

/// What a thread sums in the course of a backward pass: gradients that the rest of the pass does not add to any more.
///
/// That thread alone talks to other ranks from the first gradients on until [`end`](Self::end), or until this is dropped: the thread
/// has made all sums then that were begun, as have the other ranks'. A rank that fails in its backward pass says so after that, to
/// whichever sum the others wait in.
pub(crate) struct Meanwhile {
    work: Arc<Mutex<Work>>,
}

struct Work {
    ranks: Ranks,
    weight: u64,
    /// Those that wait to become as many as are worth a sum.
    waiting: Vec<Travelling>,
    thread: Option<Summing>,
    ended: bool,
}

struct Summing {
    queue: Sender<Vec<Travelling>>,
    thread: JoinHandle<Result<Vec<Travelling>, ModelError>>,
}

impl Meanwhile {
    /// Of a pass over a share of so many targets. `None` for ranks that do not sum meanwhile.
    pub(crate) fn new(ranks: &Ranks, weight: u64) -> Option<Self> {
        let overlaps = ranks.overlap.is_some() && !ranks.is_alone() && !ranks.divides_experts();
        let work = Work {
            ranks: ranks.clone(),
            weight,
            waiting: Vec::new(),
            thread: None,
            ended: false,
        };
        overlaps.then(|| Self {
            work: Arc::new(Mutex::new(work)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that no operation of the pass before this one has a share in the gradients of `of`: they are complete when the backward
    /// pass has come back to here.
    pub(crate) fn complete(&self, pass: &mut impl Pass, of: &impl Parameters) {
        let mut places = Vec::new();
        of.visit("", &mut |_, param| places.push(param.handle()));
        let work = Arc::clone(&self.work);
        pass.on_return(move |gradients| {
            let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
            work.add(places, gradients)
        });
    }

    /// The weight, what has been summed, and what has not.
    pub(super) fn end(self) -> Result<(u64, Vec<Travelling>, Vec<Travelling>), ModelError> {
        let mut work = self.lock();
        let summed = work.end()?;
        Ok((work.weight, summed, std::mem::take(&mut work.waiting)))
    }
}

impl Drop for Meanwhile {
    fn drop(&mut self) {
        // What went wrong has been said where the pass ended, or will be by what the ranks do next.
        let _ = self.lock().end();
    }
}

impl Work {
    fn add(
        &mut self,
        places: Vec<ParamHandle>,
        gradients: &mut CpuGradients,
    ) -> Result<(), CpuError> {
        for place in places {
            self.waiting
                .push(Travelling::take(place, false, gradients)?);
        }
        let values: usize = self.waiting.iter().map(|t| t.place.len()).sum();
        if self.ended || self.ranks.overlap.is_none_or(|enough| values < enough) {
            return Ok(());
        }
        if self.thread.is_none() {
            let (queue, received) = channel();
            let (ranks, weight) = (self.ranks.clone(), self.weight);
            let thread = std::thread::Builder::new()
                .name("sums of gradients".into())
                .spawn(move || sum_all(&ranks, weight, &received));
            let refused = |e: std::io::Error| ParallelError::Transport(format!("a thread: {e}"));
            let thread = thread.map_err(|e| into_dfdx(refused(e).into()))?;
            self.ranks.leave_to(Some(thread.thread().id()));
            self.thread = Some(Summing { queue, thread });
        }
        if let Some(Summing { queue, .. }) = &self.thread {
            // A thread that has ended says why at the end of the pass.
            let _ = queue.send(std::mem::take(&mut self.waiting));
        }
        Ok(())
    }

    fn end(&mut self) -> Result<Vec<Travelling>, ModelError> {
        self.ended = true;
        let Some(Summing { queue, thread }) = self.thread.take() else {
            return Ok(Vec::new());
        };
        drop(queue);
        let summed = thread.join();
        self.ranks.leave_to(None);
        match summed {
            Ok(summed) => summed,
            // One panic at a time.
            Err(_) if std::thread::panicking() => Ok(Vec::new()),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn sum_all(
    ranks: &Ranks,
    weight: u64,
    queue: &Receiver<Vec<Travelling>>,
) -> Result<Vec<Travelling>, ModelError> {
    let mut summed = Vec::new();
    for mut some in queue {
        sum(ranks, (0.0, weight), &mut some)?;
        summed.extend(some);
    }
    Ok(summed)
}

impl Ranks {
    /// `values = Σ_r weights[r] values_r`, summed in rank order in f64 and rounded once: every rank gets the same bits.
    ///
    /// Each rank adds up its part of the values and sends it to the others, so that each value crosses the network twice less
    /// `2 / ranks`, whatever the number of ranks.
    ///
    /// # Errors
    /// As [`gather_bytes`](Self::gather_bytes); [`ParallelError::Unsupported`], on this rank, if there is not one weight a rank.
    pub fn weighted_sum(&self, values: &mut [f32], weights: &[f64]) -> Result<(), ParallelError> {
        let (rank, size) = (self.rank(), self.size());
        if weights.len() != size {
            let what = format!("values of {size} ranks with {} weights", weights.len());
            return Err(ParallelError::Unsupported(what));
        }
        let Some(shared) = self.several() else {
            let weigh = |x: &mut f32| *x = (weights[0] * f64::from(*x)) as f32;
            values.iter_mut().for_each(weigh);
            return Ok(());
        };
        let mut received = Vec::new();
        for bucket in values.chunks_mut(BUCKET) {
            let counts = shared.begin(Kind::Sum, bucket.len())?;
            shared.same("values to add", &counts)?;
            let parts: Vec<usize> = (0..size)
                .map(|r| part(bucket.len(), size, r).len())
                .collect();
            let mine = parts[rank];
            received.clear();
            received.resize(mine * size, 0.0);
            let from = vec![mine; size];
            let communicator = &shared.communicator;
            communicator.exchange((bucket, &parts), (&mut received, &from))?;
            let own: Vec<f32> = (0..mine)
                .map(|i| {
                    let shares = weights.iter().enumerate();
                    let terms = shares.map(|(r, w)| w * f64::from(received[r * mine + i]));
                    terms.sum::<f64>() as f32
                })
                .collect();
            communicator.gather(&own, bucket, &parts)?;
            let others = bucket.len() - mine + (size - 1) * mine;
            shared.sent_in_all(others * size_of::<f32>(), 2 * (size - 1));
        }
        Ok(())
    }

    /// Adds what the ranks in the same place of every group have, in rank order; each of them gets the same bits.
    ///
    /// # Errors
    /// As [`gather_bytes`](Self::gather_bytes).
    pub(crate) fn sum_over_groups(&self, values: &mut [f32]) -> Result<(), ParallelError> {
        let (size, of) = (self.size(), self.group.max(1));
        if size == of {
            return Ok(());
        }
        let groups = size / of;
        let alike = |rank: usize| rank % of == self.place();
        // Ranks in other places have other experts, and take part in every exchange all the same.
        let lengths = self.gather_f64(&[values.len() as f64])?;
        let longest = lengths.iter().fold(0.0, |most: f64, n| most.max(*n)) as usize;
        let mut rest = values;
        for _ in 0..longest.div_ceil(BUCKET) {
            let (bucket, others) = rest.split_at_mut(rest.len().min(BUCKET));
            rest = others;
            let of_group = |group: usize| part(bucket.len(), groups, group);
            let to = |rank: usize| {
                if alike(rank) {
                    of_group(rank / of).len()
                } else {
                    0
                }
            };
            let to: Vec<usize> = (0..size).map(to).collect();
            let (received, from) = self.exchange(bucket, &to)?;
            let mine = of_group(self.rank() / of).len();
            let each: Vec<usize> = (0..size).map(|r| if alike(r) { mine } else { 0 }).collect();
            if from != each {
                let what = "gradients of other experts than this rank holds";
                return Err(ParallelError::Transport(what.into()));
            }
            let sum = |i: usize| -> f32 {
                let terms = (0..groups).map(|g| f64::from(received[g * mine + i]));
                terms.sum::<f64>() as f32
            };
            let own: Vec<f32> = (0..mine).map(sum).collect();
            let (all, _) = self.exchange(&own.repeat(groups), &each)?;
            bucket.copy_from_slice(&all);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::kernels::scratch::Scratch;
    use crate::nn::Linear;
    use crate::ops::Host;
    use crate::parallel::{Threads, reduce};
    use crate::pass::TrainPass;
    use crate::place::PlacedGradients;
    use crate::seeded_rng;
    use dfdx::prelude::OwnedTape;

    const LAYERS: usize = 4;

    type Broken = fn() -> Result<(), CpuError>;

    /// A pass through some layers; `broken` is done when its backward pass comes back to the output of that layer.
    fn pass(
        ranks: &Ranks,
        layers: &[Linear],
        broken: Option<(usize, Broken)>,
    ) -> Result<TrainPass<PlacedGradients>, ModelError> {
        let mut pass = Host(OwnedTape::default());
        let meanwhile = Meanwhile::new(ranks, 3).expect("several ranks");
        let mut x = pass.constant(Scratch::zeros(12), (3, 4))?;
        for (l, layer) in layers.iter().enumerate() {
            meanwhile.complete(&mut pass, layer);
            x = layer.run(&mut pass, x)?;
            if let Some((_, what)) = broken.filter(|(at, _)| *at == l) {
                pass.on_return(move |_| what());
            }
        }
        let (loss, rows) = pass.cross_entropy(x, &[0, 1, 2])?;
        let made = TrainPass::of(pass, loss, rows, Vec::new())?;
        let meanwhile = Some(meanwhile);
        Ok(TrainPass { meanwhile, ..made }.placed())
    }

    fn layers() -> Vec<Linear> {
        let mut rng = seeded_rng(1);
        let layer = |_| Linear::new(4, 4, true, &mut rng).unwrap();
        (0..LAYERS).map(layer).collect()
    }

    /// One of three ranks cannot go on in its backward pass, with all, some or none of its sums begun.
    #[test]
    fn a_rank_that_fails_in_its_backward_pass_ends_all() {
        let layers = layers();
        for (at, failing) in [(0, 1), (1, 0), (2, 2), (3, 1)] {
            let started = Instant::now();
            let ends = Threads::run(3, |ranks| {
                let ranks = &ranks.clone().overlapping(1);
                let broken: Broken = || Err(CpuError::WrongNumElements);
                let broken = (ranks.rank() == failing).then_some((at, broken));
                let mut pass = pass(ranks, &layers, broken)?;
                reduce(ranks, &layers, &mut pass, 3)
            });
            assert!(started.elapsed() < Duration::from_secs(20));
            for (rank, end) in ends.into_iter().enumerate() {
                let error = end.unwrap_err();
                match rank == failing {
                    true => assert!(matches!(error, ModelError::Tensor(_)), "{error}"),
                    false => assert!(
                        matches!(&error, ModelError::Parallel(ParallelError::Peer { rank, .. }) if *rank == failing),
                        "{error}"
                    ),
                }
            }
        }
    }

    #[test]
    fn a_rank_that_panics_in_its_backward_pass_ends_all() {
        let layers = layers();
        let started = Instant::now();
        let ended = catch_unwind(AssertUnwindSafe(|| {
            Threads::run(3, |ranks| {
                let ranks = &ranks.clone().overlapping(1);
                let broken: Broken = || panic!("on purpose");
                let broken = (ranks.rank() == 1).then_some((2, broken));
                let mut pass = pass(ranks, &layers, broken)?;
                reduce(ranks, &layers, &mut pass, 3)
            })
        }));
        let words = *ended.unwrap_err().downcast::<&str>().unwrap();
        assert_eq!(words, "on purpose");
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn nothing_else_is_asked_of_ranks_before_the_reduction() {
        let layers = layers();
        let ends = Threads::run(2, |ranks| {
            let ranks = &ranks.clone().overlapping(1);
            let mut pass = pass(ranks, &layers, None)?;
            let refused = ranks.sum(&mut [1.0]).unwrap_err().to_string();
            assert!(refused.contains("between an overlapping"), "{refused}");
            reduce(ranks, &layers, &mut pass, 3)?;
            ranks.sum(&mut [1.0])?;
            // A share of another size than it was.
            let mut pass = self::pass(ranks, &layers, None)?;
            let wrong = reduce(ranks, &layers, &mut pass, 4)
                .unwrap_err()
                .to_string();
            assert!(wrong.contains("targets of a share"), "{wrong}");
            // Nobody asks for the sums of a pass.
            drop(self::pass(ranks, &layers, None)?);
            ranks.sum(&mut [1.0])?;
            Ok::<_, ModelError>(())
        });
        assert!(ends.into_iter().all(|end| end.is_ok()));
    }
}
