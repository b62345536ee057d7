use super::Summary;

/// What the paper reports for a row of a table (arXiv 2512.19765).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reported {
    /// The figure of the study: test loss of the synthetic one, the task's metric (0 to 1) of GLUE.
    pub figure: f64,
    /// Experts K, least and most, where they are given.
    pub experts: Option<(f64, f64)>,
    /// Mean experts a token k, least and most, where they are given.
    pub active_per_token: Option<(f64, f64)>,
}

/// Static pools of the synthetic study, each at its best k; read off a figure but for K = 15.
const SYNTHETIC_STATIC: [(usize, f64, Option<f64>); 4] = [
    (5, 2.6, None),
    (10, 2.25, None),
    (15, 2.18, Some(4.7)),
    (20, 2.3, None),
];

/// Tasks of the paper's GLUE table (BERT-large-cased), the columns of the rows below.
const GLUE_TASKS: [&str; 5] = ["CoLA", "MRPC", "QNLI", "MNLI", "RTE"];

/// Static pools with top-k routing by k, in percent; secondary sources, as all of the GLUE rows.
const GLUE_STATIC: [(usize, [f64; 5]); 4] = [
    (1, [63.63, 89.81, 92.39, 86.63, 74.01]),
    (2, [64.71, 90.18, 92.53, 86.73, 72.32]),
    (4, [64.12, 89.74, 92.65, 86.59, 75.33]),
    (8, [64.37, 90.35, 92.49, 86.51, 73.53]),
];
const GLUE_DYNMOE: [f64; 5] = [65.17, 90.64, 92.59, 86.37, 73.41];
const GLUE_MASS: [f64; 5] = [65.62, 90.58, 92.62, 86.74, 75.33];

/// The paper's figure to set beside a summary row; `None` where it has none.
///
/// The synthetic study's static rows are matched by their number of experts: the paper gives each
/// pool at its best k, here k is the row's own. GLUE's are matched by k alone: the paper does not say at which K.
#[must_use]
pub fn reported(study: &str, row: &Summary) -> Option<Reported> {
    match study {
        // The paper has one set of data: the quick preset's, by name or alone.
        "synthetic" if row.task.as_deref().is_none_or(|task| task == "vocab50") => synthetic(row),
        "glue" => glue(row),
        _ => None,
    }
}

fn synthetic(row: &Summary) -> Option<Reported> {
    let exactly = |x: f64| Some((x, x));
    match row.method.as_str() {
        "mass" => Some(Reported {
            figure: 2.15,
            experts: exactly(12.4),
            active_per_token: exactly(3.9),
        }),
        "static" => SYNTHETIC_STATIC
            .iter()
            .find(|(experts, ..)| row.experts_mean == Some(*experts as f64))
            .map(|&(experts, figure, active_per_token)| Reported {
                figure,
                experts: exactly(experts as f64),
                active_per_token: active_per_token.and_then(exactly),
            }),
        _ => None,
    }
}

fn glue(row: &Summary) -> Option<Reported> {
    let column = GLUE_TASKS
        .iter()
        .position(|task| row.task.as_deref() == Some(task))?;
    let (percent, experts, active_per_token) = match row.method.as_str() {
        "mass" => (GLUE_MASS, Some((9.5, 12.7)), Some((2.6, 3.2))),
        "dynmoe" => (GLUE_DYNMOE, Some((9.0, 9.0)), Some((6.5, 8.0))),
        "static" => {
            let (k, row) = GLUE_STATIC.iter().find(|(k, _)| row.k == Some(*k))?;
            (*row, None, Some((*k as f64, *k as f64)))
        }
        _ => return None,
    };
    Some(Reported {
        figure: percent[column] / 100.0,
        experts,
        active_per_token,
    })
}
