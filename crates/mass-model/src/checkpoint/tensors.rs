//! Named f32 tensors in safetensors form, read and written in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, View};

use super::broken;
use crate::error::CheckpointError;
use crate::error::ModelError;
use crate::param::Param;

/// A tensor to be written.
pub(super) struct F32View<'a> {
    pub(super) shape: Vec<usize>,
    pub(super) values: &'a [f32],
}

impl View for F32View<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        for (b, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(self.values) {
            *b = x.to_le_bytes();
        }
        Cow::Owned(bytes)
    }
    fn data_len(&self) -> usize {
        self.values.len() * 4
    }
}

pub(super) fn encode(
    name: &str,
    tensors: Vec<(String, F32View<'_>)>,
) -> Result<Vec<u8>, ModelError> {
    safetensors::serialize(tensors, None)
        .map_err(|e| broken(Path::new(name), CheckpointError::Header(e.to_string())))
}

/// The tensors of a file; their values stay where they are until they are asked for.
pub(super) struct TensorFile<'a> {
    path: &'a Path,
    tensors: BTreeMap<String, TensorView<'a>>,
}

impl<'a> TensorFile<'a> {
    pub(super) fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self, ModelError> {
        // The parser bounds the header by the file's own length and checks every offset against it before anything is
        // made of its size.
        let file = SafeTensors::deserialize(bytes)
            .map_err(|e| broken(path, CheckpointError::Header(e.to_string())))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            if view.dtype() != Dtype::F32 {
                let (name, dtype) = (name.to_owned(), format!("{:?}", view.dtype()));
                return Err(broken(path, CheckpointError::TensorType { name, dtype }));
            }
            tensors.insert(name.to_owned(), view);
        }
        Ok(Self { path, tensors })
    }

    /// Values in all tensors together.
    pub(super) fn num_values(&self) -> u64 {
        self.tensors
            .values()
            .map(|t| t.data().len() as u64 / 4)
            .sum()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn get(&self, name: &str) -> Result<&TensorView<'a>, ModelError> {
        self.tensors.get(name).ok_or_else(|| {
            let name = name.to_owned();
            broken(self.path, CheckpointError::MissingTensor { name })
        })
    }

    /// Refuses a tensor that is missing or of another shape.
    pub(super) fn check(&self, name: &str, shape: &[usize]) -> Result<(), ModelError> {
        let actual = self.get(name)?.shape();
        if actual == shape {
            return Ok(());
        }
        let why = CheckpointError::TensorShape {
            name: name.to_owned(),
            expected: shape.to_vec(),
            actual: actual.to_vec(),
        };
        Err(broken(self.path, why))
    }

    /// Refuses a tensor that is missing, of another shape, or with a value that is no number.
    pub(super) fn check_values(&self, name: &str, shape: &[usize]) -> Result<(), ModelError> {
        self.check(name, shape)?;
        let mut values = self.get(name)?.data().as_chunks::<4>().0.iter();
        match values.all(|b| f32::from_le_bytes(*b).is_finite()) {
            true => Ok(()),
            false => {
                let name = name.to_owned();
                Err(broken(self.path, CheckpointError::NonFinite { name }))
            }
        }
    }

    /// Gives a parameter a tensor's values; its own are not read, which may lie on a device that has failed.
    pub(super) fn read_into(&self, name: &str, param: &mut Param) -> Result<(), ModelError> {
        self.check(name, param.shape())?;
        param.replace(self.values(name)?)
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let data = self.get(name)?.data().as_chunks::<4>().0;
        Ok(data.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    /// Takes a tensor out of the file.
    pub(super) fn take(&mut self, name: &str) -> Result<Vec<f32>, ModelError> {
        let values = self.values(name)?;
        self.tensors.remove(name);
        Ok(values)
    }

    /// Refuses a file with tensors beside the expected ones.
    pub(super) fn expect_only(&self, expected: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        match self.tensors.keys().find(|name| !expected(name)) {
            Some(name) => {
                let name = name.clone();
                Err(broken(self.path, CheckpointError::UnknownTensor { name }))
            }
            None => Ok(()),
        }
    }
}
