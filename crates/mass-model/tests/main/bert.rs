//! BERT on small random models: gradients, padding, dropout, mixtures.

use std::collections::HashMap;

use mass_model::bert::{BertClassifier, BertConfig, Targets, TextBatch};
use mass_model::growth::Mixtures;
use mass_model::lm::Masked;
use mass_model::{DropoutKeys, ModelError, Parameters, seeded_rng};
use mass_routing::{Combine, RouterConfig};

const TOP_2: RouterConfig = RouterConfig::TopK {
    k: 2,
    combine: Combine::Renormalised,
};

fn config() -> BertConfig {
    BertConfig {
        vocab_size: 23,
        hidden_size: 12,
        num_hidden_layers: 3,
        num_attention_heads: 3,
        intermediate_size: 20,
        max_position_embeddings: 9,
        // Wide enough for gradients that differences in f32 can measure.
        initializer_range: 0.3,
        ..BertConfig::default()
    }
}

/// Three layers, the second a mixture of experts that differ; biases and norms away from where they start.
fn model(labels: usize) -> BertClassifier {
    let mut rng = seeded_rng(5);
    let mut model = BertClassifier::new(&config(), labels, &mut rng).unwrap();
    model.convert(1, 4, TOP_2, &mut rng).unwrap();
    let mut phase = 0.0;
    model.visit_mut("", &mut |name, p| {
        phase += 1.0;
        if p.shape().len() == 1 || name.contains("experts") {
            for (i, x) in p.values_mut().iter_mut().enumerate() {
                // Gate rows far apart: a choice of experts that a small step changes has no derivative.
                let size = if name.ends_with(".gate") { 1.0 } else { 0.1 };
                *x += size * (i as f32 * 1.7 + phase).sin();
            }
        }
    });
    model
}

/// Three sequences of 4, 7 and 1 tokens.
fn batch() -> TextBatch {
    let ids = (0..12).map(|i| 1 + i * 5 % 22).collect();
    let types = vec![0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0];
    TextBatch::packed(ids, types, vec![0, 4, 11, 12])
}

/// The same, with a padding of four tokens to a common length.
fn padded(seq: usize) -> TextBatch {
    let packed = batch();
    let (mut ids, mut types, mut mask) = (Vec::new(), Vec::new(), Vec::new());
    for w in packed.offsets.windows(2) {
        let gap = seq - (w[1] - w[0]);
        ids.extend(&packed.ids[w[0]..w[1]]);
        ids.extend(vec![0; gap]);
        types.extend(&packed.types[w[0]..w[1]]);
        types.extend(vec![0; gap]);
        mask.extend(vec![true; w[1] - w[0]]);
        mask.extend(vec![false; gap]);
    }
    TextBatch::padded(ids, types, &mask, seq).unwrap()
}

fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    let off = got.iter().zip(want).map(|(a, b)| (a - b).abs());
    let worst = off.fold(0.0, f32::max);
    assert!(worst <= 1e-5 * largest, "{what}: off by {worst}");
}

fn gradients(
    model: &BertClassifier,
    batch: &TextBatch,
    targets: Targets<'_>,
    keys: Option<&mut DropoutKeys>,
) -> Vec<(String, Vec<f32>)> {
    let mut pass = model.train_pass(batch, targets, keys).unwrap();
    let mut all = Vec::new();
    model.visit("", &mut |name, p| {
        all.push((name, p.gradient(&mut pass.gradients).unwrap().clone()));
    });
    all
}

fn unit(v: impl Iterator<Item = f32>) -> Vec<f32> {
    let v: Vec<f32> = v.collect();
    let norm = v.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
    v.iter().map(|x| x / norm).collect()
}

#[test]
fn gradients_agree_with_central_differences() {
    let (batch, classes, values) = (batch(), [2u32, 0, 1], [0.4f32, -1.2, 0.7]);
    for (labels, targets, dropped) in [
        (3, Targets::Classes(&classes), false),
        (3, Targets::Classes(&classes), true),
        (1, Targets::Values(&values), true),
    ] {
        let model = model(labels);
        // The same keys in every pass: the same network, with the same elements missing.
        let keys = || dropped.then(|| DropoutKeys::new(3, 8));
        let gradients = gradients(&model, &batch, targets, keys().as_mut());
        let loss_at = |which: &str, direction: &[f32], step: f32| {
            let mut moved = model.clone();
            moved.visit_mut("", &mut |name, p| {
                if name == which {
                    let along = p.values_mut().iter_mut().zip(direction);
                    along.for_each(|(x, d)| *x += step * d);
                }
            });
            let pass = moved.train_pass(&batch, targets, keys().as_mut()).unwrap();
            f64::from(pass.loss)
        };
        for (name, gradient) in &gradients {
            let steepest = unit(gradient.iter().copied());
            let other = unit((0..gradient.len()).map(|i| (i as f32 * 1.37 + 0.3).sin()));
            for direction in [steepest, other] {
                let dot = gradient
                    .iter()
                    .zip(&direction)
                    .map(|(g, d)| f64::from(g * d));
                let analytic: f64 = dot.sum();
                let numeric = |h: f32| {
                    let (up, down) = (loss_at(name, &direction, h), loss_at(name, &direction, -h));
                    (up - down) / (2.0 * f64::from(h))
                };
                let errors = [1e-2f32, 3e-3].map(|h| (numeric(h) - analytic).abs());
                assert!(
                    errors[0].min(errors[1]) < 2e-4 + 1e-2 * analytic.abs(),
                    "{name}: gradient {analytic}, off by {errors:?}"
                );
            }
        }
        let size = |part: &str| {
            let found = gradients.iter().find(|(n, _)| n.contains(part)).unwrap();
            found.1.iter().fold(0.0f32, |m, x| m.max(x.abs()))
        };
        // Otherwise the comparison above would be of zeros.
        for part in ["moe.experts", "layers.0.attention.qkv", "pooler", "words"] {
            assert!(size(part) > 1e-3, "{part}: {}", size(part));
        }
    }
}

#[test]
fn padding_changes_nothing_at_real_tokens() {
    let (model, packed, padded) = (model(3), batch(), padded(9));
    let real: Vec<usize> = (0..27)
        .filter(|&i| padded.keys.as_ref().unwrap()[i])
        .collect();
    assert_eq!(real.len(), packed.ids.len());
    let without = model.hidden_states(&packed).unwrap();
    for (l, with) in model.hidden_states(&padded).unwrap().iter().enumerate() {
        let rows: Vec<f32> = real
            .iter()
            .flat_map(|&i| &with[i * 12..][..12])
            .copied()
            .collect();
        assert_close(&format!("hidden state {l}"), &rows, &without[l]);
    }
    let targets = Targets::Classes(&[1, 1, 0]);
    assert_close(
        "logits",
        &model.logits(&padded, None).unwrap().0,
        &model.logits(&packed, None).unwrap().0,
    );
    let wanted: HashMap<_, _> = gradients(&model, &packed, targets, None)
        .into_iter()
        .collect();
    for (name, gradient) in gradients(&model, &padded, targets, None) {
        assert_close(&name, &gradient, &wanted[&name]);
    }
}

#[test]
fn each_row_has_the_loss_of_its_sequence() {
    let (model, batch) = (model(3), batch());
    let targets = Targets::Classes(&[2, 0, 1]);
    let pass = model.train_pass(&batch, targets, None).unwrap();
    let losses = model.losses(&batch, targets, None).unwrap();
    assert_eq!(losses.len(), 3);
    for (w, loss) in batch.offsets.windows(2).zip(&losses) {
        assert_eq!(&pass.token_losses[w[0]..w[1]], vec![*loss; w[1] - w[0]]);
    }
    assert_eq!(pass.token_losses.len(), 12);
    let mean = losses.iter().sum::<f32>() / 3.0;
    assert!((pass.loss - mean).abs() < 1e-6);
    // One output: half the squares is not what PyTorch's mean squared error is.
    let model = self::model(1);
    let outputs = model.logits(&batch, None).unwrap().0;
    let wanted = [0.5f32, -1.0, 2.0];
    let squares = model
        .losses(&batch, Targets::Values(&wanted), None)
        .unwrap();
    let by_hand: Vec<f32> = outputs
        .iter()
        .zip(wanted)
        .map(|(y, t)| (y - t).powi(2))
        .collect();
    assert_close("squared errors", &squares, &by_hand);
}

#[test]
fn dropout_is_a_function_of_seed_and_step() {
    let (model, batch) = (model(3), batch());
    let targets = Targets::Classes(&[2, 0, 1]);
    let run = |seed, step| {
        gradients(
            &model,
            &batch,
            targets,
            Some(&mut DropoutKeys::new(seed, step)),
        )
    };
    assert_eq!(run(1, 4), run(1, 4));
    assert_ne!(run(1, 4), run(1, 5));
    assert_ne!(run(1, 4), run(2, 4));
    assert_ne!(run(1, 4), gradients(&model, &batch, targets, None));

    let none = BertConfig {
        hidden_dropout_prob: 0.0,
        attention_probs_dropout_prob: 0.0,
        ..config()
    };
    let model = BertClassifier::new(&none, 3, &mut seeded_rng(1)).unwrap();
    let keys = &mut DropoutKeys::new(1, 4);
    assert_eq!(
        gradients(&model, &batch, targets, Some(keys)),
        gradients(&model, &batch, targets, None)
    );
    // The classifier has a rate of its own.
    let head = BertConfig {
        classifier_dropout: Some(0.5),
        ..none
    };
    let model = BertClassifier::new(&head, 3, &mut seeded_rng(1)).unwrap();
    assert_ne!(
        gradients(&model, &batch, targets, Some(&mut DropoutKeys::new(1, 4))),
        gradients(&model, &batch, targets, None)
    );
}

#[test]
fn threads_do_not_change_a_bit() {
    // As many sequences as make several pieces of every kernel's work, the largest being dropout's.
    let (model, three, times) = (model(3), batch(), 130);
    assert!(times * three.ids.len() * config().hidden_size > 1 << 14);
    let starts = (0..times).map(|i| i * three.ids.len());
    let ends = starts.flat_map(|start| three.offsets[1..].iter().map(move |end| start + end));
    let offsets = std::iter::once(0).chain(ends).collect();
    let batch = TextBatch::packed(three.ids.repeat(times), three.types.repeat(times), offsets);
    let classes: Vec<u32> = (0..3 * times as u32).map(|i| i % 3).collect();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let keys = &mut DropoutKeys::new(2, 2);
        let pool = pool.build().unwrap();
        pool.install(|| gradients(&model, &batch, Targets::Classes(&classes), Some(keys)))
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

#[test]
fn a_mixture_of_copies_computes_what_the_network_did() {
    let mut rng = seeded_rng(9);
    let dense = BertClassifier::new(&config(), 2, &mut rng).unwrap();
    let mut mixed = dense.clone();
    mixed.convert(2, 5, TOP_2, &mut rng).unwrap();
    mixed.convert(0, 3, TOP_2, &mut rng).unwrap();
    let (before, none) = dense.logits(&batch(), None).unwrap();
    let (after, traces) = mixed.logits(&batch(), None).unwrap();
    assert_close("logits", &after, &before);
    assert!(none.is_empty());
    // A mixture in the last layer is of all tokens, a dense network of first tokens alone.
    let targets = Targets::Classes(&[1, 0, 1]);
    let with = gradients(&mixed, &batch(), targets, None);
    for (name, of_dense) in gradients(&dense, &batch(), targets, None) {
        if let Some((_, of_mixed)) = with.iter().find(|(n, _)| *n == name) {
            assert_close(&name, of_mixed, &of_dense);
        }
    }
    // Bottom first, whatever the order of conversion.
    assert_eq!(mixed.mixtures(), 2);
    assert_eq!(mixed.mixture_name(0), "layers.0.moe");
    assert_eq!(mixed.mixture_name(1), "layers.2.moe");
    assert_eq!(mixed.mixture(1).experts().len(), 5);
    assert_eq!(mixed.mixture_mut(0).experts().len(), 3);
    assert_eq!(traces.len(), 2);
    // The parameters that a mixture's name promises are there.
    let mut names = Vec::new();
    mixed.visit("", &mut |name, _| names.push(name));
    assert!(names.contains(&"layers.2.moe.experts.4.fc1.weight".to_owned()));
    assert!(!names.iter().any(|n| n.starts_with("layers.2.ffn.")));

    let expert = mixed.mixture(1).ids()[3];
    let masked = |layer, expert| mixed.logits(&batch(), Some(Masked { layer, expert }));
    let (_, traces) = masked(1, expert).unwrap();
    assert_eq!(traces[1].plan.load(3), 0);
    assert!(matches!(
        masked(0, mass_expand::ExpertId(7)),
        Err(ModelError::NoSuchExpert(7))
    ));
    assert!(matches!(masked(2, expert), Err(ModelError::Config(_))));
    assert!(matches!(
        mixed.convert(0, 3, TOP_2, &mut rng),
        Err(ModelError::Config(_))
    ));
    assert!(mixed.convert(3, 3, TOP_2, &mut rng).is_err());
    assert!(mixed.convert(1, 0, TOP_2, &mut rng).is_err());
}

#[test]
fn matrices_decay_and_nothing_else_does() {
    model(3).visit("", &mut |name, p| {
        let wanted = p.shape().len() == 2 || name.ends_with(".gate");
        assert_eq!(p.decays(), wanted, "{name}");
    });
}

#[test]
fn a_wrong_batch_is_refused() {
    let model = model(3);
    let good = batch();
    let refused = |change: &dyn Fn(&mut TextBatch)| {
        let mut bad = good.clone();
        change(&mut bad);
        model.logits(&bad, None).unwrap_err().to_string()
    };
    assert!(refused(&|b| b.ids[3] = 23).contains("token 23 at position 3"));
    assert!(refused(&|b| b.types[2] = 2).contains("segment 2 at position 2"));
    assert!(refused(&|b| b.types.truncate(5)).contains("types"));
    assert!(refused(&|b| b.offsets = vec![0, 1, 12]).contains("longest sequence"));
    assert!(refused(&|b| b.offsets = vec![0, 4, 4, 12]).contains("offsets"));
    assert!(refused(&|b| *b = TextBatch::default()).contains("offsets"));
    assert!(refused(&|b| b.keys = Some(vec![true; 3])).contains("key mask"));
    assert!(TextBatch::padded(vec![1, 2, 3], vec![0; 3], &[true; 3], 2).is_err());
    assert!(TextBatch::padded(vec![1, 2], vec![0; 2], &[true; 3], 2).is_err());
    assert!(TextBatch::padded(vec![], vec![], &[], 0).is_err());

    let of = |targets| model.losses(&good, targets, None);
    assert!(matches!(
        of(Targets::Classes(&[0])),
        Err(ModelError::Shape { .. })
    ));
    assert!(matches!(
        of(Targets::Classes(&[0, 3, 0])),
        Err(ModelError::Index { .. })
    ));
    assert!(matches!(
        of(Targets::Values(&[0.0; 3])),
        Err(ModelError::Config(_))
    ));
    let one = self::model(1);
    let of = |targets| one.losses(&good, Targets::Values(targets), None);
    assert!(matches!(of(&[0.0]), Err(ModelError::Shape { .. })));
    assert!(matches!(
        of(&[0.0, f32::NAN, 0.0]),
        Err(ModelError::NonFinite(_))
    ));
}

#[test]
fn a_wrong_configuration_is_refused() {
    let refused = |change: &dyn Fn(&mut BertConfig)| {
        let mut bad = config();
        change(&mut bad);
        let e = BertClassifier::new(&bad, 2, &mut seeded_rng(0)).unwrap_err();
        e.to_string()
    };
    assert!(refused(&|c| c.num_attention_heads = 5).contains("num_attention_heads 5"));
    assert!(refused(&|c| c.num_attention_heads = 0).contains("num_attention_heads"));
    assert!(refused(&|c| c.num_hidden_layers = 0).contains("num_hidden_layers"));
    assert!(refused(&|c| c.num_hidden_layers = 1 << 40).contains("more than 1048576"));
    assert!(refused(&|c| c.hidden_dropout_prob = 1.0).contains("hidden_dropout_prob"));
    assert!(refused(&|c| c.classifier_dropout = Some(f32::NAN)).contains("classifier_dropout"));
    assert!(refused(&|c| c.layer_norm_eps = 0.0).contains("layer_norm_eps"));
    assert!(refused(&|c| c.initializer_range = f32::INFINITY).contains("initializer_range"));
    assert!(refused(&|c| c.pad_token_id = 23).contains("pad_token_id"));
    assert!(refused(&|c| c.vocab_size = usize::MAX).contains("memory"));
    assert!(BertClassifier::new(&config(), 0, &mut seeded_rng(0)).is_err());
    let large = BertConfig::large_cased();
    large.check().unwrap();
    let text = serde_json::to_string(&large).unwrap();
    assert_eq!(serde_json::from_str::<BertConfig>(&text).unwrap(), large);
    assert!(text.contains(r#""hidden_act":"gelu""#));
}

/// PyTorch's `padding_idx`: the row has no gradient, even where the token stands among the real ones.
#[test]
fn the_padding_tokens_embedding_is_not_trained() {
    let model = model(3);
    let words = |model: &BertClassifier| {
        let mut row = Vec::new();
        model.visit("", &mut |name, p| {
            if name == "embeddings.words" {
                row = p.values().to_vec();
            }
        });
        row
    };
    assert!(words(&model)[..12].iter().all(|&x| x == 0.0));
    assert!(words(&model)[12..24].iter().any(|&x| x != 0.0));
    let mut batch = batch();
    batch.ids[2] = 0;
    let all = gradients(&model, &batch, Targets::Classes(&[2, 0, 1]), None);
    let (_, table) = all.iter().find(|(n, _)| n == "embeddings.words").unwrap();
    assert!(table[..12].iter().all(|&x| x == 0.0));
    let row = |id: u32| &table[id as usize * 12..][..12];
    assert!(row(batch.ids[1]).iter().any(|&x| x != 0.0));
}

/// Padding before the tokens or between them: positions count from the start of the row, and the head reads its first token.
#[test]
fn padding_that_is_not_at_the_end_keeps_its_positions() {
    let model = model(3);
    let mask = [false, true, true, true, false, true];
    let padded = TextBatch::padded(vec![3, 5, 6, 2, 9, 7], vec![0; 6], &mask, 6).unwrap();
    let states = model.hidden_states(&padded).unwrap();
    // What stands where nothing may look changes its own row alone.
    let mut other = padded.clone();
    (other.ids[0], other.ids[4]) = (8, 4);
    let changed = model.hidden_states(&other).unwrap();
    for (a, b) in states.iter().zip(&changed) {
        for row in [1, 2, 3, 5] {
            assert_close("a real token", &b[row * 12..][..12], &a[row * 12..][..12]);
        }
    }
    let (logits, _) = model.logits(&padded, None).unwrap();
    let (moved, _) = model.logits(&other, None).unwrap();
    assert_ne!(logits, moved, "the head reads the first row, marked or not");
    // Without it the real tokens would stand elsewhere.
    let packed = TextBatch::packed(vec![5, 6, 2, 7], vec![0; 4], vec![0, 4]);
    let close = model.hidden_states(&packed).unwrap();
    assert_ne!(close[0][..12], states[0][12..24]);
}
