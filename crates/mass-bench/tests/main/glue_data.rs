//! GLUE files: the official layout of every task, and what is refused.

use std::path::Path;

use mass_bench::glue::GlueError;
use mass_bench::glue::data::{Dataset, parse};
use mass_bench::glue::task::{Labels, Target, Task};
use mass_bench::glue::{batch, sample};
use proptest::prelude::*;

/// A file of each task in its official columns: header, then rows.
fn official(task: Task) -> (&'static str, Vec<&'static str>) {
    match task {
        Task::Cola => (
            "",
            vec![
                "gj04\t1\t\tOur friends won't buy \"this analysis.",
                "gj04\t0\t*\tThey drank the pub.",
            ],
        ),
        Task::Sst2 => (
            "sentence\tlabel",
            vec!["hide new secretions \t0", "a \"gem\t1"],
        ),
        Task::Mrpc => (
            "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            vec![
                "1\t70\t71\tHe said \" no .\t\" No , \" he said .",
                "0\t72\t73\tA .\tB .",
            ],
        ),
        Task::Stsb => (
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            vec![
                "0\tmain\tMSR\t2012\t0001\tnone\tnone\tA plane.\tAn air plane.\t5.000",
                "1\tmain\tMSR\t2012\t0004\tnone\tnone\tA man.\tA dog.\t0.250",
            ],
        ),
        Task::Qqp => (
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            vec!["1\t2\t3\tWhy?\tHow?\t0", "2\t4\t5\tWho?\t\t1"],
        ),
        Task::Mnli => (
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t\
             sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
            vec![
                "0\t1\t1n\tgov\t( a )\t( b )\t(R a)\t(R b)\tA man.\tA human.\tneutral\tentailment",
                "1\t2\t2c\tgov\t( a )\t( b )\t(R a)\t(R b)\tA man.\tNo man.\tneutral\tcontradiction",
            ],
        ),
        Task::Qnli => (
            "index\tquestion\tsentence\tlabel",
            vec![
                "0\tWho?\tIt was he.\tentailment",
                "1\tWhen?\tIt was he.\tnot_entailment",
            ],
        ),
        Task::Rte => (
            "index\tsentence1\tsentence2\tlabel",
            vec!["0\tA.\tB.\tnot_entailment", "1\tA.\tA.\tentailment"],
        ),
        Task::Wnli => (
            "index\tsentence1\tsentence2\tlabel",
            vec![
                "0\tIt is clogged.\tThe drain is clogged.\t1",
                "1\tA.\tB.\t0",
            ],
        ),
    }
}

fn file(task: Task) -> String {
    let (header, rows) = official(task);
    let lines = (!header.is_empty()).then_some(header).into_iter();
    lines.chain(rows).map(|l| format!("{l}\n")).collect()
}

fn read(task: Task, text: &[u8]) -> Result<Vec<mass_bench::glue::data::Example>, GlueError> {
    parse(Path::new("dev.tsv"), text, task).map(|(examples, _)| examples)
}

/// Fails unless the text is refused with a message that names the file and holds `parts`.
fn refused(task: Task, text: &[u8], parts: &[&str]) {
    let message = match read(task, text) {
        Ok(examples) => panic!("{task}: accepted as {examples:?}"),
        Err(error) => error.to_string(),
    };
    for part in ["dev.tsv"].iter().chain(parts) {
        assert!(message.contains(part), "{task}: no `{part}` in: {message}");
    }
}

#[test]
fn every_task_reads_its_official_columns() {
    for task in Task::ALL {
        let examples = read(task, file(task).as_bytes()).unwrap();
        assert_eq!(examples.len(), 2, "{task}");
        assert_eq!(examples[0].second.is_some(), task.layout().second.is_some());
        assert_ne!(examples[0].target, examples[1].target, "{task}");
        // A last line without an end, and lines that end as on Windows, read the same.
        let text = file(task);
        assert_eq!(
            read(task, text.trim_end_matches('\n').as_bytes()).unwrap(),
            examples
        );
        assert_eq!(
            read(task, text.replace('\n', "\r\n").as_bytes()).unwrap(),
            examples
        );
    }
    let cola = read(Task::Cola, file(Task::Cola).as_bytes()).unwrap();
    assert_eq!(cola[0].first, "Our friends won't buy \"this analysis.");
    assert_eq!(cola[0].target, Target::Class(1));
    let mnli = read(Task::Mnli, file(Task::Mnli).as_bytes()).unwrap();
    assert_eq!(
        (mnli[0].target, mnli[1].target),
        (Target::Class(0), Target::Class(2))
    );
    assert_eq!(mnli[1].second.as_deref(), Some("No man."));
    let stsb = read(Task::Stsb, file(Task::Stsb).as_bytes()).unwrap();
    assert_eq!(stsb[1].target, Target::Value(0.25));
    assert_eq!(stsb[0].first, "A plane.");
}

#[test]
fn damaged_lines_are_refused_with_file_and_line() {
    for task in Task::ALL {
        let text = file(task);
        let line = text.lines().count();
        let at = format!("line {line}");
        refused(task, b"", &["no examples"]);
        if task.layout().columns.is_empty() {
            let header = text.lines().next().unwrap();
            refused(task, format!("{header}\n").as_bytes(), &["no examples"]);
            let renamed = text.replacen(task.layout().label, "other", 1);
            refused(task, renamed.as_bytes(), &["line 1", "no column"]);
        }
        // One column too few, one too many.
        let (start, _) = text.trim_end().rsplit_once('\t').unwrap();
        refused(task, start.as_bytes(), &[&at, "columns", "expected"]);
        refused(
            task,
            format!("{}\tx", text.trim_end()).as_bytes(),
            &[&at, "columns"],
        );
        refused(task, format!("{text}\n").as_bytes(), &["columns"]);
        // A byte that is no UTF-8.
        let mut bytes = text.trim_end().as_bytes().to_vec();
        let last = bytes.len() - 1;
        bytes[last] = 0xff;
        refused(task, &bytes, &[&at, "UTF-8"]);
    }
    refused(
        Task::Cola,
        b"gj04\t\t\tA.\n",
        &["line 1", "label is missing"],
    );
    refused(Task::Cola, b"gj04\t2\t\tA.\n", &["line 1", "`2`", "0, 1"]);
    refused(
        Task::Cola,
        b"gj04\t1\t\t \n",
        &["line 1", "sentence", "empty"],
    );
    let rte = "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n";
    refused(
        Task::Rte,
        format!("{rte}1\tA.\tB.\tneutral\n").as_bytes(),
        &["line 3", "`neutral`", "not_entailment"],
    );
    refused(
        Task::Rte,
        b"index\tsentence1\tsentence2\tlabel\tlabel\n",
        &["line 1", "twice"],
    );
    let stsb = file(Task::Stsb);
    for score in ["5.1", "-0.1", "nan", "inf", "high"] {
        let text = stsb.replace("0.250", score);
        refused(Task::Stsb, text.as_bytes(), &["line 3", score, "0 to 5"]);
    }
}

#[test]
fn question_pairs_leave_out_a_few_broken_lines_and_say_which() {
    let (header, rows) = official(Task::Qqp);
    let mut lines = vec![header.to_owned()];
    lines.extend((0..1999).map(|i| rows[i % 2].to_owned()));
    lines.insert(700, "3\t4\t5\tWhy".into());
    let text = lines.join("\n");
    let (examples, skipped) = parse(Path::new("train.tsv"), text.as_bytes(), Task::Qqp).unwrap();
    assert_eq!((examples.len(), skipped.len()), (1999, 1));
    assert_eq!(skipped[0].line, 701);
    lines.truncate(900);
    refused(Task::Qqp, lines.join("\n").as_bytes(), &["line 701"]);
}

#[test]
fn a_missing_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for task in Task::ALL {
        let error = Dataset::read(dir.path(), task).unwrap_err();
        assert!(matches!(error, GlueError::Io { .. }), "{error}");
        let folder = dir.path().join("glue").join(task.name());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("train.tsv"), file(task)).unwrap();
        let error = Dataset::read(dir.path(), task).unwrap_err().to_string();
        assert!(
            error.contains(task.dev_files()[0]) && error.contains(task.name()),
            "{error}"
        );
        for name in task.dev_files() {
            std::fs::write(folder.join(name), file(task)).unwrap();
        }
        let data = Dataset::read(dir.path(), task).unwrap();
        assert_eq!(
            (data.train.len(), data.dev.len()),
            (2, task.dev_files().len())
        );
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), task in 0..9usize) {
        let task = Task::ALL[task];
        if let Ok(examples) = read(task, &bytes) {
            prop_assert!(!examples.is_empty());
        }
        // The same after a valid header, where more of the reader is reached.
        let mut text = file(task).into_bytes();
        text.extend(bytes);
        if let Ok(examples) = read(task, &text) {
            prop_assert!(examples.len() >= 2);
        }
    }

    #[test]
    fn an_epoch_holds_every_example_once(
        lengths in proptest::collection::vec(1..128usize, 1..700),
        batch in 1..9usize,
        together in 1..60usize,
        seed: u64,
    ) {
        let batches = batch::epoch_batches(&lengths, batch, together, seed, 3);
        prop_assert_eq!(batches.len(), lengths.len().div_ceil(batch));
        prop_assert!(batches.iter().all(|b| (1..=batch).contains(&b.len())));
        let mut all = batches.concat();
        all.sort_unstable();
        prop_assert!(all.into_iter().eq(0..lengths.len()));
        prop_assert_eq!(&batches, &batch::epoch_batches(&lengths, batch, together, seed, 3));
        let mut all = batch::scoring_batches(&lengths, batch).concat();
        all.sort_unstable();
        prop_assert!(all.into_iter().eq(0..lengths.len()));
    }
}

#[test]
fn batches_are_of_similar_length_and_change_with_seed_and_epoch() {
    let lengths: Vec<usize> = (0..3200).map(|i| 5 + (i * 37) % 120).collect();
    let spread = |batches: &[Vec<usize>]| {
        let of = |b: &Vec<usize>| {
            let l = || b.iter().map(|&i| lengths[i]);
            l().max().unwrap() - l().min().unwrap()
        };
        batches.iter().map(of).sum::<usize>() as f64 / batches.len() as f64
    };
    let batches = batch::epoch_batches(&lengths, 32, 50, 5, 0);
    let unsorted: Vec<Vec<usize>> = (0..3200)
        .collect::<Vec<_>>()
        .chunks(32)
        .map(<[_]>::to_vec)
        .collect();
    assert!(spread(&batches) < spread(&unsorted) / 10.0);
    for (seed, epoch) in [(5, 1), (6, 0)] {
        assert_ne!(batches, batch::epoch_batches(&lengths, 32, 50, seed, epoch));
    }
    let all = batch::epoch_batches(&lengths, usize::MAX, 50, 5, 0);
    assert_eq!((all.len(), all[0].len()), (1, 3200));
    // Batches do not come in order of length.
    let firsts: Vec<usize> = batches.iter().map(|b| lengths[b[0]]).collect();
    assert!(firsts.windows(2).filter(|w| w[0] > w[1]).count() > 20);
}

#[test]
fn the_built_in_sample_covers_every_label_of_every_task() {
    for task in Task::ALL {
        let data = sample::dataset(task);
        for part in [&data.train, &data.dev[0].1] {
            for output in 0..task.outputs() as u32 {
                let has = part.iter().any(|e| e.target == Target::Class(output));
                assert_eq!(
                    has,
                    matches!(task.labels(), Labels::Classes(_)),
                    "{task} {output}"
                );
            }
            assert!(
                part.iter()
                    .all(|e| e.second.is_some() == task.layout().second.is_some())
            );
        }
        assert_eq!(data.dev.len(), task.dev_files().len());
    }
}

#[test]
fn so_many_labels_are_wrong_as_were_asked_for_and_no_others() {
    for task in Task::ALL {
        let right = sample::dataset(task);
        let with = |percent| {
            let mut data = right.clone();
            data.mislabel(percent, 7).unwrap();
            assert_eq!(data.dev, right.dev, "{task}");
            let pairs = data.train.iter().zip(&right.train);
            let wrong: Vec<bool> = pairs
                .map(|(a, b)| {
                    assert_eq!((&a.first, &a.second), (&b.first, &b.second));
                    a.target != b.target
                })
                .collect();
            (data, wrong)
        };
        let n = right.train.len();
        for percent in [0, 1, 20, 40, 100] {
            let (data, wrong) = with(percent);
            let count = wrong.iter().filter(|w| **w).count();
            assert_eq!(count as u64, (n as u64 * percent + 50) / 100, "{task}");
            assert_eq!(data, with(percent).0);
            for example in &data.train {
                match (example.target, task.labels()) {
                    (Target::Class(c), Labels::Classes(all)) => assert!((c as usize) < all.len()),
                    (Target::Value(v), Labels::Score { low, high }) => {
                        assert!((low..=high).contains(&v));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        // A larger share has the wrong labels of a smaller one.
        let ((less, few), (more, many)) = (with(20), with(40));
        for i in (0..n).filter(|&i| few[i]) {
            assert!(many[i] && less.train[i] == more.train[i]);
        }
        let refused = right.clone().mislabel(101, 7).unwrap_err();
        assert!(refused.to_string().contains("101 %"), "{refused}");
    }
}
