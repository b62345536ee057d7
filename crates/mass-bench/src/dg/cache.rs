//! Large arrays on disk, beside what they were made from.
//!
//! A file is a magic number, the length of a JSON header, the header, the payload and a CRC-32 of header and payload.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use crc32fast::Hasher;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::durable;

const MAGIC: &[u8; 8] = b"MASSARR1";
/// A header is short; a longer one is damage.
const LONGEST_HEADER: u32 = 64 << 20;

/// Writes a file under a temporary name, syncs it and renames it, so that nobody ever sees a part of it.
pub(super) fn write(
    path: &Path,
    header: &impl Serialize,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    durable::create_dir_all(dir)?;
    durable::write(path, |file| {
        let header = serde_json::to_vec(header)?;
        let length = u32::try_from(header.len()).map_err(io::Error::other)?;
        let mut file = Summing::new(BufWriter::with_capacity(1 << 20, file));
        file.write_all(MAGIC)?;
        file.write_all(&length.to_le_bytes())?;
        file.write_all(&header)?;
        fill(&mut file)?;
        let (mut inner, sum) = (file.inner, file.sum.finalize());
        inner.write_all(&sum.to_le_bytes())?;
        inner.flush()
    })
}

/// Reads a file back: its header goes to `payload`, which says how many bytes follow, then `take` gets them.
///
/// `Ok(None)` if there is no file.
///
/// # Errors
/// Why it cannot be used, in words.
pub(super) fn read<H: DeserializeOwned, T>(
    path: &Path,
    payload: impl FnOnce(&H) -> Result<u64, String>,
    take: impl FnOnce(&mut dyn Read) -> io::Result<T>,
) -> Result<Option<(H, T)>, String> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    let size = file.metadata().map_err(|e| e.to_string())?.len();
    let mut file = Summing::new(BufReader::with_capacity(1 << 20, file));
    let mut start = [0; 12];
    file.read_exact(&mut start)
        .map_err(|_| "shorter than its beginning")?;
    let (magic, length) = start.split_at(8);
    if magic != MAGIC {
        return Err("not a file of this kind".into());
    }
    let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
    if length > LONGEST_HEADER || u64::from(length) > size {
        return Err("a damaged header".into());
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|e| e.to_string())?;
    let header: H = serde_json::from_slice(&header).map_err(|e| format!("its header: {e}"))?;
    let expected = (start.len() as u64 + u64::from(length))
        .checked_add(payload(&header)?)
        .and_then(|n| n.checked_add(4));
    if expected != Some(size) {
        return Err(format!("it has {size} bytes, not {expected:?}"));
    }
    let taken = take(&mut file).map_err(|e| e.to_string())?;
    let (mut inner, sum) = (file.inner, file.sum.finalize());
    let mut stored = [0; 4];
    inner.read_exact(&mut stored).map_err(|e| e.to_string())?;
    if u32::from_le_bytes(stored) != sum {
        return Err("its checksum is wrong".into());
    }
    Ok(Some((header, taken)))
}

/// Removes the files that differ from one in the last part of their name alone: `<name>-<16 hexadecimal digits>.<ending>`.
pub(super) fn remove_older(path: &Path) -> io::Result<()> {
    let parts = |path: &Path| {
        let stem = path.file_stem()?.to_str()?;
        let (name, digest) = stem.rsplit_once('-')?;
        let hexadecimal = digest.len() == 16 && digest.bytes().all(|b| b.is_ascii_hexdigit());
        hexadecimal.then(|| (name.to_owned(), path.extension().map(OsStr::to_owned)))
    };
    let (Some(dir), Some(own)) = (path.parent(), parts(path)) else {
        return Ok(());
    };
    for entry in fs::read_dir(dir)? {
        let other = entry?.path();
        if other != path && parts(&other).as_ref() == Some(&own) {
            fs::remove_file(&other)?;
        }
    }
    Ok(())
}

/// A reader or writer that sums what passes.
struct Summing<T> {
    inner: T,
    sum: Hasher,
}

impl<T> Summing<T> {
    fn new(inner: T) -> Self {
        Self {
            inner,
            sum: Hasher::new(),
        }
    }
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.sum.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Summing<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(bytes)?;
        self.sum.update(&bytes[..n]);
        Ok(n)
    }
}
