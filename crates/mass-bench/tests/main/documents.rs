//! What the documents print is what the results beside them say.

use std::fs;
use std::path::Path;

use crate::shards::done;

/// The cells of a table's line.
fn cells(line: &str) -> Vec<&str> {
    let cells = line.split("  ").map(str::trim);
    cells.filter(|cell| !cell.is_empty()).collect()
}

/// Whether a line is a row of `report`, but for columns that are left out.
fn is_row_of(line: &str, report: &str) -> bool {
    report.lines().any(|row| {
        let mut row = cells(row).into_iter();
        cells(line)
            .iter()
            .all(|cell| row.any(|other| other == *cell))
    })
}

#[test]
fn tables_are_those_of_the_results() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/results");
    let dir = tempfile::tempdir().unwrap();
    for (document, results) in [
        (
            "synthetic.md",
            &["synthetic-quick", "synthetic-quick-packed"][..],
        ),
        ("ablation.md", &["ablation-full"]),
        ("regime.md", &["regime-quick"]),
        ("glue.md", &["glue-full"]),
        ("dg.md", &["dg-full"]),
    ] {
        let mut report = String::new();
        for name in results {
            let (from, out) = (docs.join(name), dir.path().join(name));
            let [from, out] = [&from, &out].map(|path| path.to_str().unwrap());
            report += &done(&["report", from, "--out", out]);
        }
        let text = fs::read_to_string(docs.join(document)).unwrap();
        let mut rows = 0;
        for block in text.split("```text").skip(1) {
            let table = block.split("```").next().unwrap_or_default();
            let table = table.lines().skip_while(|line| !line.starts_with("------"));
            // Rows end with the number of seeds; what follows the table is in sentences.
            let is_row = |line: &&str| cells(line).len() > 4;
            for row in table.skip(1).take_while(is_row) {
                assert!(is_row_of(row, &report), "{document}: {row}");
                rows += 1;
            }
        }
        assert!(rows >= 9, "{document} has {rows} rows");
    }
    assert!(is_row_of(
        "static  5  1.890 ± 0.001",
        "static    5   2.00  1.890 ± 0.001  x"
    ));
    assert!(!is_row_of(
        "static  5  1.891 ± 0.001",
        "static    5   2.00  1.890 ± 0.001  x"
    ));
}
