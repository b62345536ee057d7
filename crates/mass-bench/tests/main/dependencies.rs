//! What the project depends on: under which licences, from where, and for which Rust.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use spdx::{Expression, ParseMode};

/// The list `allow` of .cargo/deny.toml, which cargo-deny reads too.
fn allowed(root: &Path) -> Vec<String> {
    let text = fs::read_to_string(root.join(".cargo/deny.toml")).unwrap();
    let (_, list) = text.split_once("allow = [").unwrap();
    let (list, _) = list.split_once("\n]").unwrap();
    let entries = list
        .lines()
        .filter_map(|line| line.trim().split('"').nth(1));
    entries.map(str::to_owned).collect()
}

/// Whether an expression is met by licences of a list; none is by an expression that cannot be read.
fn is_met(expression: &str, allowed: &[String]) -> bool {
    let Ok(expression) = Expression::parse_mode(expression, ParseMode::LAX) else {
        return false;
    };
    expression.evaluate(|needed| {
        let id = needed.license.id();
        id.is_some_and(|id| needed.addition.is_none() && allowed.iter().any(|name| name == id.name))
    })
}

/// `1.89` or `1.89.0` as numbers.
fn version(text: &str) -> Vec<u32> {
    let mut parts: Vec<u32> = text.split('.').map(|part| part.parse().unwrap()).collect();
    parts.resize(3, 0);
    parts
}

#[test]
fn dependencies_are_free_to_use_from_the_registry_and_for_our_rust() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let metadata = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version=1",
            "--all-features",
            "--locked",
        ])
        .current_dir(&root)
        .output()
        .unwrap();
    assert!(metadata.status.success(), "{metadata:?}");
    let metadata: Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let allowed = allowed(&root);
    assert!(allowed.len() > 3, "{allowed:?}");
    let packages = metadata["packages"].as_array().unwrap();
    let text =
        |package: &Value, field: &str| package[field].as_str().unwrap_or_default().to_owned();
    let ours = packages.iter().find(|p| p["name"] == "mass-bench").unwrap();
    let rust = version(&text(ours, "rust_version"));
    for package in packages {
        let (name, license) = (text(package, "name"), text(package, "license"));
        assert!(is_met(&license, &allowed), "{name} is under {license:?}");
        for dependency in package["dependencies"].as_array().unwrap() {
            let any = dependency["req"] == "*" && package["source"].is_null();
            assert!(!any, "{name} takes any version of {dependency}");
        }
        let source = package["source"].as_str();
        let registry = "registry+https://github.com/rust-lang/crates.io-index";
        let ours = package["source"].is_null() && package["repository"] != Value::Null;
        assert!(
            ours || name == "xtask" || source == Some(registry),
            "{name} is from {source:?}"
        );
        if let Some(needed) = package["rust_version"].as_str() {
            assert!(version(needed) <= rust, "{name} needs Rust {needed}");
        }
    }
    assert!(packages.len() > 100);
}

#[test]
fn licences_are_read_as_expressions() {
    let allowed = ["MIT", "Apache-2.0", "ISC"].map(str::to_owned);
    for met in [
        "MIT",
        "GPL-3.0 OR MIT",
        "MIT/Apache-2.0",
        "(MIT OR GPL-2.0) AND ISC",
    ] {
        assert!(is_met(met, &allowed), "{met}");
    }
    for refused in [
        "",
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "Apache-2.0 WITH LLVM-exception",
        "as you like",
    ] {
        assert!(!is_met(refused, &allowed), "{refused}");
    }
}
