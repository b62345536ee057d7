//! What is said where there is no driver, an old one, or no device. Each case is a process of its own: the driver's
//! library is opened once.

use std::process::Command;

use mass_cuda::{CudaError, Device};

const CASE: &str = "MASS_CUDA_CASE";

/// Runs the named test of this file again with an environment.
fn again(test: &str, environment: &[(&str, &str)]) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--nocapture"])
        .env(CASE, "1");
    for (name, value) in environment {
        command.env(name, value);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.into_owned())
}

#[test]
fn no_driver_is_an_error_value() {
    if std::env::var_os(CASE).is_some() {
        let error = Device::open(0).unwrap_err();
        println!("<{error}>");
        assert_eq!(
            error,
            CudaError::NoDriver {
                missing: String::new()
            }
        );
        assert_eq!(Device::count().unwrap_err(), error);
        return;
    }
    // Under the names of a driver, whether or not there is one, there is nothing that can be opened.
    let folder = Folder::new("none");
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::fs::write(folder.0.join(name), "no library").unwrap();
    }
    let (good, text) = again(
        "without_driver::no_driver_is_an_error_value",
        &[("LD_LIBRARY_PATH", folder.0.to_str().unwrap())],
    );
    assert!(good, "{text}");
    assert!(
        text.contains("<no CUDA driver (libcuda.so) on this machine; use the CPU>"),
        "{text}"
    );
}

/// Where a process is to look for libraries first.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("mass-cuda-{}-{name}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A library that this process has opened: any will do that is no driver, but for libc, of which there should be one.
#[cfg(target_os = "linux")]
fn some_library() -> std::path::PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let paths = maps
        .lines()
        .filter_map(|line| Some(&line[line.find('/')?..]));
    let library = paths.into_iter().find(|path| {
        let name = path.rsplit('/').next().unwrap_or_default();
        name.contains(".so")
            && !["libc.", "ld-", "libcuda"]
                .iter()
                .any(|no| name.starts_with(no))
    });
    library.expect("Rust's unwinder is a library").into()
}

#[cfg(target_os = "linux")]
#[test]
fn a_library_that_is_no_driver_is_an_error_value() {
    if std::env::var_os(CASE).is_some() {
        let error = Device::open(0).unwrap_err();
        println!("<{error}>");
        assert!(matches!(error, CudaError::NoDriver { ref missing } if missing.contains("cuInit")));
        return;
    }
    let folder = Folder::new("other");
    std::fs::copy(some_library(), folder.0.join("libcuda.so")).unwrap();
    let (good, text) = again(
        "without_driver::a_library_that_is_no_driver_is_an_error_value",
        &[("LD_LIBRARY_PATH", folder.0.to_str().unwrap())],
    );
    assert!(good, "{text}");
    assert!(text.contains("lacks cuInit"), "{text}");
}

/// One program runs with and without a GPU.
#[cfg(target_os = "linux")]
#[test]
fn no_library_of_cuda_is_linked() {
    if std::env::var_os(CASE).is_some() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let ours = maps.lines().find(|line| line.contains("libc."));
        println!("<{}>", ours.is_some());
        for library in ["libcuda", "libcudart", "libcublas", "libnvrtc", "libnvidia"] {
            assert!(!maps.contains(library), "{library}");
        }
        return;
    }
    let (good, text) = again("without_driver::no_library_of_cuda_is_linked", &[]);
    assert!(good && text.contains("<true>"), "{text}");
}

#[cfg(feature = "emulated")]
#[test]
fn drivers_and_devices_that_will_not_do_are_told_apart() {
    on_device!();
    if let Some(case) = std::env::var_os(CASE) {
        let _ = case;
        println!(
            "<{}>",
            Device::open(std::env::var("ORDINAL").unwrap().parse().unwrap()).unwrap_err()
        );
        return;
    }
    let cases: [(&[(&str, &str)], &str); 6] = [
        (
            &[("EMU_VERSION", "11040")],
            "<the CUDA driver supports CUDA 11.4, at least 12.2 is needed (driver 535)>",
        ),
        (&[("EMU_DEVICES", "0")], "<no CUDA device 0: there are 0>"),
        (&[("ORDINAL", "3")], "<no CUDA device 3: there are 1>"),
        (
            &[("EMU_CAPABILITY", "61")],
            "<emulated GPU has compute capability 6.1, at least 7.5 (Turing) is needed>",
        ),
        (&[("EMU_INIT", "100")], "<no CUDA device 0: there are 0>"),
        (
            &[("EMU_INIT", "999")],
            "<CUDA: starting the driver failed: error 999 (error 999)>",
        ),
    ];
    for (environment, wanted) in cases {
        let all: Vec<_> = [("ORDINAL", "0")]
            .into_iter()
            .chain(environment.iter().copied())
            .collect();
        let (good, text) = again(
            "without_driver::drivers_and_devices_that_will_not_do_are_told_apart",
            &all,
        );
        assert!(good && text.contains(wanted), "{environment:?}: {text}");
    }
}
