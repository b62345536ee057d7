use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::{PretrainedError, damaged, io, open};

/// No configuration is longer; what is longer is another file.
const LONGEST: u64 = 16 << 20;

pub(super) fn read_json(path: &Path, longest: u64) -> Result<Map<String, Value>, PretrainedError> {
    let mut text = String::new();
    let file = open(path)?;
    let read = file.take(longest + 1).read_to_string(&mut text);
    read.map_err(io(path))?;
    if text.len() as u64 > longest {
        return Err(damaged(path, format!("longer than {longest} bytes")));
    }
    match serde_json::from_str(&text).map_err(|e| damaged(path, e))? {
        Value::Object(map) => Ok(map),
        _ => Err(damaged(path, "not a JSON object")),
    }
}

/// Reads `config.json` of a folder. Fields that `T` does not have are passed over.
///
/// # Errors
/// [`PretrainedError::Io`] if it cannot be read, [`PretrainedError::Damaged`] if it is no JSON object, and
/// [`PretrainedError::Field`] naming the field that is missing or has a value of the wrong kind.
pub fn read_config<T: DeserializeOwned>(dir: &Path) -> Result<T, PretrainedError> {
    let path = config_file(dir);
    let map = read_json(&path, LONGEST)?;
    from_fields(&path, map)
}

/// Where the configuration of a folder is.
pub(crate) fn config_file(dir: &Path) -> PathBuf {
    dir.join("config.json")
}

/// Fields that are there, as `T`.
pub(crate) fn from_fields<T: DeserializeOwned>(
    path: &Path,
    map: Map<String, Value>,
) -> Result<T, PretrainedError> {
    let keys: Vec<String> = map.keys().cloned().collect();
    let all = Value::Object(map);
    T::deserialize(&all).map_err(|e| {
        let why = e.to_string();
        let missing = why.strip_prefix("missing field `");
        let field = match missing {
            Some(rest) => rest.split('`').next().unwrap_or_default().to_owned(),
            None => refused::<T>(&all, &keys, &why),
        };
        field_error(path, &field, &why)
    })
}

/// The field whose value is refused. serde names one that is missing, but not this one: without it, and without those that come
/// before it, the message is another.
fn refused<T: DeserializeOwned>(all: &Value, keys: &[String], why: &str) -> String {
    let same_without = |first: usize| {
        let mut others = all.clone();
        if let Value::Object(map) = &mut others {
            keys[..first].iter().for_each(|key| {
                map.remove(key);
            });
        }
        T::deserialize(&others).is_err_and(|e| e.to_string() == why)
    };
    // The message is the same without the first `low` fields, and another without the first `high`.
    let (mut low, mut high) = (0, keys.len());
    while high - low > 1 {
        let middle = low.midpoint(high);
        if same_without(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    keys.get(low).cloned().unwrap_or_default()
}

pub(crate) fn field_error(path: &Path, field: &str, why: &str) -> PretrainedError {
    PretrainedError::Field {
        path: path.to_owned(),
        field: field.to_owned(),
        why: why.to_owned(),
    }
}

/// For `#[serde(default, deserialize_with = "present")]`: a field that is absent is `None`, and null is no value.
pub(crate) fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}
