//! How large a model is by its configuration alone, known before anything is allocated for it.

use mass_routing::RouterConfig;

use crate::nn::{BlockConfig, MoeConfig};

impl MoeConfig {
    /// Values that a layer of this configuration holds at the least, with the experts it starts with; `None` if there is no
    /// such number.
    pub fn values_at_least(&self) -> Option<u64> {
        let (dim, hidden) = (self.dim as u64, self.hidden as u64);
        let expert = hidden.checked_mul(2)?.checked_add(2)?.checked_mul(dim)?;
        let experts = (self.experts as u64).checked_mul(expert.checked_add(hidden)?)?;
        experts.checked_add(per_expert(&self.router))
    }
}

impl BlockConfig {
    /// As [`MoeConfig::values_at_least`], of a block.
    pub fn values_at_least(&self) -> Option<u64> {
        let dim = self.moe.dim as u64;
        let attention = dim.checked_mul(4)?.checked_add(8)?.checked_mul(dim)?;
        self.moe.values_at_least()?.checked_add(attention)
    }
}

/// Values that a router is made with.
fn per_expert(router: &RouterConfig) -> u64 {
    match router {
        RouterConfig::TopAny { experts } => *experts as u64,
        RouterConfig::Noisy { inner, .. } => per_expert(inner),
        _ => 0,
    }
}
