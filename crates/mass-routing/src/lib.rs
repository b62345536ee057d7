#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod plan;
mod router;
mod select;
mod softmax;

pub use error::{NonFinite, RoutingError};
pub use plan::{Combine, RoutingPlan};
pub use router::{AnyRouter, Router, RouterConfig, TopK, TopP};
