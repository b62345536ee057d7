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
            &[
                "synthetic-quick",
                "synthetic-quick-packed",
                "synthetic-full",
            ][..],
        ),
        ("ablation.md", &["ablation-full"]),
        ("regime.md", &["regime-full"]),
        ("size.md", &["size-full"]),
        ("continual.md", &["continual-full"]),
        ("domains.md", &["domains-full"]),
        ("sensitivity.md", &["sensitivity-full"]),
        ("noise.md", &["noise-full"]),
        ("labels.md", &["labels-quick"]),
        ("scale.md", &["scale-full", "scale-full-top2"]),
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
        assert!(rows >= 8, "{document} has {rows} rows");
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
fn the_readme_s_table_and_picture_are_the_study_s() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
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

/// The project's README first, then those of crates.
fn readmes(root: &Path) -> Vec<(PathBuf, String)> {
    let crates = fs::read_dir(root.join("crates")).unwrap();
    let folders = crates.map(|entry| entry.unwrap().path());
    let folders = [root.to_owned()].into_iter().chain(folders);
    let paths = folders.map(|folder| folder.join("README.md"));
    paths
        .map(|path| (path.clone(), fs::read_to_string(path).unwrap()))
        .collect()
}

#[test]
fn documents_are_narrow() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut paths = Vec::new();
    markdown(&root, &mut paths);
    assert!(paths.len() > 30, "{paths:?}");
    for path in &paths {
        let text = fs::read_to_string(path).unwrap();
        let readme = path.ends_with("README.md");
        let mut wide = Vec::new();
        let mut code = false;
        for line in text.lines() {
            code ^= line.trim_start().starts_with("```");
            // Rows of tables, addresses, and what a command prints cannot be broken.
            let printed = !readme && (code || line.starts_with("    "));
            let whole = printed || line.starts_with(['|', '[']);
            if line.chars().count() > 100 && !whole {
                wide.push(line);
            }
        }
        assert_eq!(wide, Vec::<&str>::new(), "{}", path.display());
    }
}

/// Each command of the README is run as it stands, but for sizes, and for files where it says FILE or DIR.
#[test]
fn the_readme_s_commands_do_what_they_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let benches = fs::read_to_string(root.join("xtask/src/bench.rs")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    fs::write(&text, "What is written here is learnt. ".repeat(100)).unwrap();
    let small = "--dim 16 --hidden 16 --layers 1 --seq 16 --batch 2 --steps 3";
    let (mut studies, mut trained, mut outs) = (Vec::new(), 0, Vec::<String>::new());
    let mut model = String::new();
    for line in blocks(&readme, "console") {
        let command = line.split(" #").next().unwrap_or_default();
        let words: Vec<&str> = command.split_whitespace().skip(1).collect();
        let arguments = match words[..] {
            // CI runs these three.
            ["cargo", "xtask", "ci" | "docs"] | ["cargo", "test", "--workspace"] => continue,
            // CI compiles them.
            ["cargo", "xtask", "bench", name, "--peers"] => {
                let there = benches.contains(&format!("name: \"{name}\""));
                assert!(there || name == "all", "{line}");
                continue;
            }
            ["cargo", "xtask", ref arguments @ ..] => arguments,
            _ => panic!("{line}"),
        };
        let cli = Cli::try_parse_from(["mass-bench"].iter().chain(arguments));
        let mut run: Vec<&str> = arguments.to_vec();
        let out = dir.path().join((outs.len() + trained).to_string());
        let out = out.to_str().unwrap();
        match cli.unwrap_or_else(|e| panic!("{line}: {e}")).command {
            Command::Reproduce(args) => {
                // No data, no models, and the smallest size.
                for (flag, count) in [("--preset", 2), ("--data", 2), ("--models", 2)] {
                    if let Some(at) = run.iter().position(|word| *word == flag) {
                        run.drain(at..at + count);
                    }
                }
                // CI runs every method of every study once.
                if args.methods.is_none() {
                    run.extend(["--methods", "static"]);
                }
                let printed = done(&[&run[..], &["--preset", "smoke", "--out", out]].concat());
                assert!(
                    printed.contains(&format!("{} (smoke)", args.study)),
                    "{line}: {printed}"
                );
                studies.push(args.study);
                outs.push(out.to_owned());
            }
            Command::Train(_) => {
                let file = run.iter().position(|word| *word == "FILE").unwrap();
                run[file] = text.to_str().unwrap();
                run.extend(small.split(' '));
                assert!(
                    done(&[&run[..], &["--out", out]].concat()).contains("bits"),
                    "{line}"
                );
                trained += 1;
                model = out.to_owned();
            }
            Command::Score(_) => {
                assert_eq!(arguments, ["score", "target/train", "FILE"]);
                let score = done(&["score", &model, text.to_str().unwrap()]);
                assert!(score.contains("bits per byte"), "{line}: {score}");
            }
            Command::Report(_) => {
                assert_eq!(arguments, ["report", "DIR", "DIR"]);
                let joined = done(&["report", &outs[0], &outs[0], "--out", out]);
                assert!(Path::new(out).join("report.html").exists(), "{line}");
                assert!(joined.contains("synthetic (smoke)"), "{joined}");
            }
            Command::Data(_) if arguments == ["data", "check"] => {
                assert!(done(&run).contains("minilm-l6"), "{line}");
            }
            // Tests of the feature `hub` run it.
            Command::Data(_) => assert_eq!(arguments[..2], ["data", "fetch"], "{line}"),
            Command::Bench(_) => panic!("{line}"),
        }
    }
    for study in study::STUDIES {
        assert!(studies.iter().any(|s| s == study.name), "{}", study.name);
    }
    assert!(trained > 1 && outs.len() > 9);
}

/// The commands of a text, wherever they stand, as words; a line that ends with a backslash goes on.
fn commands(text: &str) -> Vec<Vec<String>> {
    let text = text.replace("\\\n", " ");
    let mut found = Vec::new();
    // Between backticks, or in a block, which three of them enclose: every second piece.
    for piece in text.split('`').skip(1).step_by(2) {
        for line in piece.lines() {
            let Some(at) = line.find("cargo ") else {
                continue;
            };
            let before = line[..at].trim_start_matches("$ ");
            let alone = before.split_whitespace().all(|word| word.contains('='));
            let command = line[at..].split(" # ").next().unwrap_or_default();
            if alone {
                found.push(command.split_whitespace().map(str::to_owned).collect());
            }
        }
    }
    found
}

#[test]
fn commands_of_every_readme_exist_and_ci_runs_their_examples() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let ci = fs::read_to_string(root.join(".ci/run")).unwrap();
    let xtask = fs::read_to_string(root.join("xtask/src/main.rs")).unwrap();
    let mut examples = Vec::new();
    for (path, text) in readmes(&root) {
        let at = path.display();
        for command in commands(&text) {
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            let after = |flag: &str| {
                let at = words.iter().position(|word| *word == flag)?;
                words.get(at + 1).copied()
            };
            let manifest = after("--manifest-path").map(|path| path.replace("/Cargo.toml", ""));
            let package = after("-p").map(|name| format!("crates/{name}"));
            let folder = root.join(manifest.or(package).unwrap_or_default());
            assert!(folder.join("Cargo.toml").exists(), "{at}: {words:?}");
            let there = |kind: &str, name: &str| {
                let file = folder.join(kind).join(name);
                file.with_extension("rs").exists() || file.join("main.rs").exists()
            };
            match words[1] {
                "xtask" => {
                    let known = words
                        .get(2)
                        .is_none_or(|name| xtask.contains(&format!("\"{name}\"")));
                    assert!(known, "{at}: {words:?}");
                }
                "run" | "test" | "bench" | "doc" | "build" => {}
                _ => panic!("{at}: {words:?}"),
            }
            for (flag, kind) in [
                ("--example", "examples"),
                ("--test", "tests"),
                ("--bench", "benches"),
            ] {
                let Some(name) = after(flag) else { continue };
                assert!(there(kind, name), "{at}: {words:?}");
                if kind == "examples" {
                    examples.push(name.to_owned());
                }
            }
            if let Some(feature) = after("--features") {
                let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
                assert!(
                    manifest.contains(&format!("\n{feature} = [")),
                    "{at}: {words:?}"
                );
            }
        }
    }
    examples.sort();
    examples.dedup();
    assert!(examples.len() > 9, "{examples:?}");
    // What measures speed takes minutes, PyTorch or a GPU.
    for name in examples
        .iter()
        .filter(|name| !["compare_gate", "speed"].contains(&&name[..]))
    {
        assert!(ci.contains(name), ".ci/run does not run {name}");
    }
}

#[test]
fn commands_are_found_in_blocks_and_between_backticks() {
    let text =
        "a cargo of words, `cargo a b`,\n```console\n$ X=1 cargo c \\\n    d # e\n```\nand `mass`";
    assert_eq!(
        commands(text),
        [vec!["cargo", "a", "b"], vec!["cargo", "c", "d"]]
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
