use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::config::read_json;
use super::{PretrainedError, damaged, io, open};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The longest header the safetensors format allows.
const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes read at a time; a multiple of every element's size.
const BLOCK: usize = 1 << 20;

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Where its bytes are in the file.
    start: u64,
    bytes: usize,
}

/// The tensors of a folder of pretrained weights, by name. Opening reads no more than the headers.
#[derive(Debug)]
pub struct Weights {
    dir: PathBuf,
    files: Vec<PathBuf>,
    entries: BTreeMap<String, Entry>,
}

/// The tensors of a header in the order of their bytes. A name that stands there twice is refused, and errors name the tensor.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut tensors, mut names) = (Vec::new(), BTreeSet::new());
                while let Some(name) = map.next_key::<String>()? {
                    let about = |e| A::Error::custom(format!("tensor {name}: {e}"));
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("{name} is there twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let info: TensorInfo = map.next_value().map_err(about)?;
                    let (start, end) = info.data_offsets;
                    if end < start {
                        let why =
                            format!("tensor {name} ends at {end}, before it begins at {start}");
                        return Err(A::Error::custom(why));
                    }
                    tensors.push((name, info));
                }
                tensors.sort_by_key(|(_, info)| info.data_offsets);
                Ok(Header(tensors))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// The header, and that each tensor has as many bytes as its shape says.
fn header_of(json: &[u8]) -> Result<Metadata, String> {
    let Header(tensors) = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    for (name, info) in &tensors {
        let bits = info
            .shape
            .iter()
            .try_fold(info.dtype.bitsize(), |n, &s| n.checked_mul(s));
        let (start, end) = info.data_offsets;
        if bits != (end - start).checked_mul(8) {
            return Err(format!(
                "tensor {name} is {} of shape {:?}, which are not the {} bytes it has",
                info.dtype,
                info.shape,
                end - start
            ));
        }
    }
    Metadata::new(None, tensors).map_err(|e| e.to_string())
}

/// The files that a `model.safetensors.index.json` names, each with the tensors that it says are in it.
///
/// # Errors
/// [`PretrainedError::Io`] if the index cannot be read; [`PretrainedError::Damaged`] if it is none, or names a file outside its
/// folder.
pub fn shards(index: &Path) -> Result<BTreeMap<String, Vec<String>>, PretrainedError> {
    let map = read_json(index, LONGEST_HEADER)?;
    let Some(Value::Object(places)) = map.get("weight_map") else {
        return Err(damaged(index, "there is no weight_map"));
    };
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in places {
        let outside = |f: &&str| f.is_empty() || f.contains(['/', '\\']) || [".", ".."].contains(f);
        let Some(file) = file.as_str().filter(|f| !outside(f)) else {
            let why = format!("tensor {tensor} is in {file}, which is no name of a file");
            return Err(damaged(index, why));
        };
        let tensors = shards.entry(file.to_owned()).or_default();
        tensors.push(tensor.clone());
    }
    Ok(shards)
}

/// The files of a folder, each with the tensors that an index says are in it.
fn parts(dir: &Path) -> Result<BTreeMap<String, Vec<String>>, PretrainedError> {
    let index = dir.join(INDEX);
    if !index.exists() {
        return Ok(BTreeMap::from([(SINGLE.to_owned(), Vec::new())]));
    }
    let shards = shards(&index)?;
    if shards.is_empty() {
        return Err(damaged(&index, "there is no tensor in weight_map"));
    }
    if dir.join(SINGLE).exists() && !shards.contains_key(SINGLE) {
        let why = format!(
            "{SINGLE} is beside it, and it does not name that: remove whichever is not the model"
        );
        return Err(damaged(&index, why));
    }
    Ok(shards)
}

/// The files that hold the weights of a folder, without looking into them: `model.safetensors`, or those that
/// `model.safetensors.index.json` names.
///
/// # Errors
/// As [`shards`], and [`PretrainedError::Damaged`] for an index beside a `model.safetensors` that it does not name.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, PretrainedError> {
    Ok(parts(dir)?.into_keys().map(|file| dir.join(file)).collect())
}

impl Weights {
    /// Opens `model.safetensors` of a folder, or the files that its `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`PretrainedError::Io`] naming a file that cannot be read; [`PretrainedError::Damaged`] if a header is no header or
    /// promises other than what the file holds, the index names what no file has, or there are both an index and a
    /// `model.safetensors` that it does not name.
    pub fn open(dir: &Path) -> Result<Self, PretrainedError> {
        let mut weights = Self {
            dir: dir.to_owned(),
            files: Vec::new(),
            entries: BTreeMap::new(),
        };
        let index = dir.join(INDEX);
        for (file, tensors) in parts(dir)? {
            weights.add(dir.join(&file))?;
            let last = weights.files.len() - 1;
            let held = |t: &String| weights.entries.get(t).is_some_and(|e| e.file == last);
            if let Some(absent) = tensors.into_iter().find(|t| !held(t)) {
                let why = format!("tensor {absent} is not in {file}");
                return Err(damaged(&index, why));
            }
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), PretrainedError> {
        let mut file = open(&path)?;
        let len = file.metadata().map_err(io(&path))?.len();
        let mut prefix = [0; 8];
        if len < 8 {
            return Err(damaged(
                &path,
                format!("{len} bytes are no safetensors file"),
            ));
        }
        file.read_exact(&mut prefix).map_err(io(&path))?;
        let header = u64::from_le_bytes(prefix);
        if header > LONGEST_HEADER || header > len - 8 {
            let why = format!("a header of {header} bytes in a file of {len}");
            return Err(damaged(&path, why));
        }
        let mut json = Vec::new();
        (&mut file)
            .take(header)
            .read_to_end(&mut json)
            .map_err(io(&path))?;
        let metadata = header_of(&json).map_err(|e| damaged(&path, e))?;
        let (first, data) = (8 + header, len - 8 - header);
        if (metadata.data_len() as u64) < data {
            let why = format!(
                "{data} bytes of tensors, the header says {}",
                metadata.data_len()
            );
            return Err(damaged(&path, why));
        }
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else {
                continue;
            };
            let (start, end) = info.data_offsets;
            if end as u64 > data {
                let why = format!("the file ends within tensor {name}");
                return Err(damaged(&path, why));
            }
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: first + start as u64,
                bytes: end - start,
            };
            if let Some(other) = self.entries.insert(name.clone(), entry) {
                let why = format!(
                    "tensor {name} is also in {}",
                    self.files[other.file].display()
                );
                return Err(damaged(&path, why));
            }
        }
        self.files.push(path);
        Ok(())
    }

    /// The names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shape of a tensor, if there is one of that name.
    pub fn shape(&self, tensor: &str) -> Option<&[usize]> {
        self.entries.get(tensor).map(|e| e.shape.as_slice())
    }

    /// The file a tensor is in, or the folder if it is in none.
    pub fn file_of(&self, tensor: &str) -> &Path {
        self.entries
            .get(tensor)
            .map_or(&self.dir, |e| &self.files[e.file])
    }

    /// The values of a tensor, row-major.
    ///
    /// # Errors
    /// [`PretrainedError::Missing`] if there is no such tensor, [`PretrainedError::Shape`] if it has another shape,
    /// [`PretrainedError::Dtype`] if it is not `F32`, `F16` or `BF16`, [`PretrainedError::NonFinite`] if it holds a NaN or
    /// an infinity, [`PretrainedError::Io`] if the file cannot be read.
    pub fn read(&self, tensor: &str, shape: &[usize]) -> Result<Vec<f32>, PretrainedError> {
        let entry = self.check(tensor, shape)?;
        // The header's sizes were compared with the length of the file when it was opened.
        let mut values = Vec::with_capacity(shape.iter().product());
        self.append(tensor, entry, &mut values)?;
        Ok(values)
    }

    /// Several tensors, one after the other: what a model holds side by side and the file apart.
    pub(super) fn read_stacked(
        &self,
        parts: &[(String, Vec<usize>)],
    ) -> Result<Vec<f32>, PretrainedError> {
        let entries = parts
            .iter()
            .map(|(tensor, shape)| Ok((tensor, self.check(tensor, shape)?)))
            .collect::<Result<Vec<_>, PretrainedError>>()?;
        let len = parts.iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        let mut values = Vec::with_capacity(len);
        for (tensor, entry) in entries {
            self.append(tensor, entry, &mut values)?;
        }
        Ok(values)
    }

    fn check(&self, tensor: &str, shape: &[usize]) -> Result<&Entry, PretrainedError> {
        let path = || self.file_of(tensor).to_owned();
        let Some(entry) = self.entries.get(tensor) else {
            return Err(PretrainedError::Missing {
                path: path(),
                tensor: tensor.to_owned(),
            });
        };
        if entry.shape != shape {
            return Err(PretrainedError::Shape {
                path: path(),
                tensor: tensor.to_owned(),
                expected: shape.to_vec(),
                actual: entry.shape.clone(),
            });
        }
        if !matches!(entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(PretrainedError::Dtype {
                path: path(),
                tensor: tensor.to_owned(),
                dtype: format!("{:?}", entry.dtype),
            });
        }
        Ok(entry)
    }

    fn append(
        &self,
        tensor: &str,
        entry: &Entry,
        values: &mut Vec<f32>,
    ) -> Result<(), PretrainedError> {
        let (path, first) = (&self.files[entry.file], values.len());
        let mut file = open(path)?;
        file.seek(SeekFrom::Start(entry.start)).map_err(io(path))?;
        let mut block = vec![0; BLOCK.min(entry.bytes)];
        let mut left = entry.bytes;
        while left > 0 {
            let bytes = &mut block[..BLOCK.min(left)];
            file.read_exact(bytes).map_err(io(path))?;
            match entry.dtype {
                Dtype::F32 => {
                    let words = bytes.as_chunks::<4>().0;
                    values.extend(words.iter().map(|b| f32::from_le_bytes(*b)));
                }
                Dtype::F16 => {
                    let words = bytes.as_chunks::<2>().0;
                    values.extend(words.iter().map(|b| f16::from_le_bytes(*b).to_f32()));
                }
                _ => {
                    let words = bytes.as_chunks::<2>().0;
                    values.extend(words.iter().map(|b| bf16::from_le_bytes(*b).to_f32()));
                }
            }
            left -= bytes.len();
        }
        match values[first..].iter().position(|x| !x.is_finite()) {
            Some(position) => Err(PretrainedError::NonFinite {
                path: path.clone(),
                tensor: tensor.to_owned(),
                position,
            }),
            None => Ok(()),
        }
    }
}
