//! One image file as pixels.
//!
//! The format is recognised by the first bytes, not by the name: a PNG called `.jpg` is read as what it is. Grey images have their
//! value in all three channels, CMYK is converted, transparency is dropped, and an orientation in the metadata is not applied: as
//! torchvision's `Image.open(path).convert("RGB")`, but for grey values of 16 bits, which are scaled to 8 where Pillow clips them.
//!
//! Decoders of JPEG fill in what is missing at the end of a file and report nothing; so whether a JPEG has its end is checked here.
//! Damage within the compressed data of a JPEG that leaves a decodable stream cannot be told from a picture.

use std::io::Cursor;
use std::path::Path;

use image::imageops::{self, FilterType};
use image::{ImageFormat, ImageReader, Limits, RgbImage};

use super::DgError;
use crate::text::regular;

/// Images wider or higher than this are refused, before their pixels take any memory.
pub const LARGEST_SIDE: u32 = 20_000;

/// Squares larger than this are not made.
pub const LARGEST_SQUARE: u32 = 4096;

/// An image that was made a square.
#[derive(Debug, Clone, PartialEq)]
pub struct Square {
    /// Red, green, blue, row by row; `3 * size * size` values.
    pub pixels: Vec<u8>,
    /// Width by height before.
    pub aspect: f32,
}

/// A file as `size` x `size` pixels.
///
/// Other proportions are not kept, as in DomainBed's `Resize((224, 224))`. The filter is a triangle as wide as the
/// reduction (bilinear with antialiasing).
///
/// # Errors
/// [`DgError::Size`] for no pixels or more than [`LARGEST_SQUARE`] a side, [`DgError::Io`] for a file that cannot be read,
/// [`DgError::Image`] for one that is no whole image.
pub fn read_square(path: &Path, size: usize) -> Result<Square, DgError> {
    let side = check_size(size)?;
    let bytes = regular(path).map_err(DgError::io(path))?;
    let refuse = |problem: String| DgError::Image {
        path: path.to_owned(),
        problem,
    };
    let image = rgb(&bytes).map_err(refuse)?;
    let (width, height) = image.dimensions();
    let square = match (width, height) == (side, side) {
        true => image,
        false => imageops::resize(&image, side, side, FilterType::Triangle),
    };
    Ok(Square {
        pixels: square.into_raw(),
        aspect: width as f32 / height as f32,
    })
}

/// The side of a square that can be made.
pub(super) fn check_size(size: usize) -> Result<u32, DgError> {
    let side = u32::try_from(size).ok();
    let side = side.filter(|side| (1..=LARGEST_SQUARE).contains(side));
    side.ok_or(DgError::Size(size))
}

/// The pixels of an image in any of the known formats; what is wrong with the bytes otherwise.
///
/// # Errors
/// What is wrong, in words: no known format, a side of zero or larger than [`LARGEST_SIDE`], a truncated or damaged file.
pub fn rgb(bytes: &[u8]) -> Result<RgbImage, String> {
    let format = format(bytes)?;
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    if format == ImageFormat::Jpeg {
        whole_jpeg(bytes)?;
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(LARGEST_SIDE);
    limits.max_image_height = Some(LARGEST_SIDE);
    reader.limits(limits);
    let image = reader.decode().map_err(|e| e.to_string())?.to_rgb8();
    if image.width() == 0 || image.height() == 0 {
        return Err("an image without pixels".into());
    }
    Ok(image)
}

/// The format that a file has by its first bytes, of those that are read.
pub(crate) fn format(start: &[u8]) -> Result<ImageFormat, String> {
    use ImageFormat::{Bmp, Jpeg, Png, WebP};
    match image::guess_format(start) {
        _ if start.is_empty() => Err("the file is empty".into()),
        Ok(format @ (Jpeg | Png | Bmp | WebP)) => Ok(format),
        _ => Err("neither JPEG, PNG, BMP nor WebP by its first bytes".into()),
    }
}

/// Whether a JPEG goes on to its end-of-image marker.
///
/// Segments are followed by their lengths, so that a thumbnail's end in the metadata is not taken for the picture's.
fn whole_jpeg(bytes: &[u8]) -> Result<(), String> {
    let cut = || Err("a truncated JPEG: it has no end-of-image marker".to_owned());
    let mut at = 2;
    loop {
        // In a segment's place a marker must come; within compressed data anything else may.
        let Some(found) = bytes[at.min(bytes.len())..].iter().position(|&b| b == 0xff) else {
            return cut();
        };
        at += found + 1;
        match bytes.get(at) {
            None => return cut(),
            // Stuffing after a data byte of 0xff, fill bytes, and markers that stand alone.
            Some(0x00 | 0x01 | 0xd0..=0xd8) => at += 1,
            Some(0xff) => {}
            Some(0xd9) => return Ok(()),
            Some(_) => match bytes.get(at + 1..at + 3) {
                Some(length) => at += 1 + usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return cut(),
            },
        }
    }
}
