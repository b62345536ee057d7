//! Experiments on mixtures of experts that grow while they learn; see `mass-bench --help`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    mass_bench::cli::main(std::env::args_os())
}
