use mass_expand::{ControllerParams, ExpandError};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use statrs::function::erf::erf;

/// What the tests of a run's controller said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decisions {
    /// Alarms of detectors.
    pub alarms: usize,
    /// Alignment tests in the record: of a trigger without a detector those alone that were passed.
    pub tests: usize,
    /// Those that were passed: gradient and weights nearly orthogonal.
    pub passed: usize,
    /// How often two random directions of as many dimensions pass the test.
    pub by_chance: f64,
}

impl Decisions {
    /// The alarms and tests among events, where the first matrix of an expert is `hidden` x `dim`; `None` if there are none.
    ///
    /// ```text
    /// by_chance = P(|c| < delta) = erf(delta sqrt(hidden dim / 2)),   c ~ N(0, 1 / (hidden dim))
    /// ```
    pub(crate) fn of(
        events: &[Value],
        params: &ControllerParams,
        (hidden, dim): (usize, usize),
    ) -> Result<Option<Self>, ExpandError> {
        let count = |is: &dyn Fn(&Value) -> bool| events.iter().filter(|e| is(e)).count();
        let kind = |event: &Value, kind: &str| event["kind"] == kind;
        let delta = params.alignment.delta(hidden, dim)?;
        let found = Self {
            alarms: count(&|e| kind(e, "flag")),
            tests: count(&|e| kind(e, "alignment")),
            passed: count(&|e| kind(e, "alignment") && e["drifted"] == true),
            by_chance: erf(delta * (hidden as f64 * dim as f64 / 2.0).sqrt()),
        };
        Ok((found.alarms + found.tests > 0).then_some(found))
    }
}
