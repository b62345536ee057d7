//! How tests steer the emulated driver, and what it counted: a file of words, see emu/README.md.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use mass_cuda::Device;

/// Numbers of the words.
#[derive(Clone, Copy)]
pub(crate) enum Word {
    Launches = 0,
    Allocations = 1,
    Freed = 2,
    LiveBytes = 3,
    UpBytes = 6,
    DownBytes = 9,
    DownLargest = 10,
    Faults = 12,
    FailAllocation = 16,
    FailLaunch = 17,
    Schedule = 18,
    Memory = 19,
}

/// Whether the tests are to run on a real device: those that steer the emulated one, or ask it, cannot.
fn real() -> bool {
    std::env::var_os("MASS_CUDA_REAL").is_some()
}

/// Whether a device was promised: the emulated one by `cargo xtask cuda-emu`, which sets `EMU_CONTROL`, or a real one by
/// `MASS_CUDA_REAL`. If it then is not there, tests fail.
pub(crate) fn there() -> bool {
    let promised = real() || std::env::var_os("EMU_CONTROL").is_some();
    if !promised {
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a test");
        // Not by `eprintln!`, which the harness hides where a test passes.
        let _ = writeln!(
            std::io::stderr(),
            "{test} was NOT RUN: it needs a device, which `cargo xtask cuda-emu` emulates"
        );
    }
    promised
}

fn file() -> File {
    let path = std::env::var_os("EMU_CONTROL").expect("steers the emulated device only");
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

pub(crate) fn get(word: Word) -> u64 {
    let mut bytes = [0; 8];
    file().read_exact_at(&mut bytes, 8 * word as u64).unwrap();
    u64::from_ne_bytes(bytes)
}

pub(crate) fn set(word: Word, value: u64) {
    file()
        .write_all_at(&value.to_ne_bytes(), 8 * word as u64)
        .unwrap();
}

/// The emulated device, with nothing left over from another test's wishes; or the real one.
pub(crate) fn device() -> Device {
    let device = Device::open(0).unwrap();
    if real() {
        return device;
    }
    for word in [
        Word::FailAllocation,
        Word::FailLaunch,
        Word::Schedule,
        Word::Memory,
    ] {
        set(word, 0);
    }
    assert_eq!(device.name(), "emulated GPU");
    device
}

/// Runs `f` under every order of threads and blocks, three times on a real device; all results must have the same
/// bits.
pub(crate) fn every_schedule(f: impl Fn(&Device) -> Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let device = device();
    let mut first: Option<Vec<Vec<f32>>> = None;
    // Where the schedule is given from outside, one run is all.
    let schedules = if std::env::var_os("EMU_SCHEDULE").is_some() {
        1
    } else {
        3
    };
    for schedule in 0..schedules {
        if !real() {
            set(Word::Schedule, schedule);
        }
        let now = f(&device);
        for (i, values) in now.iter().enumerate() {
            for (j, v) in values.iter().enumerate() {
                assert!(
                    !v.is_nan(),
                    "schedule {schedule}: value {j} of result {i} is NaN"
                );
            }
        }
        let bits = |all: &[Vec<f32>]| -> Vec<Vec<u32>> {
            all.iter()
                .map(|v| v.iter().map(|x| x.to_bits()).collect())
                .collect()
        };
        if let Some(first) = &first {
            assert!(
                bits(first) == bits(&now),
                "schedule {schedule} gives other bits"
            );
        }
        first.get_or_insert(now);
    }
    if !real() {
        set(Word::Schedule, 0);
    }
    first.unwrap()
}

/// Values between -1 and 1 that differ with the seed.
pub(crate) fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            let word = ((state >> ((state >> 28) + 4)) ^ state).wrapping_mul(277_803_737);
            ((word >> 22) ^ word) as f32 / 2_147_483_648.0 - 1.0
        })
        .collect()
}

/// Every value within `tolerance` (absolute, and relative where values exceed one).
pub(crate) fn close(what: &str, got: &[f32], wanted: &[f64], tolerance: f64) {
    assert_eq!(got.len(), wanted.len(), "{what}: number of values");
    for (i, (&g, &w)) in got.iter().zip(wanted).enumerate() {
        let error = (f64::from(g) - w).abs();
        assert!(
            error <= tolerance * w.abs().max(1.0),
            "{what}: value {i} is {g}, not {w}"
        );
    }
}

pub(crate) fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&x| f64::from(x)).collect()
}
