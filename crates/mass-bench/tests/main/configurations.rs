//! Every configuration of `mass-model` and `mass-bench` refuses fields that it does not have.

use std::fs;
use std::path::{Path, PathBuf};

/// What configurations are called.
const ENDINGS: [&str; 11] = [
    "Config", "Params", "Setting", "Options", "Args", "Schedule", "Group", "Augment", "Method",
    "Loss", "Manifest",
];
/// Hugging Face's own, with fields that are not ours.
const OTHERS: [&str; 1] = ["BertConfig"];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The types of a file that are read by serde, with their attributes.
fn read_types(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut attributes = String::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[") {
            attributes.push_str(line);
            continue;
        }
        let mut words = line.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        let keyword = words.by_ref().find(|w| ["struct", "enum"].contains(w));
        if let (Some(_), Some(name)) = (keyword, words.next())
            && attributes.contains("Deserialize")
            && !line.starts_with("//")
        {
            found.push((name.to_owned(), attributes.clone()));
        }
        if !line.starts_with("//") {
            attributes.clear();
        }
    }
    found
}

#[test]
fn every_configuration_refuses_fields_that_it_does_not_have() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut checked = Vec::new();
    for name in ["mass-model", "mass-bench"] {
        let mut files = Vec::new();
        sources(&crates.join(name).join("src"), &mut files);
        for file in files {
            for (name, attributes) in read_types(&fs::read_to_string(&file).unwrap()) {
                let is_one = ENDINGS.iter().any(|end| name.ends_with(end));
                if !is_one || OTHERS.contains(&name.as_str()) {
                    continue;
                }
                // What is made from another type is refused by that one.
                let closed = ["deny_unknown_fields", "from = "];
                assert!(
                    closed.iter().any(|word| attributes.contains(word)),
                    "{}: {name} takes any field",
                    file.display()
                );
                checked.push(name);
            }
        }
    }
    assert!(checked.len() >= 20, "{checked:?}");
    for name in [
        "MoeConfig",
        "GateConfig",
        "GrowerConfig",
        "TrainArgs",
        "DynMoeConfig",
    ] {
        assert!(checked.iter().any(|c| c == name), "{name} is not found");
    }
}
