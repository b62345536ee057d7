//! Grows a top-1 mixture of linear experts in plain ndarray, with no tensor library: every 100 steps the expert with the
//! largest share of the loss is bisected, and a held-out check 50 steps later keeps the newcomer or takes it back. What is printed with
//! each decision is the held-out loss before it, which a newcomer that is taken back has raised.
use mass_expand::*;
use ndarray::{Array1, Array2, ArrayView1, Axis, s};
use ndarray_rand::{RandomExt, rand::SeedableRng, rand_distr::StandardNormal};
use rand_chacha::ChaCha8Rng;

const TOKENS: usize = 240;

/// Tokens and targets.
type Batch = (Array2<f32>, Array1<f32>);

/// Name, weights, and gate row followed by the logit offset.
type Expert = (ExpertId, Array1<f32>, Array1<f32>);

/// Tokens around six points of a circle, each point with a linear target of its own; the last entry is constant.
fn batch(rng: &mut ChaCha8Rng) -> Batch {
    let mut x = Array2::<f32>::random_using((TOKENS, 3), StandardNormal, rng) * 0.4f32;
    let targets = x.rows_mut().into_iter().enumerate().map(|(t, mut x)| {
        x[0] += 3.0 * ((t % 6) as f32).cos();
        x[1] += 3.0 * ((t % 6) as f32).sin();
        x[2] = 1.0;
        [2.0, -1.0, 3.0, -3.0, 1.0, -2.0][t % 6] * (x[0] - x[1])
    });
    let y = targets.collect();
    (x, y)
}

/// The expert of each token and its error, with `out` masked.
fn forward(pool: &[Expert], (x, y): &Batch, out: Option<ExpertId>) -> Vec<(usize, f32)> {
    let route = |x: ArrayView1<f32>| {
        let open = (0..pool.len()).filter(|&k| Some(pool[k].0) != out);
        let best = open.max_by(|&a, &b| pool[a].2.dot(&x).total_cmp(&pool[b].2.dot(&x)));
        best.expect("an expert that is not masked")
    };
    let error = |(x, y): (ArrayView1<f32>, &f32)| (route(x), pool[route(x)].1.dot(&x) - y);
    x.rows().into_iter().zip(y).map(error).collect()
}

/// Squared error of each token.
fn losses(pool: &[Expert], batch: &Batch, out: Option<ExpertId>) -> Vec<f64> {
    let routed = forward(pool, batch, out);
    routed.iter().map(|r| f64::from(r.1 * r.1)).collect()
}

fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

fn main() -> Result<(), ExpandError> {
    let rng = &mut ChaCha8Rng::seed_from_u64(0);
    let params = ControllerParams::calibrated(1, 2, 16, 20_000).with_schedule(100, 100);
    let mut controller = params.check()?;
    let mut random = || Array1::random_using(3, StandardNormal, rng);
    let start = |&id: &ExpertId| (id, Array1::zeros(3), random());
    let mut pool: Vec<Expert> = controller.active(0).iter().map(start).collect();
    let probe = batch(rng);
    for step in 0..3000 {
        let tokens = batch(rng);
        let routed = forward(&pool, &tokens, None);
        let loss: f64 = routed.iter().map(|r| f64::from(r.1 * r.1)).sum();
        let mut experts = Vec::new();
        for (k, (id, weight, _)) in pool.iter_mut().enumerate() {
            let of = |r: &(usize, f32)| if r.0 == k { r.1 } else { 0.0 };
            let errors = Array1::from_iter(routed.iter().map(of));
            let gradient = errors.dot(&tokens.0) / TOKENS as f32;
            let load = routed.iter().filter(|r| r.0 == k).count() as u64;
            let norm = gradient.dot(&gradient).sqrt();
            let mut observed = ExpertObservation::new(*id, norm.into(), load);
            observed.loss_share = Some(f64::from(errors.dot(&errors)) / loss);
            experts.push(observed);
            weight.scaled_add(-0.2, &gradient);
        }
        let layers = [LayerObservation::new(&experts, 1, 3)];
        for request in controller.begin_step(&StepObservation::new(step, loss, &layers))? {
            if let Request::ProbeLoss { layer, expert } = request {
                let masked = losses(&pool, &probe, Some(expert));
                let full = losses(&pool, &probe, None);
                controller.answer(Answer::probe(layer, expert, &masked, &full)?)?;
            }
        }
        for action in controller.finish_step()? {
            println!(
                "step {step}, held-out loss {:.3}: {action:?}",
                mean(&losses(&pool, &probe, None))
            );
            #[rustfmt::skip]
            let Action::Split { source, newcomer, .. } = action else {
                pool.retain(|e| controller.active(0).contains(&e.0));
                continue;
            };
            let k = pool.iter().position(|e| e.0 == source).expect("active");
            let mine: Vec<usize> = (0..TOKENS).filter(|&t| routed[t].0 == k).collect();
            let (x, gate) = (tokens.0.select(Axis(0), &mine), pool[k].2.to_vec());
            let (x, cut) = (x.slice(s![.., ..2]), BisectParams::default());
            let halves = bisect(x, &gate[..2], gate[2], cut)?;
            let row = |row: Vec<f32>, offset| Array1::from_iter(row.into_iter().chain([offset]));
            pool[k].2 = row(halves.source_row, halves.source_offset);
            let gate = row(halves.newcomer_row, halves.newcomer_offset);
            pool.push((newcomer, pool[k].1.clone(), gate));
        }
    }
    let loss = mean(&losses(&pool, &probe, None));
    println!("{} experts, held-out loss {loss:.3}", pool.len());
    Ok(())
}
