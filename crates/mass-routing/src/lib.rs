#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod gate;
pub mod losses;
mod plan;
mod router;
mod select;
mod simd;
mod softmax;
mod specialisation;
mod threads;
mod tile;
mod usage;

pub use error::{NonFinite, RoutingError};
pub use gate::{
    CosineForward, CosineGate, CosineGradients, LowRankForward, LowRankGate, LowRankGradients,
};
/// The version of ndarray whose views and arrays the interface takes.
pub use ndarray;
pub use plan::{Combine, PlanParts, RoutingPlan};
pub use router::{
    AnyRouter, BiasBalanced, ExpertChoice, GateGradient, Loads, Noisy, Router, RouterConfig,
    TargetK, TopAny, TopK, TopP,
};
pub use specialisation::{
    LabelUsage, LabelWeighting, jensen_shannon_bound, jensen_shannon_divergence,
    normalized_mutual_information, pairwise_jensen_shannon_divergence,
};
pub use usage::UsageStats;
