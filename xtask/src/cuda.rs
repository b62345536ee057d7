//! `cargo xtask cuda-kernels` and `cargo xtask cuda-emu`: what mass-cuda needs beside Rust.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use crate::run::{Outcome, cargo, exit_code, must, read, root, target, wheels, write};

/// The compiler of the kernels, and of that compiler's output. Any other version gives other bytes.
const WHEELS: [&str; 2] = [
    "nvidia-cuda-nvrtc-cu12==12.2.140",
    "nvidia-cuda-nvcc-cu12==12.2.140",
];

/// Architectures that the kernels are tried for: Turing, Ampere, Ada, Hopper.
const ARCHITECTURES: [&str; 5] = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"];

/// Most shared memory of a block.
const SHARED_MEMORY: u32 = 48 << 10;

pub(crate) fn home() -> PathBuf {
    root().join("crates/mass-cuda")
}

pub(crate) fn report(outcome: Outcome<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|message| {
        eprintln!("error: {message}");
        ExitCode::FAILURE
    })
}

/// The kernels' sources: what all share, then the others by name.
fn sources(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let list =
        fs::read_dir(folder).map_err(|e| format!("cannot list {}: {e}", folder.display()))?;
    let mut found: Vec<PathBuf> = list
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    found.sort_by_key(|path| {
        let first = path.file_name().is_some_and(|n| n == "math.cu");
        (!first, path.clone())
    });
    match found.is_empty() {
        true => Err(format!("no kernels in {}", folder.display())),
        false => Ok(found),
    }
}

/// A folder of NVIDIA's packages under the target directory, the pinned compiler among them.
fn tools() -> Outcome<PathBuf> {
    Ok(wheels("cuda-tools", &WHEELS)?.join("nvidia"))
}

/// Compiles the kernels of a folder.
fn compile(tools: &Path, folder: &Path, out: &Path) -> Outcome<()> {
    let library = tools.join("cuda_nvrtc/lib/libnvrtc.so.12");
    let mut command = Command::new("python3");
    command
        .arg(home().join("nvrtc.py"))
        .arg(library)
        .arg(out)
        .args(sources(folder)?);
    must(&mut command)
}

/// Refuses kernels that spill registers or take more shared memory than there is.
fn assemble(tools: &Path, ptx: &Path) -> Outcome<()> {
    let ptxas = tools.join("cuda_nvcc/bin/ptxas");
    let text = read(ptx)?;
    let kernels = entries(&text);
    for architecture in ARCHITECTURES {
        let mut command = Command::new(&ptxas);
        command
            .args(["-v", "-arch", architecture, "-o", "/dev/null"])
            .arg(ptx);
        let output = command
            .output()
            .map_err(|e| format!("cannot run ptxas: {e}"))?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            return Err(format!("ptxas for {architecture}:\n{text}"));
        }
        let faults = judge(&text, &kernels);
        if !faults.is_empty() {
            return Err(format!("ptxas for {architecture}:\n{}", faults.join("\n")));
        }
        let count = kernels.len();
        println!("{architecture}: {count} kernels, no spills, shared memory within 48 KiB");
    }
    Ok(())
}

/// Names of the kernels in PTX.
fn entries(ptx: &str) -> Vec<&str> {
    let texts = ptx.split(".entry ").skip(1);
    texts
        .filter_map(|text| Some(text.split_once('(')?.0.trim()))
        .collect()
}

/// The number before a unit, if there is one.
fn before(line: &str, unit: &str) -> Option<u32> {
    let (head, _) = line.split_once(unit)?;
    head.rsplit([' ', ',']).next()?.parse().ok()
}

/// What is wrong with kernels, by what ptxas says of them: of each it must have said that it compiled it, what it
/// spills and what it uses. What it does not say, or not in the words that are known here, is a fault as well.
fn judge(text: &str, kernels: &[&str]) -> Vec<String> {
    if kernels.is_empty() {
        return vec!["there is no kernel in what was compiled".into()];
    }
    let mut faults = Vec::new();
    for name in kernels {
        let start = format!("Compiling entry function '{name}'");
        let Some((_, own)) = text.split_once(&start) else {
            faults.push(format!("of {name} there is nothing to read"));
            continue;
        };
        let own = own.split("Compiling entry function").next().unwrap_or(own);
        let mut lines = own.lines().filter(|line| line.contains("spill")).peekable();
        let there = lines.peek().is_some();
        // Functions that the kernel calls have lines of their own.
        let spills = lines.try_fold(0, |sum, line| {
            let own = before(line, " bytes spill stores")? + before(line, " bytes spill loads")?;
            Some(sum + own)
        });
        match spills.filter(|_| there) {
            Some(0) => {}
            Some(bytes) => faults.push(format!("{name} spills: {bytes} bytes")),
            None => faults.push(format!("of {name} it is not known what it spills")),
        }
        // A kernel without shared memory has nothing said of it.
        let used = own.lines().find(|line| line.contains(" registers"));
        let shared = used.map(|line| match line.contains(" bytes smem") {
            true => before(line, " bytes smem"),
            false => Some(0),
        });
        match shared.flatten() {
            Some(bytes) if bytes <= SHARED_MEMORY => {}
            Some(bytes) => faults.push(format!(
                "{name} takes too much shared memory: {bytes} bytes"
            )),
            None => faults.push(format!("of {name} it is not known what it uses")),
        }
    }
    faults
}

/// Compiles the kernels to the PTX that is committed and embedded.
pub(crate) fn kernels(arguments: &[OsString]) -> ExitCode {
    let help = "\
Usage: cargo xtask cuda-kernels [--check]

Compiles crates/mass-cuda/src/kernels/*.cu to kernels.ptx, with the pinned NVRTC of NVIDIA's wheels (python3 -m venv under
target/), and assembles it for every architecture: no kernel may spill or take more than 48 KiB of shared memory.

  --check   write nothing; fail if what is committed is not what comes out";
    let check = match arguments
        .iter()
        .map(|a| a.to_str())
        .collect::<Option<Vec<_>>>()
        .as_deref()
    {
        Some([]) => false,
        Some(["--check"]) => true,
        Some(["--help" | "-h"]) => {
            println!("{help}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("error: cuda-kernels takes --check or nothing");
            return ExitCode::from(2);
        }
    };
    report(compile_kernels(check))
}

fn compile_kernels(check: bool) -> Outcome<ExitCode> {
    let tools = tools()?;
    for (folder, name) in [
        (home().join("src/kernels"), "kernels"),
        (home().join("tests/faults"), "faults"),
    ] {
        let (made, committed) = (
            target().join(format!("{name}.ptx")),
            folder.join(format!("{name}.ptx")),
        );
        compile(&tools, &folder, &made)?;
        assemble(&tools, &made)?;
        let text = read(&made)?;
        if !check {
            write(&committed, &text)?;
        } else if read(&committed)? != text {
            let committed = committed.display();
            return Err(format!(
                "{committed} is stale: run `cargo xtask cuda-kernels` and commit it"
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Names of the kernels in a source.
fn names(source: &str) -> Vec<&str> {
    let texts = source.split("extern \"C\" __global__ void").skip(1);
    texts
        .filter_map(|text| {
            let mut text = text.trim_start();
            if let Some(rest) = text.strip_prefix("__launch_bounds__") {
                text = rest.split_once(')')?.1.trim_start();
            }
            Some(text.split_once('(')?.0.trim())
        })
        .collect()
}

/// Flags of g++ for the emulated driver.
const FLAGS: [&str; 13] = [
    "-std=c++17",
    "-O2",
    "-march=native",
    // Nothing is fused but what the source fuses, as on the device.
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
    "-pthread",
    "-mtls-dialect=gnu2",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unused-function",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
];

/// Builds the emulated driver of a folder's kernels, if it is not there as it would come out. With `races`, accesses
/// of the kernels to shared memory are watched, which makes them several times slower.
pub(crate) fn build_driver(folder: &Path, out: &Path, races: bool) -> Outcome<()> {
    fs::create_dir_all(out).map_err(|e| format!("cannot make {}: {e}", out.display()))?;
    let emu = home().join("emu");
    let mut includes = String::new();
    let mut list = String::new();
    let mut all = format!("{races} {}\n", FLAGS.join(" "));
    for file in ["driver.cpp", "kernels.cpp", "races.cpp", "emu.h", "table.h"] {
        all += &read(&emu.join(file))?;
    }
    for source in sources(folder)? {
        let text = read(&source)?;
        includes += &format!("#include \"{}\"\n", source.display());
        for name in names(&text) {
            list += &format!("LIST({name})\n");
        }
        all += &text;
    }
    if list.is_empty() {
        return Err(format!("no kernels in {}", folder.display()));
    }
    let (library, stamp) = (out.join("libcuda.so"), out.join("stamp"));
    if library.exists() && fs::read_to_string(&stamp).is_ok_and(|there| there == all) {
        return Ok(());
    }
    write(&out.join("kernels.inc"), &includes)?;
    write(&out.join("list.inc"), &list)?;
    let mut link = Command::new("g++");
    link.args(["-shared", "-pthread", "-Wl,-Bsymbolic", "-o"])
        .arg(&library);
    for file in ["driver", "kernels", "races"] {
        if file == "races" && !races {
            continue;
        }
        let object = out.join(file).with_extension("o");
        let mut command = Command::new("g++");
        command.args(FLAGS).arg("-I").arg(out).arg("-I").arg(&emu);
        if file == "kernels" && races {
            command.args(["-fsanitize=thread", "-fno-threadsafe-statics"]);
        }
        command.arg("-c").arg(emu.join(file).with_extension("cpp"));
        must(command.arg("-o").arg(&object))?;
        link.arg(&object);
    }
    must(link.arg("-ldl"))?;
    write(&stamp, &all)
}

/// Builds the emulated driver and runs tests on it.
pub(crate) fn emulate(arguments: &[OsString]) -> ExitCode {
    let help = "\
Usage: cargo xtask cuda-emu [--build | --races] [-- ARGUMENTS OF CARGO TEST]

Builds a libcuda.so whose device is the CPU, from the kernels' sources with g++, and runs the tests that need a device on it:
those that the arguments say, or without arguments mass-cuda's, mass-model's and mass-bench's, and mass-cuda's once more on a
device that looks for races in shared memory. The tests have one thread: the device uses all.

  --build   build it only, and print the folder to put into LD_LIBRARY_PATH
  --races   on the device that looks for races only";
    let (what, rest) = match arguments.first().and_then(|a| a.to_str()) {
        None => (What::Both, &[][..]),
        Some("--") if arguments.len() == 1 => (What::Both, &[][..]),
        Some("--") => (What::Plain, &arguments[1..]),
        Some("--build") if arguments.len() == 1 => (What::Build, &[][..]),
        Some("--races") => match arguments.get(1).map(|a| a == "--") {
            None => (What::Races, &[][..]),
            Some(true) => (What::Races, &arguments[2..]),
            Some(false) => return refuse(&arguments[1]),
        },
        Some("--help" | "-h") => {
            println!("{help}");
            return ExitCode::SUCCESS;
        }
        Some(_) => return refuse(arguments.last().unwrap_or(&arguments[0])),
    };
    report(run_emulated(what, rest))
}

fn refuse(argument: &OsString) -> ExitCode {
    let argument = argument.to_string_lossy();
    eprintln!(
        "error: cuda-emu takes --build, --races, or -- and arguments of cargo test, not `{argument}`"
    );
    ExitCode::from(2)
}

/// Which of the emulated devices is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// Its driver, and nothing is run.
    Build,
    Plain,
    Races,
    /// One after the other.
    Both,
}

fn run_emulated(what: What, arguments: &[OsString]) -> Outcome<ExitCode> {
    let folder = target().join("cuda-emu");
    let (kernels, planted) = (home().join("src/kernels"), home().join("tests/faults"));
    build_driver(&kernels, &folder, false)?;
    if what == What::Build {
        println!("{}", folder.display());
        return Ok(ExitCode::SUCCESS);
    }
    let (races, faults) = (folder.join("races"), folder.join("faults"));
    if what != What::Plain {
        build_driver(&kernels, &races, true)?;
    }
    build_driver(&planted, &faults, false)?;
    build_driver(&planted, &faults.join("races"), true)?;
    // Kernels race or do not, whoever calls them: the tests of models and commands run on the first device only.
    let own_tests = "-p mass-cuda --features emulated --test main";
    // By the build of the whole workspace, which plain tests have made: of one package, other features would be wanted.
    let models = "--workspace --lib --test main cuda";
    let own: &[(&PathBuf, &str)] = match what {
        What::Races => &[(&races, own_tests)],
        What::Both => &[(&folder, own_tests), (&folder, models), (&races, own_tests)],
        _ => &[(&folder, own_tests)],
    };
    for &(driver, tests) in own {
        let mut command = cargo();
        command.arg("test").current_dir(root());
        match arguments {
            [] => command.args(tests.split(' ')),
            some => command.args(some),
        };
        let mut path = OsString::from(driver);
        if let Some(there) = std::env::var_os("LD_LIBRARY_PATH") {
            path.push(":");
            path.push(there);
        }
        command.env("LD_LIBRARY_PATH", path);
        command.env("RUST_TEST_THREADS", "1");
        // A file of zeros: nobody's wishes are left in it.
        let control = folder.join("control");
        write(&control, "")?;
        command.env("EMU_CONTROL", control);
        command.env("EMU_FAULTS", &faults);
        if driver == &races {
            println!("on the device that looks for races in shared memory");
            // What one schedule shows of races, all do.
            command.env("EMU_SCHEDULE", "0");
        }
        let code = exit_code(command);
        if code != ExitCode::SUCCESS {
            return Ok(code);
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::{entries, judge, names};

    #[test]
    fn kernels_are_found_by_name() {
        let source = "extern \"C\" __global__ void __launch_bounds__(256, 2) a_1(const float *x) {}\n\
                      __device__ void b(int) {}\nextern \"C\" __global__ void c(int n) {}";
        assert_eq!(names(source), ["a_1", "c"]);
    }

    #[test]
    fn entries_are_found_in_ptx() {
        let ptx = ".visible .entry f(\n.param .u64 f_param_0\n)\n{}\n.visible .entry g()\n{}";
        assert_eq!(entries(ptx), ["f", "g"]);
        assert!(entries(".version 8.2").is_empty());
    }

    const GOOD: &str = "ptxas info    : Compiling entry function 'f' for 'sm_75'\n\
                        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                        ptxas info    : Used 8 registers, 49152 bytes smem, 380 bytes cmem[0]\n\
                        ptxas info    : Compiling entry function 'g' for 'sm_75'\n\
                        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                        ptxas info    : Used 8 registers, 380 bytes cmem[0]\n";

    #[test]
    fn spills_and_too_much_shared_memory_are_faults() {
        let both = ["f", "g"];
        assert!(judge(GOOD, &both).is_empty());
        for (from, to) in [
            ("0 bytes spill loads", "12 bytes spill loads"),
            ("0 bytes spill stores", "4 bytes spill stores"),
            ("49152", "49156"),
        ] {
            let bad = GOOD.replacen(from, to, 1);
            assert_eq!(judge(&bad, &both).len(), 1, "{bad}");
        }
    }

    #[test]
    fn what_is_not_said_of_a_kernel_is_no_praise() {
        let both = ["f", "g"];
        assert_eq!(judge(GOOD, &[]).len(), 1);
        assert_eq!(judge("", &[]).len(), 1);
        assert_eq!(judge("", &both).len(), 2);
        assert_eq!(judge(GOOD, &["f", "h"]).len(), 1);
        for (from, to) in [
            ("Compiling entry function 'g'", "Assembling 'g'"),
            (
                "0 bytes spill stores, 0 bytes spill loads",
                "nothing spilled",
            ),
            ("0 bytes spill stores", "no bytes spill stores"),
            ("0 bytes spill loads", "no spill loads"),
            ("Used 8 registers", "Used 8 lanes"),
            ("49152 bytes smem", "48K bytes smem"),
        ] {
            let unknown = GOOD.replacen(from, to, 1);
            assert_ne!(unknown, GOOD);
            assert!(!judge(&unknown, &both).is_empty(), "{unknown}");
        }
    }
}
