//! Downloads from a server on this machine that speaks as the hub does.
#![cfg(feature = "hub")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use mass_bench::BenchError;
use mass_bench::hub::fetch;

use crate::models;

const REPOSITORY: &str = "someone/tiny-bert";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A server of one repository. `broken` counts down the transfers that it breaks off half-way.
struct Hub {
    endpoint: String,
    broken: Arc<AtomicUsize>,
}

fn serve(files: BTreeMap<&'static str, Vec<u8>>) -> Hub {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let broken = Arc::new(AtomicUsize::new(0));
    let breaks = Arc::clone(&broken);
    // It ends with the test's process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (files, breaks) = (files.clone(), Arc::clone(&breaks));
            thread::spawn(move || answer(stream.unwrap(), &files, &breaks));
        }
    });
    Hub { endpoint, broken }
}

fn answer(mut stream: TcpStream, files: &BTreeMap<&'static str, Vec<u8>>, breaks: &AtomicUsize) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(request)) = lines.next() else {
        return;
    };
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let mut range = None;
    for line in lines {
        let line = line.unwrap();
        if let Some(bytes) = line.to_lowercase().strip_prefix("range: bytes=") {
            let (from, to) = bytes.split_once('-').unwrap();
            range = Some((from.parse::<usize>().unwrap(), to.parse::<usize>().ok()));
        }
        if line.is_empty() {
            break;
        }
    }
    if path == format!("/api/models/{REPOSITORY}/revision/main") {
        let names: Vec<String> = files
            .keys()
            .map(|name| format!("{{\"rfilename\": \"{name}\"}}"))
            .collect();
        let body = format!(
            "{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}",
            names.join(", ")
        );
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream
            .write_all(format!("{head}{body}").as_bytes())
            .unwrap();
        return;
    }
    let name = path.strip_prefix(&format!("/{REPOSITORY}/resolve/main/"));
    let Some((name, content)) = name.and_then(|n| files.get_key_value(n)) else {
        let head = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        return;
    };
    let (from, to) = range.unwrap();
    let to = to.unwrap_or(content.len() - 1).min(content.len() - 1);
    let body = &content[from..=to];
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nETag: \"{name}-1\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{to}/{}\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        content.len(),
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let whole = body.len() < 64
        || breaks
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
            .is_err();
    let sent = if whole { body.len() } else { body.len() / 2 };
    // The reader may have gone away.
    stream.write_all(&body[..sent]).ok();
}

fn model() -> BTreeMap<&'static str, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    models::bert(dir.path(), 2);
    let mut files = BTreeMap::from([
        ("README.md", b"not needed".to_vec()),
        ("pytorch_model.bin", vec![0; 1000]),
    ]);
    for name in ["config.json", "model.safetensors", "vocab.txt"] {
        files.insert(name, fs::read(dir.path().join(name)).unwrap());
    }
    files
}

/// The same in two files of weights.
fn sharded() -> BTreeMap<&'static str, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    models::bert(dir.path(), 2);
    let mut files = model();
    files.remove("model.safetensors");
    for name in models::split(dir.path()) {
        let name: &'static str = name.leak();
        files.insert(name, fs::read(dir.path().join(name)).unwrap());
    }
    let index = "model.safetensors.index.json";
    files.insert(index, fs::read(dir.path().join(index)).unwrap());
    files
}

#[test]
fn a_model_arrives_whole_with_the_files_that_are_needed() {
    let (dir, files) = (tempfile::tempdir().unwrap(), model());
    let models = dir.path().join("models");
    let hub = serve(files.clone());
    let fetched = fetch(REPOSITORY, &models, Some(&hub.endpoint)).unwrap();
    assert_eq!(fetched.dir, models.join("tiny-bert"));
    assert!(
        fetched.summary.contains("41 tensors"),
        "{}",
        fetched.summary
    );
    let mut names: Vec<String> = fs::read_dir(&fetched.dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "vocab.txt"]);
    for name in names {
        let got = fs::read(fetched.dir.join(&name)).unwrap();
        assert!(got == files[name.as_str()], "{name}");
    }
    // Nothing is left beside it, and it is not replaced.
    assert_eq!(fs::read_dir(&models).unwrap().count(), 1);
    let again = fetch(REPOSITORY, &models, Some(&hub.endpoint)).unwrap_err();
    assert!(again.to_string().contains("is there already"), "{again}");
    assert_eq!(again.exit_code(), 2);
}

#[test]
fn a_model_in_several_files_arrives_with_all_of_them() {
    let (dir, files) = (tempfile::tempdir().unwrap(), sharded());
    let hub = serve(files.clone());
    let fetched = fetch(REPOSITORY, dir.path(), Some(&hub.endpoint)).unwrap();
    assert!(
        fetched.summary.contains("in 2 files"),
        "{}",
        fetched.summary
    );
    for (name, content) in &files {
        let got = fs::read(fetched.dir.join(name)).ok();
        let wanted = !["README.md", "pytorch_model.bin"].contains(name);
        assert_eq!(got.as_ref(), wanted.then_some(content), "{name}");
    }
    // One file that is the whole model is taken alone, as Hugging Face's own loader does.
    let mut both = sharded();
    both.insert(
        "model.safetensors",
        model().remove("model.safetensors").unwrap(),
    );
    let (dir, hub) = (tempfile::tempdir().unwrap(), serve(both));
    let fetched = fetch(REPOSITORY, dir.path(), Some(&hub.endpoint)).unwrap();
    assert!(!fetched.dir.join("model.safetensors.index.json").exists());
}

#[test]
fn a_transfer_that_breaks_off_is_taken_up_again() {
    let (dir, files) = (tempfile::tempdir().unwrap(), model());
    let hub = serve(files.clone());
    hub.broken.store(2, Ordering::SeqCst);
    let fetched = fetch(REPOSITORY, dir.path(), Some(&hub.endpoint)).unwrap();
    let got = fs::read(fetched.dir.join("model.safetensors")).unwrap();
    assert!(got == files["model.safetensors"]);
    assert_eq!(hub.broken.load(Ordering::SeqCst), 0);
}

#[test]
fn what_cannot_be_had_is_said_and_leaves_no_model() {
    let refused = |files: BTreeMap<&'static str, Vec<u8>>, words: &str, code| {
        let dir = tempfile::tempdir().unwrap();
        let hub = serve(files);
        let error = fetch(REPOSITORY, dir.path(), Some(&hub.endpoint)).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.exit_code(), code, "{error}");
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    };
    let mut files = model();
    files.remove("model.safetensors");
    refused(files, "has no model.safetensors", 2);
    let mut files = sharded();
    files.remove("model-00002-of-00002.safetensors");
    refused(files, "has no model-00002-of-00002.safetensors", 2);
    let mut files = model();
    files.get_mut("model.safetensors").unwrap().truncate(9000);
    refused(files, "the file ends within tensor", 2);
    let mut files = model();
    files.remove("vocab.txt");
    refused(files, "neither tokenizer.json nor vocab.txt", 2);
    // A model that no study can use.
    let mut files = model();
    files.insert("config.json", br#"{"model_type": "roberta"}"#.to_vec());
    refused(files, "roberta", 2);

    let dir = tempfile::tempdir().unwrap();
    for name in ["tiny", "a/b/c", "../up", "a/..", "a/b c", ""] {
        let error = fetch(name, dir.path(), Some("http://127.0.0.1:9")).unwrap_err();
        assert!(matches!(error, BenchError::Usage(_)), "{name}: {error}");
    }
    let hub = serve(model());
    let error = fetch("someone/else", dir.path(), Some(&hub.endpoint)).unwrap_err();
    assert!(error.to_string().contains("someone/else"), "{error}");
    // Nobody listens there.
    let error = fetch(REPOSITORY, dir.path(), Some("http://127.0.0.1:9")).unwrap_err();
    assert_eq!(error.exit_code(), 1, "{error}");
}
