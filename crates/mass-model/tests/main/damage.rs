//! Damaged checkpoints: what the checksums and the pointer find.

use mass_model::ModelError;
use mass_model::checkpoint::{self, CheckpointError as E, Files};
use mass_model::lm::LanguageModel;

use crate::saved::damage::{bytes, case, refuse_all, seal};
use crate::saved::{saved, snapshot, trained};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

#[test]
fn damage_is_refused_by_the_name_of_the_file() {
    let cases = vec![
        case(
            "truncated",
            MODEL,
            |f| bytes(f, MODEL, &|b| b.truncate(b.len() / 2)),
            |e| matches!(e, E::Length { expected, actual } if *actual == expected / 2),
        ),
        case(
            "longer",
            OPTIMIZER,
            |f| bytes(f, OPTIMIZER, &|b| b.push(0)),
            |e| matches!(e, E::Length { .. }),
        ),
        case(
            "flipped bit in the header",
            MODEL,
            |f| bytes(f, MODEL, &|b| b[9] ^= 0x40),
            |e| matches!(e, E::Checksum { .. }),
        ),
        case(
            "flipped bit in a weight",
            MODEL,
            |f| bytes(f, MODEL, &|b| *b.last_mut().unwrap() ^= 1),
            |e| matches!(e, E::Checksum { .. }),
        ),
        case(
            "flipped bit in a moment",
            OPTIMIZER,
            |f| bytes(f, OPTIMIZER, &|b| *b.last_mut().unwrap() ^= 1),
            |e| matches!(e, E::Checksum { .. }),
        ),
        case(
            "flipped bit in the averages",
            "ema.safetensors",
            |f| bytes(f, "ema.safetensors", &|b| *b.last_mut().unwrap() ^= 1),
            |e| matches!(e, E::Checksum { .. }),
        ),
        case(
            "flipped bit in the state",
            "state.json",
            |f| bytes(f, "state.json", &|b| b[20] ^= 2),
            |e| matches!(e, E::Checksum { .. }),
        ),
        case(
            "flipped bit in the checksums",
            "checksums",
            |f| bytes(f, "checksums", &|b| b[3] ^= 1),
            |e| matches!(e, E::Seals),
        ),
        case(
            "empty checksums",
            "checksums",
            |f| bytes(f, "checksums", &|b| b.clear()),
            |e| matches!(e, E::Seals),
        ),
        case(
            "flipped bit in the pointer",
            "latest",
            |f| bytes(f.parent().unwrap(), "latest", &|b| b[14] ^= 1),
            |e| matches!(e, E::Pointer { .. }),
        ),
        case(
            "empty pointer",
            "latest",
            |f| bytes(f.parent().unwrap(), "latest", &|b| b.clear()),
            |e| matches!(e, E::Pointer { .. }),
        ),
        case(
            "pointer out of the directory",
            "latest",
            |f| {
                bytes(f.parent().unwrap(), "latest", &|b| {
                    *b = b"../../etc\n".to_vec()
                })
            },
            |e| matches!(e, E::Pointer { .. }),
        ),
        case(
            "pointer to nothing",
            "latest",
            |f| std::fs::rename(f, f.with_file_name("away")).unwrap(),
            |e| matches!(e, E::NoFolder { name } if name == "step-0000000001"),
        ),
        case(
            "a file that is not listed",
            OPTIMIZER,
            |f| {
                let kept = std::fs::read(f.join(OPTIMIZER)).unwrap();
                std::fs::remove_file(f.join(OPTIMIZER)).unwrap();
                seal(f);
                std::fs::write(f.join(OPTIMIZER), kept).unwrap();
            },
            |e| matches!(e, E::Absent),
        ),
    ];
    refuse_all(cases);
    for missing in [
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
        "state.json",
        "checksums",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let folder = saved(dir.path(), 3);
        std::fs::remove_file(folder.join(missing)).unwrap();
        match checkpoint::load::<LanguageModel, String>(dir.path()) {
            Err(ModelError::Io { path, .. }) => assert!(path.ends_with(missing)),
            other => panic!("{missing}: {other:?}"),
        }
    }
    let empty = tempfile::tempdir().unwrap();
    assert!(!checkpoint::exists(empty.path()));
    let error = checkpoint::load::<LanguageModel, String>(empty.path()).unwrap_err();
    assert!(matches!(&error, ModelError::Io { path, .. } if path.ends_with("latest")));
}

fn refused(files: &Files) -> bool {
    matches!(
        checkpoint::decode::<LanguageModel, String>(files),
        Err(ModelError::Checkpoint { .. })
    )
}

#[test]
fn no_flipped_bit_and_no_cut_goes_unnoticed() {
    let mut files = checkpoint::encode(&snapshot(&trained(2))).unwrap();
    checkpoint::decode::<LanguageModel, String>(&files).unwrap();
    let names: Vec<String> = files.keys().cloned().collect();
    assert_eq!(names.len(), 5);
    for name in names {
        let whole = files[&name].clone();
        for at in 0..whole.len() {
            let bytes = files.get_mut(&name).unwrap();
            bytes[at] ^= 1 << (at % 8);
            assert!(refused(&files), "{name}: bit {} of byte {at}", at % 8);
            files.get_mut(&name).unwrap()[at] = whole[at];
        }
        for len in (0..whole.len()).step_by(61) {
            files.insert(name.clone(), whole[..len].to_vec());
            assert!(refused(&files), "{name}: cut to {len} bytes");
        }
        files.insert(name, whole);
    }
    checkpoint::decode::<LanguageModel, String>(&files).unwrap();
}
