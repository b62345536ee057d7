//! `data check` on directories made here.

use std::{
    fs,
    path::{Path, PathBuf},
};

use mass_bench::data_check::{DataReport, Status, check};

use crate::models;

/// A small picture, whole or cut before its end.
fn picture(format: image::ImageFormat) -> Vec<u8> {
    let pixels = |x, y| image::Rgb([(x * 31) as u8, (y * 17) as u8, 90]);
    let picture = image::RgbImage::from_fn(8, 8, pixels);
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).expect("a picture");
    bytes.into_inner()
}

fn jpeg() -> Vec<u8> {
    picture(image::ImageFormat::Jpeg)
}

// Both directories are always given: the variables may name real ones, which take their time.

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
        put(root, &format!("pacs/photo/{class}/1.jpg"), jpeg());
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
    models::bert(&models.path().join("b"), 3);
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
            put(dir.path(), &format!("VLCS/{domain}/{class}/1.jpg"), jpeg());
        }
    }
    put(dir.path(), "office_home/Art/Bed/1.jpg", jpeg());
    let report = check(Some(dir.path()), Some(dir.path())).expect("a directory");
    let found = "2 domains, 2 classes, 4 images";
    assert_eq!(status(&report, "vlcs"), Status::Found(found.into()));
    broken(&report, "office_home", "1 domain(s)");
    assert_eq!(status(&report, "terra_incognita"), Status::Missing);
    put(dir.path(), "VLCS/LabelMe/car/2.png", "");
    let report = check(Some(dir.path()), Some(dir.path())).expect("a directory");
    broken(&report, "vlcs", "empty");
}

/// What macOS leaves beside files is passed over, and other formats are images too, as in the study.
#[test]
fn images_are_those_that_the_study_reads() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    good(dir.path());
    put(dir.path(), "pacs/photo/dog/._1.jpg", "resource fork");
    put(
        dir.path(),
        "pacs/photo/dog/2.jpg",
        picture(image::ImageFormat::Bmp),
    );
    let webp = picture(image::ImageFormat::WebP);
    put(dir.path(), "pacs/photo/dog/a/b/3.webp", webp);
    let report = check(Some(dir.path()), Some(dir.path())).expect("a directory");
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
            "columns",
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
            &check(Some(dir.path()), Some(dir.path())).expect("a directory"),
            name,
            part,
        );
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    good(dir.path());
    fs::remove_file(dir.path().join("glue/RTE/dev.tsv")).expect("a file");
    broken(
        &check(Some(dir.path()), Some(dir.path())).expect("a directory"),
        "glue/RTE",
        "dev.tsv",
    );
}

/// What the loader of the study refuses is broken, in whatever line or row it is.
#[test]
fn tables_that_the_study_refuses_are_broken() {
    use mass_bench::glue::{data::Dataset, task::Task};
    let rte = |rows: &str| format!("index\tsentence1\tsentence2\tlabel\n{rows}");
    let many = "0\ta\tb\tentailment\n".repeat(200);
    let mnli = |label: &str| {
        let header = "index\tsentence1\tsentence2\tgold_label\n";
        format!("{header}0\ta\tb\tneutral\n1\ta\tb\t{label}\n")
    };
    let cases: [(Task, &str, String, &str); 8] = [
        (
            Task::Rte,
            "train.tsv",
            rte("0\ta\tb\tentailment\tmore\n"),
            "line 2: 5 tab",
        ),
        (
            Task::Rte,
            "train.tsv",
            rte(&format!("{many}1\ta\n")),
            "line 202: 2 tab",
        ),
        (
            Task::Rte,
            "dev.tsv",
            rte(&format!("{many}1\ta\tb\tentailm")),
            "`entailm`",
        ),
        (
            Task::Rte,
            "dev.tsv",
            rte(&format!("{many}1\ta\tb\t")),
            "label is missing",
        ),
        (
            Task::Rte,
            "dev.tsv",
            rte(&format!("{many}1\t\tb\tentailment")),
            "`sentence1` is empty",
        ),
        (
            Task::Mnli,
            "dev_matched.tsv",
            mnli("-"),
            "line 3: unknown label `-`",
        ),
        (Task::Mnli, "dev_mismatched.tsv", mnli("hidden"), "`hidden`"),
        (
            Task::Stsb,
            "dev.tsv",
            "index\tsentence1\tsentence2\tscore\n0\ta\tb\t5.1\n".into(),
            "5.1",
        ),
    ];
    for (task, file, text, part) in cases {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for path in Dataset::files(dir.path(), task) {
            let text = match task {
                Task::Rte => rte(&many),
                Task::Mnli => mnli("entailment"),
                _ => "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2\n".into(),
            };
            let path = path.strip_prefix(dir.path()).expect("inside");
            put(dir.path(), path.to_str().expect("Unicode"), text);
        }
        let name = format!("glue/{task}");
        let look = || check(Some(dir.path()), Some(dir.path())).expect("a directory");
        assert!(matches!(status(&look(), &name), Status::Found(_)), "{name}");
        put(dir.path(), &format!("{name}/{file}"), text);
        broken(&look(), &name, part);
        let refused = Dataset::read(dir.path(), task).expect_err(part).to_string();
        assert_eq!(status(&look(), &name), Status::Broken(refused));
    }
}

/// All damaged images are named at once, wherever in a class they lie.
#[test]
fn every_damaged_image_is_named() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    good(dir.path());
    let mut cut = jpeg();
    cut.truncate(cut.len() - 2);
    let mut png = picture(image::ImageFormat::Png);
    png.truncate(png.len() / 2);
    let damaged = [
        "dog/2.jpg",
        "dog/below/3.jpg",
        "person/0.jpg",
        "house/4.png",
    ];
    for name in damaged {
        let bytes = if name.ends_with("png") { &png } else { &cut };
        put(dir.path(), &format!("pacs/photo/{name}"), bytes);
    }
    let report = check(Some(dir.path()), Some(dir.path())).expect("a directory");
    for name in damaged {
        broken(&report, "pacs/photo", name);
    }
    broken(&report, "pacs/photo", "4 files are no whole images");
}

#[test]
fn models_that_the_study_refuses_are_broken() {
    let configured = |kind: &str| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let model = dir.path().join("m");
        models::bert(&model, 2);
        let text = fs::read_to_string(model.join("config.json")).expect("a configuration");
        let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        config["model_type"] = kind.into();
        put(&model, "config.json", config.to_string());
        dir
    };
    let found = |dir: &Path, kind: &str| {
        let report = check(Some(dir), Some(dir)).expect("a directory");
        let Status::Found(what) = status(&report, "m") else {
            panic!("{report}");
        };
        assert!(what.starts_with(kind), "{what}");
        what
    };
    let refused = |dir: &Path, part: &str| {
        broken(
            &check(Some(dir), Some(dir)).expect("a directory"),
            "m",
            part,
        );
    };
    let good = configured("bert");
    assert!(found(good.path(), "bert, 41 tensors").ends_with(", vocab.txt"));
    for kind in [
        "distilbert",
        "roberta",
        "modernbert",
        "dinov3_vit",
        "deit",
        "llama",
    ] {
        refused(configured(kind).path(), kind);
    }
    // In several files, and with one beside them that the index does not name.
    let weights = fs::read(good.path().join("m/model.safetensors")).expect("weights");
    models::split(&good.path().join("m"));
    assert!(found(good.path(), "bert, 41 tensors").contains(" in 2 files"));
    put(good.path(), "m/model.safetensors", &weights);
    refused(good.path(), "model.safetensors.index.json");
    refused(good.path(), "model.safetensors is beside it");
    fs::remove_file(good.path().join("m/model.safetensors")).expect("a file");
    fs::remove_file(good.path().join("m/model-00001-of-00002.safetensors")).expect("a file");
    refused(good.path(), "model-00001-of-00002.safetensors");

    let images = tempfile::tempdir().expect("a temporary directory");
    models::vit(&images.path().join("m"));
    found(images.path(), "vit");
    models::split(&images.path().join("m"));
    found(images.path(), "vit");

    for (file, bytes, part) in [
        ("config.json", &b""[..], "empty"),
        ("config.json", b"{}", "model_type"),
        ("model.safetensors", b"", "0 bytes"),
        (
            "model.safetensors",
            &weights[..weights.len() - 1],
            "ends within tensor",
        ),
        (
            "model.safetensors",
            &[weights.clone(), vec![0]].concat(),
            "the header says",
        ),
        (
            "model.safetensors",
            b"\x08\0\0\0\0\0\0\0{not json",
            "m/model.safetensors",
        ),
        ("vocab.txt", b"[PAD]\n", "`[CLS]` is missing"),
        (
            "tokenizer_config.json",
            b"{\"strip_accents\": 3}",
            "strip_accents is 3",
        ),
        ("tokenizer.json", b"{}", "tokenizer.json"),
    ] {
        let dir = configured("bert");
        put(dir.path(), &format!("m/{file}"), bytes);
        refused(dir.path(), part);
    }
    let dir = configured("bert");
    fs::remove_file(dir.path().join("m/vocab.txt")).expect("a file");
    refused(dir.path(), "neither tokenizer.json nor vocab.txt");
    // More words than the model has embeddings.
    let words = mass_bench::glue::sample::vocabulary().join("\n") + "\nonemore\n";
    put(dir.path(), "m/vocab.txt", words);
    refused(dir.path(), "the model's vocabulary has");
    // A NaN among the weights, which no header shows.
    let dir = configured("bert");
    let mut bytes = weights.clone();
    // The first value after the header: the last ones are the old head's, which nobody reads.
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    bytes[8 + header..12 + header].copy_from_slice(&f32::NAN.to_le_bytes());
    put(dir.path(), "m/model.safetensors", bytes);
    refused(dir.path(), "is not finite");
}

#[test]
fn a_directory_that_does_not_exist_is_an_error() {
    let error = check(Some(Path::new("/nowhere/at/all")), None).expect_err("no directory");
    assert_eq!(error.exit_code(), 2);
}

/// A pipe or a device could be read for ever; a socket, which nothing can hang on, stands for them here.
#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_not_read() {
    for (name, file) in [
        ("glue/CoLA", "glue/CoLA/train.tsv"),
        ("pacs/photo", "pacs/photo/dog/1.jpg"),
        ("tcpd", "tcpd/annotations.json"),
        ("m", "m/config.json"),
        ("m", "m/vocab.txt"),
        ("m", "m/tokenizer.json"),
        ("m", "m/tokenizer_config.json"),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        good(dir.path());
        models::bert(&dir.path().join("m"), 2);
        let path = dir.path().join(file);
        fs::remove_file(&path).ok();
        let _socket = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        let report = check(Some(dir.path()), Some(dir.path())).expect("a directory");
        broken(&report, name, "not a regular file");
    }
}
