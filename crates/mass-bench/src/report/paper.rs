use super::Summary;

/// What the paper reports for a row of a table (arXiv 2512.19765).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reported {
    /// Test loss.
    pub test_loss: f64,
    /// Experts K.
    pub experts: f64,
    /// Mean experts a token k, where it is given.
    pub active_per_token: Option<f64>,
}

/// Static pools of the synthetic study, each at its best k; read off a figure but for K = 15.
const SYNTHETIC_STATIC: [(usize, f64, Option<f64>); 4] = [
    (5, 2.6, None),
    (10, 2.25, None),
    (15, 2.18, Some(4.7)),
    (20, 2.3, None),
];

/// The paper's figure to set beside a summary row; `None` where it has none.
///
/// The synthetic study's static rows are matched by their number of experts: the paper gives each
/// pool at its best k, here k is the row's own.
#[must_use]
pub fn reported(study: &str, row: &Summary) -> Option<Reported> {
    match (study, row.method.as_str()) {
        ("synthetic", "mass") => Some(Reported {
            test_loss: 2.15,
            experts: 12.4,
            active_per_token: Some(3.9),
        }),
        ("synthetic", "static") => SYNTHETIC_STATIC
            .iter()
            .find(|(experts, ..)| row.experts_mean == Some(*experts as f64))
            .map(|&(experts, test_loss, active_per_token)| Reported {
                test_loss,
                experts: experts as f64,
                active_per_token,
            }),
        _ => None,
    }
}
