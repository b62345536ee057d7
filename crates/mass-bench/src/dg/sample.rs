//! A small generated set: bars, discs, crosses and rings on four kinds of ground, for checks that need no data.
//!
//! A domain decides colours, contrast and texture; a class decides the shape, whose place and extent are drawn.

use ndarray_rand::rand::Rng;

use super::images::{DomainImages, Source};
use crate::rng::{Purpose, stream};

/// Names of the domains.
pub const DOMAINS: [&str; 4] = ["bright", "dark", "noisy", "striped"];
/// Names of the classes.
pub const CLASSES: [&str; 4] = ["bar", "cross", "disc", "ring"];

/// The set, with `per_class` images of each class in each domain, `size` x `size` pixels. The same on every machine.
#[must_use]
pub fn images(size: usize, per_class: usize) -> DomainImages {
    let (mut domain, mut class, mut pixels) = (Vec::new(), Vec::new(), Vec::new());
    for d in 0..DOMAINS.len() {
        for c in 0..CLASSES.len() {
            for i in 0..per_class {
                let index = ((d * CLASSES.len() + c) * per_class + i) as u64;
                draw(d, c, size, index, &mut pixels);
                domain.push(d);
                class.push(c as u32);
            }
        }
    }
    DomainImages {
        domains: DOMAINS.map(str::to_owned).to_vec(),
        classes: CLASSES.map(str::to_owned).to_vec(),
        size,
        left_out: Vec::new(),
        passed_over: 0,
        source: Source::Generated,
        domain,
        aspects: vec![1.0; class.len()],
        class,
        pixels,
    }
}

fn draw(domain: usize, class: usize, size: usize, index: u64, pixels: &mut Vec<u8>) {
    let mut rng = stream(0, Purpose::Training, index);
    let side = size as f32;
    let mut near = |middle: f32, width: f32| middle + width * (rng.random::<f32>() - 0.5);
    let (x0, y0) = (near(side / 2.0, side / 5.0), near(side / 2.0, side / 5.0));
    let radius = near(side / 3.2, side / 8.0);
    let inside = |x: f32, y: f32| {
        let (dx, dy) = ((x - x0).abs(), (y - y0).abs());
        let distance = dx.hypot(dy);
        let thin = radius / 3.0;
        match class {
            0 => dx < thin && dy < radius,
            1 => (dx < thin && dy < radius) || (dy < thin && dx < radius),
            2 => distance < radius,
            _ => distance < radius && distance > radius - thin,
        }
    };
    let (ground, shape) = match domain {
        0 => ([230.0, 225.0, 200.0], [40.0, 60.0, 160.0]),
        1 => ([20.0, 25.0, 40.0], [150.0, 90.0, 70.0]),
        2 => ([120.0, 120.0, 120.0], [220.0, 220.0, 220.0]),
        _ => ([160.0, 190.0, 160.0], [30.0, 40.0, 30.0]),
    };
    let noise = if domain == 2 { 70.0 } else { 15.0 };
    for y in 0..size {
        for x in 0..size {
            let colour = if inside(x as f32, y as f32) {
                shape
            } else {
                ground
            };
            let stripe = if domain == 3 && x % 4 < 2 { 25.0 } else { 0.0 };
            for value in colour {
                let v = value + stripe + noise * (rng.random::<f32>() - 0.5);
                pixels.push(v.clamp(0.0, 255.0) as u8);
            }
        }
    }
}
