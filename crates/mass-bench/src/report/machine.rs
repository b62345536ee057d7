use std::{fmt, fs};

use serde::{Deserialize, Serialize};

/// The machine that runs were made on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Processor model; "unknown" where the system does not say.
    pub cpu: String,
    /// Threads used.
    pub threads: usize,
    /// What computed: `cpu`, or a GPU with its name, compute capability and memory. Files of the processor's results do not say it.
    #[serde(default = "cpu", skip_serializing_if = "is_cpu")]
    pub device: String,
}

/// The device of results that say of none.
pub(super) const CPU: &str = "cpu";

fn cpu() -> String {
    CPU.into()
}

fn is_cpu(device: &str) -> bool {
    device == CPU
}

impl Machine {
    /// This machine, with the number of threads in use.
    #[must_use]
    pub fn this(threads: usize) -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            cpu: cpu_model(&info).unwrap_or_else(|| format!("unknown {}", std::env::consts::ARCH)),
            threads,
            device: cpu(),
        }
    }
}

/// "Intel Xeon, 2 threads", and a GPU where one computed.
impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} threads", self.cpu, self.threads)?;
        match self.device == CPU {
            true => Ok(()),
            false => write!(f, "; {}", self.device),
        }
    }
}

/// The model line of /proc/cpuinfo; ARM has none under that name.
fn cpu_model(info: &str) -> Option<String> {
    ["model name", "Hardware", "cpu model", "Model"]
        .iter()
        .find_map(|key| {
            info.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                (name.trim() == *key).then(|| value.trim().to_owned())
            })
        })
        .filter(|model| !model.is_empty())
}

/// Begins a new count for [`peak_rss_mib`], so that it is of what comes from now on. Where the system does not offer that, the
/// count goes on.
pub fn reset_peak_rss() {
    // Linux: "5" resets VmHWM to what is held now.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The most memory this process has held since it began or [`reset_peak_rss`] was called, MiB (VmHWM); `None` where the system
/// does not say.
#[must_use]
pub fn peak_rss_mib() -> Option<f64> {
    high_water_mark(&fs::read_to_string("/proc/self/status").ok()?)
}

fn high_water_mark(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_begins_a_new_count_of_memory() {
        // Where the system does not offer it there is nothing to test.
        if fs::write("/proc/self/clear_refs", "5").is_err() {
            return;
        }
        let big = vec![1u8; 256 << 20];
        assert!(std::hint::black_box(&big).contains(&1));
        drop(big);
        let high = peak_rss_mib().unwrap();
        reset_peak_rss();
        let low = peak_rss_mib().unwrap();
        assert!(high - low > 200.0, "{high} and {low}");
    }

    #[test]
    fn parses_what_linux_writes() {
        let info = "processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t: fpu\n";
        assert_eq!(cpu_model(info).as_deref(), Some("AMD EPYC 9B14"));
        assert_eq!(cpu_model("processor : 0\n"), None);
        assert_eq!(
            high_water_mark("VmPeak: 9 kB\nVmHWM:\t  2048 kB\n"),
            Some(2.0)
        );
        assert_eq!(high_water_mark("VmHWM: lots\n"), None);
        assert_eq!(high_water_mark(""), None);
    }

    #[test]
    fn this_machine_has_a_name() {
        let machine = Machine::this(2);
        assert!(!machine.cpu.is_empty());
        assert_eq!(machine.threads, 2);
        #[cfg(target_os = "linux")]
        assert!(peak_rss_mib().is_some_and(|mib| mib > 1.0));
    }
}
