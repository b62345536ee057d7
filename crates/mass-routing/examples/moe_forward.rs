//! A sparse mixture-of-experts layer, forward and gate gradient, in plain ndarray: what the plan's arrays are for.

use mass_routing::{Combine, Router, RoutingPlan, TopP, UsageStats};
use ndarray::{Array1, Array2, ArrayView2, Axis};

/// One expert: `relu(x W1) W2`.
struct Expert {
    w1: Array2<f32>,
    w2: Array2<f32>,
}

impl Expert {
    fn forward(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        x.dot(&self.w1).mapv_into(|v| v.max(0.0)).dot(&self.w2)
    }
}

fn main() -> Result<(), mass_routing::RoutingError> {
    let (tokens, width, hidden, num_experts) = (12, 6, 8, 5);
    let weights = |rows, columns, seed: usize| {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            (((i * 7 + j * 13 + seed * 29) % 19) as f32 - 9.0) / 12.0
        })
    };
    let x = weights(tokens, width, 1);
    let gate = weights(num_experts, width, 2);
    let experts: Vec<Expert> = (0..num_experts)
        .map(|e| Expert {
            w1: weights(width, hidden, 3 + e),
            w2: weights(hidden, width, 40 + e),
        })
        .collect();

    let logits = x.dot(&gate.t());
    let mut router = TopP::new(0.6, Combine::Renormalised)?;
    let mut plan = RoutingPlan::default(); // kept between steps: its buffers are reused
    router.route(logits.view(), None, &mut plan)?;

    // Each expert computes its own tokens, gathered into one matrix: a grouped matrix product.
    let mut y = Array2::<f32>::zeros((tokens, width));
    let mut d_weights = vec![0.0; plan.num_assignments()];
    let d_y = Array2::<f32>::ones((tokens, width)); // the gradient of sum(y)
    for (e, expert) in experts.iter().enumerate() {
        let segment = plan.segment(e);
        if segment.is_empty() {
            continue;
        }
        let rows: Vec<usize> = plan.tokens()[segment.clone()]
            .iter()
            .map(|&t| t as usize)
            .collect();
        let out = expert.forward(x.select(Axis(0), &rows).view());
        for ((a, &t), row) in segment.zip(&rows).zip(out.outer_iter()) {
            y.row_mut(t).scaled_add(plan.weights()[a], &row);
            d_weights[a] = d_y.row(t).dot(&row);
        }
    }

    // The gate's gradient, back through the routing weights.
    let mut d_logits = Array2::zeros((tokens, num_experts));
    router.backward(&plan, &d_weights, &mut d_logits.view_mut())?;
    let d_gate = d_logits.t().dot(&x);

    let mut usage = UsageStats::new(num_experts);
    usage.record(&plan)?;
    println!(
        "mean experts per token {:.2}, load {:?}",
        plan.mean_k(),
        usage.load()
    );
    println!(
        "output norm {:.4}, gate gradient norm {:.4}",
        norm(y.iter()),
        norm(d_gate.iter())
    );
    let first: Array1<f32> = y.row(0).to_owned();
    println!("first token {first:.3}");
    Ok(())
}

fn norm<'a>(values: impl Iterator<Item = &'a f32>) -> f32 {
    values.map(|v| v * v).sum::<f32>().sqrt()
}
