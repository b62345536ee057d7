//! The arithmetic of a split against values from outside, read from `$MASS_GOLDEN_DIR`.

use mass_expand::{
    Decomposition, Reduction, alignment, project_onto_weights, redundancy_gradient, redundancy_loss,
};
use safetensors::SafeTensors;

fn read(name: &str) -> Vec<u8> {
    let dir = std::env::var("MASS_GOLDEN_DIR").expect("MASS_GOLDEN_DIR names the golden values");
    let path = std::path::Path::new(&dir).join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn tensor(file: &SafeTensors<'_>, name: &str) -> (Vec<f32>, (usize, usize)) {
    let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
    let values = view
        .data()
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    let shape = match *view.shape() {
        [n] => (1, n),
        [rows, columns] => (rows, columns),
        ref other => panic!("{name}: shape {other:?}"),
    };
    (values, shape)
}

fn assert_close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (g - w).abs() <= tolerance * w.abs().max(1.0),
            "element {i}: got {g}, want {w}"
        );
    }
}

#[test]
fn golden_decompose() {
    let bytes = read("decompose.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let (gradient, shape) = tensor(&file, "g");
    let (weight, _) = tensor(&file, "w");

    let cosine = alignment(&gradient, &weight).unwrap().cosine.unwrap();
    assert_close(&[cosine as f32], &tensor(&file, "cosine").0, 1e-6);

    for (name, mode) in [
        ("aligned_whole", Decomposition::Whole),
        ("aligned_rowwise", Decomposition::Rowwise),
    ] {
        let mut aligned = gradient.clone();
        project_onto_weights(&mut aligned, &weight, shape, mode).unwrap();
        assert_close(&aligned, &tensor(&file, name).0, 1e-6);
    }
}

#[test]
fn golden_redundancy() {
    let bytes = read("decompose.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let json: serde_json::Value = serde_json::from_slice(&read("decompose.json")).unwrap();
    let pairs: Vec<(usize, usize)> = serde_json::from_value(json["pairs"].clone()).unwrap();
    let (gate, (_, dim)) = tensor(&file, "gate");
    let rows: Vec<&[f32]> = gate.chunks(dim).collect();
    let want_sum = tensor(&file, "redundancy_sum").0[0];

    let sum = redundancy_loss(&rows, &pairs, Reduction::Sum).unwrap();
    assert_close(&[sum as f32], &[want_sum], 1e-6);
    let mean = redundancy_loss(&rows, &pairs, Reduction::Mean).unwrap();
    assert_close(&[mean as f32], &[want_sum / pairs.len() as f32], 1e-6);

    let mut gradient = vec![0.0f32; gate.len()];
    let mut slices: Vec<&mut [f32]> = gradient.chunks_mut(dim).collect();
    redundancy_gradient(&rows, &pairs, Reduction::Sum, 1.0, &mut slices).unwrap();
    assert_close(&gradient, &tensor(&file, "redundancy_sum_grad").0, 1e-6);
}
