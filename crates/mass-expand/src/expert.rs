//! Names of experts that outlive their place in the pool.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A number that names one expert of one layer for the whole run.
///
/// It is never used again once its expert is removed, so a figure in a log means the same expert from the first step to
/// the last, whatever slot the expert has in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExpertId(pub u32);

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
