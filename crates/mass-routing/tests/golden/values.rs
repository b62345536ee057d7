//! Reads the golden files from `$MASS_GOLDEN_DIR`.
#![allow(dead_code)]

use std::path::PathBuf;

use ndarray::{Array1, Array2};
use safetensors::{Dtype, SafeTensors};

pub(crate) struct Golden {
    bytes: Vec<u8>,
    json: serde_json::Value,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let dir = PathBuf::from(
            std::env::var_os("MASS_GOLDEN_DIR").expect("MASS_GOLDEN_DIR names the golden files"),
        );
        let read = |ext: &str| {
            let path = dir.join(format!("{name}.{ext}"));
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let json = serde_json::from_slice(&read("json")).expect("JSON");
        Self {
            bytes: read("safetensors"),
            json,
        }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("safetensors")
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = String> {
        self.tensors()
            .names()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
            .into_iter()
    }

    pub(crate) fn number(&self, key: &str) -> f64 {
        self.json[key]
            .as_f64()
            .unwrap_or_else(|| panic!("number {key}"))
    }

    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let tensor = tensors
            .tensor(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        tensor
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect()
    }

    pub(crate) fn integers(&self, name: &str) -> Vec<i64> {
        let tensors = self.tensors();
        let tensor = tensors
            .tensor(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        match tensor.dtype() {
            Dtype::I32 => tensor
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|&b| i32::from_le_bytes(b).into())
                .collect(),
            Dtype::I64 => tensor
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|&b| i64::from_le_bytes(b))
                .collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    pub(crate) fn vector(&self, name: &str) -> Array1<f32> {
        self.floats(name).into()
    }

    pub(crate) fn scalar(&self, name: &str) -> f32 {
        let values = self.floats(name);
        assert_eq!(values.len(), 1, "{name}");
        values[0]
    }

    pub(crate) fn matrix(&self, name: &str) -> Array2<f32> {
        let shape = self
            .tensors()
            .tensor(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"))
            .shape()
            .to_vec();
        let &[rows, columns] = shape.as_slice() else {
            panic!("{name} has shape {shape:?}")
        };
        Array2::from_shape_vec((rows, columns), self.floats(name)).expect("shape")
    }
}
