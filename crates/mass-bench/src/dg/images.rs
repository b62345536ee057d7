//! A whole set of images at one size.

use std::io::Read;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::folder::ImageFolder;
use super::{DgError, cache, decode};
use crate::fnv::Fnv;

/// What to do with files that are no whole images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BadImages {
    /// End, naming all of them in the order of names.
    #[default]
    Refuse,
    /// Go on without them; [`DomainImages::left_out`] lists them.
    LeaveOut,
}

/// An image that is not part of the set, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: String,
}

/// Where the pixels of a set came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// They were generated.
    Generated,
    /// Every file was decoded.
    Decoded,
    /// The file of an earlier reading.
    Cache,
    /// Every file was decoded, since the file of an earlier reading was damaged as told here. It is replaced.
    Repaired(String),
}

/// Images of several domains, `size` x `size` pixels each.
#[derive(Debug, Clone, PartialEq)]
pub struct DomainImages {
    /// Names of the domains.
    pub domains: Vec<String>,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Side of an image in pixels.
    pub size: usize,
    /// Files that are no whole images, if they may be left out.
    pub left_out: Vec<LeftOut>,
    /// Number of files that are no images by their names.
    pub passed_over: usize,
    /// Where the pixels came from.
    pub source: Source,
    pub(super) domain: Vec<usize>,
    pub(super) class: Vec<u32>,
    /// Of each image before it was made a square, width by height.
    pub(super) aspects: Vec<f32>,
    pub(super) pixels: Vec<u8>,
}

/// Files decoded between two reports of progress.
pub(crate) const PIECE: usize = 256;

/// What the file of decoded pixels begins with.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    size: usize,
    digest: u64,
    files: usize,
    left_out: Vec<(usize, String)>,
    aspects: Vec<f32>,
}

impl Header {
    fn bytes(&self) -> Option<u64> {
        let kept = self.files.checked_sub(self.left_out.len())?;
        let bytes = self.size.checked_mul(self.size)?.checked_mul(3)?;
        bytes.checked_mul(kept)?.try_into().ok()
    }
}

/// Files by their numbers, with what is wrong with them.
fn problems(folder: &ImageFolder, files: &[(usize, String)]) -> Vec<LeftOut> {
    let named = files.iter().map(|(index, problem)| LeftOut {
        path: folder.files[*index].path.clone(),
        problem: problem.clone(),
    });
    named.collect()
}

fn refuse(folder: &ImageFolder, files: &[(usize, String)]) -> Result<(), DgError> {
    DgError::of_images(problems(folder, files)).map_or(Ok(()), Err)
}

impl DomainImages {
    /// Reads a set laid out as `<domain>/<class>/<image>`, on all threads.
    ///
    /// With `cache` the decoded pixels are kept there, in a file named after the set, the size and a digest of the listing
    /// (names, lengths and times of change), and read back from it next time, checked against a CRC-32. A new file replaces
    /// those of the same set and size with another listing. None is kept while a file could not be read at all.
    ///
    /// # Errors
    /// As [`ImageFolder::open`]; [`DgError::Size`] for no pixels or more than [`LARGEST_SQUARE`](decode::LARGEST_SQUARE) a side;
    /// [`DgError::Image`] or [`DgError::Io`] naming the file that is no whole image, or [`DgError::Images`] naming all of several,
    /// unless those are left out; [`DgError::Layout`] for a class folder of which none is left; [`DgError::Cache`] for a cache that
    /// cannot be written.
    pub fn read(
        root: &Path,
        size: usize,
        bad: BadImages,
        cache: Option<&Path>,
    ) -> Result<Self, DgError> {
        Self::read_with(root, size, bad, cache, &mut |_, _| true)
    }

    /// As [`read`](Self::read). While files are decoded `progress` is told how many are done and how many there are, and returns
    /// whether to go on.
    ///
    /// # Errors
    /// As [`read`](Self::read), and [`DgError::Stopped`] when told to stop.
    pub fn read_with(
        root: &Path,
        size: usize,
        bad: BadImages,
        cache: Option<&Path>,
        progress: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Self, DgError> {
        decode::check_size(size)?;
        let folder = ImageFolder::open(root)?;
        let name = root.file_name().unwrap_or_default().to_string_lossy();
        let stored = cache.map(|dir| dir.join(format!("{name}-{size}-{:016x}.rgb", folder.digest)));
        let mut source = Source::Decoded;
        if let Some(path) = &stored {
            match Self::stored(path, size, &folder) {
                Ok(Some((header, pixels))) => {
                    return Self::assemble(&folder, header, pixels, bad, Source::Cache);
                }
                Ok(None) => {}
                Err(problem) => {
                    source = Source::Repaired(format!("{}: {problem}", path.display()));
                }
            }
        }
        let (header, pixels, all_read) = Self::decode(&folder, size, bad, progress)?;
        // A file that could not be read may be readable next time, and the listing would not tell.
        if let Some(path) = stored.filter(|_| all_read) {
            let path = &path;
            let fill = |file: &mut dyn std::io::Write| file.write_all(&pixels);
            cache::write(path, &header, fill).map_err(DgError::cache(path))?;
            cache::remove_older(path).map_err(DgError::cache(path))?;
        }
        Self::assemble(&folder, header, pixels, bad, source)
    }

    fn stored(
        path: &Path,
        size: usize,
        folder: &ImageFolder,
    ) -> Result<Option<(Header, Vec<u8>)>, String> {
        let files = folder.files.len();
        let fits = |h: &Header| {
            let order = h.left_out.windows(2).all(|w| w[0].0 < w[1].0);
            let inside = h.left_out.last().is_none_or(|l| l.0 < files);
            let same = (h.size, h.digest, h.files) == (size, folder.digest, files)
                && h.aspects.len() + h.left_out.len() == files;
            let bytes = h.bytes().filter(|_| same && order && inside);
            bytes.ok_or_else(|| "it is of other images".to_owned())
        };
        // How many bytes there are is known once the header has been read.
        let bytes = std::cell::Cell::new(0);
        cache::read(
            path,
            |h: &Header| fits(h).inspect(|&n| bytes.set(n)),
            |file| {
                let mut pixels = Vec::with_capacity(bytes.get() as usize);
                file.take(bytes.get()).read_to_end(&mut pixels)?;
                Ok(pixels)
            },
        )
    }

    fn decode(
        folder: &ImageFolder,
        size: usize,
        bad: BadImages,
        progress: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<(Header, Vec<u8>, bool), DgError> {
        let files = &folder.files;
        let mut all_read = true;
        let mut pixels = Vec::with_capacity(files.len() * size * size * 3);
        let (mut left_out, mut aspects) = (Vec::new(), Vec::with_capacity(files.len()));
        let mut unreadable = None;
        for (piece, some) in files.chunks(PIECE).enumerate() {
            let decoded: Vec<_> = some
                .par_iter()
                .map(|file| decode::read_square(&file.path, size))
                .collect();
            for (i, image) in decoded.into_iter().enumerate() {
                let index = piece * PIECE + i;
                match image {
                    Ok(image) => {
                        pixels.extend(image.pixels);
                        aspects.push(image.aspect);
                    }
                    Err(DgError::Image { problem, .. }) => left_out.push((index, problem)),
                    Err(DgError::Io { path, source }) => {
                        left_out.push((index, source.to_string()));
                        all_read = false;
                        unreadable = Some(DgError::Io { path, source });
                    }
                    Err(e) => return Err(e),
                }
            }
            if !progress(piece * PIECE + some.len(), files.len()) {
                return Err(DgError::Stopped);
            }
        }
        if bad == BadImages::Refuse {
            if let (Some(error), 1) = (unreadable, left_out.len()) {
                return Err(error);
            }
            refuse(folder, &left_out)?;
        }
        let header = Header {
            size,
            digest: folder.digest,
            files: folder.files.len(),
            left_out,
            aspects,
        };
        Ok((header, pixels, all_read))
    }

    fn assemble(
        folder: &ImageFolder,
        header: Header,
        pixels: Vec<u8>,
        bad: BadImages,
        source: Source,
    ) -> Result<Self, DgError> {
        if bad == BadImages::Refuse {
            refuse(folder, &header.left_out)?;
        }
        let mut kept: Vec<_> = folder.files.iter().map(Some).collect();
        let left_out = problems(folder, &header.left_out);
        for (index, _) in header.left_out {
            kept[index] = None;
        }
        let kept: Vec<_> = kept.into_iter().flatten().collect();
        for (d, domain) in folder.domains.iter().enumerate() {
            for (c, class) in folder.classes.iter().enumerate() {
                if !kept.iter().any(|f| f.domain == d && f.class as usize == c) {
                    let problem = "none of its files is a whole image";
                    let dir = folder.root.join(domain).join(class);
                    return Err(DgError::layout(&dir, problem));
                }
            }
        }
        Ok(Self {
            domains: folder.domains.clone(),
            classes: folder.classes.clone(),
            size: header.size,
            left_out,
            passed_over: folder.passed_over.len(),
            source,
            domain: kept.iter().map(|f| f.domain).collect(),
            class: kept.iter().map(|f| f.class).collect(),
            aspects: header.aspects,
            pixels,
        })
    }

    /// A digest of all there is to learn from: size, names of domains and classes, and each image's domain, class, aspect and
    /// pixels. The same files have the same, wherever they lie and whenever they were written.
    ///
    /// It is computed from every pixel, about a second for a gigabyte.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let of_image = |image: usize| {
            let mut digest = Fnv::default();
            digest.eat(&(self.domain[image] as u64).to_le_bytes());
            digest.eat(&self.class[image].to_le_bytes());
            digest.eat(&self.aspects[image].to_le_bytes());
            digest.eat(self.pixels(image));
            digest.0
        };
        let images: Vec<u64> = (0..self.len()).into_par_iter().map(of_image).collect();
        let mut digest = Fnv::default();
        digest.eat(&(self.size as u64).to_le_bytes());
        for names in [&self.domains, &self.classes] {
            digest.eat(&(names.len() as u64).to_le_bytes());
            for name in names {
                digest.eat(&(name.len() as u64).to_le_bytes());
                digest.eat(name.as_bytes());
            }
        }
        images.iter().for_each(|i| digest.eat(&i.to_le_bytes()));
        digest.0
    }

    /// Number of images.
    #[must_use]
    pub fn len(&self) -> usize {
        self.class.len()
    }

    /// Whether there is none; a set that was read has at least one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.class.is_empty()
    }

    /// Index of the class of an image.
    #[must_use]
    pub fn class(&self, image: usize) -> u32 {
        self.class[image]
    }

    /// Index of the domain of an image.
    #[must_use]
    pub fn domain(&self, image: usize) -> usize {
        self.domain[image]
    }

    /// Width by height of an image before it was made a square.
    #[must_use]
    pub fn aspect(&self, image: usize) -> f32 {
        self.aspects[image]
    }

    /// Pixels of an image, `[size, size, 3]`, red, green, blue.
    #[must_use]
    pub fn pixels(&self, image: usize) -> &[u8] {
        let bytes = self.size * self.size * 3;
        &self.pixels[image * bytes..][..bytes]
    }

    /// The images of a domain, in order.
    #[must_use]
    pub fn of_domain(&self, domain: usize) -> Vec<usize> {
        (0..self.len())
            .filter(|&i| self.domain[i] == domain)
            .collect()
    }
}
