//! The default segmentation against human annotators (Turing Change Point Dataset).

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
};

use mass_cpd::offline::PeltParams;
use ndarray::Array1;
use serde_json::Value;

const MARGIN: usize = 5;

struct Annotated {
    name: String,
    /// Points, with their places in the series; missing ones are left out.
    values: Vec<(usize, f64)>,
    len: usize,
    annotators: Vec<BTreeSet<usize>>,
}

fn folder() -> PathBuf {
    let dir = env::var("MASS_DATA_DIR").expect("MASS_DATA_DIR names the folder of data");
    PathBuf::from(dir).join("tcpd")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn all() -> Vec<Annotated> {
    let file: Value =
        serde_json::from_str(&read(&folder().join("annotations.json"))).expect("JSON");
    let series = file.as_object().expect("an object");
    assert!(!series.is_empty());
    series
        .iter()
        .map(|(name, annotators)| {
            let text = read(&folder().join("series").join(format!("{name}.csv")));
            let rows: Vec<&str> = text.lines().skip(1).collect();
            let values = rows
                .iter()
                .enumerate()
                .filter_map(|(t, row)| {
                    let field = row
                        .split(',')
                        .nth(1)
                        .unwrap_or_else(|| panic!("{name}: {row}"));
                    (!field.is_empty()).then(|| {
                        (
                            t,
                            field
                                .parse()
                                .unwrap_or_else(|e| panic!("{name}: {field}: {e}")),
                        )
                    })
                })
                .collect();
            let annotators = annotators
                .as_object()
                .expect("annotators")
                .values()
                .map(|marks| {
                    let marks = marks.as_array().expect("marks");
                    marks
                        .iter()
                        .map(|m| m.as_u64().expect("an index") as usize)
                        .collect()
                })
                .collect();
            Annotated {
                name: name.clone(),
                values,
                len: rows.len(),
                annotators,
            }
        })
        .collect()
}

/// Marks that have a prediction within the margin, each prediction used once, the nearest first.
fn true_positives(marks: &BTreeSet<usize>, predicted: &BTreeSet<usize>) -> usize {
    let mut free = predicted.clone();
    marks
        .iter()
        .filter(|&&mark| {
            let nearest = free
                .iter()
                .copied()
                .filter(|p| p.abs_diff(mark) <= MARGIN)
                .min_by_key(|p| p.abs_diff(mark));
            nearest.is_some_and(|p| free.remove(&p))
        })
        .count()
}

fn f1(annotators: &[BTreeSet<usize>], found: &[usize]) -> f64 {
    let with_zero =
        |marks: &BTreeSet<usize>| -> BTreeSet<usize> { marks.iter().copied().chain([0]).collect() };
    let predicted: BTreeSet<usize> = found.iter().copied().chain([0]).collect();
    let marks: Vec<_> = annotators.iter().map(with_zero).collect();
    let union: BTreeSet<usize> = marks.iter().flatten().copied().collect();
    let precision = true_positives(&union, &predicted) as f64 / predicted.len() as f64;
    let recall = marks
        .iter()
        .map(|m| true_positives(m, &predicted) as f64 / m.len() as f64)
        .sum::<f64>()
        / marks.len() as f64;
    2.0 * precision * recall / (precision + recall)
}

fn segments(cuts: impl IntoIterator<Item = usize>, n: usize) -> Vec<(usize, usize)> {
    let mut edges: Vec<usize> = cuts.into_iter().filter(|&c| c > 0 && c < n).collect();
    edges.insert(0, 0);
    edges.push(n);
    edges.windows(2).map(|e| (e[0], e[1])).collect()
}

fn covering(annotators: &[BTreeSet<usize>], found: &[usize], n: usize) -> f64 {
    let predicted = segments(found.iter().copied(), n);
    let one = |marks: &BTreeSet<usize>| -> f64 {
        segments(marks.iter().copied(), n)
            .into_iter()
            .map(|(a, b)| {
                let overlap = |&(c, d): &(usize, usize)| {
                    let both = b.min(d).saturating_sub(a.max(c)) as f64;
                    both / (b.max(d) - a.min(c)) as f64
                };
                let best = predicted.iter().map(overlap).fold(0.0, f64::max);
                (b - a) as f64 * best
            })
            .sum::<f64>()
            / n as f64
    };
    annotators.iter().map(one).sum::<f64>() / annotators.len() as f64
}

/// Method -> series -> score; a method without a score for a series (M, F) lacks it.
fn published(file: &str) -> BTreeMap<String, BTreeMap<String, f64>> {
    let text = read(&folder().join(file));
    let mut lines = text.lines();
    let methods: Vec<&str> = lines
        .next()
        .expect("a header")
        .split('\t')
        .skip(1)
        .collect();
    let mut table: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    for line in lines {
        let mut fields = line.split('\t');
        let series = fields.next().expect("a name");
        for (method, field) in methods.iter().zip(fields) {
            if let Ok(score) = field.parse() {
                table
                    .entry((*method).to_owned())
                    .or_default()
                    .insert(series.to_owned(), score);
            }
        }
    }
    table
}

fn mean(scores: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = scores.len() as f64;
    scores.sum::<f64>() / n
}

#[test]
fn scorer_reproduces_the_published_scores_of_no_change_points() {
    let (f1_table, cover_table) = (
        published("published_default_f1.tsv"),
        published("published_default_cover.tsv"),
    );
    for s in all() {
        let want = (f1_table["zero"][&s.name], cover_table["zero"][&s.name]);
        let got = (f1(&s.annotators, &[]), covering(&s.annotators, &[], s.len));
        assert!(
            (got.0 - want.0).abs() < 6e-4,
            "{}: F1 {} {}",
            s.name,
            got.0,
            want.0
        );
        assert!(
            (got.1 - want.1).abs() < 6e-4,
            "{}: cover {} {}",
            s.name,
            got.1,
            want.1
        );
    }
}

#[test]
fn default_segmentation_is_at_least_the_best_published_default() {
    let series = all();
    let pelt = PeltParams::default().check().expect("the default is valid");
    let scores: Vec<(f64, f64)> = series
        .iter()
        .map(|s| {
            let values: Array1<f64> = s.values.iter().map(|v| v.1).collect();
            let found = pelt.segment(values.view()).expect("a series").indices();
            let places: Vec<usize> = found.iter().map(|&i| s.values[i].0).collect();
            let score = (
                f1(&s.annotators, &places),
                covering(&s.annotators, &places, s.len),
            );
            println!(
                "{}: F1 {:.3}, covering {:.3}, {places:?}",
                s.name, score.0, score.1
            );
            score
        })
        .collect();
    let means = [
        mean(scores.iter().map(|s| s.0)),
        mean(scores.iter().map(|s| s.1)),
    ];
    println!("mean F1 {:.4}, mean covering {:.4}", means[0], means[1]);
    let tables = ["published_default_f1.tsv", "published_default_cover.tsv"];
    for (ours, file) in means.into_iter().zip(tables) {
        for (method, scores) in published(file) {
            // Over the series here; a method that failed on one of them has no mean to compare with.
            let have: Vec<f64> = series
                .iter()
                .filter_map(|s| scores.get(&s.name).copied())
                .collect();
            if have.len() == series.len() {
                let theirs = mean(have.into_iter());
                assert!(
                    ours >= theirs,
                    "{file}: {method} has {theirs:.4}, we have {ours:.4}"
                );
            }
        }
    }
}
