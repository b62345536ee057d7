//! The emulated device finds planted faults: kernels of tests/faults on a driver of their own, in processes of their
//! own.

use std::process::Command;

use mass_cuda::testing::{EMBEDDED, launch, open};
use mass_cuda::{Buffer, CudaError, Device};

use super::emulator::{Word, device, get, set};

const CASE: &str = "MASS_CUDA_FAULT";
const PTX: &str = include_str!("../faults/faults.ptx");

/// What a kernel made of 64 rising values, or the error, under one schedule.
fn outcome(kernel: &str, n: u32) -> Result<Vec<f32>, CudaError> {
    let device = open(0, PTX)?;
    let rising: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let mut y = Buffer::from_slice(&device, &rising)?;
    if kernel == "leaves_values_unwritten" {
        y = Buffer::uninitialised(&device, 64)?;
    }
    launch(&device, kernel, 1, 64, y.view_mut(), n)?;
    let got = y.to_vec()?;
    drop(y);
    device.synchronise()?;
    Ok(got)
}

/// The test that is run again, on the driver with the faults.
#[test]
fn one_kernel() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let (kernel, n) = case.split_once(' ').unwrap();
    for schedule in 0..3 {
        set(Word::Schedule, schedule);
        match outcome(kernel, n.parse().unwrap()) {
            Ok(values) => println!("[{schedule} {values:?}]"),
            Err(error) => {
                println!("[{schedule} error {error}]");
                break;
            }
        }
    }
}

fn run(kernel: &str, n: u32) -> String {
    run_on(kernel, n, "")
}

/// On the driver with the faults, or on the one beside it that looks for races.
fn run_on(kernel: &str, n: u32, driver: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["faults::one_kernel", "--exact", "--nocapture"]);
    command.env(CASE, format!("{kernel} {n}"));
    let faults = std::env::var_os("EMU_FAULTS").expect("runs under `cargo xtask cuda-emu`");
    command.env(
        "LD_LIBRARY_PATH",
        std::path::Path::new(&faults).join(driver),
    );
    command.env_remove("EMU_SCHEDULE");
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{kernel}: the process must live on: {output:?}"
    );
    (String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr)).into_owned()
}

/// The lines of results.
fn results(text: &str) -> Vec<&str> {
    let lines = text
        .lines()
        .filter_map(|l| l.split_once('[')?.1.strip_suffix(']'));
    lines
        .filter_map(|l| l.split_once(' ').map(|x| x.1))
        .collect()
}

#[test]
fn a_kernel_without_fault_is_right_under_every_schedule() {
    on_device!();
    let text = run("no_fault", 0);
    let wanted = format!("{:?}", (0..64).rev().map(|i| i as f32).collect::<Vec<_>>());
    assert_eq!(results(&text), [wanted.as_str(); 3], "{text}");
}

#[test]
fn missing_barriers_give_nans_or_other_values() {
    on_device!();
    for kernel in ["missing_barrier", "missing_second_barrier"] {
        let text = run(kernel, 0);
        let all = results(&text);
        assert!(
            all.iter().any(|r| r.contains("NaN") || *r != all[0]),
            "{kernel}: {text}"
        );
    }
}

#[test]
fn races_for_shared_memory_are_errors_whatever_the_schedule_makes_of_them() {
    on_device!();
    for (kernel, races) in [
        ("missing_barrier", true),
        ("missing_second_barrier", true),
        ("no_fault", false),
    ] {
        let text = run_on(kernel, 0, "races");
        assert_eq!(
            text.contains("race for shared memory"),
            races,
            "{kernel}: {text}"
        );
        assert_eq!(text.contains("(error 719)"), races, "{kernel}: {text}");
    }
}

#[test]
fn accesses_outside_of_an_allocation_are_errors() {
    on_device!();
    for (kernel, n, wanted) in [
        (
            "reads_past_the_end",
            64,
            "past the end of an allocation of 256",
        ),
        (
            "reads_one_past_the_end",
            64,
            "0 bytes past the end of an allocation of 256",
        ),
        (
            "writes_one_past_the_end",
            64,
            "0 bytes past the end of an allocation of 256",
        ),
        (
            "reads_before_the_start",
            0,
            "8 bytes before an allocation of 256",
        ),
        ("follows_no_pointer", 0, "outside of every allocation"),
    ] {
        let text = run(kernel, n);
        assert!(text.contains(wanted), "{kernel}: {text}");
        assert!(
            text.contains("an illegal memory access was encountered (error 700)"),
            "{kernel}: {text}"
        );
    }
}

#[test]
fn values_nobody_wrote_are_nan() {
    on_device!();
    for kernel in ["leaves_values_unwritten", "reads_shared_memory_unwritten"] {
        let text = run(kernel, 0);
        assert!(
            results(&text).iter().all(|r| r.contains("NaN")),
            "{kernel}: {text}"
        );
    }
}

#[test]
fn threads_that_wait_for_each_other_in_vain_are_an_error() {
    on_device!();
    for (kernel, wanted) in [
        (
            "barrier_for_some",
            "a barrier is not reached by all threads of the block",
        ),
        (
            "barriers_at_two_places",
            "a barrier is not reached by all threads of the block",
        ),
        (
            "shuffle_of_some",
            "a shuffle is not reached by all threads of the warp",
        ),
    ] {
        let text = run(kernel, 0);
        assert!(
            text.contains(wanted) && text.contains("(error 719)"),
            "{kernel}: {text}"
        );
    }
}

#[test]
fn a_stale_module_is_refused() {
    on_device!();
    device();
    let renamed = EMBEDDED.replacen(".entry fill(", ".entry filled(", 1);
    let more = format!("{EMBEDDED}\n.visible .entry another()\n{{ ret; }}\n");
    let narrower = EMBEDDED.replacen(".param .f32 fill_param_2", ".param .u64 fill_param_2", 1);
    for stale in [PTX, "", &renamed, &more, &narrower] {
        assert!(stale != EMBEDDED);
        assert!(matches!(
            open(0, stale),
            Err(CudaError::Call { code: 218, .. })
        ));
    }
}

#[test]
fn a_failed_launch_makes_every_later_call_an_error() {
    on_device!();
    let device = device();
    let mut x = Buffer::from_slice(&device, &[1.0_f32, 2.0]).unwrap();
    set(Word::FailLaunch, 2);
    mass_cuda::kernels::elementwise::scale(&device, 2.0, x.view_mut()).unwrap();
    let first = mass_cuda::kernels::elementwise::scale(&device, 2.0, x.view_mut()).unwrap_err();
    assert!(
        matches!(&first, CudaError::Call { what, code: 701, .. } if what == "launching scale"),
        "{first}"
    );
    assert_eq!(x.to_vec().unwrap_err(), first);
    assert_eq!(Buffer::<f32>::zeros(&device, 3).unwrap_err(), first);
    assert_eq!(device.synchronise().unwrap_err(), first);
    assert_eq!(device.memory().unwrap_err(), first);
    drop(x);
    drop(device);
    // Nothing is wrong with a device that is opened anew.
    Device::open(0).unwrap().synchronise().unwrap();
}

#[test]
fn memory_that_does_not_suffice_is_an_error_that_says_how_much() {
    on_device!();
    let device = device();
    set(Word::Memory, 4096);
    let held = Buffer::<f32>::zeros(&device, 512).unwrap();
    let live = get(Word::LiveBytes) as usize;
    let error = Buffer::<f32>::zeros(&device, 1000).unwrap_err();
    assert_eq!(
        error,
        CudaError::OutOfMemory {
            wanted: 4000,
            free: 4096 - live,
            total: 4096
        }
    );
    // The device is as good as before.
    assert_eq!(held.to_vec().unwrap(), [0.0; 512]);
    set(Word::Memory, 0);
    set(Word::FailAllocation, 1);
    assert!(matches!(
        Buffer::<f32>::zeros(&device, 1),
        Err(CudaError::OutOfMemory { wanted: 4, .. })
    ));
    Buffer::<f32>::zeros(&device, 1000).unwrap();
    assert!(matches!(
        Buffer::<f32>::zeros(&device, usize::MAX / 2),
        Err(CudaError::TooLarge { .. })
    ));
}
