#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod alignment;
pub mod controller;
mod decomposition;
mod error;
mod expert;
mod gate_split;
pub mod guide;
mod redundancy;
mod sweep;

pub use alignment::{Alignment, AlignmentThreshold, alignment};
pub use controller::{
    Action, AfterSplit, Answer, Choice, Controller, ControllerParams, Diagnosis, Event, EventKind,
    ExpertObservation, HoldReason, LayerObservation, Level, Moments, Phase, PruneRedundant,
    PruneUnused, Pruning, Reach, RemovalReason, Request, RoutingObservation, SplitOperator,
    StepObservation, StopReason, StopRule, Trigger, Unused, Watch, Watched,
};
pub use decomposition::{Decomposition, decompose, divide_gradient, project_onto_weights};
pub use error::ExpandError;
pub use expert::ExpertId;
pub use gate_split::{
    BisectDirection, BisectParams, Bisection, absorb_mass, bisect, bisect_slice, preserve_mass,
};
pub use redundancy::{
    Reduction, RedundancyShare, redundancy_gradient, redundancy_loss, redundancy_shares,
};
