//! Settings of a router in one line, for command lines and keys of runs.

use std::fmt;
use std::str::FromStr;

use super::RouterConfig;
use crate::{Combine, RoutingError};

/// Every name, with the settings it takes.
const NAMES: [(&str, &[&str]); 7] = [
    ("top_p", &["p", "combine"]),
    ("top_k", &["k", "combine"]),
    ("top_any", &["experts"]),
    ("bias_balanced", &["k", "rate", "combine"]),
    ("target_k", &["target", "p", "combine"]),
    ("expert_choice", &["capacity", "combine"]),
    ("noisy", &["std", "seed"]),
];

/// Most routers behind one another in a text.
const DEEPEST: usize = 16;

/// Reads `NAME:SETTING=VALUE,SETTING=VALUE`, and for `noisy` a slash and the router behind it.
///
/// | text | settings left out |
/// |---|---|
/// | `top_p:p=0.5` | `combine=renormalised`, as for all that have it; others: `raw`, `straight_through` |
/// | `top_k:k=2` | |
/// | `top_any:experts=8` | `experts=0`, see [`RouterConfig::TopAny`] |
/// | `bias_balanced:k=2,rate=0.001` | `rate=0.001` |
/// | `target_k:target=3,p=0.5` | `p=0.5` |
/// | `expert_choice:capacity=2` | |
/// | `noisy:std=0.25,seed=7/top_k:k=1,combine=raw` | `seed=0` |
///
/// A hyphen in a name is as good as an underscore. Domains are checked by [`RouterConfig::build`]. The text that
/// [`Display`](fmt::Display) writes reads back as the same settings, if no more than
/// sixteen routers stand behind one another.
impl FromStr for RouterConfig {
    type Err = RoutingError;

    /// # Errors
    /// [`RoutingError::InvalidText`]: an unknown name or setting, one that is missing, given twice or not a number.
    fn from_str(text: &str) -> Result<Self, RoutingError> {
        let refuse = |what: String| RoutingError::InvalidText {
            text: text.to_owned(),
            what,
        };
        if text.matches('/').count() > DEEPEST {
            return Err(refuse(format!(
                "more than {DEEPEST} routers behind one another"
            )));
        }
        let (own, behind) = match text.split_once('/') {
            Some((own, behind)) => (own, Some(behind)),
            None => (text, None),
        };
        let (name, rest) = own.split_once(':').unwrap_or((own, ""));
        let name = name.trim().replace('-', "_");
        let Some(&(name, known)) = NAMES.iter().find(|(known, _)| *known == name) else {
            let names = NAMES.map(|(name, _)| name).join(", ");
            return Err(refuse(format!("there is no `{name}`; there are {names}")));
        };
        let mut given: Vec<(&str, &str)> = Vec::new();
        for part in rest.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(refuse(format!("`{part}` is not SETTING=VALUE")));
            };
            let (key, value) = (key.trim(), value.trim());
            if !known.contains(&key) {
                let known = known.join(", ");
                return Err(refuse(format!("{name} has no `{key}`; it has {known}")));
            }
            if given.iter().any(|(k, _)| *k == key) {
                return Err(refuse(format!("`{key}` is given twice")));
            }
            given.push((key, value));
        }
        if name != "noisy" && behind.is_some() {
            return Err(refuse(format!(
                "only noisy has a router behind it, not {name}"
            )));
        }
        let settings = Settings {
            text,
            name,
            given: &given,
        };
        let combine = || match settings.text_of("combine") {
            None => Ok(Combine::default()),
            Some("raw") => Ok(Combine::Raw),
            Some("renormalised") => Ok(Combine::Renormalised),
            Some("straight_through") => Ok(Combine::StraightThrough),
            Some(other) => {
                let what = format!(
                    "combine is `{other}`; it is `raw`, `renormalised` or `straight_through`"
                );
                Err(refuse(what))
            }
        };
        Ok(match name {
            "top_p" => Self::TopP {
                p: settings.number("p", None)?,
                combine: combine()?,
            },
            "top_k" => Self::TopK {
                k: settings.number("k", None)?,
                combine: combine()?,
            },
            "top_any" => Self::TopAny {
                experts: settings.number("experts", Some(0))?,
            },
            "bias_balanced" => Self::BiasBalanced {
                k: settings.number("k", None)?,
                rate: settings.number("rate", Some(super::any::BIAS_RATE))?,
                combine: combine()?,
            },
            "target_k" => Self::TargetK {
                target: settings.number("target", None)?,
                p: settings.number("p", Some(0.5))?,
                combine: combine()?,
            },
            "expert_choice" => Self::ExpertChoice {
                capacity: settings.number("capacity", None)?,
                combine: combine()?,
            },
            _ => {
                let Some(behind) = behind else {
                    let what = "noisy needs a router behind it, as in noisy:std=0.1/top_k:k=2";
                    return Err(refuse(what.into()));
                };
                Self::Noisy {
                    std: settings.number("std", None)?,
                    seed: settings.number("seed", Some(0))?,
                    inner: Box::new(behind.parse()?),
                }
            }
        })
    }
}

/// The settings of one router in a text.
struct Settings<'a> {
    text: &'a str,
    name: &'a str,
    given: &'a [(&'a str, &'a str)],
}

impl Settings<'_> {
    fn text_of(&self, key: &str) -> Option<&str> {
        let found = self.given.iter().find(|(k, _)| *k == key);
        found.map(|(_, value)| *value)
    }

    fn number<T: FromStr>(&self, key: &str, unless: Option<T>) -> Result<T, RoutingError> {
        let refuse = |what| RoutingError::InvalidText {
            text: self.text.to_owned(),
            what,
        };
        match (self.text_of(key), unless) {
            (Some(value), _) => {
                let wrong = |_| refuse(format!("{key} is `{value}`, which is no number it can be"));
                value.parse().map_err(wrong)
            }
            (None, Some(value)) => Ok(value),
            (None, None) => Err(refuse(format!("{} needs {key}", self.name))),
        }
    }
}

impl fmt::Display for RouterConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |combine: &Combine| match combine {
            Combine::Raw => "raw",
            Combine::Renormalised => "renormalised",
            Combine::StraightThrough => "straight_through",
        };
        match self {
            Self::TopP { p, combine } => write!(f, "top_p:p={p},combine={}", name(combine)),
            Self::TopK { k, combine } => write!(f, "top_k:k={k},combine={}", name(combine)),
            Self::TopAny { experts } => write!(f, "top_any:experts={experts}"),
            Self::BiasBalanced { k, rate, combine } => {
                let combine = name(combine);
                write!(f, "bias_balanced:k={k},rate={rate},combine={combine}")
            }
            Self::TargetK { target, p, combine } => {
                let combine = name(combine);
                write!(f, "target_k:target={target},p={p},combine={combine}")
            }
            Self::ExpertChoice { capacity, combine } => {
                let combine = name(combine);
                write!(f, "expert_choice:capacity={capacity},combine={combine}")
            }
            Self::Noisy { std, seed, inner } => write!(f, "noisy:std={std},seed={seed}/{inner}"),
        }
    }
}
