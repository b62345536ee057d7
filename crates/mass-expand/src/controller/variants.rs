//! The named variants and the growth baselines, as compositions of the parts.

use mass_cpd::{CalibratedCusumParams, WindowedZParams};

use super::params::{
    AfterSplit, Choice, ControllerParams, Moments, Phase, SplitOperator, StopRule, Trigger, Unused,
};
use super::validate::MOST_EXPERTS;
use super::watch::{Level, Watch};
use crate::{AlignmentThreshold, BisectParams, Decomposition};

impl ControllerParams {
    /// What the paper writes, with its settings for language: expansion in the first tenth of `steps`,
    /// `T_warm = max(30, 5 %)`, `w = max(60, 9 %)`, alpha 0.01, delta 0.001, gamma 3.
    ///
    /// `layers` layers of `experts` experts each, at most `k_max`; more layers than [`check`](Self::check) takes experts are cut
    /// down to as many as it refuses. Mind that the window of 9 % and the end at 10 % leave
    /// detection live for 1 % of the run: [`Controller::live_steps`](super::Controller::live_steps) tells.
    #[must_use]
    pub fn paper(layers: usize, experts: usize, k_max: usize, steps: u64) -> Self {
        Self {
            experts: vec![experts; layers.min(MOST_EXPERTS + 1)],
            k_max,
            steps: Some(steps),
            phase: Phase {
                live_from: 0,
                live_until: (steps / 10).max(1),
                continual: None,
            },
            watch: Watch::experts(WindowedZParams::paper(
                percent(steps, 5, 30),
                percent(steps, 9, 60),
                0.01,
            )),
            unused: Unused::ObserveZero,
            trigger: Trigger::DetectorAndAlignment,
            alignment: AlignmentThreshold::Absolute(0.001),
            choice: Choice::TriggeredLowestIndex,
            averaging_steps: 50.0,
            operator: SplitOperator::Clone {
                decomposition: Some(Decomposition::Whole),
                preserve_mass: false,
            },
            moments: Moments::Zero,
            after_split: AfterSplit::Keep,
            stop: StopRule::Consecutive { gamma: 3 },
            pruning: None,
            seed: 0,
            trace: 0,
        }
    }

    /// What the released code does, with its settings for language; see the table in the documentation of
    /// [`Controller`](super::Controller)'s module for the differences. For vision, checks begin after one expansion:
    /// `checks_after_expansions = 0`.
    #[must_use]
    pub fn reference(layers: usize, experts: usize, k_max: usize, steps: u64) -> Self {
        Self {
            watch: Watch::experts(WindowedZParams::reference(
                percent(steps, 5, 30),
                percent(steps, 9, 60),
                0.01,
            )),
            operator: SplitOperator::Clone {
                decomposition: Some(Decomposition::Rowwise),
                preserve_mass: false,
            },
            after_split: AfterSplit::ResetSourceCount,
            stop: StopRule::Patience {
                patience: 3,
                checks_after_expansions: 1,
            },
            ..Self::paper(layers, experts, k_max, steps)
        }
    }

    /// The paper's aim with a known false-alarm rate: calibrated CUSUMs on the logarithms of the loss, of each layer's
    /// pooled norm and of each expert's norm share alpha 0.05 over the phase (the first 30 % of `steps`); the expert with the largest
    /// share of the loss is bisected; a held-out check a tenth of the run later, at most 50 steps, decides whether growth goes
    /// on. References are [`shortened`](Watch::shortened) in runs of under 2000 steps. Mind that in runs of under 250 steps
    /// detectors have not learnt enough when the phase ends: [`reach`](Self::reach) tells.
    #[must_use]
    pub fn calibrated(layers: usize, experts: usize, k_max: usize, steps: u64) -> Self {
        let live_until = (steps.saturating_mul(3) / 10).max(1);
        Self {
            phase: Phase {
                live_from: 0,
                live_until,
                continual: None,
            },
            watch: Self::calibrated_watch(0.05, live_until).shortened(steps),
            unused: Unused::Skip,
            trigger: Trigger::DetectorOnly,
            choice: Choice::LossShare,
            operator: SplitOperator::Bisect(BisectParams::default()),
            after_split: AfterSplit::Rewarm,
            stop: StopRule::HeldOut {
                margin: 0.0,
                z: 1.0,
                wait: (steps / 10).clamp(1, 50),
                patience: 2,
                remove: true,
            },
            ..Self::paper(layers, experts, k_max, steps)
        }
    }

    /// The best way to grow that this project has found where the data do not change: the pool grows to `k_max`
    /// while the learning rate still rises. From 0.5 % of `steps` on, every 0.1 % (or as often as it takes to be done in a tenth), the
    /// expert with the largest share of the loss is [bisected](crate::bisect()) by a soft boundary, and the newcomer has its source's
    /// moments. Nothing is watched, and nothing has to be held out.
    ///
    /// It belongs with straight-through weights (`Combine::StraightThrough` of mass-routing): with renormalised ones a token of one
    /// expert teaches the gate nothing, so that boundaries stay where they were drawn.
    ///
    /// # Examples
    /// ```
    /// use mass_expand::ControllerParams;
    /// let reach = ControllerParams::ours(1, 5, 20, 2000).reach();
    /// assert_eq!((reach.first_split, reach.end), (Some(10), 200));
    /// ```
    #[must_use]
    pub fn ours(layers: usize, experts: usize, k_max: usize, steps: u64) -> Self {
        let room = k_max.saturating_sub(experts).max(1) as u64;
        let first = (steps / 200).max(1);
        let tenth = steps / 10;
        let every = (steps / 1000)
            .min(tenth.saturating_sub(first) / room)
            .max(1);
        Self {
            phase: Phase {
                live_from: 0,
                // Even of a run that is too short there is room for every newcomer.
                live_until: tenth.max(first.saturating_add(room)),
                continual: None,
            },
            watch: Watch {
                expert: None,
                layer: None,
                loss: None,
                level: Level::Shared,
            },
            choice: Choice::LossShare,
            operator: SplitOperator::Bisect(BisectParams {
                strength: 0.75,
                ..BisectParams::default()
            }),
            moments: Moments::Inherit,
            // Of no effect unless something is watched later on.
            after_split: AfterSplit::Rewarm,
            stop: StopRule::Never,
            ..Self::paper(layers, experts, k_max, steps)
        }
        .with_schedule(first, every)
    }

    /// The detectors of [`calibrated`](Self::calibrated) at a level of `alpha` over `horizon` steps, for a phase of its own.
    #[must_use]
    pub fn calibrated_watch(alpha: f64, horizon: u64) -> Watch {
        // Chosen on real runs: a lagged reference, drift taken off, only sudden rises of several standard deviations.
        let detector = CalibratedCusumParams {
            horizon,
            alpha,
            ..CalibratedCusumParams::training(1)
        };
        Watch {
            expert: Some(detector.into()),
            layer: Some(detector.into()),
            loss: Some(detector.into()),
            level: Level::Shared,
        }
    }

    /// Baseline: a split at `first` and every `every` steps after it, whatever the gradients do.
    #[must_use]
    pub fn with_schedule(mut self, first: u64, every: u64) -> Self {
        self.trigger = Trigger::Schedule {
            first,
            every,
            splits: 1,
        };
        self
    }

    /// Baseline: a split whenever the averaged training loss has not improved by more than `threshold` nats for `patience` steps.
    #[must_use]
    pub fn on_plateau(mut self, patience: u64, threshold: f64) -> Self {
        self.trigger = Trigger::Plateau {
            patience,
            threshold,
        };
        self
    }

    /// Ablation: detection without the alignment test.
    #[must_use]
    pub fn detector_only(mut self) -> Self {
        self.trigger = Trigger::DetectorOnly;
        self
    }

    /// Ablation: the alignment test without detection.
    #[must_use]
    pub fn alignment_only(mut self) -> Self {
        self.trigger = Trigger::AlignmentOnly;
        self
    }

    /// Baseline: the trigger says when, chance says which.
    #[must_use]
    pub fn random_expert(mut self, seed: u64) -> Self {
        self.choice = Choice::Random;
        self.seed = seed;
        self
    }

    /// Baseline: the trigger says when, and the expert with the most tokens is split.
    #[must_use]
    pub fn most_loaded(mut self) -> Self {
        self.choice = Choice::MostLoaded;
        self
    }

    /// Ablation: cloning without gradient decomposition.
    #[must_use]
    pub fn plain_cloning(mut self) -> Self {
        self.operator = SplitOperator::Clone {
            decomposition: None,
            preserve_mass: false,
        };
        self
    }

    /// Continual mode: after the first phase expansion goes on by alarms of the training loss, which have a false-alarm probability
    /// of `alpha` in every `horizon` steps, whatever was spent before. Which expert is split then, [`choice`](Self::choice) says.
    ///
    /// Gradient norms are not watched. An expert's moves with its load, as a gradient is a sum over its tokens; and on real texts
    /// that do not change a layer's, too, raises several times the false alarms that its share of the level allows, for few changes
    /// that the loss does not find (`docs/results/continual.md` of the repository). To watch them, set [`Phase::continual`] to a
    /// whole [`calibrated_watch`](Self::calibrated_watch), or one without experts, and [`unused`](Self::unused) to
    /// [`Unused::Skip`].
    #[must_use]
    pub fn continual(mut self, alpha: f64, horizon: u64) -> Self {
        self.phase.continual = Some(Watch {
            expert: None,
            layer: None,
            ..Self::calibrated_watch(alpha, horizon)
        });
        self
    }
}

fn percent(steps: u64, percent: u64, at_least: usize) -> usize {
    let share = steps.saturating_mul(percent) / 100;
    usize::try_from(share).unwrap_or(usize::MAX).max(at_least)
}
