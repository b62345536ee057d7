//! What can be wrong with the input of a router.

/// An input that a router, a plan or a statistic refuses, and why.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RoutingError {
    /// A parameter is outside its domain.
    #[error("{name} must be {expected}, got {value}")]
    InvalidParameter {
        /// The parameter's name.
        name: &'static str,
        /// The domain it has to lie in.
        expected: &'static str,
        /// The value given.
        value: f64,
    },
    /// Two arrays do not fit together.
    #[error("{what}: expected {expected}, got {found}")]
    ShapeMismatch {
        /// Which length or dimension.
        what: &'static str,
        /// The length that fits.
        expected: usize,
        /// The length given.
        found: usize,
    },
    /// There is no expert to route to (zero columns).
    #[error("there are no experts: the logits have zero columns")]
    NoExperts,
    /// The mask leaves no expert in use, so no token can be routed.
    #[error("all {experts} experts are masked out: no token can be routed")]
    AllExpertsMasked {
        /// Number of experts, all of them masked.
        experts: usize,
    },
    /// Top-k asks for more experts than are in use.
    #[error("top-k needs k = {k} experts, but only {available} are in use")]
    TooFewExperts {
        /// Experts wanted per token.
        k: usize,
        /// Experts in use.
        available: usize,
    },
    /// A logit (or another score) is NaN or infinite.
    #[error("the logit of token {token} for expert {expert} is {value}")]
    NonFiniteLogit {
        /// Row of the logit.
        token: usize,
        /// Column of the logit.
        expert: usize,
        /// The value found there.
        value: f32,
    },
    /// A number other than a logit is NaN or infinite.
    #[error("{what} is {value} at position {index}")]
    NonFinite {
        /// Which array.
        what: &'static str,
        /// Position in the array, row-major.
        index: usize,
        /// The value found there.
        value: f64,
    },
    /// Positions in a plan are 32-bit; the logits have more entries than that.
    #[error("{tokens} tokens x {experts} experts exceed 2^32 - 1 possible assignments")]
    TooLarge {
        /// Rows of the logits.
        tokens: usize,
        /// Columns of the logits.
        experts: usize,
    },
    /// The gradient of raw weights needs the full softmax, which the router was told not to keep.
    #[error(
        "the plan holds no probabilities, and the gradient of these weights needs them: keep probabilities when training"
    )]
    ProbabilitiesNotKept,
    /// A plan was made from assignments, and nobody has said how its weights depend on the logits.
    #[error(
        "the plan was made from assignments, which do not say how weights depend on logits: add RoutingPlan::with_probabilities, or \
         let the router have a backward of its own"
    )]
    GradientUnknown,
    /// An assignment of a plan made by hand is none of its batch, or contradicts another.
    #[error("assignment {index}, of token {token} to expert {expert}: {what}")]
    InvalidAssignment {
        /// Its position in the order given.
        index: usize,
        /// Its token.
        token: usize,
        /// Its expert.
        expert: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// A router's settings, written in one line, cannot be read.
    #[error("router `{text}`: {what}")]
    InvalidText {
        /// What was read.
        text: String,
        /// What is wrong with it.
        what: String,
    },
    /// The statistic is undefined for this input.
    #[error("{0}")]
    Undefined(&'static str),
}

/// What a router does with a token that has a NaN or infinite logit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum NonFinite {
    /// Fail, naming token and expert.
    #[default]
    Error,
    /// Route the token nowhere: it gets no assignment and a zero row of probabilities.
    Skip,
}

/// [`RoutingError::ShapeMismatch`] unless a size is what it has to be.
pub(crate) fn same(what: &'static str, expected: usize, found: usize) -> Result<(), RoutingError> {
    if expected == found {
        Ok(())
    } else {
        Err(RoutingError::ShapeMismatch {
            what,
            expected,
            found,
        })
    }
}
