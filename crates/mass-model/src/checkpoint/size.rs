//! How large a model is by its configuration alone, known before anything is allocated for it.

use mass_routing::RouterConfig;

use crate::nn::{BlockConfig, GateConfig, MoeConfig};

impl MoeConfig {
    /// Values that a layer of this configuration holds at the least, with the experts it starts with; `None` if there is no
    /// such number.
    pub fn values_at_least(&self) -> Option<u64> {
        let dim = self.dim as u64;
        let network = |hidden: usize| {
            let hidden = hidden as u64;
            let matrices = if self.gated { 3 } else { 2 };
            let weights = hidden.checked_mul(dim)?.checked_mul(matrices)?;
            weights
                .checked_add(hidden.checked_mul(matrices - 1)?)?
                .checked_add(dim)
        };
        let (gate, projection) = match self.gate {
            GateConfig::Cosine {
                projection: Some(width),
                ..
            } => (
                width as u64,
                (width as u64).checked_mul(dim.checked_add(1)?)?,
            ),
            GateConfig::LowRank { rank, anchors, .. } => (
                (rank as u64).checked_mul(anchors as u64)?,
                (rank as u64).checked_mul(dim)?,
            ),
            _ => (dim, 0),
        };
        let expert = network(self.hidden)?.checked_add(gate)?;
        let experts = (self.experts as u64).checked_mul(expert)?;
        let shared = self.shared_hidden.map_or(Some(0), network)?;
        let outside = shared.checked_add(projection)?;
        let inside = experts.checked_add(per_expert(&self.router))?;
        inside.checked_add(outside)
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
