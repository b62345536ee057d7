//! Routing for a model written elsewhere: slices in, slices out. Here stands for candle, burn, tch or a C interface whatever hands
//! out its tensors as `Vec<f32>`; nothing of ndarray is needed.

use mass_routing::{AnyRouter, Router, RouterConfig, RoutingPlan};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The router comes from the model's configuration file.
    let config: RouterConfig =
        serde_json::from_str(r#"{ "router": "top_k", "k": 2, "combine": "renormalised" }"#)?;
    let mut router = config.build()?;

    // candle: logits.to_vec2() or flatten_all()?.to_vec1(); burn: logits.into_data().to_vec(); PyTorch: a contiguous CPU tensor.
    let (tokens, experts) = (3, 4);
    let logits: Vec<f32> = vec![
        0.1, 2.0, -1.0, 0.3, 1.0, 1.0, 0.0, -2.0, -0.5, 0.2, 0.9, 3.0,
    ];
    let mut plan = RoutingPlan::default();
    router.route_slice(&logits, experts, None, &mut plan)?;

    // What index_select, a grouped matmul and index_add of that framework want: 32-bit indices and offsets.
    println!("gather rows     {:?}", plan.tokens());
    println!("expert offsets  {:?}", plan.expert_offsets());
    println!("row weights     {:?}", plan.weights());

    // On the way back: d_weights[a] = <gradient of the output row, expert output row>, per assignment.
    let d_weights: Vec<f32> = (0..plan.num_assignments())
        .map(|a| a as f32 * 0.1)
        .collect();
    let mut d_logits = vec![0.0; tokens * experts];
    router.backward_slice(&plan, &d_weights, &mut d_logits)?;
    println!("d_logits        {d_logits:?}");

    // A checkpoint keeps the router with its state.
    let saved = serde_json::to_string(&router)?;
    let restored: AnyRouter = serde_json::from_str(&saved)?;
    assert_eq!(restored, router);
    Ok(())
}
