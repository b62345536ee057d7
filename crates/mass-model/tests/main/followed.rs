//! Averaged weights follow splits.

use dfdx::prelude::NoneTape;
use mass_expand::{BisectParams, ExpertId, SplitOperator};
use mass_model::checkpoint::{self, Snapshot};
use mass_model::growth::{GateShift, Mixtures, remove_expert, split_expert};
use mass_model::lm::LanguageModel;
use mass_model::optim::{AdamW, AdamWConfig, Ema};
use mass_routing::{Combine, RouterConfig};

use crate::growing::{SEQ, batch, model};

const DECAY: f64 = 0.9;

/// A model some steps on, and its average, which lags behind.
fn trained(router: RouterConfig) -> (LanguageModel, AdamW, Ema) {
    let mut model = model(router);
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut ema = Ema::new(DECAY).unwrap();
    for step in 0..6 {
        let (tokens, targets) = batch(step);
        let mut pass = model.train_pass(&tokens, &targets, SEQ).unwrap();
        optimizer
            .step(&mut model, &mut pass.gradients, 3e-2)
            .unwrap();
        ema.update(&model).unwrap();
    }
    (model, optimizer, ema)
}

fn raw(p: f32) -> RouterConfig {
    RouterConfig::TopP {
        p,
        combine: Combine::Raw,
    }
}

fn logits(model: &LanguageModel) -> Vec<f32> {
    let (tokens, _) = batch(0);
    model
        .forward(&tokens, SEQ, None, NoneTape)
        .unwrap()
        .logits
        .as_vec()
}

/// The model with its averages for weights, as a model of its own.
fn averaged(model: &mut LanguageModel, ema: &mut Ema) -> LanguageModel {
    ema.evaluate(model, |m| m.clone()).unwrap()
}

fn operators() -> [SplitOperator; 2] {
    let clone = SplitOperator::Clone {
        decomposition: None,
        preserve_mass: true,
    };
    [SplitOperator::Bisect(BisectParams::default()), clone]
}

/// Splits an expert of the model by the tokens that the model itself routes; twins split alike.
fn split(models: &mut [&mut LanguageModel], id: u32, operator: SplitOperator) -> Vec<GateShift> {
    let (tokens, targets) = batch(0);
    let pass = models[0].train_pass(&tokens, &targets, SEQ).unwrap();
    let split = |model: &mut LanguageModel| {
        let mut own = model.train_pass(&tokens, &targets, SEQ).unwrap();
        let moe = model.mixture_mut(0);
        split_expert(
            moe,
            ExpertId(id),
            operator,
            &pass.layers[0],
            &mut own.gradients,
        )
        .unwrap()
    };
    models.iter_mut().map(|model| split(model)).collect()
}

fn close(found: &[f32], wanted: &[f32], what: &str) {
    let largest = wanted.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    for (a, b) in found.iter().zip(wanted) {
        assert!((a - b).abs() <= 2e-5 * largest, "{what}: {a} and {b}");
    }
    assert_eq!(found.len(), wanted.len());
}

#[test]
fn the_average_after_a_split_is_the_split_of_the_average() {
    for operator in operators() {
        for router in [
            raw(1.0),
            RouterConfig::TopK {
                k: 2,
                combine: Combine::Renormalised,
            },
        ] {
            let (mut model, _, mut ema) = trained(router);
            let mut twin = averaged(&mut model, &mut ema);
            assert_ne!(logits(&twin), logits(&model));
            // Twice, the newcomer too, before the average is looked at.
            split(&mut [&mut model, &mut twin], 1, operator);
            split(&mut [&mut model, &mut twin], 3, operator);
            let found = ema.evaluate(&mut model, logits).unwrap();
            close(&found, &logits(&twin), "right after the split");
            // What a caller does for itself changes nothing, before and after an update.
            let mut adopting = ema.clone();
            adopting.adopt("blocks.0.moe.experts.1", "blocks.0.moe.experts.3");
            assert_eq!(adopting, ema);
            ema.update(&model).unwrap();
            let mut adopting = ema.clone();
            adopting.adopt("blocks.0.moe.experts.1", "blocks.0.moe.experts.3");
            assert_eq!(adopting, ema);
        }
    }
}

#[test]
fn an_average_that_is_adopted_by_name_is_moved_too() {
    let (mut model, _, mut ema) = trained(raw(1.0));
    let mut twin = averaged(&mut model, &mut ema);
    split(
        &mut [&mut model, &mut twin],
        1,
        SplitOperator::Bisect(BisectParams::default()),
    );
    ema.adopt("blocks.0.moe.experts.1", "blocks.0.moe.experts.3");
    close(
        &ema.evaluate(&mut model, logits).unwrap(),
        &logits(&twin),
        "adopted before",
    );
}

#[test]
fn averages_go_on_from_the_split() {
    let (mut model, _, mut ema) = trained(raw(1.0));
    let mut twin = averaged(&mut model, &mut ema);
    split(
        &mut [&mut model, &mut twin],
        1,
        SplitOperator::Bisect(BisectParams::default()),
    );
    let row = |m: &LanguageModel, e: usize| m.mixture(0).experts()[e].gate.values().to_vec();
    ema.update(&model).unwrap();
    for (e, name) in [
        (1, "blocks.0.moe.experts.1.gate"),
        (3, "blocks.0.moe.experts.3.gate"),
    ] {
        let pairs = row(&twin, e).into_iter().zip(row(&model, e));
        let wanted: Vec<f32> = pairs.map(|(s, x)| 0.9 * s + 0.1 * x).collect();
        close(&ema.shadow()[name], &wanted, name);
    }
}

#[test]
fn a_split_that_is_undone_is_undone_in_the_average() {
    let (mut model, _, mut ema) = trained(raw(1.0));
    let before = averaged(&mut model, &mut ema);
    for update_between in [false, true] {
        let mut model = model.clone();
        let mut ema = ema.clone();
        let shift = split(
            &mut [&mut model],
            1,
            SplitOperator::Bisect(BisectParams::default()),
        )
        .remove(0);
        if update_between {
            ema.follow(&model).unwrap();
        }
        remove_expert(model.mixture_mut(0), shift.newcomer, Some(&shift)).unwrap();
        close(
            &ema.evaluate(&mut model, logits).unwrap(),
            &logits(&before),
            "undone",
        );
    }
}

#[test]
fn a_checkpoint_between_a_split_and_the_next_update_loses_nothing() {
    let (mut model, optimizer, mut ema) = trained(raw(1.0));
    split(
        &mut [&mut model],
        1,
        SplitOperator::Bisect(BisectParams::default()),
    );
    let dir = tempfile::tempdir().unwrap();
    let snapshot = Snapshot {
        step: 6,
        model: &model,
        optimizer: &optimizer,
        ema: Some(&ema),
        state: &(),
    };
    checkpoint::save(dir.path(), &snapshot).unwrap();
    let read = checkpoint::load::<LanguageModel, ()>(dir.path()).unwrap();
    let (mut restored, mut average) = (read.model, read.ema.unwrap());
    ema.follow(&model).unwrap();
    assert_eq!(average, ema);
    // A split right after the restart is followed as well, and both go on alike.
    for (model, ema) in [(&mut model, &mut ema), (&mut restored, &mut average)] {
        split(
            &mut [model],
            0,
            SplitOperator::Bisect(BisectParams::default()),
        );
        ema.update(model).unwrap();
    }
    assert_eq!(average, ema);
}
