//! What is asked of every reader of outside files, whatever bytes it is given; shared by a test, the example `fuzz` and the
//! libFuzzer target. Checkpoints are `mass-model`'s affair.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use image::{ImageFormat, RgbImage};
use mass_bench::dg::{decode::rgb, folder::ImageFolder};
use mass_bench::glue::{data, sample, task::Labels, task::Task, tokenize::TextTokenizer};
use mass_bench::report::{Run, join};
use mass_model::pretrained::Weights;
use mass_model::seeded_rng;
use ndarray_rand::rand::Rng;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "../../../mass-cpd/examples/gradient_norms.rs"]
#[allow(dead_code)]
mod gradient_norms;
#[path = "../../../mass-model/tests/fuzz/mutate.rs"]
mod mutate;
mod structured;

/// A reader with valid files, each of another kind: an input is a file in the place of one of them.
pub(crate) struct Parser {
    pub(crate) name: &'static str,
    pub(crate) samples: Vec<Vec<u8>>,
    /// In a folder of each kind of file; true if it was read, false if it was refused.
    read: fn(&Path, usize, &[u8]) -> bool,
    folder: TempDir,
}

impl Parser {
    /// With the files that are beside an input: in the folder of a kind, all samples of `beside`.
    fn new(
        name: &'static str,
        samples: Vec<Vec<u8>>,
        beside: &[&str],
        read: fn(&Path, usize, &[u8]) -> bool,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder for temporary files");
        for which in 0..samples.len() {
            let dir = folder.path().join(which.to_string());
            fs::create_dir(&dir).expect("a folder");
            for (name, sample) in beside.iter().zip(&samples) {
                fs::write(dir.join(name), sample).expect("room for a file");
            }
        }
        Self {
            name,
            samples,
            read,
            folder,
        }
    }

    /// Reads an input: true if it was taken, false if it was refused.
    ///
    /// # Panics
    /// If the reader panics, or lets something through that is not what it promises.
    pub(crate) fn run(&self, which: usize, bytes: &[u8]) -> bool {
        let which = which % self.samples.len();
        (self.read)(&self.folder.path().join(which.to_string()), which, bytes)
    }

    /// The input of a number: which file, and the file with random damage.
    #[allow(dead_code, reason = "libFuzzer has inputs of its own")]
    pub(crate) fn input(&self, number: u64) -> (usize, Vec<u8>) {
        let mut rng = seeded_rng(number);
        let files: Vec<&[u8]> = self.samples.iter().map(|file| &file[..]).collect();
        let which = rng.random_range(0..files.len());
        let mut bytes = files[which].to_vec();
        for _ in 0..rng.random_range(1..=4) {
            if rng.random_range(0..2) == 0 || !structured::damage(&mut bytes, &mut rng) {
                mutate::damage(&mut bytes, &files, &mut rng);
            }
        }
        (which, bytes)
    }
}

/// All of them.
pub(crate) fn parsers() -> Vec<Parser> {
    vec![
        Parser::new("glue", tables(), &[], table),
        Parser::new("tokenizer", tokenizers(), &[], tokenizer),
        Parser::new("image", images(), &[], |_, _, bytes| image(bytes)),
        Parser::new("folder", folders(), &[], |dir, _, bytes| folder(dir, bytes)),
        Parser::new("safetensors", weights(), &["model.safetensors"], weight),
        Parser::new("results", results(), &RESULTS, result),
        Parser::new("norms", norms(), &[], |_, _, bytes| norm(bytes)),
    ]
}

/// A table of each task of GLUE.
fn tables() -> Vec<Vec<u8>> {
    let table = |task: &Task| {
        let layout = task.layout();
        let second = layout.second.unwrap_or("more");
        let named = ["index", layout.first, second, layout.label];
        let columns = match layout.columns {
            [] => &named,
            columns => columns,
        };
        let labels = match task.labels() {
            Labels::Classes(classes) => classes.iter().map(|&c| c.to_owned()).collect(),
            Labels::Score { .. } => vec!["0.0".to_owned(), "3.8".to_owned()],
        };
        let mut text = String::new();
        if layout.columns.is_empty() {
            text += &(columns.join("\t") + "\n");
        }
        for line in 0..4 {
            let cell = |column: &&str| match *column == layout.label {
                true => labels[line % labels.len()].clone(),
                false => format!("It \"rained, {line}"),
            };
            text += &(columns.iter().map(cell).collect::<Vec<_>>().join("\t") + "\n");
        }
        text.into_bytes()
    };
    Task::ALL.iter().map(table).collect()
}

fn table(_: &Path, which: usize, bytes: &[u8]) -> bool {
    let task = Task::ALL[which];
    let Ok((examples, broken)) = data::parse("train.tsv".as_ref(), bytes, task) else {
        return false;
    };
    assert!(!examples.is_empty());
    let pair = task.layout().second.is_some();
    assert!(
        examples
            .iter()
            .all(|example| example.second.is_some() == pair)
    );
    assert!(broken.iter().all(|skipped| skipped.line > 1));
    true
}

/// `vocab.txt`, a configuration beside it, `tokenizer.json`.
fn tokenizers() -> Vec<Vec<u8>> {
    let words = sample::vocabulary();
    let text = words.join("\n").into_bytes();
    let dir = tempfile::tempdir().expect("a folder for temporary files");
    fs::write(dir.path().join("vocab.txt"), &text).expect("room for a file");
    let ids: serde_json::Map<_, _> = words
        .iter()
        .zip(0..)
        .map(|(w, i)| (w.clone(), json!(i)))
        .collect();
    let special = ["[UNK]", "[CLS]", "[SEP]"].map(|word| {
        json!({ "id": ids[word], "content": word, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    });
    let model = json!({ "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": ids });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": special, "model": model, "decoder": null,
        "normalizer": { "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": { "type": "BertProcessing", "sep": ["[SEP]", ids["[SEP]"]], "cls": ["[CLS]", ids["[CLS]"]] },
    });
    let config =
        json!({ "do_lower_case": true, "strip_accents": null, "tokenize_chinese_chars": true });
    vec![
        text,
        config.to_string().into_bytes(),
        json.to_string().into_bytes(),
    ]
}

fn tokenizer(dir: &Path, which: usize, bytes: &[u8]) -> bool {
    let name = ["vocab.txt", "tokenizer_config.json", "tokenizer.json"][which];
    if which == 1 && !dir.join("vocab.txt").exists() {
        fs::write(dir.join("vocab.txt"), sample::vocabulary().join("\n")).expect("room for a file");
    }
    fs::write(dir.join(name), bytes).expect("room for a file");
    let Ok(tokenizer) = TextTokenizer::open(dir, 12) else {
        return false;
    };
    // A vocabulary without what a text needs is refused here.
    if let Ok(encoded) = tokenizer.encode(
        "The cat, seen by a na\u{ef}ve farmer",
        Some("\u{4e2d} helps!"),
    ) {
        assert!(encoded.ids.len() <= 12 && encoded.ids.len() == encoded.types.len());
        assert!(
            encoded
                .ids
                .iter()
                .all(|&id| (id as usize) < tokenizer.vocabulary_size())
        );
    }
    true
}

fn images() -> Vec<Vec<u8>> {
    let image = RgbImage::from_fn(9, 7, |x, y| {
        image::Rgb([(x * 28) as u8, (y * 36) as u8, 90])
    });
    let formats = [
        ImageFormat::Png,
        ImageFormat::Jpeg,
        ImageFormat::Bmp,
        ImageFormat::WebP,
    ];
    let file = |format| {
        let mut bytes = Cursor::new(Vec::new());
        image
            .write_to(&mut bytes, format)
            .expect("an image that can be written");
        bytes.into_inner()
    };
    let mut files: Vec<Vec<u8>> = formats.into_iter().map(file).collect();
    files.push(include_bytes!("../main/dg_cmyk.jpg").to_vec());
    files
}

fn image(bytes: &[u8]) -> bool {
    rgb(bytes).is_ok_and(|image| {
        assert!(image.width() > 0 && image.height() > 0);
        true
    })
}

/// Names of files, a line each.
fn folders() -> Vec<Vec<u8>> {
    vec![
        b"art/cat/1.png\nart/dog/2.jpg\nphoto/cat/3.bmp\nphoto/dog/below/4.webp\nphoto/notes.txt"
            .to_vec(),
    ]
}

fn folder(dir: &Path, bytes: &[u8]) -> bool {
    let root = dir.join("set");
    let _ = fs::remove_dir_all(&root);
    fs::create_dir(&root).expect("a folder");
    for line in bytes.split(|&b| b == b'\n').take(12) {
        // Nothing outside the folder, whatever the input says; names that are not Unicode as such.
        let parts = line.split(|&b| b == b'/').take(5);
        let parts = parts.filter(|part| !part.is_empty() && part.len() < 200 && !part.contains(&0));
        let parts: Vec<_> = parts
            .filter(|part| ![&b"."[..], b".."].contains(part))
            .map(named)
            .collect();
        let Some((file, above)) = parts.split_last() else {
            continue;
        };
        let above = above
            .iter()
            .fold(root.clone(), |path, part| path.join(part));
        // A file may be where a folder is wanted.
        if fs::create_dir_all(&above).is_ok() {
            let _ = fs::File::create(above.join(file));
        }
    }
    let Ok(found) = ImageFolder::open(&root) else {
        return false;
    };
    assert!(
        found.domains.len() > 1 && found.files.len() >= found.domains.len() * found.classes.len()
    );
    assert!(found.files.iter().all(|file| file.path.starts_with(&root)));
    true
}

#[cfg(unix)]
fn named(bytes: &[u8]) -> std::ffi::OsString {
    std::os::unix::ffi::OsStringExt::from_vec(bytes.to_vec())
}

#[cfg(not(unix))]
fn named(bytes: &[u8]) -> std::ffi::OsString {
    String::from_utf8_lossy(bytes).into_owned().into()
}

/// A file of tensors, and an index of it.
fn weights() -> Vec<Vec<u8>> {
    let (f32s, f16s) = (
        [0.5f32, -1.0, 2.0, 0.25, 3.0, 1.5]
            .map(f32::to_le_bytes)
            .concat(),
        [0u8, 60, 0, 188],
    );
    let tensors = [
        ("a.weight", Dtype::F32, vec![2, 3], &f32s[..]),
        ("b", Dtype::F16, vec![2], &f16s[..]),
    ];
    let views = tensors.map(|(name, dtype, shape, bytes)| {
        (
            name,
            TensorView::new(dtype, shape, bytes).expect("a tensor"),
        )
    });
    let index = json!({ "metadata": {}, "weight_map": { "a.weight": "model.safetensors", "b": "model.safetensors" } });
    vec![
        serialize(views, None).expect("a file"),
        index.to_string().into_bytes(),
    ]
}

fn weight(dir: &Path, which: usize, bytes: &[u8]) -> bool {
    let name = ["model.safetensors", "model.safetensors.index.json"][which];
    fs::write(dir.join(name), bytes).expect("room for a file");
    let Ok(weights) = Weights::open(dir) else {
        return false;
    };
    for name in weights.names() {
        let shape = weights
            .shape(name)
            .expect("a tensor that was listed")
            .to_vec();
        if let Ok(values) = weights.read(name, &shape) {
            assert_eq!(values.len(), shape.iter().product::<usize>());
            assert!(values.iter().all(|value| value.is_finite()));
        }
    }
    true
}

const RESULTS: [&str; 4] = [
    "results.json",
    "settings.json",
    "events.jsonl",
    "metrics.jsonl",
];

/// Two runs of a published study, one of which split experts, and the first lines of theirs.
fn results() -> Vec<Vec<u8>> {
    // Of a fuzz target the manifest is one folder further down.
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let mut published = above.map(|folder| folder.join("docs/results/synthetic-quick"));
    let folder = published
        .find(|folder| folder.is_dir())
        .expect("published results");
    let read = |name| fs::read_to_string(folder.join(name)).expect("a published result");
    let mut all: Value = serde_json::from_str(&read(RESULTS[0])).expect("JSON");
    let runs = all["runs"].as_array_mut().expect("runs");
    let split = runs
        .iter()
        .position(|run| run["expansions"].as_array().is_some_and(|e| !e.is_empty()));
    let mut kept = vec![
        runs[0].clone(),
        runs[split.expect("a run with splits")].clone(),
    ];
    // What a study with a metric has, and one that was split.
    kept[0]["metric"] = json!(0.5);
    kept[0]["metric_name"] = json!("accuracy");
    let name =
        |run: &Value| serde_json::from_value::<Run>(run.clone()).map(|run| run.key().to_string());
    let plan: Result<Vec<String>, _> = kept.iter().map(name).collect();
    all["part"] = json!({ "shards": [1, 2], "of": 2, "plan": plan.expect("names of runs") });
    all["runs"] = Value::Array(kept);
    let some = |name| {
        read(name)
            .lines()
            .step_by(400)
            .take(4)
            .collect::<Vec<_>>()
            .join("\n")
    };
    let rest = [read(RESULTS[1]), some(RESULTS[2]), some(RESULTS[3])];
    let files = [all.to_string()].into_iter().chain(rest);
    files.map(String::into_bytes).collect()
}

fn result(dir: &Path, which: usize, bytes: &[u8]) -> bool {
    fs::write(dir.join(RESULTS[which]), bytes).expect("room for a file");
    let out = dir.join("out");
    let _ = fs::remove_dir_all(&out);
    let made = join(&[dir.to_owned()], Some(&out));
    made.is_ok_and(|(results, _)| {
        let page = fs::read_to_string(out.join("report.html")).expect("a report");
        assert!(!results.study.contains("<script") || !page.contains(&results.study));
        true
    })
}

/// Loss and norms of two experts, whose level changes.
fn norms() -> Vec<Vec<u8>> {
    let mut text = "step,loss,norm_0,norm_1\n".to_owned();
    let mut rng = seeded_rng(0);
    for step in 0..60 {
        let [a, b, c] = [(); 3].map(|()| rng.random_range(0.9..1.1f32));
        text += &format!(
            "{step},{a:.4},{b:.4},{:.4}\n",
            if step < 40 { c } else { 9.0 * c }
        );
    }
    vec![text.into_bytes()]
}

fn norm(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| gradient_norms::alarms(text).is_ok())
}
