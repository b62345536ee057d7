//! What can be wrong with a parameter, an observation or a stored state.

use thiserror::Error;

/// Most observations that a stored state may have counted: as many as f64 can count.
pub(crate) const MOST: u64 = 1 << 53;

/// Why a parameter, an observation or a stored state was refused.
///
/// A refused observation leaves the detector exactly as it was.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum CpdError {
    /// The observation is NaN or infinite.
    #[error("observation {count} is {value}, but only finite numbers can be monitored")]
    NonFinite {
        /// Its 1-based position: one more than the number of observations so far, missing ones among them.
        count: u64,
        /// The offending value.
        value: f64,
    },
    /// The observation is zero or negative and the detector takes logarithms.
    #[error("observation {count} is {value}, but the log transform needs positive numbers")]
    NonPositive {
        /// Its 1-based position: one more than the number of observations so far, missing ones among them.
        count: u64,
        /// The offending value.
        value: f64,
    },
    /// The observation is finite, but the moments it enters might not be.
    #[error("observation {count} is {value}, beyond the {limit:e} whose moments stay finite")]
    TooLarge {
        /// Its 1-based position: one more than the number of observations so far, missing ones among them.
        count: u64,
        /// The offending value.
        value: f64,
        /// The largest that can be used.
        limit: f64,
    },
    /// A parameter lies outside the range in which the method means anything.
    #[error("parameter `{name}` is {value}, but must be {expected}")]
    Parameter {
        /// The parameter's name, as it is written in the parameter struct.
        name: &'static str,
        /// The value given.
        value: f64,
        /// The values allowed.
        expected: &'static str,
    },
    /// Parameters that are each allowed, but not together.
    #[error("there is no detector of {what}")]
    Unsupported {
        /// What was asked for together.
        what: &'static str,
    },
    /// A serialised detector contradicts itself.
    #[error("stored state is not valid: {reason}")]
    State {
        /// What contradicts what.
        reason: &'static str,
    },
    /// A series has too few observations for the method.
    #[error("{got} observations given, but at least {needed} are needed")]
    TooShort {
        /// Observations given.
        got: usize,
        /// The least number that the method can use.
        needed: usize,
    },
    /// A batch does not have one observation for each live stream.
    #[error("{got} observations given for a bank of {expected} slots")]
    BatchLength {
        /// Observations given.
        got: usize,
        /// Slots of the bank.
        expected: usize,
    },
    /// The bank has no live stream of this name.
    #[error("the bank has no live stream {id}")]
    UnknownStream {
        /// The stream asked for.
        id: u64,
    },
    /// What a change point costs is less than the rounding of the series' sums of squares.
    #[error(
        "a penalty of {penalty:e} is lost in the rounding of this series' sums of squares, {resolution:e}; \
         scale it up, or leave out the observations that dwarf the others"
    )]
    LostInRounding {
        /// The penalty given.
        penalty: f64,
        /// The least penalty that can be told from rounding.
        resolution: f64,
    },
    /// A numerical search did not reach its target.
    #[error("no {what} found within the range searched")]
    NotFound {
        /// What was searched for.
        what: &'static str,
    },
}

/// Refuses `value` unless `ok`.
pub(crate) fn require(
    ok: bool,
    name: &'static str,
    value: f64,
    expected: &'static str,
) -> Result<(), CpdError> {
    if ok {
        Ok(())
    } else {
        Err(CpdError::Parameter {
            name,
            value,
            expected,
        })
    }
}

/// Refuses an observation that is not finite.
#[inline]
pub(crate) fn require_finite(x: f64, count: u64) -> Result<(), CpdError> {
    if x.is_finite() {
        Ok(())
    } else {
        Err(CpdError::NonFinite {
            count: count + 1,
            value: x,
        })
    }
}
