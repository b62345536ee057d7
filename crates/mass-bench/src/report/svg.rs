//! Line plots as plain SVG: no script, no network.

use std::fmt::Write;

/// A named line.
pub(super) struct Series {
    pub(super) name: String,
    /// Finite points (x, y), x not decreasing.
    pub(super) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 860.0;
/// Of a plot with a short legend.
const LEAST_HEIGHT: f64 = 340.0;
/// A line of the legend.
const LEGEND: f64 = 16.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 250.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 45.0;
/// Points a line is thinned to: a browser need not draw more than there are pixels.
const MAX_POINTS: usize = 600;

/// Colours that stay apart for colour-blind readers (Okabe and Ito), then dashed again in several ways.
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
];
const DASHES: [&str; 4] = [
    "",
    " stroke-dasharray=\"6 3\"",
    " stroke-dasharray=\"2 2\"",
    " stroke-dasharray=\"9 3 2 3\"",
];

/// A plot of `series` with a horizontal dashed line for each of `levels`. Empty when there is nothing to draw.
pub(super) fn line_plot(
    title: &str,
    x_label: &str,
    series: &[Series],
    levels: &[(String, f64)],
) -> String {
    let points = || series.iter().flat_map(|s| s.points.iter().copied());
    if points().next().is_none() {
        return String::new();
    }
    let height = LEAST_HEIGHT.max(TOP + LEGEND * series.len() as f64);
    let (x_min, x_max) = span(points().map(|p| p.0));
    let (y_min, y_max) = span(points().map(|p| p.1).chain(levels.iter().map(|l| l.1)));
    let x = |v: f64| LEFT + (v - x_min) / (x_max - x_min) * (WIDTH - LEFT - RIGHT);
    let y = |v: f64| height - BOTTOM - (v - y_min) / (y_max - y_min) * (height - TOP - BOTTOM);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{0}\">\n\
         <text x=\"{LEFT}\" y=\"18\" class=\"title\">{0}</text>\n",
        escape(title)
    );
    for tick in ticks(y_min, y_max) {
        let at = y(tick);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" class=\"grid\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            label(tick)
        );
    }
    for tick in ticks(x_min, x_max) {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x(tick),
            height - BOTTOM + 16.0,
            label(tick)
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        height - 8.0,
        escape(x_label)
    );
    for (name, level) in levels {
        let at = y(*level);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{0}\" y1=\"{at:.1}\" y2=\"{at:.1}\" class=\"level\"/>\
             <text x=\"{1}\" y=\"{2:.1}\">{3}</text>",
            WIDTH - RIGHT,
            WIDTH - RIGHT - 4.0,
            at - 4.0,
            escape(name)
        );
    }
    for (index, line) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let dash = DASHES[index / COLOURS.len() % DASHES.len()];
        let step = line.points.len().div_ceil(MAX_POINTS).max(1);
        let last = line.points.len().saturating_sub(1);
        let path: Vec<String> = line
            .points
            .iter()
            .enumerate()
            .filter(|(i, _)| i % step == 0 || *i == last)
            .map(|(_, p)| format!("{:.1},{:.1}", x(p.0), y(p.1)))
            .collect();
        let at = TOP + LEGEND * index as f64;
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"{dash}/>\
             <line x1=\"{}\" x2=\"{}\" y1=\"{at}\" y2=\"{at}\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>\
             <text x=\"{}\" y=\"{}\">{}</text>",
            path.join(" "),
            WIDTH - RIGHT + 14.0,
            WIDTH - RIGHT + 36.0,
            WIDTH - RIGHT + 42.0,
            at + 4.0,
            escape(&line.name)
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Least and greatest, moved apart when they coincide.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
        (l.min(v), h.max(v))
    });
    if high > low {
        (low, high)
    } else {
        (low - 0.5, high + 0.5)
    }
}

/// Three to eight round numbers within a span.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let raw = (high - low) / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|step| *step >= raw)
        .unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

fn label(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text.is_empty() || text == "-0" {
        "0".into()
    } else {
        text.to_owned()
    }
}

/// Text made safe for HTML and attribute values.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ticks_are_few_and_inside(low in -1e6..1e6f64, width in 1e-3..1e6f64) {
            let high = low + width;
            let ticks = ticks(low, high);
            prop_assert!((2..=8).contains(&ticks.len()), "{ticks:?}");
            let slack = width * 1e-6;
            prop_assert!(ticks.iter().all(|t| *t >= low - slack && *t <= high + slack));
        }
    }

    #[test]
    fn nothing_to_draw_draws_nothing() {
        assert_eq!(line_plot("t", "x", &[], &[("floor".into(), 1.0)]), "");
    }

    #[test]
    fn a_long_legend_fits_and_styles_differ() {
        let line = |i: usize| Series {
            name: format!("run {i}"),
            points: vec![(0.0, i as f64), (9.0, 5.0)],
        };
        let series: Vec<Series> = (0..28).map(line).collect();
        let svg = line_plot("t", "step", &series, &[]);
        let numbers = |name: &str| -> Vec<f64> {
            let name = format!(" {name}=\"");
            let parts = svg.split(&name).skip(1);
            let text = parts.map(|p| p.split('"').next().unwrap());
            text.map(|t| t.parse().unwrap()).collect()
        };
        let lowest = numbers("y").into_iter().fold(0.0, f64::max);
        let view = svg.split("viewBox=\"0 0 860 ").nth(1).unwrap();
        let height: f64 = view.split('"').next().unwrap().parse().unwrap();
        assert!(lowest < height, "{lowest} {height}");
        let styles: std::collections::HashSet<&str> = svg
            .lines()
            .filter(|l| l.starts_with("<polyline"))
            .map(|l| l.split("stroke=").nth(1).unwrap())
            .collect();
        assert_eq!(styles.len(), 28);
    }

    #[test]
    fn a_flat_line_is_drawn_and_names_are_escaped() {
        let series = [Series {
            name: "<b>".into(),
            points: vec![(0.0, 5.0), (9.0, 5.0)],
        }];
        let svg = line_plot("a & b", "step", &series, &[("floor".into(), 1.3)]);
        assert!(svg.contains("&lt;b&gt;") && svg.contains("a &amp; b") && svg.contains("floor"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
