//! Which images there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::DgError;
use crate::fnv::Fnv;

/// Endings of the files that are taken for images; what they are is read from their content.
pub const EXTENSIONS: [&str; 5] = ["jpg", "jpeg", "png", "bmp", "webp"];

/// A file that should be an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// Where it is.
    pub path: PathBuf,
    /// Index of its domain.
    pub domain: usize,
    /// Index of its class.
    pub class: u32,
}

/// The files of a directory `<domain>/<class>/<image>`, every list in the order of names. Images in folders below a class are
/// of that class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFolder {
    /// Its root.
    pub root: PathBuf,
    /// Names of the domains.
    pub domains: Vec<String>,
    /// Names of the classes, the same in every domain.
    pub classes: Vec<String>,
    /// The images, domain by domain and within it class by class.
    pub files: Vec<ImageFile>,
    /// What is no image by its name, or in a place where none belongs.
    pub passed_over: Vec<PathBuf>,
    /// Of names, lengths and times of change of the files: another listing has another.
    pub digest: u64,
}

impl ImageFolder {
    /// Lists a directory.
    ///
    /// # Errors
    /// [`DgError::Io`] for what cannot be listed; [`DgError::Layout`] if there are fewer than two domains, a class is missing in
    /// one of them or has no image there, or a name is not Unicode.
    pub fn open(root: &Path) -> Result<Self, DgError> {
        let mut passed_over = Vec::new();
        let mut digest = Fnv::default();
        let domains = directories(root, &mut passed_over)?;
        if domains.len() < 2 {
            let found = domains.len();
            return Err(DgError::layout(
                root,
                format!("{found} domain(s); at least two are needed"),
            ));
        }
        let mut by_domain = Vec::new();
        let mut classes = BTreeSet::new();
        for domain in &domains {
            let found = directories(&root.join(domain), &mut passed_over)?;
            classes.extend(found.iter().cloned());
            by_domain.push(found);
        }
        let classes: Vec<String> = classes.into_iter().collect();
        if classes.is_empty() {
            return Err(DgError::layout(root, "its domains have no classes"));
        }
        let mut files = Vec::new();
        for (d, (domain, found)) in domains.iter().zip(&by_domain).enumerate() {
            for (class, name) in classes.iter().enumerate() {
                let dir = root.join(domain).join(name);
                if !found.contains(name) {
                    let problem = format!("domain {domain} has no class {name}, which another has");
                    return Err(DgError::layout(&dir, problem));
                }
                let before = files.len();
                for path in images(&dir, &mut passed_over)? {
                    // A link to nothing is an image that cannot be read: the reader's affair.
                    let metadata = fs::metadata(&path).ok();
                    let length = metadata.as_ref().map_or(0, fs::Metadata::len);
                    let modified = metadata.and_then(|m| m.modified().ok());
                    let since = modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok());
                    let relative = path.strip_prefix(root).unwrap_or(&path);
                    digest.eat(relative.as_os_str().as_encoded_bytes());
                    digest.eat(&[0]);
                    digest.eat(&length.to_le_bytes());
                    digest.eat(&since.map_or(0, |t| t.as_nanos()).to_le_bytes());
                    files.push(ImageFile {
                        path,
                        domain: d,
                        class: class as u32,
                    });
                }
                if files.len() == before {
                    let endings = EXTENSIONS.join(", ");
                    return Err(DgError::layout(&dir, format!("no image ({endings})")));
                }
            }
        }
        Ok(Self {
            root: root.to_owned(),
            domains,
            classes,
            files,
            passed_over,
            digest: digest.0,
        })
    }
}

/// Where a set lies in a directory of data: under its name, or under that in capitals, as DomainBed's downloader writes PACS and
/// VLCS. `None` if neither is there.
#[must_use]
pub fn find_set(data: &Path, name: &str) -> Option<PathBuf> {
    let dirs = [data.join(name), data.join(name.to_uppercase())];
    dirs.into_iter().find(|dir| dir.is_dir())
}

/// Entries of a directory in the order of their names.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, DgError> {
    let mut paths = fs::read_dir(dir)
        .and_then(|entries| {
            entries
                .map(|e| Ok(e?.path()))
                .collect::<Result<Vec<_>, _>>()
        })
        .map_err(DgError::io(dir))?;
    paths.sort();
    Ok(paths)
}

/// Names of the directories in a directory, but for hidden ones.
fn directories(dir: &Path, passed_over: &mut Vec<PathBuf>) -> Result<Vec<String>, DgError> {
    let mut names = Vec::new();
    for path in entries(dir)? {
        let name = path.file_name().unwrap_or_default();
        let Some(name) = name.to_str() else {
            return Err(DgError::layout(&path, "its name is not Unicode"));
        };
        if path.is_dir() && !name.starts_with('.') {
            names.push(name.to_owned());
        } else {
            passed_over.push(path);
        }
    }
    Ok(names)
}

/// Images, by their names, in a directory and in those below it, but for hidden ones, in the order of torchvision's
/// `ImageFolder`: directory by directory in the order of their paths as text, and in each by name.
pub(crate) fn images(dir: &Path, passed_over: &mut Vec<PathBuf>) -> Result<Vec<PathBuf>, DgError> {
    let mut found = Vec::new();
    walk(dir, &mut Vec::new(), &mut found, passed_over)?;
    found.sort_by(|(a, _), (b, _)| a.as_os_str().cmp(b.as_os_str()));
    Ok(found.into_iter().flat_map(|(_, images)| images).collect())
}

/// Lists a directory and those below it, each with its images; `above` holds the directories on the way to it.
fn walk(
    dir: &Path,
    above: &mut Vec<PathBuf>,
    found: &mut Vec<(PathBuf, Vec<PathBuf>)>,
    passed_over: &mut Vec<PathBuf>,
) -> Result<(), DgError> {
    // Links are followed, as torchvision does; one that leads back would be followed for ever.
    let place = fs::canonicalize(dir).map_err(DgError::io(dir))?;
    if above.contains(&place) {
        passed_over.push(dir.to_owned());
        return Ok(());
    }
    above.push(place);
    let mut images = Vec::new();
    for path in entries(dir)? {
        let name = path.file_name().unwrap_or_default();
        if name.as_encoded_bytes().starts_with(b".") {
            passed_over.push(path);
        } else if path.is_dir() {
            walk(&path, above, found, passed_over)?;
        } else if is_image(&path) {
            images.push(path);
        } else {
            passed_over.push(path);
        }
    }
    found.push((dir.to_owned(), images));
    above.pop();
    Ok(())
}

/// Whether a file is one by its name.
fn is_image(path: &Path) -> bool {
    let ending = path.extension().and_then(|e| e.to_str());
    let ending = ending.unwrap_or_default().to_ascii_lowercase();
    EXTENSIONS.contains(&ending.as_str())
}
