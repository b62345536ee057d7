//! Expert networks large enough to be computed in several blocks of rows and several pieces of a matrix, against plain loops in
//! double precision.

use dfdx::prelude::*;
use mass_model::kernels::gemm::Store;
use mass_model::kernels::moe_ffn::{
    self, ExpertGradients, ExpertWeights, FfnShape, Grouped, Hidden,
};
use mass_model::nn::FeedForward;
use mass_model::ops::Rows;
use mass_model::{Activation, Param, Parameters, seeded_rng};

/// More rows of each matrix than one piece of its gradient has (64), so that a piece begins past the first row; the second
/// time of a width at which rows are kept apart.
const SHAPES: [(usize, usize); 2] = [(96, 80), (256, 264)];
/// More than a block of rows (of up to 512).
const TOKENS: usize = 700;
const ACTIVATIONS: [Activation; 2] = [Activation::Silu, Activation::Relu];

fn drawn(n: usize, bound: f32, seed: u64) -> Vec<f32> {
    let param = Param::uniform(&[n], bound, false, &mut seeded_rng(seed)).unwrap();
    param.values().to_vec()
}

fn doubled(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn assert_close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        let off = (f64::from(*a) - b).abs();
        assert!(off <= 1e-4 * largest, "{what}[{i}]: {a} against {b}");
    }
}

/// `y = W x + b` in double precision, with the gradients of both.
struct Affine {
    weight: Vec<f64>,
    bias: Vec<f64>,
    d_weight: Vec<f64>,
    d_bias: Vec<f64>,
}

impl Affine {
    fn new(weight: &[f32], bias: &[f32]) -> Self {
        Self {
            weight: doubled(weight),
            bias: doubled(bias),
            d_weight: vec![0.0; weight.len()],
            d_bias: vec![0.0; bias.len()],
        }
    }

    fn forward(&self, x: &[f64]) -> Vec<f64> {
        let rows = self.weight.chunks_exact(x.len()).zip(&self.bias);
        rows.map(|(row, b)| dot(row, x) + b).collect()
    }

    /// Adds to its gradients and to its input's, for the gradient `dy` of its output.
    fn backward(&mut self, x: &[f64], dy: &[f64], dx: &mut [f64]) {
        for (i, d) in dy.iter().enumerate() {
            self.d_bias[i] += d;
            let row = i * x.len()..(i + 1) * x.len();
            let (w, dw) = (&self.weight[row.clone()], &mut self.d_weight[row]);
            for (((dw, dx), w), x) in dw.iter_mut().zip(dx.iter_mut()).zip(w).zip(x) {
                *dw += d * x;
                *dx += d * w;
            }
        }
    }
}

/// An expert with SiLU or ReLU, as the formulas of its kernel say.
struct Expert {
    fc1: Affine,
    fc2: Affine,
    up: Option<Affine>,
    activation: Activation,
}

impl Expert {
    /// From its matrices, each followed by its bias, the factor's last.
    fn new(values: &[Vec<f32>], activation: Activation) -> Self {
        let pair = |i: usize| Affine::new(&values[i], &values[i + 1]);
        Self {
            activation,
            fc1: pair(0),
            fc2: pair(2),
            up: (values.len() > 4).then(|| pair(4)),
        }
    }

    /// Adds the gradients of `weight * <y(x), dy>` and returns `y(x)`.
    fn pass(&mut self, x: &[f64], weight: f64, dy: &[f64], dx: &mut [f64]) -> Vec<f64> {
        let pre = self.fc1.forward(x);
        let factor = match &self.up {
            Some(up) => up.forward(x),
            None => vec![1.0; pre.len()],
        };
        let value_and_slope = |p: &f64| match self.activation {
            Activation::Relu if *p > 0.0 => (*p, 1.0),
            Activation::Relu => (0.0, 0.0),
            _ => {
                let s = 1.0 / (1.0 + (-p).exp());
                (p * s, s * (1.0 + p * (1.0 - s)))
            }
        };
        let (activated, slope): (Vec<f64>, Vec<f64>) = pre.iter().map(value_and_slope).unzip();
        let hidden: Vec<f64> = activated.iter().zip(&factor).map(|(a, u)| a * u).collect();
        let y = self.fc2.forward(&hidden);

        let dy: Vec<f64> = dy.iter().map(|d| weight * d).collect();
        let mut d_hidden = vec![0.0; hidden.len()];
        self.fc2.backward(&hidden, &dy, &mut d_hidden);
        let d_pre = slope.iter().zip(&factor).zip(&d_hidden);
        let d_pre: Vec<f64> = d_pre.map(|((s, u), d)| s * u * d).collect();
        self.fc1.backward(x, &d_pre, dx);
        if let Some(up) = &mut self.up {
            let d_factor = activated.iter().zip(&d_hidden);
            let d_factor: Vec<f64> = d_factor.map(|(a, d)| a * d).collect();
            up.backward(x, &d_factor, dx);
        }
        y
    }

    /// Gradients, in the order of [`new`](Self::new).
    fn gradients(&self) -> Vec<&[f64]> {
        let layers = [&self.fc1, &self.fc2].into_iter().chain(&self.up);
        layers
            .flat_map(|a| [&a.d_weight[..], &a.d_bias[..]])
            .collect()
    }
}

/// Shapes and activations, gated and not.
fn cases() -> impl Iterator<Item = (((usize, usize), Activation), bool)> {
    let shapes = SHAPES.into_iter().flat_map(|s| ACTIVATIONS.map(|a| (s, a)));
    shapes.flat_map(|case| [(case, false), (case, true)])
}

/// A network that has more rows than a block and more features than a piece of a gradient has the gradients of its formula.
#[test]
fn a_network_of_many_rows_has_the_gradients_of_plain_loops() {
    for (case, gated) in cases() {
        let ((dim, hidden), activation) = case;
        let network = FeedForward::new(dim, hidden, activation, gated, &mut seeded_rng(1)).unwrap();
        let (input, upstream) = (drawn(TOKENS * dim, 1.0, 2), drawn(TOKENS * dim, 1.0, 3));
        let dev = Cpu::default();
        let x: Rows<NoneTape> = dev.tensor_from_vec(input.clone(), (TOKENS, dim));
        let dy: Rows<NoneTape> = dev.tensor_from_vec(upstream.clone(), (TOKENS, dim));
        let y = network.try_forward(x.leaky_trace()).unwrap();
        let found = y.as_vec();
        let mut gradients = (y * dy).sum::<Rank0, _>().backward();

        let mut values = Vec::new();
        network.visit("", &mut |_, p| values.push(p.values().to_vec()));
        let mut expert = Expert::new(&values, activation);
        let (input, upstream) = (doubled(&input), doubled(&upstream));
        let (mut wanted, mut dx) = (Vec::new(), vec![0.0; TOKENS * dim]);
        for t in 0..TOKENS {
            let row = t * dim..(t + 1) * dim;
            let (x, dy) = (&input[row.clone()], &upstream[row.clone()]);
            wanted.extend(expert.pass(x, 1.0, dy, &mut dx[row]));
        }
        assert_close("y", &found, &wanted);
        assert_close("dx", &gradients.get(&x).as_vec(), &dx);
        let mut parts = expert.gradients().into_iter();
        network.visit("", &mut |name, p| {
            let what = format!("{name}, gated {gated}, {case:?}");
            let found = p.gradient(&mut gradients).unwrap();
            assert_close(&what, found, parts.next().unwrap());
        });
        assert!(parts.next().is_none());
    }
}

/// Assignments in the form that the kernel takes: grouped by expert, and listed by token.
struct Plan {
    expert_offsets: Vec<u32>,
    tokens: Vec<u32>,
    weights: Vec<f32>,
    token_offsets: Vec<u32>,
    token_assignments: Vec<u32>,
}

impl Plan {
    /// From the tokens of each expert, with weights drawn from (-1, 1).
    fn new(by_expert: &[Vec<u32>]) -> Self {
        let tokens = by_expert.concat();
        let (mut expert_offsets, mut token_offsets) = (vec![0], vec![0]);
        let mut token_assignments = Vec::new();
        let mut end = 0;
        for chosen in by_expert {
            end += chosen.len() as u32;
            expert_offsets.push(end);
        }
        for t in 0..TOKENS as u32 {
            let positions = (0..tokens.len()).filter(|&a| tokens[a] == t);
            token_assignments.extend(positions.map(|a| a as u32));
            token_offsets.push(token_assignments.len() as u32);
        }
        Self {
            weights: drawn(tokens.len(), 1.0, 4),
            expert_offsets,
            tokens,
            token_offsets,
            token_assignments,
        }
    }

    fn grouped(&self) -> Grouped<'_> {
        Grouped {
            expert_offsets: &self.expert_offsets,
            tokens: &self.tokens,
            weights: &self.weights,
            token_offsets: &self.token_offsets,
            token_assignments: &self.token_assignments,
        }
    }
}

fn weights_of(values: &[Vec<f32>]) -> ExpertWeights<'_> {
    let [w1, b1, w2, b2, up @ ..] = values else {
        panic!("{} parts of an expert", values.len());
    };
    ExpertWeights {
        w1,
        b1,
        w2,
        b2,
        up: match up {
            [w, b] => Some((w, b)),
            _ => None,
        },
    }
}

fn gradients_into(values: &mut [Vec<f32>], store: Store) -> ExpertGradients<'_> {
    let [w1, b1, w2, b2, up @ ..] = values else {
        panic!("an expert has at least four parts");
    };
    ExpertGradients {
        w1,
        b1,
        w2,
        b2,
        up: match up {
            [w, b] => Some((w, b)),
            _ => None,
        },
        store,
    }
}

/// Values for each part of three experts.
fn experts_drawn(
    (dim, hidden): (usize, usize),
    gated: bool,
    bound: f32,
    seed: u64,
) -> Vec<Vec<Vec<f32>>> {
    let matrix = dim * hidden;
    let all = [matrix, hidden, matrix, dim, matrix, hidden];
    let sizes = &all[..if gated { 6 } else { 4 }];
    let expert = |e: u64| {
        let seeds = seed + 10 * e..;
        let parts = sizes.iter().zip(seeds);
        parts.map(|(&n, seed)| drawn(n, bound, seed)).collect()
    };
    (0..3).map(expert).collect()
}

/// A crowded expert, one without tokens and one that begins in the middle of the plan have the gradients of their formula, which
/// replace whatever was there or are added to it.
#[test]
fn experts_of_uneven_load_have_the_gradients_of_plain_loops() {
    // Most tokens, none and a seventh; some tokens have two experts, and some have none.
    let of = |keep: fn(&u32) -> bool| (0..TOKENS as u32).filter(keep).collect::<Vec<u32>>();
    let by_expert = [of(|t| t % 9 > 1), Vec::new(), of(|t| t % 7 == 0)];
    let plan = Plan::new(&by_expert);
    let assigned = plan.tokens.len();
    for (case, gated) in cases() {
        let ((dim, hidden), activation) = case;
        let (input, upstream) = (drawn(TOKENS * dim, 1.0, 2), drawn(TOKENS * dim, 1.0, 3));
        let (rows, d_rows) = (doubled(&input), doubled(&upstream));
        let shape = FfnShape {
            dim,
            hidden,
            activation,
            gated,
        };
        let values = experts_drawn((dim, hidden), gated, 0.15, 100);
        let mut experts: Vec<Expert> = values.iter().map(|v| Expert::new(v, activation)).collect();
        let (mut y, mut dx) = (vec![0.0f64; TOKENS * dim], vec![0.0f64; TOKENS * dim]);
        let mut d_weights = Vec::new();
        for (expert, chosen) in experts.iter_mut().zip(&by_expert) {
            for &t in chosen {
                let row = t as usize * dim..(t as usize + 1) * dim;
                let weight = f64::from(plan.weights[d_weights.len()]);
                let (x, dy) = (&rows[row.clone()], &d_rows[row.clone()]);
                let output = expert.pass(x, weight, dy, &mut dx[row.clone()]);
                d_weights.push(dot(&output, dy));
                for (sum, part) in y[row].iter_mut().zip(&output) {
                    *sum += weight * part;
                }
            }
        }
        for store in [Store::Replace, Store::Add] {
            let what = format!("gated {gated}, {case:?}, {store:?}");
            let weights: Vec<_> = values.iter().map(|v| weights_of(v)).collect();
            let mut kept = Hidden::take(shape, assigned);
            let mut found = vec![7.0; TOKENS * dim];
            moe_ffn::forward(
                &input,
                &weights,
                plan.grouped(),
                shape,
                Some(&mut kept),
                &mut found,
            );
            assert_close(&format!("y, {what}"), &found, &y);
            let before = experts_drawn((dim, hidden), gated, 1.0, 200);
            let mut held = before.clone();
            let mut gradients: Vec<_> = held.iter_mut().map(|g| gradients_into(g, store)).collect();
            let (mut found_dx, mut found_weights) = (vec![0.5; TOKENS * dim], vec![7.0; assigned]);
            moe_ffn::backward(
                &input,
                &weights,
                plan.grouped(),
                shape,
                &mut kept,
                &upstream,
                (&mut found_dx, store),
                &mut gradients,
                &mut found_weights,
            );
            let before_dx = if store == Store::Add { 0.5 } else { 0.0 };
            let wanted: Vec<f64> = dx.iter().map(|dx| dx + before_dx).collect();
            assert_close(&format!("dx, {what}"), &found_dx, &wanted);
            assert_close(&format!("d_weights, {what}"), &found_weights, &d_weights);
            for (e, expert) in experts.iter().enumerate() {
                for (i, part) in expert.gradients().into_iter().enumerate() {
                    let mut wanted = part.to_vec();
                    if store == Store::Add {
                        let pairs = wanted.iter_mut().zip(&before[e][i]);
                        pairs.for_each(|(w, b)| *w += f64::from(*b));
                    }
                    let what = format!("part {i} of expert {e}, {what}");
                    assert_close(&what, &held[e][i], &wanted);
                }
            }
        }
    }
}
