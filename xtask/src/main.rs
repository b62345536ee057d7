//! Project commands: `cargo xtask <command>`. Needs nothing but Rust; `deny` needs Python, those for CUDA g++ as well.
//!
//! Each command is one file. What concerns experiments is forwarded to the `mass-bench` binary, which
//! is built first.
#![forbid(unsafe_code)]

mod bench;
mod ci;
mod cuda;
mod cuda_bundle;
mod deny;
mod docs;
mod forward;
mod run;

use std::process::ExitCode;

const HELP: &str = "\
Usage: cargo xtask <command> [arguments]

  reproduce [STUDY]   run a study and print its table beside the paper's figures
  report DIR...       join the shards of a study, or make the report of one directory anew
  train --text FILE   train a byte-level language model with MASS layers on your text
  score DIR FILE      score a text with a model that `train` has left
  bench [NAME]        time something (cpd, routing, expand, moe, step, ..., all), with --peers beside its rivals
  data check          list data sets and models: there, missing, broken
  data fetch MODEL    download a model from the Hugging Face Hub
  cuda-kernels        compile mass-cuda's kernels to the PTX that is committed; --check compares
  cuda-emu            run the tests that need a GPU on an emulated one
  cuda-bundle         make an archive that checks and measures a GPU elsewhere
  deny                check licences, sources and advisories of what the project depends on
  docs                make a site of the reference and the documents, and check its links
  ci                  run what CI runs

`cargo xtask <command> --help` lists a command's arguments.
";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.first().and_then(|a| a.to_str()) {
        Some("reproduce" | "report" | "train" | "score" | "data") => forward::run(&arguments),
        Some("bench") => bench::run(&arguments),
        Some("cuda-kernels") => cuda::kernels(&arguments[1..]),
        Some("cuda-emu") => cuda::emulate(&arguments[1..]),
        Some("cuda-bundle") => cuda_bundle::run(&arguments[1..]),
        Some("deny") => deny::run(&arguments[1..]),
        Some("docs") => docs::run(&arguments[1..]),
        Some("ci") => ci::run(&arguments[1..]),
        Some("help" | "--help" | "-h") => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        other => {
            let what = other.map_or("no command given".to_owned(), |o| {
                format!("unknown command `{o}`")
            });
            eprintln!(
                "error: {what}; there are: reproduce, report, train, score, bench, data, cuda-kernels, cuda-emu, cuda-bundle, deny, docs, ci"
            );
            ExitCode::from(2)
        }
    }
}
