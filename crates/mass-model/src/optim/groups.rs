use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::param::Param;

/// Which parameters a [`Group`] speaks of.
///
/// Names are compared by whole components: `blocks.1` does not reach `blocks.10`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// Every parameter.
    All,
    /// Parameters that decay unless told otherwise: matrices, embeddings and gate rows.
    Matrices,
    /// The others: biases and the scales of norms.
    Vectors,
    /// Names that begin with these components, such as `blocks.1`.
    Prefix(String),
    /// Names that end with these components, such as `gate` or `fc1.bias`.
    Suffix(String),
    /// Names with this text anywhere in them.
    Contains(String),
    /// What any of these selects.
    AnyOf(Vec<Select>),
}

impl Select {
    /// Whether a parameter of this name is meant.
    pub fn matches(&self, name: &str, param: &Param) -> bool {
        let whole = |rest: Option<&str>, at_cut: fn(&str) -> bool| {
            rest.is_some_and(|rest| rest.is_empty() || at_cut(rest))
        };
        match self {
            Self::All => true,
            Self::Matrices => param.decays(),
            Self::Vectors => !param.decays(),
            Self::Prefix(p) => whole(name.strip_prefix(p.as_str()), |rest| rest.starts_with('.')),
            Self::Suffix(s) => whole(name.strip_suffix(s.as_str()), |rest| rest.ends_with('.')),
            Self::Contains(text) => name.contains(text.as_str()),
            Self::AnyOf(several) => several.iter().any(|s| s.matches(name, param)),
        }
    }
}

/// A rule that gives some parameters their own weight decay or learning rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Name of the rule, for messages.
    pub name: String,
    /// Whom it is about.
    pub select: Select,
    /// Their weight decay; `None` leaves the question to later groups.
    #[serde(default)]
    pub weight_decay: Option<f64>,
    /// Factor on their learning rate (0 freezes them); `None` leaves the question to later groups.
    #[serde(default)]
    pub lr_scale: Option<f64>,
}

impl Group {
    pub(super) fn check(&self) -> Result<(), ModelError> {
        for (what, value) in [
            ("weight decay", self.weight_decay),
            ("learning-rate factor", self.lr_scale),
        ] {
            if let Some(value) = value
                && !(value >= 0.0 && value.is_finite())
            {
                return Err(ModelError::Config(format!(
                    "AdamW group {:?}: {what} is {value}, not a number of at least 0",
                    self.name
                )));
            }
        }
        Ok(())
    }
}

/// What the groups decide for one parameter: its weight decay and the factor on its learning rate.
///
/// Each of the two is settled by the first group that selects the parameter and speaks of it.
pub(super) fn decide(
    groups: &[Group],
    default_decay: f64,
    name: &str,
    param: &Param,
) -> (f64, f64) {
    let (mut decay, mut scale) = (None, None);
    for group in groups {
        let open = (decay.is_none() && group.weight_decay.is_some())
            || (scale.is_none() && group.lr_scale.is_some());
        if open && group.select.matches(name, param) {
            decay = decay.or(group.weight_decay);
            scale = scale.or(group.lr_scale);
        }
    }
    let unsaid = if param.decays() { default_decay } else { 0.0 };
    (decay.unwrap_or(unsaid), scale.unwrap_or(1.0))
}
