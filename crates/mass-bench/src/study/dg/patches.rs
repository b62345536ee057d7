//! Which patches go to which expert, by class and by domain.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

use image::{ImageFormat, RgbImage};
use mass_model::Place;
use mass_model::growth::Mixtures;
use mass_model::vit::VitClassifier;
use mass_routing::{LabelUsage, RoutingPlan, normalized_mutual_information};
use ndarray::{Array2, Axis, Slice};
use serde_json::{Value, json};

use super::data::Set;
use crate::BenchError;
use crate::durable;

/// Images of each class in each domain that are counted; the first of them is drawn.
const EXAMPLES: usize = 8;

/// Pixels between the pictures of a sheet, and around it.
const GAP: usize = 4;

/// Colours of experts, in the order of the gate's logits; beyond the last they begin again. The first eight are those of Okabe
/// and Ito, which colour-blind readers can tell apart.
const COLOURS: [[u8; 3]; 12] = [
    [230, 159, 0],
    [86, 180, 233],
    [0, 158, 115],
    [240, 228, 66],
    [0, 114, 178],
    [213, 94, 0],
    [204, 121, 167],
    [60, 60, 60],
    [255, 255, 255],
    [140, 86, 75],
    [127, 0, 255],
    [166, 206, 150],
];

/// How one mixture layer routes the patches of some images.
pub(super) struct PatchRouting {
    name: String,
    experts: Vec<u32>,
    /// Assignments by label and expert.
    by_class: Array2<f64>,
    by_domain: Array2<f64>,
    /// The heaviest expert of each patch of the drawn images, by (domain, class).
    drawn: BTreeMap<(usize, usize), (usize, Vec<usize>)>,
}

/// Routes patches of up to [`EXAMPLES`] images of each class and domain, the first of `of`, with the model as in evaluation;
/// class tokens are not counted. Empty for a model without mixtures.
pub(super) fn route(
    place: &Place,
    model: &VitClassifier,
    set: &Set,
    of: &[usize],
) -> Result<Vec<PatchRouting>, BenchError> {
    if model.mixtures() == 0 {
        return Ok(Vec::new());
    }
    let mut chosen: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
    for &image in of {
        let key = (set.images.domain(image), set.images.class(image) as usize);
        let images = chosen.entry(key).or_default();
        if images.len() < EXAMPLES {
            images.push(image);
        }
    }
    let failed = |e| BenchError::failed("routing patches", e);
    let tokens = set.tokens;
    let (classes, domains) = (set.images.classes.len(), set.images.domains.len());
    let ids = |layer| model.mixture(layer).ids().iter().map(|id| id.0).collect();
    // Class tokens get a label of their own, the last, which is left out afterwards.
    let usage = |labels, layer| LabelUsage::new(labels + 1, model.mixture(layer).ids().len());
    let mut counts: Vec<_> = (0..model.mixtures())
        .map(|layer| {
            (
                usage(classes, layer),
                usage(domains, layer),
                BTreeMap::new(),
            )
        })
        .collect();
    for (&(domain, class), images) in &chosen {
        let input = set.plain(images)?;
        let (_, traces) = model
            .logits_at(place, set.batch(&input), None)
            .map_err(failed)?;
        let labels = |label, none| -> Vec<usize> {
            let of = |t| if t % tokens == 0 { none } else { label };
            (0..images.len() * tokens).map(of).collect()
        };
        for (trace, (by_class, by_domain, drawn)) in traces.iter().zip(&mut counts) {
            let failed = |e| BenchError::failed("counting patches", e);
            let plan = &trace.plan;
            let (c, d) = (labels(class, classes), labels(domain, domains));
            by_class.record(plan, &c).map_err(failed)?;
            by_domain.record(plan, &d).map_err(failed)?;
            let first = (1..tokens).map(|t| heaviest(plan, t)).collect();
            drawn.insert((domain, class), (images[0], first));
        }
    }
    let layers = counts.into_iter().enumerate();
    Ok(layers
        .map(|(layer, (by_class, by_domain, drawn))| PatchRouting {
            name: model.mixture_name(layer),
            experts: ids(layer),
            by_class: first_rows(&by_class, classes),
            by_domain: first_rows(&by_domain, domains),
            drawn,
        })
        .collect())
}

/// Counts without those of class tokens.
fn first_rows(usage: &LabelUsage, labels: usize) -> Array2<f64> {
    let counts = usage.contingency();
    counts.slice_axis(Axis(0), Slice::from(..labels)).to_owned()
}

/// The expert of a token with the largest weight, the first of equals; the number of experts if it has none.
fn heaviest(plan: &RoutingPlan, token: usize) -> usize {
    let offsets = plan.token_offsets();
    let own = &plan.token_assignments()[offsets[token] as usize..offsets[token + 1] as usize];
    let mut best: Option<(f32, usize)> = None;
    for &assignment in own {
        let weight = plan.weights()[assignment as usize];
        let expert = plan.expert_of(assignment as usize);
        if best.is_none_or(|(w, e)| weight > w || (weight == w && expert < e)) {
            best = Some((weight, expert));
        }
    }
    best.map_or(plan.num_experts(), |(_, expert)| expert)
}

impl PatchRouting {
    /// Normalised mutual information of expert and class, and of expert and domain; none where it is not defined.
    pub(super) fn information(&self) -> [Option<f64>; 2] {
        [&self.by_class, &self.by_domain].map(|c| normalized_mutual_information(c.view()).ok())
    }

    /// Counts by class and domain, for a file.
    fn counts(&self, set: &Set) -> Value {
        let rows = |names: &[String], counts: &Array2<f64>| {
            let rows = names.iter().zip(counts.outer_iter());
            let rows = rows.map(|(name, row)| (name.clone(), json!(row.to_vec())));
            Value::Object(rows.collect())
        };
        let [class, domain] = self.information();
        json!({
            "layer": self.name,
            "experts": self.experts,
            "assignments_by_class": rows(&set.images.classes, &self.by_class),
            "assignments_by_domain": rows(&set.images.domains, &self.by_domain),
            "nmi_class": class,
            "nmi_domain": domain,
        })
    }

    /// A row of pictures for each domain, two for each class: an image, and its patches in the colours of their experts. The
    /// squares below are the colours in the order of the experts.
    fn sheet(&self, set: &Set) -> RgbImage {
        let size = set.images.size;
        let (rows, columns) = (set.images.domains.len(), set.images.classes.len());
        let (width, height) = (
            GAP + columns * (2 * size + 2 * GAP),
            GAP + rows * (size + GAP) + size / 4 + GAP,
        );
        let mut sheet = RgbImage::from_pixel(width as u32, height as u32, image::Rgb([255; 3]));
        let colour = |expert: usize| COLOURS[expert % COLOURS.len()];
        for (&(domain, class), (image, experts)) in &self.drawn {
            let (left, top) = (
                GAP + class * (2 * size + 2 * GAP),
                GAP + domain * (size + GAP),
            );
            let pixels = set.images.pixels(*image);
            // As many patches a side as make up all of them: they are square.
            let side = experts.len().isqrt();
            for y in 0..size {
                for x in 0..size {
                    let at = 3 * (y * size + x);
                    let plain = [pixels[at], pixels[at + 1], pixels[at + 2]];
                    let patch = (y * side / size) * side + x * side / size;
                    let expert = experts[patch];
                    // A patch that no expert takes stays as it is.
                    let tinted = if expert < self.experts.len() {
                        let tint = colour(expert);
                        // Two thirds colour, so that experts are told apart on any image.
                        std::array::from_fn(|c| {
                            ((u16::from(plain[c]) + 2 * u16::from(tint[c])) / 3) as u8
                        })
                    } else {
                        plain
                    };
                    let (x, y) = ((left + x) as u32, (top + y) as u32);
                    sheet.put_pixel(x, y, image::Rgb(plain));
                    sheet.put_pixel(x + size as u32, y, image::Rgb(tinted));
                }
            }
        }
        let (square, top) = (size / 4, GAP + rows * (size + GAP));
        for expert in 0..self.experts.len() {
            let left = GAP + expert * (square + GAP);
            for y in top..top + square {
                for x in left..(left + square).min(width) {
                    sheet.put_pixel(x as u32, y as u32, image::Rgb(colour(expert)));
                }
            }
        }
        sheet
    }
}

/// Writes a picture for each layer and the counts of all of them, patches.json, to `dir`.
pub(super) fn write(layers: &[PatchRouting], set: &Set, dir: &Path) -> Result<(), BenchError> {
    let problem =
        |path: &Path, e: io::Error| BenchError::failed(format!("writing {}", path.display()), e);
    durable::create_dir_all(dir).map_err(|e| problem(dir, e))?;
    for layer in layers {
        let path = dir.join(format!("{}.png", layer.name));
        let sheet = layer.sheet(set);
        let picture = |file: &mut File| {
            let mut out = BufWriter::new(file);
            let written = sheet.write_to(&mut out, ImageFormat::Png);
            written.map_err(io::Error::other)?;
            out.flush()
        };
        durable::write(&path, picture).map_err(|e| problem(&path, e))?;
    }
    let path = dir.join("patches.json");
    let counts: Vec<Value> = layers.iter().map(|layer| layer.counts(set)).collect();
    let text = format!("{:#}\n", json!(counts));
    durable::write(&path, |file| file.write_all(text.as_bytes())).map_err(|e| problem(&path, e))
}
