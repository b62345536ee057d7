//! What can be wrong with what the caller handed in.

use mass_cpd::CpdError;

use crate::{Diagnosis, ExpertId};

/// Every error of this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpandError {
    /// A slice or view has the wrong number of elements.
    #[error("{what} has {got} elements, expected {expected}")]
    Shape {
        /// Which argument.
        what: &'static str,
        /// Elements it has.
        got: usize,
        /// Elements it should have.
        expected: usize,
    },
    /// An argument is empty where at least one element is needed.
    #[error("{what} is empty")]
    Empty {
        /// Which argument.
        what: &'static str,
    },
    /// A NaN or an infinity in the input.
    #[error("{what} holds a value that is not finite")]
    NonFinite {
        /// Which argument.
        what: &'static str,
    },
    /// A parameter outside its range.
    #[error("{name} = {value} is not allowed: {expected}")]
    Parameter {
        /// Name of the parameter.
        name: &'static str,
        /// The value given.
        value: f64,
        /// What is allowed.
        expected: &'static str,
    },
    /// A pair of experts that does not name two different rows.
    #[error("pair ({first}, {second}) does not name two different rows of {rows}")]
    Pair {
        /// First row.
        first: usize,
        /// Second row.
        second: usize,
        /// Number of rows given.
        rows: usize,
    },
    /// The tokens do not spread in any direction, so no boundary divides them.
    #[error("{tokens} token(s) with no spread cannot be divided")]
    NoSpread {
        /// How many tokens there were.
        tokens: usize,
    },
    /// A step number that does not follow the one before.
    #[error("step {got} does not come after step {last}")]
    StepOrder {
        /// The step given.
        got: u64,
        /// The last step seen.
        last: u64,
    },
    /// An observation names an expert that is not active in that layer, or leaves one out.
    #[error("layer {layer}: the observation does not list the active experts in order ({reason})")]
    Experts {
        /// The layer.
        layer: usize,
        /// What was wrong.
        reason: &'static str,
    },
    /// A figure of an expert that none can have.
    #[error("layer {layer}, expert {expert}: {problem}")]
    Observation {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: ExpertId,
        /// What is wrong with it.
        problem: Box<ExpandError>,
    },
    /// The controller was called out of turn.
    #[error("{called} was called, but {expected}")]
    Protocol {
        /// The method.
        called: &'static str,
        /// What should have come first.
        expected: &'static str,
    },
    /// An answer to a question that was not asked.
    #[error("no open request matches the answer for layer {layer}, expert {expert}")]
    UnknownRequest {
        /// The layer named.
        layer: usize,
        /// The expert named.
        expert: ExpertId,
    },
    /// A stored controller contradicts itself.
    #[error("stored state is not valid: {reason}")]
    State {
        /// What contradicts what.
        reason: &'static str,
    },
    /// An observation lacks a figure that the configured rule needs.
    #[error("the rule in use needs {what}, which the observation of layer {layer} lacks")]
    Missing {
        /// Which figure.
        what: &'static str,
        /// The layer.
        layer: usize,
    },
    /// A setting in which no split, or no check that its stop rule asks for, can ever be reached.
    #[error("{0}")]
    Unreachable(Diagnosis),
    /// A detector refused its parameters or its input.
    #[error(transparent)]
    Detector(#[from] CpdError),
}
