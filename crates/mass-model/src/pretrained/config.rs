use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{PretrainedError, damaged, io};

/// No configuration is longer; what is longer is another file.
const LONGEST: u64 = 16 << 20;

pub(super) fn read_json(path: &Path, longest: u64) -> Result<Map<String, Value>, PretrainedError> {
    let mut text = String::new();
    let file = File::open(path).map_err(io(path))?;
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
    let path = &dir.join("config.json");
    let map = read_json(path, LONGEST)?;
    let whole = serde_json::from_value(Value::Object(map.clone()));
    whole.map_err(|e| {
        let why = e.to_string();
        let missing = why.strip_prefix("missing field `");
        // serde names a field that is missing, but not one whose value it refuses: leave them out one by one.
        let refused = |key: &&String| {
            let mut others = map.clone();
            others.remove(*key);
            match serde_json::from_value::<T>(Value::Object(others)) {
                Ok(_) => true,
                Err(other) => other.to_string() != why,
            }
        };
        let field = match missing {
            Some(rest) => rest.split('`').next().map(str::to_owned),
            None => map.keys().find(refused).cloned(),
        };
        PretrainedError::Field {
            path: path.clone(),
            field: field.unwrap_or_default(),
            why,
        }
    })
}
