//! What can go wrong.

/// Why the device did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no CUDA driver on this machine, or not a whole one.
    #[error("no CUDA driver (libcuda.so) on this machine{missing}; use the CPU")]
    NoDriver {
        /// What a library of that name lacks, if there is one; otherwise empty.
        missing: String,
    },
    /// The driver is older than our kernels' format.
    #[error(
        "the CUDA driver supports CUDA {}.{}, at least {}.{} is needed (driver 535)",
        found / 1000, found % 1000 / 10, wanted / 1000, wanted % 1000 / 10
    )]
    DriverTooOld {
        /// Its version, as 1000 times the major plus 10 times the minor number.
        found: u32,
        /// The oldest that will do.
        wanted: u32,
    },
    /// There is no device of this number.
    #[error("no CUDA device {ordinal}: there are {count}")]
    NoDevice {
        /// The number asked for, from zero.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device lacks what our kernels need.
    #[error("{name} has compute capability {}.{}, at least 7.5 (Turing) is needed", capability.0, capability.1)]
    DeviceTooOld {
        /// Its name.
        name: String,
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// The device's memory does not suffice.
    #[error("out of memory on the device: {wanted} bytes wanted, {free} of {total} are free")]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes that were free.
        free: usize,
        /// Bytes there are.
        total: usize,
    },
    /// The driver refused a call or reported that a kernel failed. The device is of no use any more after a failed
    /// launch: every later call gives this error again.
    #[error("CUDA: {what} failed: {message} (error {code})")]
    Call {
        /// What was tried.
        what: String,
        /// The driver's number of the error.
        code: u32,
        /// The driver's words for it.
        message: String,
    },
    /// A buffer has not the length that the others ask for.
    #[error("{what}: {got} values, {wanted} are needed")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// The length it must have.
        wanted: usize,
        /// The length it has.
        got: usize,
    },
    /// A size is more than a kernel can count.
    #[error("{what}: {got} is more than {most}")]
    TooLarge {
        /// Which size.
        what: &'static str,
        /// The size.
        got: usize,
        /// The largest there may be.
        most: usize,
    },
    /// An index points at nothing.
    #[error("{what} {index} at position {position}: there are {len}")]
    Index {
        /// What it is an index of.
        what: &'static str,
        /// Its value.
        index: usize,
        /// Where it stands.
        position: usize,
        /// Number of things that it may point at.
        len: usize,
    },
    /// A setting that makes no sense.
    #[error("{what} is {got}: {wanted}")]
    Setting {
        /// Which setting.
        what: &'static str,
        /// Its value.
        got: String,
        /// What it must be.
        wanted: &'static str,
    },
    /// No expert is in use, so no token can be routed.
    #[error("all {experts} experts are masked out: no token can be routed")]
    AllExpertsMasked {
        /// Number of experts, all of them masked.
        experts: usize,
    },
    /// Fewer experts are in use than every token takes.
    #[error("top-k needs k = {k} experts, but only {available} are in use")]
    TooFewExperts {
        /// Experts of a token.
        k: usize,
        /// Experts in use.
        available: usize,
    },
    /// A logit that routing must choose by is NaN or infinite.
    #[error("token {token} has a logit that is NaN or infinite")]
    NonFiniteLogit {
        /// The first such token.
        token: usize,
    },
    /// A buffer lies on another device than the one that a call is for, or on the same one opened another time.
    #[error("{what} lies on another device")]
    OtherDevice {
        /// Which buffer.
        what: &'static str,
    },
}

impl CudaError {
    /// [`Length`](Self::Length), unless the length is right.
    pub(crate) fn check(what: &'static str, wanted: usize, got: usize) -> Result<(), Self> {
        match got == wanted {
            true => Ok(()),
            false => Err(Self::Length { what, wanted, got }),
        }
    }
}
