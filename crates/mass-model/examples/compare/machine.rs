//! What a table was measured on.

use crate::ceiling;

/// Processor, vector instructions, cores, threads, and the version of PyTorch if it takes part.
pub(crate) fn line(threads: usize, torch: Option<&str>) -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(threads, usize::from);
    let rival = torch.map_or("no rival".to_owned(), |v| format!("PyTorch {v}"));
    let (processor, vectors) = (processor(&info), ceiling::instructions());
    format!("Processor: {processor}; {vectors}; {cores} cores, {threads} threads; {rival}")
}

/// The first processor's name and numbers, because virtual machines often hide the name under which it is sold.
fn processor(info: &str) -> String {
    let field = |name: &str| {
        let mut fields = info.lines().filter_map(|line| line.split_once(':'));
        let value = fields.find(|(key, _)| key.trim() == name)?.1.trim();
        (!value.is_empty()).then_some(value)
    };
    let name = field("model name").unwrap_or(std::env::consts::ARCH);
    let numbers = [
        ("vendor_id", ""),
        ("cpu family", "family "),
        ("model", "model "),
        ("stepping", "stepping "),
    ];
    let numbers: Vec<String> = numbers
        .into_iter()
        .filter_map(|(key, word)| Some(format!("{word}{}", field(key)?)))
        .collect();
    if numbers.is_empty() {
        name.to_owned()
    } else {
        format!("{name} ({})", numbers.join(", "))
    }
}
