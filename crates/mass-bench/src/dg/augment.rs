//! DomainBed's augmentation, and the normalisation of pixels.
//!
//! In training, in this order: a random part of the image resized to the whole, a flip, changes of colour, grey. Every draw comes
//! from the generator that is given, so an augmented image is a function of the image and of that generator's state.
//!
//! Images come as squares of the size that the model takes. DomainBed takes the part from the image as it is on disk; here the part
//! has the same proportions on the image before it was made a square, but no more detail than the square has.

use ndarray_rand::rand::Rng;
use ndarray_rand::rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Means of the channels in ImageNet, of values in [0, 1].
pub const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviations of the channels in ImageNet.
pub const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Weights of red, green and blue in a grey value (ITU-R 601-2).
const LUMA: [f32; 3] = [0.299, 0.587, 0.114];

/// Bytes `[size, size, 3]` as normalised values `[3, size, size]`, added to `out`.
pub fn normalise(pixels: &[u8], out: &mut Vec<f32>) {
    for c in 0..3 {
        let channel = pixels.iter().skip(c).step_by(3);
        out.extend(channel.map(|&v| (f32::from(v) / 255.0 - MEAN[c]) / STD[c]));
    }
}

/// Ranges and chances of the augmentation. The default is DomainBed's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Augment {
    /// Least and largest part of the area that is kept.
    pub area: (f32, f32),
    /// Least and largest proportion of width to height of that part.
    pub aspect: (f32, f32),
    /// Chance of a horizontal flip.
    pub flip: f32,
    /// Half-width of the ranges of brightness, contrast and saturation (about 1) and of the hue (about 0, in turns).
    pub jitter: f32,
    /// Chance of grey.
    pub grey: f32,
}

impl Default for Augment {
    fn default() -> Self {
        Self {
            area: (0.7, 1.0),
            aspect: (3.0 / 4.0, 4.0 / 3.0),
            flip: 0.5,
            jitter: 0.3,
            grey: 0.1,
        }
    }
}

impl Augment {
    /// Bytes `[size, size, 3]` as augmented, normalised values `[3, size, size]`, added to `out`. `aspect` is the image's width by
    /// height before it was made a square. Of a size of 0 nothing is added.
    ///
    /// # Panics
    /// If there are fewer bytes.
    pub fn apply(
        &self,
        pixels: &[u8],
        size: usize,
        aspect: f32,
        rng: &mut ChaCha8Rng,
        out: &mut Vec<f32>,
    ) {
        if size == 0 {
            return;
        }
        let part = self.part(size, aspect, rng);
        let mut image = resized(pixels, size, part);
        if rng.random::<f32>() < self.flip {
            for row in image.chunks_exact_mut(size) {
                row.reverse();
            }
        }
        self.recolour(&mut image, rng);
        if rng.random::<f32>() < self.grey {
            for pixel in &mut image {
                *pixel = [grey(pixel); 3];
            }
        }
        for c in 0..3 {
            out.extend(image.iter().map(|pixel| (pixel[c] - MEAN[c]) / STD[c]));
        }
    }

    /// Left, top, width and height on the square of the part that is kept, as torchvision's `RandomResizedCrop` draws it.
    fn part(&self, size: usize, aspect: f32, rng: &mut ChaCha8Rng) -> [usize; 4] {
        let area = (size * size) as f32;
        for _ in 0..10 {
            let target = area * between(self.area, rng);
            let ratio = between((self.aspect.0.ln(), self.aspect.1.ln()), rng).exp() / aspect;
            let width = (target * ratio).sqrt().round() as usize;
            let height = (target / ratio).sqrt().round() as usize;
            if (1..=size).contains(&width) && (1..=size).contains(&height) {
                let left = rng.random_range(0..=size - width);
                let top = rng.random_range(0..=size - height);
                return [left, top, width, height];
            }
        }
        // The middle of an image that is too wide or too high for any such part.
        let side = |part: f32| ((size as f32 * part.min(1.0)).round() as usize).clamp(1, size);
        let (width, height) = (side(self.aspect.1 / aspect), side(aspect / self.aspect.0));
        [(size - width) / 2, (size - height) / 2, width, height]
    }

    /// Brightness, contrast, saturation and hue, in a random order.
    fn recolour(&self, image: &mut [[f32; 3]], rng: &mut ChaCha8Rng) {
        let mut order = [0, 1, 2, 3];
        order.shuffle(rng);
        let about_one = (1.0 - self.jitter, 1.0 + self.jitter);
        let factors = [(); 3].map(|()| between(about_one, rng));
        let hue = between((-self.jitter, self.jitter), rng);
        for which in order {
            match which {
                0 => image.iter_mut().for_each(|p| blend(p, 0.0, factors[0])),
                1 => {
                    let mean = image.iter().map(grey).sum::<f32>() / image.len() as f32;
                    image.iter_mut().for_each(|p| blend(p, mean, factors[1]));
                }
                2 => {
                    for pixel in image.iter_mut() {
                        let other = grey(pixel);
                        blend(pixel, other, factors[2]);
                    }
                }
                _ => image.iter_mut().for_each(|p| turn_hue(p, hue)),
            }
        }
    }
}

fn between((low, high): (f32, f32), rng: &mut ChaCha8Rng) -> f32 {
    low + (high - low) * rng.random::<f32>()
}

fn grey(pixel: &[f32; 3]) -> f32 {
    pixel.iter().zip(LUMA).map(|(v, w)| v * w).sum()
}

fn blend(pixel: &mut [f32; 3], other: f32, factor: f32) {
    for v in pixel {
        *v = (factor * *v + (1.0 - factor) * other).clamp(0.0, 1.0);
    }
}

/// Turns the hue by a part of the circle; value and saturation stay.
fn turn_hue(pixel: &mut [f32; 3], turn: f32) {
    let [r, g, b] = *pixel;
    let most = r.max(g).max(b);
    let range = most - r.min(g).min(b);
    if range <= 0.0 {
        return;
    }
    let sixth = if most == r {
        (g - b) / range
    } else if most == g {
        2.0 + (b - r) / range
    } else {
        4.0 + (r - g) / range
    };
    let hue = (sixth / 6.0 + turn).rem_euclid(1.0) * 6.0;
    // The distance of each channel's own sextant decides how much of the range it gets (the formula of HSV).
    *pixel = [5.0, 3.0, 1.0].map(|offset| {
        let k = (offset + hue) % 6.0;
        most - range * k.min(4.0 - k).clamp(0.0, 1.0)
    });
}

/// A part of an image at the size of the whole, by bilinear interpolation, values in [0, 1].
fn resized(pixels: &[u8], size: usize, [left, top, width, height]: [usize; 4]) -> Vec<[f32; 3]> {
    // Neighbours of each output place along an axis, and the weight of the second.
    let axis = |start: usize, extent: usize| -> Vec<(usize, usize, f32)> {
        let place = |i: usize| {
            let at = (i as f32 + 0.5) * extent as f32 / size as f32 - 0.5;
            let at = at.clamp(0.0, (extent - 1) as f32);
            let first = at as usize;
            let second = (first + 1).min(extent - 1);
            (start + first, start + second, at - first as f32)
        };
        (0..size).map(place).collect()
    };
    let (columns, rows) = (axis(left, width), axis(top, height));
    let mut image = Vec::with_capacity(size * size);
    for &(y0, y1, v) in &rows {
        for &(x0, x1, h) in &columns {
            let at = |y: usize, x: usize, c: usize| f32::from(pixels[(y * size + x) * 3 + c]);
            image.push([0, 1, 2].map(|c| {
                let above = at(y0, x0, c) * (1.0 - h) + at(y0, x1, c) * h;
                let below = at(y1, x0, c) * (1.0 - h) + at(y1, x1, c) * h;
                (above * (1.0 - v) + below * v) / 255.0
            }));
        }
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: [f32; 3], b: [f32; 3]) {
        assert!(
            a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6),
            "{a:?} {b:?}"
        );
    }

    #[test]
    fn parts_have_their_proportions_on_the_image_as_it_was() {
        let augment = Augment::default();
        let mut rng = ndarray_rand::rand::SeedableRng::seed_from_u64(3);
        for aspect in [0.6, 1.0, 1.5] {
            let (mut least, mut most) = (f32::INFINITY, 0.0f32);
            for _ in 0..500 {
                let [left, top, width, height] = augment.part(1000, aspect, &mut rng);
                assert!(left + width <= 1000 && top + height <= 1000);
                let ratio = width as f32 / height as f32 * aspect;
                let area = (width * height) as f32 / 1e6;
                assert!((0.7 - 2e-3..=1.0).contains(&area), "{area}");
                (least, most) = (least.min(ratio), most.max(ratio));
            }
            assert!(least > 0.748 && most < 1.336, "{least} to {most}");
            // The whole of the range, as far as the image has room for it.
            assert!(most - least > 0.08, "{least} to {most}");
        }
        // Four times as wide as high: no part of 7 tenths has such proportions, so it is the middle, 4 by 3.
        assert_eq!(augment.part(900, 4.0, &mut rng), [300, 0, 300, 900]);
        assert_eq!(augment.part(900, 0.25, &mut rng), [0, 300, 900, 300]);
    }

    #[test]
    fn hues_turn_by_thirds_of_the_circle() {
        let mut pixel = [0.9, 0.2, 0.4];
        turn_hue(&mut pixel, 1.0 / 3.0);
        close(pixel, [0.4, 0.9, 0.2]);
        turn_hue(&mut pixel, -2.0 / 3.0);
        close(pixel, [0.2, 0.4, 0.9]);
        turn_hue(&mut pixel, 0.0);
        close(pixel, [0.2, 0.4, 0.9]);
        let mut grey = [0.5; 3];
        turn_hue(&mut grey, 0.25);
        assert_eq!(grey, [0.5; 3]);
    }

    #[test]
    fn blends_meet_torchvisions_definitions() {
        let mut pixel = [0.5, 0.2, 0.8];
        blend(&mut pixel, 0.0, 1.2);
        close(pixel, [0.6, 0.24, 0.96]);
        let other = grey(&pixel);
        blend(&mut pixel, other, 0.0);
        close(pixel, [0.6 * 0.299 + 0.24 * 0.587 + 0.96 * 0.114; 3]);
    }

    #[test]
    fn the_whole_image_resized_to_itself_is_itself() {
        let pixels: Vec<u8> = (0..5 * 5 * 3).map(|i| (i * 37 % 251) as u8).collect();
        let image = resized(&pixels, 5, [0, 0, 5, 5]);
        for (pixel, bytes) in image.iter().zip(pixels.chunks(3)) {
            close(*pixel, [0, 1, 2].map(|c| f32::from(bytes[c]) / 255.0));
        }
        // One column of two pixels fills a row by interpolation between them.
        let image = resized(
            &[0, 0, 0, 200, 200, 200, 0, 0, 0, 200, 200, 200],
            2,
            [0, 0, 2, 1],
        );
        close(image[1], [200.0 / 255.0; 3]);
        close(image[3], [200.0 / 255.0; 3]);
    }
}
