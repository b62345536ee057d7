//! Text files as byte-level data, and every way they can be unusable.

use std::path::{Path, PathBuf};

use mass_bench::batch::TokenBatch;
use mass_bench::text::{ByteText, TextError, windows};
use proptest::prelude::*;

fn write(dir: &Path, bytes: &[u8]) -> PathBuf {
    let path = dir.join("text");
    std::fs::write(&path, bytes).expect("a writable directory");
    path
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn split_and_batches_are_pieces_of_the_text(
        text in "[a-zé ]{200,400}", held_out in 0.1..0.5f64, length in 1usize..15, step in 0u64..1000
    ) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let read = ByteText::read(&write(dir.path(), text.as_bytes()), length, held_out);
        let read = read.expect("a text long enough");
        prop_assert_eq!([read.train(), read.held_out()].concat(), text.as_bytes());
        let share = read.held_out().len() as f64 / text.len() as f64;
        prop_assert!((share - held_out).abs() <= 1.0 / text.len() as f64);

        let batch = read.batch(3, step, 4, length).expect("a batch");
        prop_assert_eq!(&batch, &read.batch(3, step, 4, length).expect("a batch"));
        for row in 0..4 {
            let mut window = batch.inputs[row * length..][..length].to_vec();
            window.push(batch.targets[(row + 1) * length - 1]);
            let window: Vec<u8> = window.iter().map(|&t| t as u8).collect();
            prop_assert!(read.train().windows(length + 1).any(|w| w == window));
            prop_assert_eq!(&batch.inputs[row * length + 1..][..length - 1],
                &batch.targets[row * length..][..length - 1]);
        }
    }

    #[test]
    fn held_out_windows_cover_the_tail_once(bytes in 60usize..300, rows in 1usize..7, length in 1usize..12) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let text: Vec<u8> = (0..bytes).map(|i| b' ' + (i % 90) as u8).collect();
        let read = ByteText::read(&write(dir.path(), &text), length, 0.5).expect("a text");
        let batches = read.held_out_batches(rows, length, usize::MAX).expect("windows");
        let targets: Vec<u8> = batches.iter().flat_map(|b| &b.targets).map(|&t| t as u8).collect();
        let whole = (read.held_out().len() - 1) / length * length;
        prop_assert_eq!(&targets[..], &read.held_out()[1..=whole]);
        prop_assert!(batches.iter().all(|b| b.rows <= rows));
        let few = read.held_out_batches(rows, length, 2).expect("windows");
        prop_assert!(few.iter().map(|b| b.rows).sum::<usize>() <= 2);
    }
}

#[test]
fn every_unusable_file_has_its_error() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let read = |bytes: &[u8]| ByteText::read(&write(dir.path(), bytes), 8, 0.5);
    assert!(matches!(
        ByteText::read(&dir.path().join("absent"), 8, 0.5),
        Err(TextError::NotFound(_))
    ));
    assert!(matches!(
        ByteText::read(dir.path(), 8, 0.5),
        Err(TextError::NotAFile(_))
    ));
    assert!(matches!(read(b""), Err(TextError::Empty(_))));
    let mut nul = vec![b'a'; 100];
    nul[41] = 0;
    assert!(matches!(
        read(&nul),
        Err(TextError::Binary {
            offset: 41,
            what: "a NUL byte",
            ..
        })
    ));
    // Two control bytes in a hundred are too many, one is not; whatever the encoding.
    let mut controls = vec![b'a'; 100];
    controls[17] = 0x01;
    controls[50] = 0xff;
    assert!(read(&controls).is_ok());
    controls[60] = 0x7f;
    assert!(matches!(
        read(&controls),
        Err(TextError::Binary {
            offset: 17,
            what: "too many control bytes, the first",
            ..
        })
    ));
    // The NUL is named first.
    controls[70] = 0;
    assert!(matches!(
        read(&controls),
        Err(TextError::Binary { offset: 70, .. })
    ));
    assert!(matches!(
        read(b"too short for"),
        Err(TextError::TooShort {
            bytes: 13,
            part: "training",
            ..
        })
    ));
    let path = write(dir.path(), &[b'a'; 100]);
    assert!(matches!(
        ByteText::read(&path, 8, 0.01),
        Err(TextError::TooShort {
            part: "held-out",
            part_bytes: 1,
            needed: 9,
            ..
        })
    ));
    for bad in [0.0, 1.0, -0.5, f64::NAN] {
        assert!(matches!(
            ByteText::read(&path, 8, bad),
            Err(TextError::HeldOut(_))
        ));
    }
    assert!(matches!(
        ByteText::read(&path, 0, 0.5),
        Err(TextError::EmptyBatch { .. })
    ));
    let text = ByteText::read(&path, 8, 0.5).expect("a text");
    assert!(matches!(
        text.batch(0, 0, 0, 8),
        Err(TextError::EmptyBatch { .. })
    ));
    assert!(matches!(
        text.batch(0, 0, 4, 0),
        Err(TextError::EmptyBatch { .. })
    ));
    assert!(matches!(
        text.batch(0, 0, 4, 50),
        Err(TextError::TooShort { .. })
    ));
    assert!(matches!(
        text.held_out_batches(4, 50, 10),
        Err(TextError::TooShort { .. })
    ));
    assert!(matches!(
        text.held_out_batches(4, 8, 0),
        Err(TextError::EmptyBatch { .. })
    ));
}

#[test]
fn sizes_that_no_batch_has_are_refused_or_give_nothing() {
    assert_eq!(windows(b"abc", 2, 0).count(), 0);
    assert_eq!(windows(b"abcdef", 0, 2).count(), 0);
    assert_eq!(windows(b"abcdef", usize::MAX, 2).count(), 1);
    assert_eq!(TokenBatch::with_capacity(usize::MAX, 2).tokens(), 0);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = write(dir.path(), &[b'a'; 400]);
    let text = ByteText::read(&path, 16, 0.5).expect("a text");
    let all = text.held_out_batches(usize::MAX, 16, 10).expect("a batch");
    assert_eq!((all.len(), all[0].rows), (1, 10));
    assert!(matches!(
        text.batch(0, 0, usize::MAX, 16),
        Err(TextError::LargeBatch { .. })
    ));
}
