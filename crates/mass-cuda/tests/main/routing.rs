use mass_cuda::kernels::routing::{Plan, Router, backward, backward_thresholds, route};
use mass_cuda::{Buffer, CudaError, Device};
use mass_routing::ndarray::ArrayView2;
use mass_routing::{
    AnyRouter, Combine, Router as _, RoutingError, RoutingPlan, TopAny, TopK, TopP,
};

use super::emulator::{close, device, every_schedule, values};

/// Which experts a token takes and with which weight, by mass-routing's rules, and its scores in double precision.
/// Top-p chooses by the probabilities in single precision, `own`: ties and masses that are met exactly are a matter
/// of their last bits.
fn choose(
    logits: &[f32],
    own: &[f32],
    used: &[bool],
    router: &Kind,
) -> (Vec<f64>, Vec<(usize, f64)>) {
    let k = logits.len();
    let max = (0..k)
        .filter(|&e| used[e])
        .map(|e| f64::from(logits[e]))
        .fold(f64::MIN, f64::max);
    let of = |e: usize| {
        if used[e] {
            (f64::from(logits[e]) - max).exp()
        } else {
            0.0
        }
    };
    let total: f64 = (0..k).map(of).sum();
    let probs: Vec<f64> = (0..k).map(|e| of(e) / total).collect();
    // Descending, ties to the lower index.
    let mut order: Vec<usize> = (0..k).filter(|&e| used[e]).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    let sigmoid = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
    let (mut chosen, renormalise): (Vec<usize>, bool) = match router {
        Kind::TopP(p, renormalise) => {
            let mut mass = 0.0;
            order.sort_by(|&a, &b| own[b].total_cmp(&own[a]).then(a.cmp(&b)));
            let take = order.iter().take_while(|&&e| {
                let more = (mass < f64::from(*p) || *p >= 1.0) && own[e] > 0.0;
                mass += f64::from(own[e]);
                more
            });
            (take.copied().collect(), *renormalise)
        }
        Kind::TopK(k, renormalise) => (order[..*k].to_vec(), *renormalise),
        Kind::TopAny(thresholds, training) => {
            let mut active: Vec<usize> = (0..k)
                .filter(|&e| used[e] && logits[e] > thresholds[e])
                .collect();
            if active.is_empty() && !training {
                active.push(order[0]);
            }
            let n = active.len() as f64;
            let scores = (0..k).map(|e| {
                if used[e] && logits[e] > thresholds[e] {
                    sigmoid(logits[e])
                } else {
                    0.0
                }
            });
            return (
                scores.collect(),
                active.into_iter().map(|e| (e, 1.0 / n)).collect(),
            );
        }
    };
    chosen.sort_unstable();
    let sum: f64 = if renormalise {
        chosen.iter().map(|&e| probs[e]).sum()
    } else {
        1.0
    };
    let weights = chosen.iter().map(|&e| (e, probs[e] / sum)).collect();
    (probs, weights)
}

enum Kind {
    TopP(f32, bool),
    TopK(usize, bool),
    TopAny(Vec<f32>, bool),
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn routed(
    device: &Device,
    logits: &[f32],
    used: Option<&[bool]>,
    k: usize,
    kind: &Kind,
) -> Result<Plan, CudaError> {
    let logits = Buffer::from_slice(device, logits)?;
    let used = used
        .map(|u| Buffer::from_slice(device, &u.iter().map(|&b| u32::from(b)).collect::<Vec<_>>()))
        .transpose()?;
    let bounds = match kind {
        Kind::TopAny(thresholds, _) => Buffer::from_slice(
            device,
            &thresholds.iter().map(|&t| sigmoid(t)).collect::<Vec<_>>(),
        )?,
        _ => Buffer::zeros(device, k)?,
    };
    let router = match *kind {
        Kind::TopP(p, renormalise) => Router::TopP { p, renormalise },
        Kind::TopK(k, renormalise) => Router::TopK { k, renormalise },
        Kind::TopAny(_, training) => Router::TopAny {
            bounds: bounds.view(),
            training,
        },
    };
    route(
        device,
        logits.view(),
        k,
        used.as_ref().map(Buffer::view),
        router,
    )
}

/// Logits on a coarse grid, so that there are many ties.
fn tied(n: usize, k: usize) -> Vec<f32> {
    values(n * k, 5).iter().map(|x| (x * 4.0).round()).collect()
}

#[test]
fn plans_are_those_of_the_host() {
    on_device!();
    for (n, k) in [
        (0, 3),
        (1, 1),
        (5, 4),
        (256, 16),
        (600, 7),
        (300, 33),
        (40, 300),
    ] {
        let masked: Vec<bool> = (0..k).map(|e| e % 3 != 1).collect();
        let thresholds: Vec<f32> = (0..k).map(|e| 0.5 + (e % 3) as f32).collect();
        let kinds = [
            Kind::TopP(0.5, false),
            Kind::TopP(0.93, true),
            Kind::TopP(1.0, false),
            Kind::TopK(1, true),
            Kind::TopK(2.min(k), false),
            Kind::TopK(2.min(k), true),
            Kind::TopAny(thresholds.clone(), true),
            Kind::TopAny(thresholds, false),
        ];
        for logits in [
            tied(n, k),
            values(n * k, 6).iter().map(|x| 5.0 * x).collect(),
        ] {
            for kind in &kinds {
                for used in [None, Some(&masked[..])] {
                    if matches!(kind, Kind::TopK(want, _) if used.is_some_and(|u| u.iter().filter(|u| **u).count() < *want))
                    {
                        continue;
                    }
                    compare(&logits, used, (n, k), kind);
                }
            }
        }
    }
}

fn compare(logits: &[f32], used: Option<&[bool]>, (n, k): (usize, usize), kind: &Kind) {
    let device = device();
    let plan = routed(&device, logits, used, k, kind).unwrap();
    let all = vec![true; k];
    let own = plan.scores.to_vec().unwrap();
    let (mut by_expert, mut scores) = (vec![Vec::new(); k], Vec::new());
    let mut by_token = Vec::new();
    for t in 0..n {
        let (row, chosen) = choose(
            &logits[t * k..][..k],
            &own[t * k..][..k],
            used.unwrap_or(&all),
            kind,
        );
        scores.extend(row);
        chosen.iter().for_each(|&(e, w)| by_expert[e].push((t, w)));
        by_token.push(chosen);
    }
    let mut offsets = vec![0_u32];
    by_expert
        .iter()
        .for_each(|list| offsets.push(offsets[offsets.len() - 1] + list.len() as u32));
    assert_eq!(plan.expert_offsets, offsets);
    assert_eq!(
        plan.expert_offsets_on_device
            .view()
            .range(0..k + 1)
            .unwrap()
            .to_vec()
            .unwrap(),
        offsets
    );
    let flat: Vec<(usize, f64)> = by_expert.concat();
    assert_eq!(
        plan.tokens.to_vec().unwrap(),
        flat.iter().map(|x| x.0 as u32).collect::<Vec<_>>()
    );
    close(
        "weights",
        &plan.weights.to_vec().unwrap(),
        &flat.iter().map(|x| x.1).collect::<Vec<_>>(),
        1e-6,
    );
    close("scores", &plan.scores.to_vec().unwrap(), &scores, 1e-6);
    let (token_offsets, assignments) = (
        plan.token_offsets.to_vec().unwrap(),
        plan.token_assignments.to_vec().unwrap(),
    );
    let experts = plan.token_experts.to_vec().unwrap();
    assert_eq!(token_offsets.len(), n + 1);
    let mut cursors = offsets.clone();
    let mut at = 0;
    for (t, chosen) in by_token.iter().enumerate() {
        assert_eq!(token_offsets[t] as usize, at);
        for &(e, _) in chosen {
            assert_eq!((assignments[at], experts[at] as usize), (cursors[e], e));
            cursors[e] += 1;
            at += 1;
        }
    }
    assert_eq!(token_offsets[n] as usize, at);
    assert_eq!(plan.num_assignments(), at);
}

#[test]
fn gradients_of_weights_reach_the_logits() {
    on_device!();
    let (n, k) = (300, 9);
    let logits: Vec<f32> = values(n * k, 6).iter().map(|x| 3.0 * x).collect();
    let thresholds: Vec<f32> = (0..k).map(|e| 0.3 * e as f32 - 1.0).collect();
    for kind in [
        Kind::TopP(0.8, false),
        Kind::TopP(0.8, true),
        Kind::TopK(3, true),
        Kind::TopAny(thresholds.clone(), false),
    ] {
        let mut wanted = vec![0.25; n * k];
        let mut wanted_thresholds = vec![0.5; k];
        let results = every_schedule(|device| {
            let plan = routed(device, &logits, None, k, &kind).unwrap();
            let d = Buffer::from_slice(device, &values(plan.num_assignments(), 8)).unwrap();
            let mut dlogits = Buffer::from_slice(device, &vec![0.25; n * k]).unwrap();
            backward(device, &plan, d.view(), dlogits.view_mut()).unwrap();
            let mut dt = Buffer::from_slice(device, &vec![0.5; k]).unwrap();
            let bounds = Buffer::from_slice(
                device,
                &thresholds.iter().map(|&t| sigmoid(t)).collect::<Vec<_>>(),
            )
            .unwrap();
            let of_thresholds =
                backward_thresholds(device, &plan, d.view(), bounds.view(), dt.view_mut());
            assert_eq!(of_thresholds.is_ok(), matches!(kind, Kind::TopAny(..)));
            vec![
                dlogits.to_vec().unwrap(),
                dt.to_vec().unwrap(),
                d.to_vec().unwrap(),
                plan.token_assignments
                    .to_vec()
                    .unwrap()
                    .iter()
                    .map(|&a| a as f32)
                    .collect(),
                plan.scores.to_vec().unwrap(),
            ]
        });
        let mut at = 0;
        for t in 0..n {
            let (scores, chosen) = choose(
                &logits[t * k..][..k],
                &results[4][t * k..][..k],
                &vec![true; k],
                &kind,
            );
            let g: Vec<f64> = chosen
                .iter()
                .map(|_| {
                    at += 1;
                    f64::from(results[2][results[3][at - 1] as usize])
                })
                .collect();
            let dot: f64 = chosen.iter().zip(&g).map(|((_, w), g)| w * g).sum();
            let row = &mut wanted[t * k..][..k];
            match &kind {
                Kind::TopAny(thresholds, _) => {
                    for (&(e, w), g) in chosen.iter().zip(&g) {
                        row[e] += g * w * scores[e] * (1.0 - scores[e]);
                        if scores[e] > 0.0 {
                            let s = 1.0 / (1.0 + (-f64::from(thresholds[e])).exp());
                            wanted_thresholds[e] -= g * w * s * (1.0 - s);
                        }
                    }
                }
                Kind::TopP(_, true) | Kind::TopK(_, true) => chosen
                    .iter()
                    .zip(&g)
                    .for_each(|(&(e, w), g)| row[e] += w * (g - dot)),
                _ => {
                    row.iter_mut().zip(&scores).for_each(|(d, r)| *d -= r * dot);
                    chosen
                        .iter()
                        .zip(&g)
                        .for_each(|(&(e, w), g)| row[e] += w * g);
                }
            }
        }
        close("logits", &results[0], &wanted, 1e-6);
        close("thresholds", &results[1], &wanted_thresholds, 1e-5);
    }
}

#[test]
fn logits_that_are_not_finite_and_settings_that_make_no_sense_are_refused() {
    on_device!();
    let device = device();
    let (n, k) = (600, 5);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for kind in [
            Kind::TopP(0.5, false),
            Kind::TopK(2, true),
            Kind::TopAny(vec![0.0; 5], true),
        ] {
            let mut logits = values(n * k, 1);
            logits[k * 599 + 1] = bad;
            logits[k * 301 + 4] = bad;
            let error = routed(&device, &logits, None, k, &kind).unwrap_err();
            assert_eq!(error, CudaError::NonFiniteLogit { token: 301 });
            // A masked expert's logit does not matter.
            let used = [true, false, true, true, false];
            routed(&device, &logits, Some(&used), k, &kind).unwrap();
        }
    }
    for kind in [
        Kind::TopP(0.0, false),
        Kind::TopP(1.1, false),
        Kind::TopP(f32::NAN, true),
        Kind::TopK(0, true),
        Kind::TopK(6, true),
    ] {
        assert!(matches!(
            routed(&device, &[0.0; 10], None, 5, &kind),
            Err(CudaError::Setting { .. })
        ));
    }
    assert!(matches!(
        routed(&device, &[0.0; 9], None, 5, &Kind::TopK(1, true)),
        Err(CudaError::Length { .. })
    ));
    assert!(matches!(
        routed(&device, &[], None, 0, &Kind::TopK(1, true)),
        Err(CudaError::Setting { .. })
    ));
}

/// mass-routing itself, with the same settings.
fn try_host(
    logits: &[f32],
    used: Option<&[bool]>,
    (n, k): (usize, usize),
    kind: &Kind,
) -> Result<RoutingPlan, RoutingError> {
    let combine = |renormalise: &bool| match renormalise {
        true => Combine::Renormalised,
        false => Combine::Raw,
    };
    let mut router = match kind {
        Kind::TopP(p, renormalise) => AnyRouter::TopP(TopP::new(*p, combine(renormalise)).unwrap()),
        Kind::TopK(k, renormalise) => AnyRouter::TopK(TopK::new(*k, combine(renormalise)).unwrap()),
        Kind::TopAny(thresholds, training) => {
            let mut router = TopAny::new(thresholds.clone()).unwrap();
            router.set_training(*training);
            AnyRouter::TopAny(router)
        }
    };
    let mut plan = RoutingPlan::default();
    let logits = ArrayView2::from_shape((n, k), logits).unwrap();
    router.route(logits, used, &mut plan)?;
    Ok(plan)
}

#[test]
fn plans_are_those_of_mass_routing() {
    on_device!();
    let device = device();
    for (n, k) in [(1, 1), (33, 3), (512, 16), (300, 40), (100, 128), (64, 200)] {
        let masked: Vec<bool> = (0..k).map(|e| e % 3 != 1).collect();
        let kinds = [
            Kind::TopP(0.5, false),
            Kind::TopP(0.9, true),
            Kind::TopP(1.0, true),
            Kind::TopK(2.min(k), true),
            Kind::TopK(1, false),
            Kind::TopAny(vec![0.5; k], false),
        ];
        let spread: Vec<f32> = values(n * k, 6).iter().map(|x| 5.0 * x).collect();
        for (logits, distinct) in [(tied(n, k), false), (spread, true)] {
            for kind in &kinds {
                for used in [None, Some(&masked[..])] {
                    // Where a sum is met exactly but for rounding, the last bits of the softmax decide.
                    let decided = distinct || matches!(kind, Kind::TopK(..) | Kind::TopAny(..));
                    let few = used.is_some_and(|u| u.iter().filter(|u| **u).count() < 2);
                    if !decided || (few && matches!(kind, Kind::TopK(2, _))) {
                        continue;
                    }
                    let plan = routed(&device, &logits, used, k, kind).unwrap();
                    let host = try_host(&logits, used, (n, k), kind).unwrap();
                    assert_eq!(plan.expert_offsets, host.expert_offsets(), "{n} {k}");
                    assert_eq!(plan.tokens.to_vec().unwrap(), host.tokens());
                    assert_eq!(plan.token_offsets.to_vec().unwrap(), host.token_offsets());
                    assert_eq!(
                        plan.token_assignments.to_vec().unwrap(),
                        host.token_assignments()
                    );
                    assert_eq!(plan.token_experts.to_vec().unwrap(), host.token_experts());
                    let weights: Vec<f64> = host.weights().iter().map(|&w| w.into()).collect();
                    close("weights", &plan.weights.to_vec().unwrap(), &weights, 3e-7);
                    let d = values(weights.len(), 3);
                    let (mut own, d_device) = (
                        Buffer::zeros(&device, n * k).unwrap(),
                        Buffer::from_slice(&device, &d).unwrap(),
                    );
                    backward(&device, &plan, d_device.view(), own.view_mut()).unwrap();
                    let mut wanted = vec![0.0; n * k];
                    host.backward_slice(&d, &mut wanted).unwrap();
                    let wanted: Vec<f64> = wanted.iter().map(|&w| w.into()).collect();
                    close("gradient of logits", &own.to_vec().unwrap(), &wanted, 1e-6);
                }
            }
        }
    }
}

#[test]
fn straight_through_weights_have_the_gradient_of_raw_ones() {
    on_device!();
    let device = device();
    for (n, k) in [(1, 1), (37, 5), (300, 17)] {
        let logits: Vec<f32> = values(n * k, 6).iter().map(|x| 5.0 * x).collect();
        for kind in [Kind::TopP(0.7, true), Kind::TopK(2.min(k), true)] {
            let plan = routed(&device, &logits, None, k, &kind).unwrap();
            let plan = plan.straight_through().unwrap();
            let combine = Combine::StraightThrough;
            let mut router = match kind {
                Kind::TopP(p, _) => AnyRouter::TopP(TopP::new(p, combine).unwrap()),
                _ => AnyRouter::TopK(TopK::new(2.min(k), combine).unwrap()),
            };
            let mut host = RoutingPlan::default();
            router.route_slice(&logits, k, None, &mut host).unwrap();
            assert_eq!(plan.tokens.to_vec().unwrap(), host.tokens());
            let d = values(host.num_assignments(), 3);
            let mut own = Buffer::zeros(&device, n * k).unwrap();
            let on_device = Buffer::from_slice(&device, &d).unwrap();
            backward(&device, &plan, on_device.view(), own.view_mut()).unwrap();
            let mut wanted = vec![0.0; n * k];
            host.backward_slice(&d, &mut wanted).unwrap();
            let wanted: Vec<f64> = wanted.iter().map(|&w| w.into()).collect();
            close("gradient of logits", &own.to_vec().unwrap(), &wanted, 1e-6);
        }
    }
    // Top-any has a way of its own.
    let plan = routed(
        &device,
        &[1.0, 2.0],
        None,
        2,
        &Kind::TopAny(vec![0.0; 2], false),
    );
    assert!(plan.unwrap().straight_through().is_err());
}

#[test]
fn masks_that_leave_too_few_experts_are_refused_as_by_mass_routing() {
    on_device!();
    let device = device();
    let k = 5;
    let refused = |n: usize, used: &[bool], kind: &Kind| {
        let logits = values(n * k, 4);
        let host = try_host(&logits, Some(used), (n, k), kind).unwrap_err();
        let error = routed(&device, &logits, Some(used), k, kind).unwrap_err();
        match error {
            CudaError::AllExpertsMasked { experts } => {
                assert_eq!(host, RoutingError::AllExpertsMasked { experts });
            }
            CudaError::TooFewExperts { k, available } => {
                assert_eq!(host, RoutingError::TooFewExperts { k, available });
            }
            other => panic!("{n} tokens: {other}"),
        }
        assert_eq!(error.to_string(), host.to_string());
    };
    for n in [0, 1, 300] {
        for kind in [
            Kind::TopP(0.5, false),
            Kind::TopP(1.0, true),
            Kind::TopK(1, true),
            Kind::TopK(3, false),
            Kind::TopAny(vec![0.0; k], false),
            Kind::TopAny(vec![0.0; k], true),
        ] {
            refused(n, &[false; 5], &kind);
        }
        refused(n, &[true, false, false, false, true], &Kind::TopK(3, true));
        let enough = [true, false, true, false, true];
        routed(
            &device,
            &values(n * k, 4),
            Some(&enough),
            k,
            &Kind::TopK(3, true),
        )
        .unwrap();
    }
}
