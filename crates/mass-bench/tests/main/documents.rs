//! What the documents print is what the results beside them say, and their links lead somewhere.

use std::fs;
use std::path::{Path, PathBuf};

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
        ("continual.md", &["continual-quick"]),
        ("sensitivity.md", &["sensitivity-quick"]),
        ("noise.md", &["noise-quick"]),
        ("scale.md", &["scale-quick", "scale-quick-top2"]),
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
    let benches = fs::read_to_string(root.join("xtask/src/bench.rs")).unwrap();
    let mut studies = Vec::new();
    for line in blocks(&readme, "console") {
        let command = line.split(" #").next().unwrap_or_default();
        let words: Vec<&str> = command.split_whitespace().skip(1).collect();
        match words[..] {
            ["cargo", "xtask", "ci" | "docs"] | ["cargo", "test", "--workspace"] => {}
            ["cargo", "xtask", "bench", name, "--peers"] => {
                let there = benches.contains(&format!("name: \"{name}\""));
                assert!(there || name == "all", "{line}");
            }
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
    let printed = fs::read_to_string(root.join("docs/results/frontier.svg")).unwrap();
    assert!(
        printed == picture,
        "docs/results/frontier.svg is not the study's"
    );
}

/// Where the repository's files are to be read.
const PUBLISHED: [&str; 3] = [
    "https://github.com/mass-moe/mass/blob/main/",
    "https://github.com/mass-moe/mass/tree/main/",
    "https://raw.githubusercontent.com/mass-moe/mass/main/",
];

/// Every Markdown file below a folder, but for what was built and what is hidden.
fn markdown(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            markdown(&path, found);
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

/// A document without its blocks of code.
fn prose(text: &str) -> String {
    let blocks = text.split("\n```").step_by(2);
    blocks.collect::<Vec<_>>().join("\n")
}

/// Targets of `[..](..)` and `[..]: ..`.
fn links(prose: &str) -> Vec<&str> {
    let inline = prose.split("](").skip(1);
    let inline = inline.filter_map(|rest| rest.split_once(')').map(|(link, _)| link));
    let below = prose.lines().filter(|line| line.starts_with('['));
    let below = below.filter_map(|line| line.split_once("]: ").map(|(_, link)| link.trim()));
    let below = below.filter(|link| !link.contains(' '));
    inline.chain(below).collect()
}

/// The fragments by which headings of a document are reached.
fn headings(text: &str) -> Vec<String> {
    let text = prose(text);
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let fragment = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(fragment).collect()
}

/// What is wrong with a link in a document, `None` if nothing is. Pages of others are not asked for.
fn fault(root: &Path, document: &Path, link: &str) -> Option<String> {
    let ours = PUBLISHED.iter().find_map(|at| link.strip_prefix(at));
    let (link, from) = match ours {
        Some(path) => (path, root),
        None if link.contains("://") || link.starts_with("mailto:") => return None,
        None => (link, document.parent().unwrap()),
    };
    let (path, fragment) = link.split_once('#').unwrap_or((link, ""));
    let there = match path {
        "" => document.to_owned(),
        _ => from.join(path),
    };
    if !there.exists() {
        return Some(format!("there is no {path}"));
    }
    if fragment.is_empty() || there.extension().is_none_or(|e| e != "md") {
        return None;
    }
    let known = headings(&fs::read_to_string(&there).unwrap());
    let missing = !known.iter().any(|heading| heading == fragment);
    missing.then(|| format!("{path} has no heading {fragment}: {known:?}"))
}

#[test]
fn links_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = root.canonicalize().unwrap();
    let mut documents = Vec::new();
    markdown(&root, &mut documents);
    let (mut faults, mut count) = (Vec::new(), 0);
    for document in &documents {
        let text = prose(&fs::read_to_string(document).unwrap());
        // What crates.io and docs.rs show stands in no folder.
        let manifest =
            fs::read_to_string(document.with_file_name("Cargo.toml")).unwrap_or_default();
        let shown = document.ends_with("README.md") && manifest.contains("[package]");
        for link in links(&text) {
            count += 1;
            let fault = match shown && !link.contains("://") && !link.starts_with('#') {
                true => Some("it has to be absolute: docs.rs shows this file elsewhere".to_owned()),
                false => fault(&root, document, link),
            };
            faults.extend(fault.map(|why| format!("{}: {link}: {why}", document.display())));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(
        documents.len() > 20 && count > 60,
        "{count} links in {documents:?}"
    );
}

#[test]
fn dead_links_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("a/here.md"), dir.path().join("there.md"));
    fs::create_dir(dir.path().join("a")).unwrap();
    fs::write(
        &there,
        "# One `two`, three\n```\n# no heading\n```\n## Four\n",
    )
    .unwrap();
    fs::write(&here, "# Here\n").unwrap();
    let text = "see [x](../there.md#one-two-three),\n[y]: #here\n[z]: https://a.b/c\n[1]: is none\n```\n[no](link)\n```\n[t](../there.md#four)";
    let text = prose(text);
    let found = links(&text);
    assert_eq!(
        found,
        [
            "../there.md#one-two-three",
            "../there.md#four",
            "#here",
            "https://a.b/c"
        ]
    );
    for link in found {
        assert_eq!(fault(dir.path(), &here, link), None);
    }
    let published = PUBLISHED.map(|at| format!("{at}there.md#four"));
    for link in &published {
        assert_eq!(fault(dir.path(), &here, link), None);
    }
    for link in [
        "there.md",
        "../there.md#five",
        "#there",
        "../there.md#no-heading",
    ] {
        assert!(fault(dir.path(), &here, link).is_some(), "{link}");
    }
    let gone = format!("{}gone.md", PUBLISHED[0]);
    assert!(fault(dir.path(), &here, &gone).is_some());
}
