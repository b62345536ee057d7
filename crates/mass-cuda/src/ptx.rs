//! The kernels as the driver reads them, and what can be read of it here: entries and their parameters.

/// All kernels, compiled for compute capability 7.5 and up by `cargo xtask cuda-kernels`.
pub(crate) const PTX: &str = include_str!("kernels/kernels.ptx");

/// A kernel's name and the bytes of each of its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) parameters: Vec<usize>,
}

/// The entries of a module in the order of the text. A parameter of a type that is unknown counts as of no bytes.
pub(crate) fn entries(ptx: &str) -> Vec<Entry> {
    let texts = ptx.split(".entry ").skip(1);
    texts
        .filter_map(|text| {
            let (name, rest) = text.split_once('(')?;
            let (list, _) = rest.split_once(')')?;
            let parameters = list.split(".param").skip(1).map(bytes).collect();
            let name = name.trim().to_owned();
            Some(Entry { name, parameters })
        })
        .collect()
}

/// Bytes of a declaration such as ` .align 8 .b8 gemm_param_0[120]` or ` .u64 fill_param_1`.
fn bytes(declaration: &str) -> usize {
    let words: Vec<&str> = declaration
        .trim()
        .trim_end_matches(',')
        .split_whitespace()
        .collect();
    let kind = words.iter().rev().nth(1).and_then(|w| w.strip_prefix('.'));
    let bits = kind.and_then(|k| {
        k.trim_start_matches(|c: char| c.is_alphabetic())
            .parse::<usize>()
            .ok()
    });
    let array = words.last().and_then(|name| name.split_once('['));
    let count = match array {
        Some((_, count)) => count.trim_end_matches(']').parse().unwrap_or(0),
        None => 1,
    };
    bits.unwrap_or(0) / 8 * count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_bytes_of_parameters_are_read() {
        let text = "\n.visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .align 8 .b8 f_param_1[120],\n\t.param .f32 f_param_2\n)\n{}\n\
                    .visible .entry g()\n{}";
        let found = entries(text);
        assert_eq!(found[0].name, "f");
        assert_eq!(found[0].parameters, [8, 120, 4]);
        assert_eq!(
            (found[1].name.as_str(), found[1].parameters.len()),
            ("g", 0)
        );
    }

    #[test]
    fn what_is_embedded_runs_on_driver_535_and_turing() {
        let line = |start: &str| {
            PTX.lines()
                .find_map(|l| l.strip_prefix(start))
                .unwrap()
                .trim()
                .to_owned()
        };
        assert_eq!(line(".version "), "8.2");
        assert_eq!(line(".target "), "sm_75");
        let all = entries(PTX);
        assert!(!all.is_empty());
        for entry in all {
            assert!(entry.parameters.iter().all(|&n| n > 0), "{entry:?}");
        }
    }

    #[test]
    fn no_kernel_has_atomics_or_shuffles_of_some_threads() {
        for line in PTX.lines() {
            let line = line.trim_start();
            assert!(
                !line.starts_with("atom.") && !line.starts_with("red."),
                "{line}"
            );
        }
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/kernels");
        let mut shuffles = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "cu") {
                let text = std::fs::read_to_string(&path).unwrap();
                for call in text.split("__shfl_").skip(1) {
                    let (_, arguments) = call.split_once('(').unwrap();
                    assert!(
                        arguments.starts_with("FULL, "),
                        "{}: {call}",
                        path.display()
                    );
                    shuffles += 1;
                }
            }
        }
        assert!(shuffles > 0);
    }
}
