//! `cargo xtask docs`: a site of the reference and the documents, and a check of its links.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::run::{Outcome, cargo, must, read, root, target, write};

const REPOSITORY: &str = "https://github.com/mass-moe/mass";

const STYLE: &str = "<style>body { max-width: 60em; margin: auto; padding: 1em; font: 1em/1.5 sans-serif }
table { border-collapse: collapse } td, th { border: 1px solid #aaa; padding: .2em .5em; text-align: left }
pre { overflow-x: auto; background: #f4f4f4; padding: .5em }</style>
";

const HELP: &str = "\
Usage: cargo xtask docs [--reports] [--all-features]

Makes a site in target/doc: the reference of every crate and the documents of docs/, with docs/README.md as its front page. Fails
if rustdoc warns, or if a link within the site leads nowhere.

  --reports        the reports of the published results too, for which mass-bench is built
  --all-features   the reference of MPI too, for which its library has to be there";

/// Builds the site and checks it.
pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    if arguments.iter().any(|a| a == "--help" || a == "-h") {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    let (mut reports, mut all) = (false, false);
    for argument in arguments {
        match argument.to_str() {
            Some("--reports") => reports = true,
            Some("--all-features") => all = true,
            _ => {
                let argument = argument.to_string_lossy();
                eprintln!("error: docs takes --reports and --all-features, not `{argument}`");
                return ExitCode::from(2);
            }
        }
    }
    let site = target().join("doc");
    match build(&site, reports, all).and_then(|()| check(&site)) {
        Ok((pages, links)) => {
            println!(
                "{}: {pages} pages, {links} links",
                site.join("index.html").display()
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build(site: &Path, reports: bool, all: bool) -> Outcome<()> {
    // Pages of what is no longer there would be checked too.
    if site.exists() {
        fs::remove_dir_all(site).map_err(|e| format!("{}: {e}", site.display()))?;
    }
    let mut reference = cargo();
    reference.args(["doc", "--workspace", "--no-deps"]);
    match all {
        true => reference.arg("--all-features"),
        // All but `mpi`, which wants a library of the system.
        false => reference.args(["--features", "mass-cpd/offline,mass-bench/hub"]),
    };
    must(
        reference
            .env("RUSTDOCFLAGS", "-Dwarnings")
            .current_dir(root()),
    )?;
    let docs = root().join("docs");
    let style = site.join("style.html");
    write(&style, STYLE)?;
    for file in files(&docs)? {
        let name = relative(&file, &docs);
        if name.ends_with(".md") {
            render(&file, &name, &style, site, reports)?;
        } else if reports && name.ends_with("/results.json") {
            let from = file.parent().unwrap_or(&docs);
            let mut report = cargo();
            // Of all packages, as tests are built: of one, its dependencies would be built anew.
            report.args(["run", "--quiet", "--bin", "mass-bench", "--", "report"]);
            report.arg(from).arg("--out").arg(
                site.join("reports")
                    .join(from.file_name().unwrap_or_default()),
            );
            must(
                report
                    .current_dir(root())
                    .stdout(std::process::Stdio::null()),
            )?;
        }
    }
    Ok(())
}

/// Makes a page of a document, in the same place of the site as in `docs/`.
fn render(file: &Path, name: &str, style: &Path, site: &Path, reports: bool) -> Outcome<()> {
    let page = site.join(page(name));
    let folder = page.parent().unwrap_or(site);
    fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut rustdoc = Command::new("rustdoc");
    rustdoc
        .arg(file)
        .arg("--html-in-header")
        .arg(style)
        .arg("--output")
        .arg(folder);
    must(rustdoc.arg("--markdown-no-toc"))?;
    let made = folder.join(
        Path::new(name)
            .with_extension("html")
            .file_name()
            .unwrap_or_default(),
    );
    let text = read(&made)?;
    let mut out = String::with_capacity(text.len());
    let mut rest = &text[..];
    while let Some((before, after)) = rest.split_once("href=\"") {
        let (link, after) = after.split_once('"').ok_or("a link without an end")?;
        out.push_str(before);
        out.push_str(&format!("href=\"{}\"", place(link, name, reports)));
        rest = after;
    }
    out.push_str(rest);
    fs::remove_file(&made).map_err(|e| format!("{}: {e}", made.display()))?;
    write(&page, &out)
}

/// Where the site has a document of `docs/`.
fn page(name: &str) -> String {
    match name {
        "README.md" => "index.html".to_owned(),
        _ => name.replace(".md", ".html"),
    }
}

/// What a link of a document in `docs/` is on the site; what is not on the site is in the repository.
fn place(link: &str, document: &str, reports: bool) -> String {
    if link.contains("://") || link.starts_with('#') {
        return link.to_owned();
    }
    let (path, fragment) = link
        .split_once('#')
        .map_or((link, String::new()), |(p, f)| (p, format!("#{f}")));
    let here = Path::new("docs").join(document);
    let path = plain(&here.parent().unwrap_or(Path::new("")).join(path));
    let up = "../".repeat(document.matches('/').count());
    let crate_page = |name: &str| format!("{up}{}/index.html{fragment}", name.replace('-', "_"));
    if path == "crates/mass-expand/src/guide.rs" {
        return format!("{up}mass_expand/guide/index.html");
    }
    let document = path.strip_prefix("docs/");
    if let Some(name) = document.filter(|name| name.ends_with(".md")) {
        return format!("{up}{}{fragment}", page(name));
    }
    if let Some(name) = path.strip_prefix("docs/results/").filter(|_| reports) {
        return format!("{up}reports/{name}/report.html");
    }
    match path.strip_prefix("crates/") {
        Some(name) if name.starts_with("mass-") && !name.contains('/') => crate_page(name),
        _ => format!("{REPOSITORY}/blob/main/{path}{fragment}"),
    }
}

/// A path without `..` and with `/`.
fn plain(path: &Path) -> String {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                parts.pop();
            }
            Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            _ => {}
        }
    }
    parts.join("/")
}

/// Whether every link within the site has a page, and every fragment an element; how many pages and links there are.
fn check(site: &Path) -> Outcome<(usize, usize)> {
    let mut pages = HashMap::new();
    for file in files(site)? {
        let name = relative(&file, site);
        let text = match name.ends_with(".html") && name != "style.html" {
            true => read(&file)?,
            false => String::new(),
        };
        pages.insert(name, text);
    }
    let ids: HashMap<&str, HashSet<&str>> = pages
        .iter()
        .map(|(name, text)| (&name[..], values(text, "id").collect()))
        .collect();
    let (mut links, mut dead) = (0, Vec::new());
    for (name, text) in &pages {
        for link in values(text, "href").chain(values(text, "src")) {
            let outside = [":", "javascript", "data"]
                .iter()
                .any(|mark| link.contains(mark));
            if outside || link.is_empty() || link.contains("${") {
                continue;
            }
            links += 1;
            let (path, fragment) = link.split_once('#').unwrap_or((link, ""));
            let from = Path::new(name).parent().unwrap_or(Path::new(""));
            let to = if path.is_empty() {
                name.clone()
            } else {
                plain(&from.join(path))
            };
            let Some(there) = ids.get(&to[..]) else {
                dead.push(format!("{name}: {link}"));
                continue;
            };
            // Lines of source are found by a script, and pages that have moved hand the fragment on.
            let by_script = to.starts_with("src/") || pages[&to].contains("<p>Redirecting to");
            if !fragment.is_empty() && !by_script && !there.contains(fragment) {
                dead.push(format!("{name}: {link} (no such place on the page)"));
            }
        }
    }
    dead.sort();
    match dead.len() {
        0 => Ok((ids.values().filter(|ids| !ids.is_empty()).count(), links)),
        n => Err(format!("{n} links lead nowhere:\n{}", dead.join("\n"))),
    }
}

/// The values of an attribute, wherever it stands in a page.
fn values<'a>(page: &'a str, attribute: &str) -> impl Iterator<Item = &'a str> {
    let start = format!(" {attribute}=\"");
    let starts: Vec<usize> = page
        .match_indices(&start)
        .map(|(at, _)| at + start.len())
        .collect();
    starts
        .into_iter()
        .filter_map(|at| page[at..].split_once('"').map(|(value, _)| value))
}

/// All files below a folder.
fn files(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let (mut found, mut open) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        let entries = fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        for entry in entries {
            let path = entry.map_err(|e| e.to_string())?.path();
            if path.is_dir() {
                open.push(path)
            } else {
                found.push(path)
            }
        }
    }
    found.sort();
    Ok(found)
}

fn relative(file: &Path, folder: &Path) -> String {
    plain(file.strip_prefix(folder).unwrap_or(file))
}
