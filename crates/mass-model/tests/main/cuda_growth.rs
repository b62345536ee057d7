//! Pools that grow on a device, against the same ones on the host. Without a device, which `cargo xtask cuda-emu` emulates, the
//! tests do nothing and say so.

use std::ops::Range;
use std::path::Path;

use mass_expand::{ControllerParams, EventKind, PruneRedundant, Pruning, StopRule, Trigger};
use mass_model::checkpoint::{self, Snapshot};
use mass_model::growth::{
    GradientNorm, Grower, GrowerConfig, LossOn, Mixtures, observe, pair_figures,
};
use mass_model::lm::LanguageModel;
use mass_model::optim::{AdamW, Ema, GradientAccumulator, Gradients};
use mass_model::{ModelError, Place};
use mass_routing::{Combine, RouterConfig};

use crate::cuda::{
    SEQ, Word, batch, control, device, get, model, model_with, optimizer, params, set,
};

/// A run, and what it has seen.
struct Run {
    place: Place,
    model: LanguageModel,
    optimizer: AdamW,
    grower: Grower,
    ema: Ema,
    losses: Vec<f32>,
    /// Splits and removals: step, layer, and which experts.
    changes: Vec<String>,
}

impl Run {
    fn new(place: &Place, router: RouterConfig, controller: ControllerParams) -> Self {
        let config = GrowerConfig {
            gradient_norm: GradientNorm::AllParameters,
            ..GrowerConfig::new(controller)
        };
        Self {
            place: place.clone(),
            model: model_with(router),
            optimizer: optimizer(),
            grower: Grower::new(config).unwrap(),
            ema: Ema::new(0.9).unwrap(),
            losses: Vec::new(),
            changes: Vec::new(),
        }
    }

    /// Makes steps of two micro-batches each.
    fn advance(&mut self, steps: Range<u64>) {
        for step in steps {
            let place = &self.place;
            let pass = |model: &LanguageModel, which| {
                let (tokens, targets) = batch(which);
                model.train_pass_at(place, &tokens, &targets, SEQ).unwrap()
            };
            let mut first = pass(&self.model, 2 * step as usize);
            let mut last = pass(&self.model, 2 * step as usize + 1);
            let mut sum = GradientAccumulator::new();
            for (micro, weight) in [(&mut first, 3.0), (&mut last, 1.0)] {
                sum.add(&self.model, &mut micro.gradients, weight).unwrap();
            }
            sum.mean_into(&self.model, &mut last.gradients).unwrap();
            drop(first);
            self.model.adapt(&last.layers).unwrap();
            let losses = |model: &LanguageModel, on, masked| {
                let (tokens, targets) = batch(match on {
                    LossOn::Batch => 2 * step as usize + 1,
                    LossOn::Probe => 1000,
                });
                let scored = model.score_at(place, &tokens, &targets, SEQ, masked)?;
                Ok(scored.0.into_iter().map(f64::from).collect())
            };
            let (model, optimizer) = (&mut self.model, &mut self.optimizer);
            let grown = self.grower.step(step, model, optimizer, &mut last, losses);
            for event in grown.unwrap() {
                match event.kind {
                    EventKind::Split { .. } | EventKind::Remove { .. } => {
                        let text = serde_json::to_value(event).unwrap();
                        let of = |key: &str| text.get(key).map(ToString::to_string);
                        let keys = ["step", "layer", "kind", "source", "new", "expert", "reason"];
                        self.changes.push(format!("{:?}", keys.map(of)));
                    }
                    _ => {}
                }
            }
            let gradients = &mut last.gradients;
            optimizer.step(model, gradients, 1e-2).unwrap();
            self.ema.update(&self.model).unwrap();
            self.losses.push(last.loss);
        }
    }

    fn save(&self, folder: &Path, step: u64) {
        let snapshot = Snapshot {
            ema: Some(&self.ema),
            ..Snapshot::new(step, &self.model, &self.optimizer, &self.grower)
        };
        checkpoint::save(folder, &snapshot).unwrap();
    }

    fn load(place: &Place, folder: &Path) -> (Self, u64) {
        let read = checkpoint::load::<LanguageModel, Grower>(folder).unwrap();
        let run = Self {
            place: place.clone(),
            model: read.model,
            optimizer: read.optimizer,
            grower: read.state,
            ema: read.ema.unwrap(),
            losses: Vec::new(),
            changes: Vec::new(),
        };
        (run, read.step)
    }

    /// All that a run leaves, bit by bit.
    fn bits(&self) -> Vec<(String, Vec<u32>)> {
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect();
        let own = params(&self.model).into_iter();
        let own = own.map(|(name, p)| (name, bits(p.try_values().unwrap())));
        let averages = self.ema.shadow().iter();
        let averages = averages.map(|(name, s)| (format!("ema {name}"), bits(s)));
        let moments = self.optimizer.state().iter();
        let moments = moments.map(|(name, s)| (format!("v {name}"), bits(&s.v)));
        own.chain(averages).chain(moments).collect()
    }
}

fn close_runs(what: &str, there: &Run, here: &Run) {
    assert_eq!(there.changes, here.changes, "{what}");
    assert_eq!(there.losses.len(), here.losses.len(), "{what}");
    for (step, (a, b)) in there.losses.iter().zip(&here.losses).enumerate() {
        assert!((a - b).abs() < 1e-4, "{what}, step {step}: {a} and {b}");
    }
    for layer in 0..here.model.mixtures() {
        let ids = [there, here].map(|run| run.model.mixture(layer).ids().to_vec());
        assert_eq!(ids[0], ids[1], "{what}");
    }
    for (name, average) in here.ema.shadow() {
        for (a, b) in there.ema.shadow()[name].iter().zip(average.iter()) {
            assert!(
                (a - b).abs() < 1e-3,
                "{what}, average of {name}: {a} and {b}"
            );
        }
    }
}

/// Rules under which a short run splits and removes.
fn rules() -> Vec<(&'static str, ControllerParams)> {
    let scheduled = |mut params: ControllerParams| {
        params.trigger = Trigger::Schedule {
            first: 2,
            every: 4,
            splits: 1,
        };
        params.phase.live_until = 14;
        params
    };
    let mut paper = scheduled(ControllerParams::paper(2, 4, 7, 24));
    paper.choice = mass_expand::Choice::MostLoaded;
    let mut reference = scheduled(ControllerParams::reference(2, 4, 7, 24));
    reference.choice = mass_expand::Choice::MostLoaded;
    let mut ours = scheduled(ControllerParams::ours(2, 4, 7, 24));
    ours.pruning = Some(Pruning {
        min_experts: 3,
        min_age: 3,
        unused: None,
        redundant: Some(PruneRedundant {
            every: 5,
            margin: 10.0,
            z: 0.0,
        }),
    });
    let mut held_out = scheduled(ControllerParams::calibrated(2, 4, 7, 24));
    held_out.watch = ControllerParams::ours(2, 4, 7, 24).watch;
    held_out.stop = StopRule::HeldOut {
        margin: 10.0,
        z: 0.0,
        wait: 2,
        patience: 9,
        remove: true,
    };
    vec![
        ("paper", paper),
        ("reference", reference),
        ("ours", ours),
        ("calibrated", held_out),
    ]
}

fn routers() -> [RouterConfig; 2] {
    [
        RouterConfig::TopP {
            p: 0.6,
            combine: Combine::StraightThrough,
        },
        RouterConfig::TopK {
            k: 2,
            combine: Combine::Renormalised,
        },
    ]
}

#[test]
fn pools_grow_as_on_the_host() {
    let Some(device) = device() else { return };
    let there = Place::Cuda(device);
    let mut removals = 0;
    for (i, (name, controller)) in rules().into_iter().enumerate() {
        let router = &routers()[i % 2];
        let [here, there] = [&Place::Cpu, &there].map(|place| {
            let mut run = Run::new(place, router.clone(), controller.clone());
            run.advance(0..12);
            run
        });
        close_runs(name, &there, &here);
        let count = |what: &str| here.changes.iter().filter(|c| c.contains(what)).count();
        assert!(count("split") >= 2, "{name}: {:?}", here.changes);
        removals += count("remove");
    }
    assert!(removals >= 2, "{removals}");
}

#[test]
fn checkpoints_cross_devices_and_resume_to_the_bit_on_one() {
    let Some(device) = device() else { return };
    let there = Place::Cuda(device);
    let (_, controller) = rules().remove(2);
    let begun = |place: &Place| Run::new(place, routers()[0].clone(), controller.clone());
    let folder = tempfile::tempdir().unwrap();
    let mut whole = begun(&there);
    whole.advance(0..8);
    whole.save(&folder.path().join("there"), 8);
    whole.advance(8..16);

    let (mut again, step) = Run::load(&there, &folder.path().join("there"));
    again.advance(step..16);
    assert!(again.bits() == whole.bits());
    assert_eq!(again.losses, whole.losses[8..]);

    let mut host = begun(&Place::Cpu);
    host.advance(0..8);
    host.save(&folder.path().join("here"), 8);
    host.advance(8..16);
    for (from, to) in [("there", &Place::Cpu), ("here", &there)] {
        let (mut moved, step) = Run::load(to, &folder.path().join(from));
        moved.advance(step..16);
        for (a, b) in moved.losses.iter().zip(&host.losses[8..]) {
            assert!((a - b).abs() < 1e-4, "from {from}: {a} and {b}");
        }
        let ids = |run: &Run| run.model.mixture(1).ids().to_vec();
        assert_eq!(ids(&moved), ids(&host));
    }
}

#[test]
fn watching_moves_nothing_of_a_parameter_s_size_and_leaves_nothing_behind() {
    let Some(device) = device() else { return };
    let Some(control) = control() else { return };
    let living = || get(&control, Word::Allocations) - get(&control, Word::Freed);
    let before = living();
    let there = Place::Cuda(device);
    // One split, on step 2; alignment is tested on every step and redundancy punished ever after.
    let mut controller = ControllerParams::paper(2, 4, 7, 400);
    controller.trigger = Trigger::Schedule {
        first: 2,
        every: 1000,
        splits: 1,
    };
    let mut run = Run::new(&there, routers()[0].clone(), controller);
    run.advance(0..5);
    let pools = [0, 1].map(|l| run.model.mixture(l).ids().len());
    assert_eq!(pools, [5, 5]);
    for word in [Word::LargestUp, Word::LargestDown] {
        set(&control, word, 0);
    }
    let kept = living();
    run.advance(5..20);
    assert_eq!(living(), kept);
    // Values, moments and averages, and nothing else.
    assert_eq!(kept - before, 4 * params(&run.model).len() as u64);
    let matrix = 4 * 32 * 64;
    let (up, down) = (
        get(&control, Word::LargestUp),
        get(&control, Word::LargestDown),
    );
    assert!(up < matrix, "{up} bytes went up at once");
    assert!(down < matrix / 2, "{down} bytes came down at once");
    drop(run);
    assert_eq!(living(), before);
}

#[test]
fn what_is_observed_is_the_host_s() {
    let Some(device) = device() else { return };
    let model = model();
    let (tokens, targets) = batch(3);
    let passes = [Place::Cpu, Place::Cuda(device)]
        .map(|place| model.train_pass_at(&place, &tokens, &targets, SEQ).unwrap());
    let [mut here, mut there] = passes;
    for norm in [GradientNorm::AllParameters, GradientNorm::Fc1] {
        for layer in 0..2 {
            let moe = model.mixture(layer);
            let [a, b] = [&mut there, &mut here].map(|pass| {
                let (trace, losses) = (&pass.layers[layer], &pass.token_losses);
                observe(moe, trace, losses, &mut pass.gradients, norm).unwrap()
            });
            for (a, b) in a.iter().zip(&b) {
                assert_eq!((a.id, a.load), (b.id, b.load));
                let error = (a.gradient_norm - b.gradient_norm).abs();
                assert!(error <= 1e-4 * b.gradient_norm, "{a:?} {b:?}");
                let shares = a.loss_share.zip(b.loss_share).unwrap();
                assert!((shares.0 - shares.1).abs() < 1e-5);
            }
            let [a, b] = [&mut there, &mut here].map(|pass| {
                let (trace, gradients) = (&pass.layers[layer], &mut pass.gradients);
                let (first, second) = (moe.ids()[0], moe.ids()[2]);
                pair_figures(moe, trace, gradients, first, second).unwrap()
            });
            let close = |a: Option<f64>, b: Option<f64>| (a.unwrap() - b.unwrap()).abs() < 1e-5;
            assert!(close(a.source_cosine, b.source_cosine), "{a:?} {b:?}");
            assert!(close(a.gate_cosine, b.gate_cosine), "{a:?} {b:?}");
            assert_eq!(a.routing_overlap, b.routing_overlap);
        }
    }
    // And the rows of some tokens.
    let [a, b] = [&there, &here].map(|pass| pass.layers[0].gate_input.rows(&[5, 0, 5]).unwrap());
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5));
    assert!(there.layers[0].gate_input.rows(&[24]).is_err());
}

#[test]
fn a_step_of_growth_that_finds_no_memory_can_be_made_again() {
    let Some(device) = device() else { return };
    let Some(control) = control() else { return };
    let there = Place::Cuda(device);
    let mut controller = ControllerParams::paper(2, 4, 7, 400);
    controller.phase.live_until = 400;
    let mut run = Run::new(&there, routers()[0].clone(), controller);
    run.advance(0..2);
    let (tokens, targets) = batch(9);
    let mut pass = run
        .model
        .train_pass_at(&there, &tokens, &targets, SEQ)
        .unwrap();
    let before = run.grower.controller().clone();
    let mut refused = 0;
    loop {
        set(&control, Word::FailAllocation, refused + 1);
        let (model, optimizer) = (&mut run.model, &mut run.optimizer);
        let outcome = run
            .grower
            .step(2, model, optimizer, &mut pass, |_, _, _| Ok(vec![1.0]));
        set(&control, Word::FailAllocation, 0);
        match outcome {
            Ok(_) => break,
            Err(ModelError::Cuda(_)) => refused += 1,
            Err(other) => panic!("{other}"),
        }
        assert!(run.grower.controller() == &before, "allocation {refused}");
    }
    assert!(refused >= 6, "{refused}");
}

#[test]
fn averages_and_sums_find_memory_before_they_change() {
    let Some(device) = device() else { return };
    let Some(control) = control() else { return };
    let there = Place::Cuda(device);
    let mut run = Run::new(&there, routers()[1].clone(), rules().remove(0).1);
    run.advance(0..1);
    let (tokens, targets) = batch(9);
    let mut pass = run
        .model
        .train_pass_at(&there, &tokens, &targets, SEQ)
        .unwrap();
    let mut sum = GradientAccumulator::new();
    set(&control, Word::FailAllocation, 7);
    let outcome = sum.add(&run.model, &mut pass.gradients, 1.0);
    assert!(matches!(outcome, Err(ModelError::Cuda(_))));
    assert_eq!(sum.batches(), 0);
    sum.add(&run.model, &mut pass.gradients, 1.0).unwrap();
    let head = &run.model.head.weight;
    let gradient = pass.gradients.copy(head).unwrap().unwrap();
    sum.mean_into(&run.model, &mut pass.gradients).unwrap();
    assert_eq!(pass.gradients.copy(head).unwrap().unwrap(), gradient);
    // A share is added, and one of another size refused.
    pass.gradients.add(head, &vec![1.0; head.len()]).unwrap();
    let more = pass.gradients.copy(head).unwrap().unwrap();
    assert!(more.iter().zip(&gradient).all(|(m, g)| *m == g + 1.0));
    assert!(pass.gradients.add(head, &[1.0]).is_err());

    // Averages begin at what is on the device, and their own buffers come with the second update.
    let mut ema = Ema::new(0.5).unwrap();
    ema.update(&run.model).unwrap();
    let first = ema.clone();
    set(&control, Word::FailAllocation, 5);
    let outcome = ema.update(&run.model);
    set(&control, Word::FailAllocation, 0);
    assert!(matches!(outcome, Err(ModelError::Cuda(_))));
    assert!(ema == first);
    // The averaged model is scored where it is, and the weights come back.
    let before = get(&control, Word::Downs);
    let weights = run.model.head.weight.clone();
    let score = |model: &LanguageModel| {
        let scored = model.score_at(&there, &tokens, &targets, SEQ, None);
        scored.unwrap().0
    };
    let plain = score(&run.model);
    let averaged = ema.evaluate(&mut run.model, score).unwrap();
    assert_eq!(averaged, plain);
    // Of two layers the offsets, tokens, weights and scores of a plan, and the losses; twice.
    assert_eq!(get(&control, Word::Downs) - before, 18);
    assert_eq!(run.model.head.weight.values(), weights.values());
}
