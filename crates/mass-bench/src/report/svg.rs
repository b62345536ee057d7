//! Charts as plain SVG within an HTML figure: no script, no network.
//!
//! A drawing is as wide as a telephone, so that its text is read there at its own size; on wider screens charts stand beside each
//! other. Title and legend are HTML, which wraps.

use std::fmt::Write;

/// A point, with half the length of its error bar.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) bar: f64,
}

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Draw {
    /// A line through the points.
    Line,
    /// A value that holds until the next point.
    Steps,
    /// The same, of less weight.
    Faint,
    /// Markers with error bars.
    Markers,
    /// The same, joined by a thin line.
    Joined,
}

/// A named line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Series {
    pub(super) name: String,
    /// Finite points, x not decreasing.
    pub(super) points: Vec<Point>,
    pub(super) draw: Draw,
}

impl Series {
    pub(super) fn new(name: String, draw: Draw, points: impl Iterator<Item = (f64, f64)>) -> Self {
        let bar = 0.0;
        let points = points.map(|(x, y)| Point { x, y, bar }).collect();
        Self { name, points, draw }
    }
}

/// What a chart shows.
#[derive(Debug, Default)]
pub(super) struct Chart<'a> {
    pub(super) title: String,
    pub(super) x_label: &'a str,
    pub(super) series: Vec<Series>,
    /// Horizontal dashed lines.
    pub(super) levels: Vec<(String, f64)>,
    /// A level that nothing goes below. One that is far below is drawn under a break of the axis.
    pub(super) floor: Option<(String, f64)>,
    /// Signs at places, by what they mean.
    pub(super) signs: Vec<(&'a str, Point)>,
    /// Points that are ringed, and what the rings mean.
    pub(super) rings: Vec<(String, Point)>,
    /// A vertical line at 0.
    pub(super) origin: bool,
    /// The x axis is that of powers of two.
    pub(super) log2: bool,
    /// The y axis counts.
    pub(super) counts: bool,
    /// Least and greatest y of the charts beside this one.
    pub(super) beside: Option<(f64, f64)>,
}

const WIDTH: f64 = 360.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 42.0;
/// Between axes and outermost points.
const INSET: f64 = 8.0;
/// Below a break of the axis.
const STRIP: f64 = 24.0;
/// Points a line is thinned to: a browser need not draw more than there are pixels.
const MAX_POINTS: usize = 360;
/// Colours of the style sheet that stay apart for colour-blind readers (Okabe and Ito), then dashed or in other shapes again.
const COLOURS: usize = 7;
/// Series of one chart that can be told apart without effort.
pub(super) const MAX_LINES: usize = 8;

impl Chart<'_> {
    /// The figure. Empty when there is nothing to draw.
    pub(super) fn figure(&self) -> String {
        match self.drawn() {
            Some((svg, legend)) => figure(&self.title, &svg, &legend),
            None => String::new(),
        }
    }

    /// The same as a picture that needs nothing beside it, with title and legend in it.
    pub(super) fn picture(&self, style: &str) -> Option<String> {
        const LINE: f64 = 17.0;
        let (svg, legend) = self.drawn()?;
        let (above, tall) = (24.0, self.height());
        let height = above + tall + 8.0 + LINE * legend.len() as f64;
        // Text does not wrap here; a letter of 12 pixels is some 7 wide.
        let longest = legend.iter().map(|l| l.name.chars().count()).max();
        let width = WIDTH.max(LEFT + 44.0 + 7.0 * longest.unwrap_or(0) as f64);
        let mut picture = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{}\" font-family=\"sans-serif\">\n\
             <style>\n{style}</style>\n<rect width=\"{width}\" height=\"{height}\" fill=\"var(--page)\"/>\n\
             <text x=\"{LEFT}\" y=\"16\" font-weight=\"bold\">{}</text>\n",
            2.0 * width,
            escape(&self.title)
        );
        let placed = format!("<svg y=\"{above}\" width=\"{WIDTH}\" height=\"{tall}\" ");
        picture.push_str(&svg.replacen("<svg ", &placed, 1));
        for (line, Entry { class, drawn, name }) in legend.iter().enumerate() {
            let y = above + tall + LINE * line as f64;
            let _ = writeln!(
                picture,
                "<svg class=\"key {class}\" x=\"{LEFT}\" y=\"{y}\" width=\"28\" height=\"12\" viewBox=\"0 0 28 12\">{drawn}</svg>\
                 <text x=\"{}\" y=\"{}\">{}</text>",
                LEFT + 36.0,
                y + 10.0,
                escape(name)
            );
        }
        picture.push_str("</svg>\n");
        Some(picture)
    }

    fn height(&self) -> f64 {
        if self.counts { 190.0 } else { 250.0 }
    }

    /// Axes with what is between them, and the legend; `None` when there is nothing to draw.
    fn drawn(&self) -> Option<(String, Vec<Entry>)> {
        let points = || self.series.iter().flat_map(|s| &s.points);
        points().next()?;
        let scale = |x: f64| if self.log2 { x.max(1e-9).log2() } else { x };
        let (x_min, x_max) = span(
            points()
                .map(|p| scale(p.x))
                .chain(self.origin.then_some(0.0)),
        );
        let (y_min, y_max) = self.y_span();
        let broken = self.floor.as_ref().filter(|(_, floor)| *floor < y_min);
        let height = self.height();
        let bottom = height - BOTTOM;
        let lowest = bottom - INSET - if broken.is_some() { STRIP } else { 0.0 };
        let (left, right) = (LEFT + INSET, WIDTH - RIGHT - INSET);
        let x = |v: f64| left + (scale(v) - x_min) / (x_max - x_min) * (right - left);
        let y = |v: f64| match broken {
            Some((_, floor)) if v <= *floor => bottom - INSET,
            _ => lowest - (v - y_min) / (y_max - y_min) * (lowest - TOP - INSET),
        };

        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n",
            escape(&self.title)
        );
        let mut y_ticks = ticks(y_min, y_max);
        y_ticks.retain(|tick| !self.counts || tick.fract() == 0.0);
        let length = y_max - y_min;
        let named = y_ticks.iter().map(|&tick| (tick, label(tick, length)));
        let below = broken.map(|(_, floor)| (*floor, format!("{floor:.3}")));
        for (tick, text) in named.chain(below) {
            let at = y(tick);
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{}\"/>\
                 <text x=\"{}\" y=\"{:.1}\" class=\"e\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 5.0,
                at + 4.0,
                text
            );
        }
        if broken.is_some() {
            let at = bottom - INSET - STRIP / 2.0;
            let (from, to) = (LEFT - 5.0, LEFT + 5.0);
            let _ = writeln!(
                svg,
                "<path class=\"axis\" d=\"M{from} {}L{to} {}M{from} {}L{to} {}\"/>",
                at + 1.0,
                at - 5.0,
                at + 5.0,
                at - 1.0
            );
        }
        let x_ticks = if self.log2 {
            let powers = (x_min.ceil() as i32)..=(x_max.floor() as i32);
            powers.map(|power| 2f64.powi(power)).collect()
        } else {
            ticks(x_min, x_max)
        };
        for tick in x_ticks {
            let at = x(tick);
            let _ = writeln!(
                svg,
                "<path class=\"axis\" d=\"M{at:.1} {bottom}v4\"/><text x=\"{at:.1}\" y=\"{}\" class=\"m\">{}</text>",
                bottom + 17.0,
                label(tick, if self.log2 { 0.0 } else { x_max - x_min })
            );
        }
        let _ = writeln!(
            svg,
            "<path class=\"axis\" d=\"M{LEFT} {TOP}V{bottom}H{}\"/>\
             <text x=\"{}\" y=\"{}\" class=\"m\">{}</text>",
            WIDTH - RIGHT,
            (LEFT + WIDTH - RIGHT) / 2.0,
            height - 6.0,
            escape(self.x_label)
        );
        if self.origin {
            let _ = writeln!(
                svg,
                "<path class=\"level\" d=\"M{:.1} {TOP}V{bottom}\"/>",
                x(0.0)
            );
        }
        let mut legend = Vec::new();
        let mut explain = |class: &str, drawn: &str, name: &str| {
            let entry = Entry {
                class: class.to_owned(),
                drawn: drawn.to_owned(),
                name: name.to_owned(),
            };
            // Several lines may be of one name.
            if !legend.contains(&entry) {
                legend.push(entry);
            }
        };
        for (index, (name, level)) in self.levels.iter().chain(&self.floor).enumerate() {
            let class = format!("level d{}", index % 4);
            let line = format!(
                "<path class=\"{class}\" d=\"M{LEFT} {:.1}H{}\"/>",
                y(*level),
                WIDTH - RIGHT
            );
            svg.push_str(&line);
            explain(&class, "<path d=\"M0 6H28\"/>", name);
        }
        let aside = self.aside(x);
        let mut index = 0;
        for (line, aside) in self.series.iter().zip(aside) {
            let place = |p: &Point| (x(p.x) + aside, y(p.y));
            let (colour, other) = (index % COLOURS, index / COLOURS);
            let class = match line.draw {
                Draw::Faint => "faint".to_owned(),
                Draw::Line | Draw::Steps => format!("c{colour} d{}", other % 4),
                Draw::Markers | Draw::Joined => format!("c{colour}"),
            };
            let mut drawn = path(line, place);
            let mut key = "<path d=\"M0 6H28\"/>".to_owned();
            if matches!(line.draw, Draw::Markers | Draw::Joined) {
                if line.draw == Draw::Markers {
                    (drawn, key) = (String::new(), String::new());
                }
                for p in &line.points {
                    let (at, _) = place(p);
                    if p.bar > 0.0 {
                        let _ = write!(
                            drawn,
                            "<path d=\"M{at:.1} {:.1}V{:.1}\"/>",
                            y(p.y - p.bar),
                            y(p.y + p.bar)
                        );
                    }
                    drawn.push_str(&shape(other, place(p), 4.0));
                }
                key.push_str(&shape(other, (14.0, 6.0), 4.0));
            }
            index += usize::from(line.draw != Draw::Faint);
            let name = escape(&line.name);
            let _ = writeln!(
                svg,
                "<g class=\"series {class}\"><title>{name}</title>{drawn}</g>"
            );
            explain(&class, &key, &line.name);
        }
        for (name, p) in &self.rings {
            let (x, y) = (x(p.x), y(p.y));
            let _ = writeln!(
                svg,
                "<circle class=\"ring\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"8\"/>"
            );
            explain(
                "",
                "<circle class=\"ring\" cx=\"14\" cy=\"6\" r=\"5\"/>",
                name,
            );
        }
        for (name, p) in &self.signs {
            let kind = sign(name);
            let (class, at) = (format!("sign s{kind}"), (x(p.x), y(p.y)));
            let _ = write!(svg, "<g class=\"{class}\">{}</g>", shape(kind, at, 4.0));
            explain(&class, &shape(kind, (14.0, 6.0), 4.0), name);
        }
        svg.push_str("</svg>");
        Some((svg, legend))
    }

    /// Least and greatest x of the points.
    pub(super) fn x_span(&self) -> (f64, f64) {
        let points = self.series.iter().flat_map(|s| &s.points);
        span(points.map(|p| p.x))
    }

    /// Least and greatest y that are drawn to scale.
    pub(super) fn y_span(&self) -> (f64, f64) {
        let points = self.series.iter().flat_map(|s| &s.points);
        let ends = points.flat_map(|p| [p.y - p.bar, p.y + p.bar]);
        let levels = self.levels.iter().map(|l| l.1);
        let beside = self.beside.map(|(low, high)| [low, high]);
        let (low, high) = span(ends.chain(levels).chain(beside.into_iter().flatten()));
        match &self.floor {
            Some((_, floor)) if *floor > low - (high - low) => (low.min(*floor), high),
            _ => (low, high),
        }
    }

    /// How far each series is moved aside, so that points of one x stand beside each other.
    fn aside(&self, x: impl Fn(f64) -> f64) -> Vec<f64> {
        let mut aside = vec![0.0; self.series.len()];
        let single =
            |i: &usize| self.series[*i].draw == Draw::Markers && self.series[*i].points.len() == 1;
        let mut at: Vec<(f64, usize)> = (0..self.series.len())
            .filter(single)
            .map(|i| (x(self.series[i].points[0].x), i))
            .collect();
        at.sort_by(|a, b| a.0.total_cmp(&b.0));
        for group in at.chunk_by(|a, b| b.0 - a.0 < 2.0) {
            let width = (44.0 / group.len() as f64).min(9.0);
            let middle = (group.len() - 1) as f64 / 2.0;
            for (place, (x, i)) in group.iter().enumerate() {
                let room = (WIDTH - RIGHT - 4.0 - x).min(x - LEFT - 4.0);
                aside[*i] = ((place as f64 - middle) * width).clamp(-room, room);
            }
        }
        aside
    }
}

/// Charts beside each other with at most [`MAX_LINES`] series of `chart` each, on common axes.
pub(super) fn in_parts(mut chart: Chart<'_>) -> String {
    let parts = chart.series.len().div_ceil(MAX_LINES).max(1);
    let each = chart.series.len().div_ceil(parts).max(1);
    chart.beside = (parts > 1).then(|| chart.y_span());
    let title = chart.title.clone();
    let series = std::mem::take(&mut chart.series);
    let mut html = String::new();
    for (part, series) in series.chunks(each).enumerate() {
        chart.series = series.to_vec();
        if parts > 1 {
            chart.title = format!("{title} ({} of {parts})", part + 1);
        }
        html.push_str(&chart.figure());
    }
    html
}

/// Maps side by side, of one row an expert; the darker a cell, the greater its value.
pub(super) fn heat_maps(title: &str, maps: &[(&str, &[Vec<f64>])]) -> String {
    const CELL: f64 = 15.0;
    const GAP: f64 = 18.0;
    let all = maps.iter().map(|(_, map)| map.len()).max().unwrap_or(0);
    let of_map = |map: &[Vec<f64>]| map.first().map_or(0, Vec::len);
    let columns: usize = maps.iter().map(|(_, map)| of_map(map)).sum();
    let values = || maps.iter().flat_map(|(_, map)| map.iter().flatten());
    let most = values().copied().fold(0.0, f64::max);
    if all == 0 || columns == 0 || most <= 0.0 {
        return String::new();
    }
    let rows = busiest(all, maps);
    let title = &match rows.len() < all {
        true => format!("{title}: the {} busiest of {all} experts", rows.len()),
        false => title.to_owned(),
    };
    // Room for the largest number.
    let first = 13.0 + 7.0 * all.to_string().len().max(3) as f64;
    let width = (WIDTH - first - 4.0 - GAP * (maps.len() - 1) as f64) / columns as f64;
    let height = TOP + CELL * rows.len() as f64 + 26.0;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n",
        escape(title)
    );
    for (place, row) in rows.iter().enumerate() {
        let y = TOP + CELL * place as f64 + 11.0;
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{y}\" class=\"e\">{row}</text>",
            first - 5.0
        );
    }
    let mut left = first;
    for (name, map) in maps {
        let wide = width * of_map(map) as f64;
        let _ = writeln!(
            svg,
            "<rect class=\"frame\" x=\"{left:.1}\" y=\"{TOP}\" width=\"{wide:.1}\" height=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{}\" class=\"m\">{}</text>",
            CELL * rows.len() as f64,
            left + wide / 2.0,
            height - 8.0,
            escape(name)
        );
        for (place, values) in rows
            .iter()
            .enumerate()
            .filter_map(|(i, r)| Some((i, map.get(*r)?)))
        {
            for (column, value) in values.iter().enumerate().filter(|(_, v)| **v > 0.0) {
                let _ = write!(
                    svg,
                    "<rect class=\"heat\" x=\"{:.1}\" y=\"{}\" width=\"{width:.1}\" height=\"{CELL}\" fill-opacity=\"{:.2}\"/>",
                    left + width * column as f64,
                    TOP + CELL * place as f64,
                    value / most
                );
            }
        }
        left += wide + GAP;
    }
    svg.push_str("</svg>");
    let key = "<rect class=\"heat\" x=\"8\" y=\"0\" width=\"12\" height=\"12\"/>";
    let entry = Entry {
        class: String::new(),
        drawn: key.to_owned(),
        name: format!("{most:.2} of the slots, the greatest share"),
    };
    figure(title, &svg, &[entry])
}

/// The rows that are shown of so many, in order: all, or of more than can be looked at those with the largest sums.
fn busiest(all: usize, maps: &[(&str, &[Vec<f64>])]) -> Vec<usize> {
    const MOST: usize = 100;
    let sum = |row: usize| -> f64 {
        let of = |map: &[Vec<f64>]| map.get(row).map_or(0.0, |values| values.iter().sum());
        maps.iter().map(|(_, map)| of(map)).sum()
    };
    let mut rows: Vec<(f64, usize)> = (0..all).map(|row| (sum(row), row)).collect();
    rows.sort_by(|a, b| b.0.total_cmp(&a.0));
    rows.truncate(MOST);
    let mut rows: Vec<usize> = rows.into_iter().map(|(_, row)| row).collect();
    rows.sort_unstable();
    rows
}

/// A line of a legend.
#[derive(PartialEq)]
struct Entry {
    class: String,
    drawn: String,
    name: String,
}

fn figure(title: &str, svg: &str, legend: &[Entry]) -> String {
    let legend: String = legend
        .iter()
        .map(|Entry { class, drawn, name }| {
            format!(
                "<li><svg class=\"key {class}\" viewBox=\"0 0 28 12\" aria-hidden=\"true\">{drawn}</svg><span>{}</span></li>",
                breakable(name)
            )
        })
        .collect();
    format!(
        "<figure><figcaption>{}</figcaption>\n<div class=\"plot\">{svg}</div>\n<ul class=\"legend\">{legend}</ul></figure>\n",
        breakable(title)
    )
}

fn path(line: &Series, place: impl Fn(&Point) -> (f64, f64)) -> String {
    let every = line.points.len().div_ceil(MAX_POINTS).max(1);
    let last = line.points.len().saturating_sub(1);
    let kept = line
        .points
        .iter()
        .enumerate()
        .filter(|(i, _)| i % every == 0 || *i == last);
    let mut d = String::new();
    for (i, point) in kept {
        let (x, y) = place(point);
        let _ = match line.draw {
            _ if i == 0 => write!(d, "M{x:.1} {y:.1}"),
            Draw::Steps | Draw::Faint => write!(d, "H{x:.1}V{y:.1}"),
            _ => write!(d, "L{x:.1} {y:.1}"),
        };
    }
    format!("<path class=\"line\" d=\"{d}\"/>")
}

/// The shape of an event's sign.
fn sign(name: &str) -> usize {
    match name {
        "split" => 2,
        "removal" => 4,
        _ => 1,
    }
}

/// A filled circle, square, triangle, diamond or hanging triangle.
fn shape(kind: usize, (x, y): (f64, f64), r: f64) -> String {
    let d = match kind % 5 {
        0 => return format!("<circle class=\"mark\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r}\"/>"),
        1 => format!("M{:.1} {:.1}h{2}v{2}h-{2}z", x - r, y - r, 2.0 * r),
        2 => format!("M{x:.1} {:.1}l{r} {}h-{}z", y - r, 2.0 * r, 2.0 * r),
        3 => format!("M{x:.1} {:.1}l{r} {r}l-{r} {r}l-{r} -{r}z", y - r),
        _ => format!("M{x:.1} {:.1}l{r} -{}h-{}z", y + r, 2.0 * r, 2.0 * r),
    };
    format!("<path class=\"mark\" d=\"{d}\"/>")
}

/// Least and greatest, moved apart when they coincide.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
        (l.min(v), h.max(v))
    });
    if high > low {
        (low, high)
    } else {
        // Of a number so large that a half is nothing beside it, more.
        let room = 0.5_f64.max(1e-9 * low.abs());
        (low - room, high + room)
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
    // So short a span, or so long a one, has no numbers between.
    if !step.is_normal() {
        return vec![low, high];
    }
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A number of an axis of such a length: as many digits as its steps need.
fn label(value: f64, length: f64) -> String {
    let largest = value.abs().max(length);
    if value != 0.0 && !(1e-3..1e6).contains(&largest) {
        let order = |x: f64| x.abs().log10().floor();
        let digits = (order(value) - order(length) + 1.0).clamp(0.0, 6.0) as usize;
        return format!("{value:.digits$e}");
    }
    let digits = if length > 0.0 {
        (3.0 - length.log10().floor()).clamp(0.0, 6.0) as usize
    } else {
        4
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    if text.is_empty() || text == "-0" {
        "0".into()
    } else {
        text.to_owned()
    }
}

/// A run's name, or text with one, that lines may break after its slashes.
pub(super) fn breakable(text: &str) -> String {
    escape(text).replace('/', "/<wbr>")
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
            let labels: std::collections::HashSet<String> = ticks.iter().map(|t| label(*t, width)).collect();
            prop_assert!(low.abs() > 1e5 * width || labels.len() == ticks.len(), "{labels:?}");
        }
    }

    fn chart(points: &[(f64, f64)]) -> Chart<'static> {
        let series = Series::new("a".into(), Draw::Line, points.iter().copied());
        Chart {
            series: vec![series],
            ..Chart::default()
        }
    }

    #[test]
    fn nothing_to_draw_draws_nothing() {
        let levels = vec![("floor".into(), 1.0)];
        assert_eq!(
            Chart {
                levels,
                ..chart(&[])
            }
            .figure(),
            ""
        );
        assert_eq!(in_parts(chart(&[])), "");
        assert_eq!(heat_maps("t", &[("entity", &[])]), "");
        assert_eq!(heat_maps("t", &[("entity", &[vec![0.0]])]), "");
    }

    #[test]
    fn a_floor_far_below_stands_under_a_break_and_one_close_by_to_scale() {
        let with = |floor| Chart {
            floor: Some(("Bayes".into(), floor)),
            ..chart(&[(0.0, 1.8), (1.0, 2.0)])
        };
        assert_eq!(with(1.7).y_span(), (1.7, 2.0));
        assert_eq!(with(1.2).y_span(), (1.8, 2.0));
        assert!(with(1.2).figure().contains(">1.200</text>"));
    }

    #[test]
    fn text_is_escaped_and_constant_lines_are_drawn() {
        assert_eq!(escape("a<b & \"c\""), "a&lt;b &amp; &quot;c&quot;");
        let figure = Chart {
            title: "<t>".into(),
            ..chart(&[(1.0, 2.0), (2.0, 2.0)])
        }
        .figure();
        assert!(
            figure.contains("&lt;t&gt;") && figure.contains("class=\"line\""),
            "{figure}"
        );
        assert!(!figure.contains("NaN") && !figure.contains("inf"));
    }

    #[test]
    fn many_lines_are_drawn_in_parts_of_one_scale() {
        let mut many = chart(&[]);
        let line = |i: usize| {
            Series::new(
                format!("line {i}"),
                Draw::Line,
                [(0.0, i as f64), (1.0, 0.5)].into_iter(),
            )
        };
        many.series = (0..20).map(line).collect();
        let html = in_parts(many);
        assert_eq!(
            (
                html.matches("<figure>").count(),
                html.matches(">15</text>").count()
            ),
            (3, 3)
        );
        assert!(html.contains("(3 of 3)"));
    }
}
