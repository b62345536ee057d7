use serde::{Deserialize, Serialize};

use super::{Run, RunKey};

macro_rules! summary {
    ($($figure:ident: $mean:ident, $std:ident;)*) => {
        /// Means over seeds of runs that differ in nothing else.
        ///
        /// `*_std` is the sample standard deviation (n - 1) and `None` when there are fewer than two
        /// values. A figure that any run of the group lacks is averaged over the runs that have it;
        /// `n` counts all runs, `judged` those with a metric, or without one a test loss, if that is not all.
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        #[allow(missing_docs)] // one mean and one deviation for each figure of `Run`
        pub struct Summary {
            /// Method.
            pub method: String,
            /// Variant.
            pub variant: Option<String>,
            /// Setting.
            pub setting: Option<String>,
            /// Task.
            pub task: Option<String>,
            /// Experts at the start.
            pub experts_init: Option<usize>,
            /// Experts a token, of static top-k.
            pub k: Option<usize>,
            /// Name of `metric`.
            pub metric_name: Option<String>,
            /// Runs.
            pub n: usize,
            /// Runs with a figure to judge them by, where others have none.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub judged: Option<usize>,
            $(pub $mean: Option<f64>, pub $std: Option<f64>,)*
        }

        fn summary_of(runs: &[&Run]) -> Summary {
            let first = runs[0];
            $(let ($mean, $std) = mean_std(runs.iter().filter_map(|r| r.$figure.map(|v| v as f64)));)*
            let judged = runs.iter().filter(|r| r.metric.or(r.test_loss).is_some()).count();
            Summary {
                method: first.method.clone(),
                variant: first.variant.clone(),
                setting: first.setting.clone(),
                task: first.task.clone(),
                experts_init: first.experts_init,
                k: first.k,
                metric_name: first.metric_name.clone(),
                n: runs.len(),
                judged: Some(judged).filter(|some| (1..runs.len()).contains(some)),
                $($mean, $std,)*
            }
        }
    };
}

summary! {
    test_loss: test_loss_mean, test_loss_std;
    bayes_loss: bayes_loss_mean, bayes_loss_std;
    accuracy: accuracy_mean, accuracy_std;
    metric: metric_mean, metric_std;
    experts: experts_mean, experts_std;
    active_per_token: active_per_token_mean, active_per_token_std;
    jsd_entity: jsd_entity_mean, jsd_entity_std;
    jsd_property: jsd_property_mean, jsd_property_std;
    nmi: nmi_mean, nmi_std;
    detection_live_steps: detection_live_steps_mean, detection_live_steps_std;
    wall_s: wall_s_mean, wall_s_std;
    tokens_per_s: tokens_per_s_mean, tokens_per_s_std;
    peak_rss_mib: peak_rss_mib_mean, peak_rss_mib_std;
}

/// Mean and sample standard deviation; `None` for what too few values cannot give.
pub(super) fn mean_std(values: impl Iterator<Item = f64>) -> (Option<f64>, Option<f64>) {
    let values: Vec<f64> = values.collect();
    let n = values.len() as f64;
    if values.is_empty() {
        return (None, None);
    }
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let std = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
    // Figures near the limits of f64 can overflow here; JSON has no infinity.
    let finite = |v: &f64| v.is_finite();
    (Some(mean).filter(finite), std.filter(finite))
}

/// One [`Summary`] for each group of runs that differ only in seed, in order of first appearance.
#[must_use]
pub fn summarise(runs: &[Run]) -> Vec<Summary> {
    groups(runs)
        .iter()
        .map(|(_, runs)| summary_of(runs))
        .collect()
}

/// Runs that differ only in seed, in order of first appearance, by their key with the seed 0.
pub(super) fn groups(runs: &[Run]) -> Vec<(RunKey, Vec<&Run>)> {
    grouped_by(runs, |run| RunKey {
        seed: 0,
        ..run.key()
    })
}

/// Runs with the same key together, in order of first appearance.
pub(super) fn grouped_by<'r, K: PartialEq>(
    runs: impl IntoIterator<Item = &'r Run>,
    key: impl Fn(&Run) -> K,
) -> Vec<(K, Vec<&'r Run>)> {
    let mut groups: Vec<(K, Vec<&Run>)> = Vec::new();
    for run in runs {
        let key = key(run);
        match groups.iter_mut().find(|(k, _)| *k == key) {
            Some((_, members)) => members.push(run),
            None => groups.push((key, vec![run])),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_sample_deviation() {
        assert_eq!(mean_std([].into_iter()), (None, None));
        assert_eq!(mean_std([2.0].into_iter()), (Some(2.0), None));
        let (mean, std) = mean_std([1.0, 2.0, 3.0, 4.0].into_iter());
        assert_eq!(mean, Some(2.5));
        assert!((std.unwrap_or(0.0) - (5.0f64 / 3.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn groups_keep_settings_apart_and_average_over_seeds() {
        let run = |method: &str, seed, k, loss| Run {
            k: Some(k),
            test_loss: loss,
            ..Run::new(method, seed)
        };
        let runs = [
            run("static", 0, 2, Some(1.0)),
            run("mass", 0, 2, Some(5.0)),
            run("static", 1, 2, Some(3.0)),
            run("static", 0, 4, Some(9.0)),
            run("static", 2, 2, None),
        ];
        let summary = summarise(&runs);
        assert_eq!(summary.len(), 3);
        assert_eq!((summary[0].n, summary[0].test_loss_mean), (3, Some(2.0)));
        assert_eq!(summary[0].test_loss_std, Some(2f64.sqrt()));
        assert_eq!(summary[1].method, "mass");
        assert_eq!((summary[2].k, summary[2].test_loss_std), (Some(4), None));
        assert_eq!(summary[0].accuracy_mean, None);
    }
}
