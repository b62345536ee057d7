//! Grows a top-1 mixture of linear experts in plain ndarray, with no tensor library: every 100 steps the expert with the
//! largest share of the loss is bisected, and a held-out check 60 steps later keeps the newcomer or takes it back.
use mass_expand::*;
use ndarray::{Array1, Array2, ArrayView1, Axis};
use ndarray_rand::{RandomExt, rand::SeedableRng, rand_distr::StandardNormal};
use rand_chacha::ChaCha8Rng;

struct Expert {
    id: ExpertId,
    weight: Array1<f32>,
    gate: Array1<f32>,
    offset: f32,
}

/// Tokens (with a constant last entry) around six points of a circle, each with a linear target of its own.
fn batch(rng: &mut ChaCha8Rng) -> (Array2<f32>, Array1<f32>) {
    let mut x = Array2::<f32>::random_using((240, 3), StandardNormal, rng) * 0.4f32;
    let y = (0..240).map(|t| {
        let (sin, cos) = ((t % 6) as f32).sin_cos();
        x[[t, 0]] += 3.0 * cos;
        x[[t, 1]] += 3.0 * sin;
        x[[t, 2]] = 1.0;
        [2.0, -1.0, 3.0, -3.0, 1.0, -2.0][t % 6] * (x[[t, 0]] - x[[t, 1]])
    });
    let y = y.collect();
    (x, y)
}

/// The expert of each token and its error, with `masked` left out.
fn forward(
    pool: &[Expert],
    x: &Array2<f32>,
    y: &Array1<f32>,
    masked: Option<ExpertId>,
) -> Vec<(usize, f32)> {
    let logit = |e: &Expert, x: ArrayView1<f32>| e.gate.dot(&x) + e.offset;
    let one = |(x, &y): (ArrayView1<f32>, &f32)| {
        let open = (0..pool.len()).filter(|&k| Some(pool[k].id) != masked);
        let best = open.max_by(|&a, &b| logit(&pool[a], x).total_cmp(&logit(&pool[b], x)));
        best.map(|k| (k, pool[k].weight.dot(&x) - y))
    };
    x.rows().into_iter().zip(y).filter_map(one).collect()
}

fn main() -> Result<(), ExpandError> {
    let rng = &mut ChaCha8Rng::seed_from_u64(0);
    let mut params = ControllerParams::ours(1, 2, 16, 20_000).with_schedule(100, 100);
    params.stop = StopRule::HeldOut {
        margin: 0.02,
        z: 2.0,
        wait: 60,
        patience: 2,
        remove: true,
    };
    let mut controller = params.check()?;
    let start = |&id: &ExpertId| {
        let gate = Array1::random_using(3, StandardNormal, rng);
        Expert {
            id,
            weight: Array1::zeros(3),
            gate,
            offset: 0.0,
        }
    };
    let mut pool: Vec<Expert> = controller.active(0).iter().map(start).collect();
    let (probe_x, probe_y) = batch(rng);
    let squares = |routed: Vec<(usize, f32)>| -> Vec<f64> {
        routed.iter().map(|r| f64::from(r.1 * r.1)).collect()
    };
    for step in 0..3000 {
        let (x, y) = batch(rng);
        let routed = forward(&pool, &x, &y, None);
        let mut gradients = vec![Array1::<f32>::zeros(3); pool.len()];
        let (mut load, mut loss) = (vec![0; pool.len()], vec![0.0; pool.len()]);
        for (x, &(k, error)) in x.rows().into_iter().zip(&routed) {
            gradients[k].scaled_add(error / 240.0, &x);
            load[k] += 1;
            loss[k] += f64::from(error * error) / 240.0;
        }
        let total: f64 = loss.iter().sum();
        let observe = |(k, e): (usize, &Expert)| ExpertObservation {
            id: e.id,
            gradient_norm: f64::from(gradients[k].dot(&gradients[k]).sqrt()),
            cosine: None,
            load: load[k],
            loss_share: Some(loss[k] / total),
            routing_entropy: None,
        };
        let experts: Vec<_> = pool.iter().enumerate().map(observe).collect();
        let layers = [LayerObservation {
            experts: &experts,
            hidden: 1,
            dim: 3,
        }];
        for request in controller.begin_step(&StepObservation {
            step,
            loss: total,
            layers: &layers,
        })? {
            if let Request::ProbeLoss { layer, expert } = request {
                let masked = squares(forward(&pool, &probe_x, &probe_y, Some(expert)));
                let full = squares(forward(&pool, &probe_x, &probe_y, None));
                controller.answer(Answer::probe(layer, expert, &masked, &full)?)?;
            }
        }
        for action in controller.finish_step()? {
            println!(
                "step {step}, loss {total:.4}, {} experts: {action:?}",
                pool.len()
            );
            match action {
                Action::Split {
                    source, newcomer, ..
                } => {
                    let k = controller
                        .active(0)
                        .iter()
                        .position(|&id| id == source)
                        .unwrap_or(0);
                    let mine: Vec<usize> = (0..240).filter(|&t| routed[t].0 == k).collect();
                    let old = &mut pool[k];
                    let halves = bisect(
                        x.select(Axis(0), &mine).view(),
                        &old.gate.to_vec(),
                        old.offset,
                        BisectParams::default(),
                    )?;
                    (old.gate, old.offset) = (halves.source_row.into(), halves.source_offset);
                    let (gate, offset) = (halves.newcomer_row.into(), halves.newcomer_offset);
                    let weight = old.weight.clone();
                    pool.push(Expert {
                        id: newcomer,
                        weight,
                        gate,
                        offset,
                    });
                }
                Action::Remove { expert, .. } => pool.retain(|e| e.id != expert),
                _ => {}
            }
        }
        let routed = forward(&pool, &x, &y, None);
        for (x, (k, error)) in x.rows().into_iter().zip(routed) {
            pool[k].weight.scaled_add(-0.2 * error / 240.0, &x);
        }
    }
    println!(
        "{} experts, held-out loss {:.4}",
        pool.len(),
        squares(forward(&pool, &probe_x, &probe_y, None))
            .iter()
            .sum::<f64>()
            / 240.0
    );
    Ok(())
}
