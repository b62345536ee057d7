//! What the documents print is what the results beside them say.

use std::fs;
use std::path::Path;

use clap::Parser;
use mass_bench::cli::{Cli, Command};
use mass_bench::study;

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

/// The lines of Markdown's blocks of one kind.
fn blocks<'t>(text: &'t str, kind: &str) -> Vec<&'t str> {
    let fence = format!("```{kind}\n");
    let blocks = text.split(fence.as_str()).skip(1);
    let lines = blocks.flat_map(|block| block.split("```").next().unwrap_or_default().lines());
    lines.collect()
}

#[test]
fn the_readme_is_narrow_its_commands_exist_and_its_picture_is_the_study_s() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let wide: Vec<&str> = readme.lines().filter(|l| l.chars().count() > 100).collect();
    assert_eq!(wide, Vec::<&str>::new());
    let mut studies = Vec::new();
    for line in blocks(&readme, "console") {
        let command = line.split(" #").next().unwrap_or_default();
        let words: Vec<&str> = command.split_whitespace().skip(1).collect();
        match words[..] {
            ["cargo", "xtask", "ci"] | ["cargo", "xtask", "bench", ..] | ["cargo", "test", ..] => {}
            ["cargo", "xtask", ref arguments @ ..] => {
                let cli = Cli::try_parse_from(["mass-bench"].iter().chain(arguments));
                match cli.unwrap_or_else(|e| panic!("{line}: {e}")).command {
                    Command::Reproduce(args) => {
                        assert!(study::find(&args.study).is_some(), "{line}");
                        studies.push(args.study);
                    }
                    Command::Train(_) | Command::Report(_) | Command::Data(_) => {}
                    Command::Bench(_) => panic!("{line}"),
                }
            }
            _ => panic!("{line}"),
        }
    }
    for study in study::STUDIES {
        assert!(studies.iter().any(|s| s == study.name), "{}", study.name);
    }
    let dir = tempfile::tempdir().unwrap();
    let from = root.join("docs/results/synthetic-quick-packed");
    let report = done(&[
        "report",
        from.to_str().unwrap(),
        "--out",
        dir.path().to_str().unwrap(),
    ]);
    let table = blocks(&readme, "text");
    let rows: Vec<&&str> = table
        .iter()
        .filter(|l| cells(l).len() > 4)
        .skip(2)
        .collect();
    assert_eq!(rows.len(), 10);
    for row in rows {
        assert!(is_row_of(row, &report), "{row}");
    }
    let picture = fs::read_to_string(dir.path().join("frontier.svg")).unwrap();
    assert_eq!(
        fs::read_to_string(root.join("docs/results/frontier.svg")).unwrap(),
        picture
    );
}
