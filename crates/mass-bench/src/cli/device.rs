//! What computes.

use std::fmt;

use mass_model::Place;

use crate::BenchError;

/// What `--device` names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(usize),
}

/// As it is typed.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(0) => f.write_str("cuda"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl Device {
    /// Reads `cpu`, `cuda` (the first GPU) or `cuda:N`, N from 0.
    ///
    /// ```
    /// use mass_bench::cli::Device;
    /// assert_eq!(Device::parse("cuda:1")?, Device::Cuda(1));
    /// assert!(Device::parse("gpu").is_err());
    /// # Ok::<(), mass_bench::BenchError>(())
    /// ```
    ///
    /// # Errors
    /// [`BenchError::Usage`], which names what there is.
    pub fn parse(text: &str) -> Result<Self, BenchError> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|_| digits)
        };
        match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            _ => {}
        }
        let found = text.strip_prefix("cuda:").and_then(number);
        found.map(Self::Cuda).ok_or_else(|| {
            BenchError::Usage(format!("no device is called `{text}`; {}", there_are()))
        })
    }

    /// Opens it.
    ///
    /// # Errors
    /// [`BenchError::Usage`] where there is no such device or no driver that will do; [`BenchError::Failed`] for a driver that
    /// fails.
    pub fn open(self) -> Result<Place, BenchError> {
        match self {
            Self::Cpu => Ok(Place::Cpu),
            Self::Cuda(number) => open_cuda(self, number),
        }
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(device: Device, number: usize) -> Result<Place, BenchError> {
    use mass_model::mass_cuda::{self, CudaError};
    mass_cuda::Device::open(number)
        .map(Place::Cuda)
        .map_err(|error| match error {
            CudaError::NoDevice { .. } => {
                BenchError::Usage(format!("--device {device}: {error}; {}", there_are()))
            }
            CudaError::NoDriver { missing } => BenchError::Usage(format!(
                "--device {device}: no CUDA driver (libcuda.so) on this machine{missing}; use --device cpu"
            )),
            CudaError::DriverTooOld { .. } | CudaError::DeviceTooOld { .. } => {
                BenchError::Usage(format!("--device {device}: {error}; use --device cpu"))
            }
            other => BenchError::failed(format!("opening --device {device}"), other),
        })
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(device: Device, _: usize) -> Result<Place, BenchError> {
    Err(BenchError::Usage(format!(
        "--device {device}: this build has no CUDA support, which the feature `cuda` of mass-bench brings; use --device cpu"
    )))
}

/// The devices of this machine, by name.
fn there_are() -> String {
    #[cfg(feature = "cuda")]
    let count = mass_model::mass_cuda::Device::count();
    #[cfg(not(feature = "cuda"))]
    let count = Err("this build has no CUDA support");
    match count {
        Ok(0) => "there is: cpu (no GPU is on this machine)".into(),
        Ok(count) => {
            let names = (0..count).map(|n| format!(", cuda:{n}"));
            format!(
                "there are: cpu, cuda (the first GPU){}",
                names.collect::<String>()
            )
        }
        Err(why) => format!("there is: cpu, and cuda or cuda:N where there is a GPU ({why})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, device) in [
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda(0)),
            ("cuda:0", Device::Cuda(0)),
            ("cuda:12", Device::Cuda(12)),
        ] {
            assert_eq!(Device::parse(text).unwrap(), device);
            assert_eq!(Device::parse(&device.to_string()).unwrap(), device);
        }
    }

    #[test]
    fn what_is_no_device_is_refused_with_what_there_is() {
        for text in [
            "",
            "gpu",
            "CPU",
            "Cuda",
            "cuda:",
            "cuda:-1",
            "cuda:+1",
            "cuda: 1",
            "cuda:1:2",
            "cuda:0x1",
            "cuda:99999999999999999999999",
            "cuda0",
            "cpu:0",
        ] {
            let refused = Device::parse(text).unwrap_err();
            assert_eq!(refused.exit_code(), 2);
            let refused = refused.one_line();
            assert!(refused.contains(&format!("`{text}`")), "{refused}");
            assert!(refused.contains("cpu"), "{refused}");
        }
    }
}
