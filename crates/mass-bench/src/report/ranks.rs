//! Results of several processes: the first writes them.

use std::fs;
use std::path::Path;

use mass_model::parallel::Ranks;
use serde::Serialize;
use serde_json::Value;

use super::{Existing, Header, ReportError, ResultStore};
use crate::BenchError;

impl ResultStore {
    /// [`open`](Self::open) by the first of several ranks, which has to say so to the others if it fails; the others learn from it
    /// what is finished, and write nothing.
    ///
    /// # Errors
    /// As there, and those of the ranks.
    pub fn open_among(
        ranks: &Ranks,
        dir: &Path,
        header: Header,
        settings: &impl Serialize,
        existing: Existing,
    ) -> Result<Self, BenchError> {
        if ranks.is_alone() {
            return Ok(Self::open(dir, header, settings, existing)?);
        }
        let mut all = vec![
            ("program".to_owned(), program()),
            ("study".to_owned(), header.study.clone()),
            ("preset".to_owned(), header.preset.clone()),
            ("existing results".to_owned(), format!("{existing:?}")),
            (
                "--expert-parallel".to_owned(),
                ranks.group().len().to_string(),
            ),
            (
                "--overlap".to_owned(),
                ranks.overlap().map_or("nothing".into(), |n| n.to_string()),
            ),
        ];
        let settings = serde_json::to_value(settings).map_err(|e| ReportError::Malformed {
            path: dir.to_owned(),
            problem: format!("settings: {e}"),
        })?;
        leaves("", &settings, &mut all);
        let all: Vec<_> = all
            .iter()
            .map(|(what, v)| (what.as_str(), v.clone()))
            .collect();
        ranks.agree(&all)?;
        let own = match ranks.is_first() {
            true => Some(Self::open(dir, header, &settings, existing)?),
            false => None,
        };
        let results = ranks.of_first(own.as_ref().map(ResultStore::results))?;
        Ok(own.unwrap_or_else(|| Self::follower(dir, results)))
    }
}

/// Which program this is: its version, and a checksum of it where the system lets it be read.
fn program() -> String {
    let own = std::env::current_exe().and_then(fs::read);
    let sum = own.map_or_else(
        |_| String::new(),
        |own| format!(" {:08x}", crc32fast::hash(&own)),
    );
    format!("{}{sum}", env!("CARGO_PKG_VERSION"))
}

/// What settings say, each by where it stands in them.
fn leaves(prefix: &str, settings: &Value, all: &mut Vec<(String, String)>) {
    match settings {
        Value::Object(entries) => {
            for (name, value) in entries {
                let dot = if prefix.is_empty() { "" } else { "." };
                leaves(&format!("{prefix}{dot}{name}"), value, all);
            }
        }
        other => all.push((prefix.to_owned(), other.to_string())),
    }
}
