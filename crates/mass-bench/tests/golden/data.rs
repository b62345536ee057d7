//! The folders that the variables name, as `data check` reads them.

use std::path::PathBuf;

use mass_bench::data_check::{Item, Status, check};

/// What the variables point at must be readable, whatever part of it is there.
#[test]
fn real_data_is_readable() {
    let dir = |name: &str| PathBuf::from(std::env::var_os(name).expect(name));
    let report = check(Some(&dir("MASS_DATA_DIR")), Some(&dir("MASS_MODELS_DIR")))
        .expect("directories exist");
    report.verdict().unwrap_or_else(|e| panic!("{e}\n{report}"));
    let found = |i: &&Item| matches!(i.status, Status::Found(_));
    assert!(
        report
            .groups
            .iter()
            .flat_map(|g| &g.items)
            .filter(found)
            .count()
            >= 3,
        "{report}"
    );
}
