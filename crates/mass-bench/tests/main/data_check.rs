//! `data check` on directories made here.

use std::{
    fs,
    path::{Path, PathBuf},
};

use mass_bench::data_check::{DataReport, Status, check};

/// How a JPEG begins.
const JPEG: [u8; 4] = [0xff, 0xd8, 0xff, 0xe0];

fn put(root: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = root.join(name);
    fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
    fs::write(&path, bytes).expect("a write");
    path
}

fn status(report: &DataReport, name: &str) -> Status {
    let mut items = report.groups.iter().flat_map(|g| &g.items);
    items.find(|i| i.name == name).expect(name).status.clone()
}

fn broken(report: &DataReport, name: &str, part: &str) {
    match status(report, name) {
        Status::Broken(why) => assert!(why.contains(part), "{name}: {why}"),
        other => panic!("{name}: {other:?}"),
    }
    assert!(
        report
            .verdict()
            .expect_err("broken")
            .to_string()
            .contains(name)
    );
}

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

const HEADER: &str = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

fn good(root: &Path) {
    put(
        root,
        "glue/RTE/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n",
    );
    put(
        root,
        "glue/RTE/dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n",
    );
    put(root, "glue/CoLA/train.tsv", "gj04\t1\t\tA sentence.\n");
    put(root, "glue/CoLA/dev.tsv", "gj04\t0\t*\tSentence a.\n");
    for class in [
        "dog", "elephant", "giraffe", "guitar", "horse", "house", "person",
    ] {
        put(root, &format!("pacs/photo/{class}/1.jpg"), JPEG);
    }
    put(root, "tcpd/annotations.json", r#"{"nile": {"6": [28]}}"#);
    put(root, "tcpd/series/nile.csv", "t,Volume\n0,1120\n");
    put(
        root,
        "tcpd/published_default_f1.tsv",
        "dataset\tpelt\nnile\t1\n",
    );
    put(
        root,
        "tcpd/published_default_cover.tsv",
        "dataset\tpelt\nnile\t1\n",
    );
    put(root, "nab/windows.json", "{}");
    put(
        root,
        "nab/realKnownCause/a.csv",
        "timestamp,value\n2014-01-01 00:00:00,1\n",
    );
    put(
        root,
        "gradient_norms/K3.csv",
        "step,norm_0,cosine_0\n0,1,0\n",
    );
}

#[test]
fn readable_data_is_found_and_the_rest_missing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    good(dir.path());
    let models = tempfile::tempdir().expect("a temporary directory");
    put(models.path(), "b/config.json", r#"{"model_type": "bert"}"#);
    put(models.path(), "b/model.safetensors", safetensors(HEADER, 8));
    put(models.path(), "b/vocab.txt", "[PAD]\n");
    let report = check(Some(dir.path()), Some(models.path())).expect("directories exist");
    for name in [
        "glue/RTE",
        "glue/CoLA",
        "pacs/photo",
        "tcpd",
        "nab",
        "gradient_norms",
        "b",
    ] {
        assert!(
            matches!(status(&report, name), Status::Found(_)),
            "{name}: {report}"
        );
    }
    for name in ["glue/MNLI", "pacs/sketch", "vlcs", "an image encoder (ViT)"] {
        assert_eq!(status(&report, name), Status::Missing);
    }
    report.verdict().expect("missing is no failure");
    let text = report.to_string();
    assert!(
        text.contains("7 found") && text.contains("0 broken"),
        "{text}"
    );
    assert!(text.contains("gluebenchmark.com") && text.contains("huggingface.co"));
}

#[test]
fn sets_are_found_where_studies_look_for_them() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for domain in ["Caltech101", "LabelMe"] {
        for class in ["bird", "car"] {
            put(dir.path(), &format!("VLCS/{domain}/{class}/1.jpg"), JPEG);
        }
    }
    put(dir.path(), "office_home/Art/Bed/1.jpg", JPEG);
    let report = check(Some(dir.path()), None).expect("a directory");
    let found = "2 domains, 2 classes, 4 images";
    assert_eq!(status(&report, "vlcs"), Status::Found(found.into()));
    broken(&report, "office_home", "1 domain(s)");
    assert_eq!(status(&report, "terra_incognita"), Status::Missing);
    put(dir.path(), "VLCS/LabelMe/car/2.png", "");
    let report = check(Some(dir.path()), None).expect("a directory");
    broken(&report, "vlcs", "empty");
}

/// What macOS leaves beside files is passed over, and other formats are images too, as in the study.
#[test]
fn images_are_those_that_the_study_reads() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    good(dir.path());
    put(dir.path(), "pacs/photo/dog/._1.jpg", "resource fork");
    put(dir.path(), "pacs/photo/dog/2.jpg", "BM............");
    put(dir.path(), "pacs/photo/dog/3.webp", b"RIFF\0\0\0\0WEBPVP8 ");
    let report = check(Some(dir.path()), None).expect("a directory");
    let Status::Found(counts) = status(&report, "pacs/photo") else {
        panic!("{report}");
    };
    assert!(counts.contains("dog 3"), "{counts}");
}

#[test]
fn unreadable_tables_and_images_are_broken() {
    let cases: [(&str, &str, &[u8], &str); 10] = [
        ("glue/RTE", "glue/RTE/train.tsv", b"", "empty"),
        (
            "glue/RTE",
            "glue/RTE/dev.tsv",
            b"index\tsentence1\tlabel\n0\ta\tb\n",
            "sentence2",
        ),
        (
            "glue/RTE",
            "glue/RTE/dev.tsv",
            b"index\tsentence1\tsentence2\tlabel\n0\ta\n",
            "columns",
        ),
        (
            "glue/RTE",
            "glue/RTE/dev.tsv",
            b"index\tsentence1\tsentence2\tlabel\n",
            "no rows",
        ),
        (
            "glue/CoLA",
            "glue/CoLA/dev.tsv",
            b"sentence\tlabel\n",
            "label",
        ),
        ("pacs/photo", "pacs/photo/dog/1.jpg", b"", "empty"),
        ("pacs/photo", "pacs/photo/dog/2.jpg", b"<html>", "JPEG"),
        ("tcpd", "tcpd/annotations.json", b"{\"nile\": ", "JSON"),
        ("nab", "nab/realKnownCause/a.csv", b"a,b\n1,2\n", "header"),
        (
            "gradient_norms",
            "gradient_norms/K3.csv",
            b"step,norm_0\n",
            "no rows",
        ),
    ];
    for (name, file, bytes, part) in cases {
        let dir = tempfile::tempdir().expect("a temporary directory");
        good(dir.path());
        put(dir.path(), file, bytes);
        broken(
            &check(Some(dir.path()), None).expect("a directory"),
            name,
            part,
        );
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    good(dir.path());
    fs::remove_file(dir.path().join("glue/RTE/dev.tsv")).expect("a file");
    broken(
        &check(Some(dir.path()), None).expect("a directory"),
        "glue/RTE",
        "dev.tsv",
    );
}

#[test]
fn unreadable_models_are_broken() {
    let config = r#"{"model_type": "bert"}"#;
    let good = safetensors(HEADER, 8);
    let mut long = safetensors(HEADER, 8);
    long[0] = 0xff;
    long[1] = 0xff;
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("", good.clone(), "empty"),
        ("{}", good.clone(), "model_type"),
        (config, Vec::new(), "too few"),
        (config, long, "truncated"),
        (config, safetensors(HEADER, 7), "truncated"),
        (config, safetensors("{not json", 8), "header"),
        (config, safetensors("{}", 0), "no tensors"),
        (config, safetensors(r#"{"w":{}}"#, 8), "data_offsets"),
    ];
    for (config, weights, part) in cases {
        let dir = tempfile::tempdir().expect("a temporary directory");
        put(dir.path(), "m/config.json", config);
        put(dir.path(), "m/model.safetensors", weights);
        put(dir.path(), "m/vocab.txt", "[PAD]\n");
        broken(
            &check(None, Some(dir.path())).expect("a directory"),
            "m",
            part,
        );
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    put(dir.path(), "m/config.json", config);
    put(dir.path(), "m/model.safetensors", good);
    broken(
        &check(None, Some(dir.path())).expect("a directory"),
        "m",
        "tokenizer",
    );
}

#[test]
fn a_directory_that_does_not_exist_is_an_error() {
    let error = check(Some(Path::new("/nowhere/at/all")), None).expect_err("no directory");
    assert_eq!(error.exit_code(), 2);
}

/// What the variables point at must be readable, whatever part of it is there.
#[cfg(feature = "real-data")]
#[test]
fn real_data_is_readable() {
    let dir = |name: &str| PathBuf::from(std::env::var_os(name).expect(name));
    let report = check(Some(&dir("MASS_DATA_DIR")), Some(&dir("MASS_MODELS_DIR")))
        .expect("directories exist");
    report.verdict().unwrap_or_else(|e| panic!("{e}\n{report}"));
    let found = |i: &&mass_bench::data_check::Item| matches!(i.status, Status::Found(_));
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
