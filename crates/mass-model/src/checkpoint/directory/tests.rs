//! What a power cut between any two calls and a full disk at any call leave of a directory of checkpoints.

use std::path::Path;

use super::super::storage::{Disk, Storage};
use super::simulated::{Faults, Simulated};
use super::{newest, steps, write};

const DIR: &str = "/runs/one";
const FILES: [&str; 3] = ["model", "state", "checksums"];

fn content(step: u64, file: &str) -> Vec<u8> {
    format!("{file} of step {step}").into_bytes()
}

fn save(storage: &Simulated, step: u64) -> bool {
    let saved = write(storage, Path::new(DIR), step, |sink| {
        FILES
            .iter()
            .try_for_each(|file| sink(file, content(step, file)))
    });
    saved.is_ok()
}

/// The step that can be read in whole; `None` where nothing has been promised yet.
fn readable(storage: &Simulated) -> Result<Option<u64>, String> {
    let dir = Path::new(DIR);
    if storage.read(&dir.join("latest")).is_err() {
        return Ok(None);
    }
    let folder = newest(storage, dir).map_err(|e| e.to_string())?;
    let name = folder.file_name().unwrap().to_str().unwrap();
    let step = name["step-".len()..].trim_end_matches('+').parse().unwrap();
    for file in FILES {
        match storage.read(&folder.join(file)) {
            Ok(bytes) if bytes == content(step, file) => {}
            other => return Err(format!("{name}/{file}: {other:?}")),
        }
    }
    Ok(Some(step))
}

fn names(storage: &Simulated) -> Vec<String> {
    storage.names(Path::new(DIR)).unwrap()
}

/// Three checkpoints, with the power cut at a call; what is wrong with what may be found afterwards.
fn cut(at: Option<usize>, false_sync: Option<usize>) -> Result<(), String> {
    let storage = Simulated::new(Faults {
        power_cut: at,
        false_sync,
        ..Faults::default()
    });
    let mut saved = None;
    for step in [10, 20, 30] {
        if !save(&storage, step) {
            break;
        }
        saved = Some(step);
    }
    for found in storage.after_a_power_cut() {
        let step = readable(&found)?;
        // Options are in the order of their steps, none first.
        if step < saved {
            return Err(format!("{saved:?} was saved, {step:?} is there"));
        }
    }
    Ok(())
}

fn calls() -> (usize, Vec<usize>) {
    let storage = Simulated::new(Faults::default());
    for step in [10, 20, 30] {
        assert!(save(&storage, step));
    }
    (storage.calls(), storage.syncs())
}

#[test]
fn a_power_cut_between_any_two_calls_leaves_what_was_saved() {
    let (calls, _) = calls();
    assert!(calls > 50, "{calls}");
    for at in 0..=calls {
        cut(Some(at), None).unwrap_or_else(|e| panic!("call {at}: {e}"));
    }
}

/// Each sync is needed: a file system on which one of them does nothing loses a checkpoint.
#[test]
fn without_any_one_sync_a_power_cut_loses_a_checkpoint() {
    let (calls, syncs) = calls();
    // Of the directory and the one above it once; of each checkpoint three files and their names, the folder's name, the
    // pointer and its name.
    assert_eq!(syncs.len(), 2 + 3 * (3 + 1 + 1 + 1 + 1), "{syncs:?}");
    for sync in syncs {
        let lost = (0..=calls).any(|at| cut(Some(at), Some(sync)).is_err());
        assert!(lost, "call {sync} is a sync that nothing needs");
    }
}

#[test]
fn after_a_power_cut_the_next_checkpoint_finds_its_way() {
    let (calls, _) = calls();
    for at in 0..calls {
        let storage = Simulated::new(Faults {
            power_cut: Some(at),
            ..Faults::default()
        });
        let _ = [10, 20, 30].iter().all(|&step| save(&storage, step));
        let states = storage.after_a_power_cut();
        for found in [&states[0], &states[states.len() - 1]] {
            assert!(save(found, 30), "call {at}");
            assert_eq!(readable(found), Ok(Some(30)), "call {at}");
            let left = names(found);
            let folders = left.iter().filter(|n| n.starts_with("step-")).count();
            assert!(folders <= 2, "call {at}: {left:?}");
            assert_eq!(left.len(), folders + 1, "call {at}: {left:?}");
        }
    }
}

#[test]
fn a_full_disk_keeps_the_previous_checkpoint_and_nothing_of_the_next() {
    let before = Simulated::new(Faults::default());
    assert!(save(&before, 10) && save(&before, 20));
    let whole = before.with(Faults::default());
    assert!(save(&whole, 30));
    let mut failed = 0;
    for at in 0..whole.calls() {
        for stays_full in [false, true] {
            let storage = before.with(Faults {
                no_space: Some(at),
                stays_full,
                ..Faults::default()
            });
            let saved = save(&storage, 30);
            failed += usize::from(!saved);
            let step = readable(&storage).unwrap_or_else(|e| panic!("call {at}: {e}"));
            assert!(step >= Some(if saved { 30 } else { 20 }), "call {at}");
            let left = names(&storage);
            assert!(
                !left.iter().any(|n| n.starts_with('.')),
                "call {at}: {left:?}"
            );
            // Where `latest` still names the step before, no folder of the new one is left.
            if step == Some(20) {
                assert!(
                    !left.iter().any(|n| n.contains("30")),
                    "call {at}: {left:?}"
                );
            }
            // With room again all goes on.
            let later = storage.with(Faults::default());
            assert!(save(&later, 40), "call {at}");
            assert_eq!(readable(&later), Ok(Some(40)), "call {at}");
        }
    }
    assert!(failed > 30, "{failed}");
    // The first checkpoint of a directory.
    let first = Simulated::new(Faults::default());
    assert!(save(&first, 10));
    for at in 0..first.calls() {
        let storage = Simulated::new(Faults {
            no_space: Some(at),
            stays_full: true,
            ..Faults::default()
        });
        let saved = save(&storage, 10);
        if storage.is_dir(Path::new(DIR)) && readable(&storage) == Ok(None) {
            assert!(!saved && names(&storage).is_empty(), "call {at}");
        }
    }
}

/// What fails after `latest` names the new checkpoint takes nothing of it away.
#[test]
fn an_old_folder_that_cannot_be_removed_stays_for_the_next_checkpoint() {
    let before = Simulated::new(Faults::default());
    assert!(save(&before, 10) && save(&before, 20));
    let whole = before.with(Faults::default());
    assert!(save(&whole, 30));
    // The last call removes a folder, the one before it syncs the name of the new one.
    for (at, is_saved) in [(whole.calls() - 1, true), (whole.calls() - 2, false)] {
        let storage = before.with(Faults {
            no_space: Some(at),
            ..Faults::default()
        });
        assert_eq!(save(&storage, 30), is_saved);
        assert_eq!(readable(&storage), Ok(Some(30)));
        assert_eq!(steps(&storage, Path::new(DIR)).len(), 3);
        assert!(save(&storage, 40));
        assert_eq!(steps(&storage, Path::new(DIR)).len(), 2);
    }
}

#[test]
fn folders_are_in_the_order_of_their_steps() {
    let storage = Simulated::new(Faults::default());
    assert!(save(&storage, 9_999_999_999) && save(&storage, 9_999_999_999));
    let dir = Path::new(DIR);
    storage.create_dir(&dir.join("step-10000000000")).unwrap();
    let found = steps(&storage, dir);
    let names = ["step-9999999999", "step-9999999999+", "step-10000000000"];
    assert_eq!(found, names.map(|name| dir.join(name)));
}

/// Somebody else has made the directory and did not sync its name.
#[test]
fn a_directory_that_was_there_is_not_lost_either() {
    let storage = Simulated::new(Faults::default());
    storage.create_dir(Path::new("/runs")).unwrap();
    storage.sync_dir(Path::new("/")).unwrap();
    storage.create_dir(Path::new(DIR)).unwrap();
    assert!(save(&storage, 10));
    for found in storage.after_a_power_cut() {
        assert_eq!(readable(&found), Ok(Some(10)));
    }
}

/// A reader has read `latest` and opens the files when the next checkpoint is already there.
#[test]
fn the_last_two_folders_stay() {
    let storage = Simulated::new(Faults::default());
    for (step, want) in [
        (10, vec!["step-0000000010"]),
        (20, vec!["step-0000000010", "step-0000000020"]),
        (30, vec!["step-0000000020", "step-0000000030"]),
        // A run that went back.
        (5, vec!["step-0000000005", "step-0000000030"]),
        (5, vec!["step-0000000005", "step-0000000005+"]),
    ] {
        let reader = newest(&storage, Path::new(DIR)).ok();
        assert!(save(&storage, step));
        assert!(reader.is_none_or(|folder| storage.is_dir(&folder)));
        let folders = names(&storage).into_iter().filter(|n| n != "latest");
        assert_eq!(folders.collect::<Vec<_>>(), want);
    }
}

/// The disk itself syncs: what has no way to be synced says so.
#[cfg(target_os = "linux")]
#[test]
fn syncs_reach_the_system() {
    let null = std::fs::File::options().write(true).open("/dev/null");
    assert!(Disk.sync(&null.unwrap()).is_err());
    assert!(Disk.sync_dir(Path::new("/proc/self")).is_err());
    let dir = tempfile::tempdir().unwrap();
    let file = Disk.create(&dir.path().join("file")).unwrap();
    Disk.sync(&file).unwrap();
    Disk.sync_dir(dir.path()).unwrap();
}
