//! What AdamW does step by step, worked by hand, and what it leaves alone.

use dfdx::prelude::*;
use mass_expand::Moments;
use mass_model::nn::{MoeConfig, MoeLayer};
use mass_model::optim::{AdamW, AdamWConfig, GradientAccumulator, ParameterState};
use mass_model::{Activation, CpuGradients, Param, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};

/// Named single values.
struct Values(Vec<(&'static str, Param)>);

impl Values {
    fn of(names: &[&'static str]) -> Self {
        let one = |name: &&'static str| (*name, Param::ones(&[1], true).unwrap());
        Self(names.iter().map(one).collect())
    }

    fn value(&self, i: usize) -> f32 {
        self.0[i].1.values()[0]
    }
}

impl Parameters for Values {
    fn visit<'a>(&'a self, _: &str, f: &mut dyn FnMut(String, &'a Param)) {
        self.0.iter().for_each(|(name, p)| f((*name).into(), p));
    }
    fn visit_mut(&mut self, _: &str, f: &mut dyn FnMut(String, &mut Param)) {
        self.0.iter_mut().for_each(|(name, p)| f((*name).into(), p));
    }
}

/// One step with these gradients; `None` for a parameter that took no part.
fn step(optimizer: &mut AdamW, values: &mut Values, gradients: &[Option<f32>]) {
    let mut all = CpuGradients::leaky();
    for ((_, param), gradient) in values.0.iter().zip(gradients) {
        if let Some(g) = gradient {
            param.set_gradient(&mut all, vec![*g]).unwrap();
        }
    }
    optimizer.step(values, &mut all, 0.1).unwrap();
}

fn close(found: f32, wanted: f64) {
    assert!(
        (f64::from(found) - wanted).abs() < 2e-6,
        "{found}, not {wanted}"
    );
}

// Gradients 1, -2, 0.5, 0 from a value of 1, at rate 0.1, decay 0.01, betas 0.9 and 0.999: by the formula, in Python.
const BY_HAND: [f64; 4] = [0.899000001, 0.934711353, 0.947445708, 0.957695130];
// A gradient of 3 twice, from a value of 1 and nothing before.
const LATE: [f64; 2] = [0.899000000, 0.798101001];
const GRADIENTS: [f32; 4] = [1.0, -2.0, 0.5, 0.0];

#[test]
fn four_steps_are_those_worked_by_hand() {
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut values = Values::of(&["a"]);
    for (t, (g, wanted)) in GRADIENTS.into_iter().zip(BY_HAND).enumerate() {
        step(&mut optimizer, &mut values, &[Some(g)]);
        close(values.value(0), wanted);
        assert_eq!(optimizer.state()["a"].step, t as u64 + 1);
    }
}

#[test]
fn a_late_newcomer_has_a_bias_correction_of_its_own() {
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut values = Values::of(&["a"]);
    for g in GRADIENTS {
        step(&mut optimizer, &mut values, &[Some(g)]);
    }
    values.0.push(("late", Param::ones(&[1], true).unwrap()));
    for wanted in LATE {
        step(&mut optimizer, &mut values, &[Some(0.0), Some(3.0)]);
        // With the corrections of the fifth and sixth step, the first update would be a quarter of this.
        close(values.value(1), wanted);
    }
    assert_eq!(optimizer.state()["late"].step, 2);
    assert_eq!(optimizer.state()["a"].step, 6);
    // One that inherits its source's moments goes on where the source is.
    values.0.push(("heir.w", Param::ones(&[1], true).unwrap()));
    let state = optimizer.state()["late"].clone();
    let mut all = optimizer.state().clone();
    all.insert("source.w".into(), state.clone());
    optimizer.restore(all).unwrap();
    optimizer.adopt("source", "heir", Moments::Inherit);
    step(&mut optimizer, &mut values, &[None, None, Some(3.0)]);
    assert_eq!(optimizer.state()["heir.w"].step, 3);
    let ParameterState { m, .. } = &optimizer.state()["heir.w"];
    close(m[0], 0.9 * f64::from(state.m[0]) + 0.3);
}

#[test]
fn a_parameter_without_a_gradient_stays_as_it_is_to_the_bit() {
    let mut optimizer = AdamW::new(AdamWConfig::default().decaying_everything()).unwrap();
    let mut values = Values::of(&["a", "b"]);
    // Never met: no state is made for it.
    step(&mut optimizer, &mut values, &[Some(1.0), None]);
    assert_eq!((values.value(1), optimizer.state().len()), (1.0, 1));
    step(&mut optimizer, &mut values, &[Some(1.0), Some(2.0)]);
    let (before, state) = (values.value(1), optimizer.state()["b"].clone());
    for _ in 0..3 {
        step(&mut optimizer, &mut values, &[Some(-1.0), None]);
        assert_eq!(values.value(1).to_bits(), before.to_bits());
        assert_eq!(optimizer.state()["b"], state);
    }
    // A gradient of zero is one: it decays, moves on by momentum, and counts.
    step(&mut optimizer, &mut values, &[Some(1.0), Some(0.0)]);
    assert!(values.value(1) < before);
    assert_eq!(optimizer.state()["b"].step, state.step + 1);
    // One that was cleared is none.
    let mut gradients = CpuGradients::leaky();
    let param = &values.0[0].1;
    assert!(param.find_gradient(&mut gradients).unwrap().is_none());
    param.set_gradient(&mut gradients, vec![0.0]).unwrap();
    assert!(param.set_gradient(&mut gradients, vec![0.0; 2]).is_err());
    assert!(param.find_gradient(&mut gradients).unwrap().is_some());
    param.clear_gradient(&mut gradients).unwrap();
    assert!(param.find_gradient(&mut gradients).unwrap().is_none());
}

/// A layer, and its gradients for inputs that leave the experts of `idle` without tokens.
fn pass(layer: &MoeLayer, idle: &[usize]) -> CpuGradients {
    let mask: Vec<bool> = (0..layer.experts().len())
        .map(|e| !idle.contains(&e))
        .collect();
    let values = (0..6 * 4)
        .map(|i| ((i * 7) % 5) as f32 * 0.3 - 0.5)
        .collect::<Vec<_>>();
    let x = Cpu::default().tensor_from_vec(values, (6, 4));
    let routed = layer.forward_routed(x.leaky_traced(), Some(&mask)).unwrap();
    idle.iter()
        .for_each(|&e| assert_eq!(routed.plan.load(e), 0));
    routed.output.square().mean().backward()
}

fn layer(gated: bool) -> MoeLayer {
    let router = RouterConfig::TopP {
        p: 0.9,
        combine: Combine::Raw,
    };
    let config = MoeConfig {
        gated,
        ..MoeConfig::new(4, 6, 3, Activation::Silu, router)
    };
    MoeLayer::new(&config, &mut seeded_rng(3)).unwrap()
}

fn values_of(layer: &MoeLayer) -> Vec<(String, Vec<f32>)> {
    let mut all = Vec::new();
    layer.visit("", &mut |name, p| all.push((name, p.values().to_vec())));
    all
}

#[test]
fn an_expert_without_tokens_is_passed_over_but_for_its_gate_row() {
    for (gated, idle) in [(false, vec![1]), (true, vec![0, 2])] {
        let mut layer = layer(gated);
        let mut optimizer = AdamW::new(AdamWConfig::default().decaying_everything()).unwrap();
        let mut gradients = pass(&layer, &[]);
        optimizer.step(&mut layer, &mut gradients, 0.1).unwrap();
        let (before, state) = (values_of(&layer), optimizer.state().clone());
        let mut gradients = pass(&layer, &idle);
        optimizer.step(&mut layer, &mut gradients, 0.1).unwrap();
        for ((name, before), (_, after)) in before.iter().zip(values_of(&layer)) {
            let is_idle = idle
                .iter()
                .any(|e| name.starts_with(&format!("experts.{e}.")));
            let stays = is_idle && !name.ends_with(".gate");
            assert_eq!(*before == after, stays, "{name}");
            assert_eq!(state[name] == optimizer.state()[name], stays, "{name}");
        }
    }
}

#[test]
fn one_pass_in_which_an_expert_has_tokens_is_enough() {
    let layer = layer(true);
    let fc1 = |e: usize| &layer.experts()[e].network.fc1.0;
    // Both passes into one set of gradients: the idle expert's from the first stay.
    let mut first = pass(&layer, &[]);
    let alone = fc1(1).gradient(&mut first).unwrap().clone();
    let mut accumulator = GradientAccumulator::new();
    accumulator.add(&layer, &mut first, 1.0).unwrap();
    let mut second = pass(&layer, &[1, 2]);
    assert!(fc1(1).find_gradient(&mut second).unwrap().is_none());
    accumulator.add(&layer, &mut second, 3.0).unwrap();
    accumulator.mean_into(&layer, &mut second).unwrap();
    // A quarter of the rows had tokens for it.
    let mean = fc1(1).find_gradient(&mut second).unwrap().unwrap();
    for (mean, alone) in mean.iter().zip(&alone) {
        assert!((mean - alone * 0.25).abs() < 1e-7);
    }
    // No tokens in any of them: no gradient of their mean.
    for _ in 0..2 {
        accumulator
            .add(&layer, &mut pass(&layer, &[1]), 2.0)
            .unwrap();
    }
    let mut mean = pass(&layer, &[]);
    accumulator.mean_into(&layer, &mut mean).unwrap();
    assert!(fc1(1).find_gradient(&mut mean).unwrap().is_none());
    assert!(fc1(0).find_gradient(&mut mean).unwrap().is_some());
}
