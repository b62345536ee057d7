//! Settings as they were written before methods were kept by name: results published with them can be gone on with.

use std::path::Path;

use serde_json::{Value, json};

use crate::BenchError;
use crate::durable;
use crate::method::Method;

/// Rewrites settings.json of a directory, if it is of the older form.
///
/// # Errors
/// [`BenchError::Failed`] if it cannot be written.
pub(super) fn renew(dir: &Path) -> Result<(), BenchError> {
    let path = dir.join("settings.json");
    // What cannot be read is found when the directory is opened.
    let old = std::fs::read_to_string(&path).ok();
    let old = old.and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let Some(new) = old.and_then(in_new_form) else {
        return Ok(());
    };
    let text = format!("{new:#}\n");
    let fill = |file: &mut std::fs::File| std::io::Write::write_all(file, text.as_bytes());
    durable::write(&path, &dir.join("settings.json.tmp"), fill)
        .map_err(|e| BenchError::failed(format!("writing {}", path.display()), e))
}

/// Settings as they are written now.
pub(super) fn renewed(settings: Value) -> Value {
    in_new_form(settings.clone()).unwrap_or(settings)
}

/// Settings of the older form as they are written now; `None` for others.
fn in_new_form(mut settings: Value) -> Option<Value> {
    let fields = settings.as_object_mut()?;
    let mut methods = match fields.remove("methods") {
        Some(Value::Array(methods)) => methods,
        Some(_) => return None,
        // The synthetic study had a list of its own.
        None => {
            let list = |value: Option<Value>| value.and_then(|v| v.as_array().cloned());
            let mut methods = list(fields.remove("mass"))?;
            let (from, to) = (
                fields.remove("experts_init")?,
                fields.remove("experts_max")?,
            );
            for mass in &mut methods {
                mass["method"] = json!("mass");
                (mass["experts"], mass["experts_max"]) = (from.clone(), to.clone());
            }
            let k = list(fields.remove("static_k"))?;
            for experts in list(fields.remove("static_experts"))? {
                let pools = k
                    .iter()
                    .map(|k| json!({ "method": "static", "experts": experts, "k": k }));
                methods.extend(pools);
            }
            methods
        }
    };
    for only_adds in ["vocabs", "checkpoint_every"] {
        fields.remove(only_adds);
    }
    for value in &mut methods {
        // What it says of smoke's thresholds is said by rules now; smoke is never gone on with for its figures.
        if value.get("loose") == Some(&json!(false)) {
            value.as_object_mut()?.remove("loose");
        }
        let dense = if value["method"] == "erm" {
            "erm"
        } else {
            "dense"
        };
        let method: Method = serde_json::from_value(value.clone()).ok()?;
        let mut run = method.run(0);
        if method == Method::Dense {
            dense.clone_into(&mut run.method);
        }
        settings["methods"][run.key().without_seed()] = json!(method);
    }
    Some(settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{ReproduceArgs, RunContext};
    use crate::report::Results;
    use crate::study::{plan::Family, synthetic};

    fn published(name: &str) -> std::path::PathBuf {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        root.join("../../docs/results").join(name)
    }

    fn settings(name: &str) -> Value {
        let text = std::fs::read_to_string(published(name).join("settings.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Every run of docs/results is read, and called as it is called now.
    #[test]
    fn published_runs_are_those_that_the_presets_make() {
        for name in ["synthetic-quick", "synthetic-quick-packed"] {
            let text = std::fs::read_to_string(published(name).join("results.json")).unwrap();
            let results: Results = serde_json::from_str(&text).unwrap();
            let args = ReproduceArgs::parsed(&["synthetic", "--preset", "quick"]);
            let plan = synthetic::plan(&args).unwrap();
            let made = plan.runs(&args).unwrap();
            let keys: Vec<_> = made.iter().map(|planned| planned.run.key()).collect();
            let theirs: Vec<_> = results.runs.iter().map(|run| run.key()).collect();
            assert_eq!(keys, theirs, "{name}");
            // And its settings are the preset's.
            let mut now = plan.family.settings().unwrap();
            for planned in &made {
                let name = planned.run.key().without_seed();
                now["methods"][name] = json!(planned.method);
            }
            let text = serde_json::to_string(&now).unwrap();
            let now: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(in_new_form(settings(name)), Some(now.clone()));
            assert_eq!(in_new_form(now), None);
        }
        // The others need their models to be planned.
        for (name, methods) in [("glue-full", 8), ("dg-full", 6)] {
            let text = std::fs::read_to_string(published(name).join("results.json")).unwrap();
            let results: Results = serde_json::from_str(&text).unwrap();
            let renewed = in_new_form(settings(name)).unwrap();
            let kept = renewed["methods"].as_object().unwrap();
            assert_eq!(kept.len(), methods);
            assert!(renewed.get("checkpoint_every").is_none());
            for run in &results.runs {
                let key = run.key().over_tasks().without_seed();
                assert!(kept.contains_key(&key), "{key}");
            }
        }
    }

    #[test]
    fn a_directory_of_the_older_form_is_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().to_str().unwrap();
        for file in [
            "results.json",
            "metrics.jsonl",
            "events.jsonl",
            "settings.json",
        ] {
            std::fs::copy(
                published("synthetic-quick").join(file),
                dir.path().join(file),
            )
            .unwrap();
        }
        let line = ["synthetic", "--preset", "quick", "--resume", "--out", out];
        let args = ReproduceArgs::parsed(&line);
        let mut ctx = RunContext::new(crate::cli::Progress::new(true));
        let plan = synthetic::plan(&args).unwrap();
        // All runs are finished: none is made.
        let results = plan.run(&args, &mut ctx).unwrap();
        let (made, theirs) = (plan.runs(&args).unwrap().len(), results.runs.len());
        assert_eq!(made, theirs);
    }
}
