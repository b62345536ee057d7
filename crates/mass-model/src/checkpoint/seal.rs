//! The list of checksums: a line a file, then a line for the list itself.
//!
//! ```text
//! 5d0c6b4e 18432 model.safetensors
//! 1f9a2b77 36512 optimizer.safetensors
//! c2d4e6f8 2210 state.json
//! 7a6b5c4d 108 checksums
//! ```
//!
//! CRC-32 finds every flipped bit and every burst of up to 32 of them. It guards against accidents, not against someone who
//! means harm and computes the sums anew.

use std::fmt::Write;
use std::path::Path;

use super::{SEALS, broken};
use crate::error::CheckpointError;
use crate::error::ModelError;

/// Length and checksum of the files of a checkpoint.
#[derive(Debug, Default)]
pub(super) struct Seals(Vec<Seal>);

#[derive(Debug)]
struct Seal {
    name: String,
    crc: u32,
    len: u64,
}

impl Seals {
    pub(super) fn add(&mut self, name: &str, bytes: &[u8]) {
        self.0.push(Seal {
            name: name.to_owned(),
            crc: crc32fast::hash(bytes),
            len: bytes.len() as u64,
        });
    }

    pub(super) fn render(&self) -> String {
        let mut text = String::new();
        for Seal { name, crc, len } in &self.0 {
            writeln!(text, "{crc:08x} {len} {name}").expect("a string can be written to");
        }
        let (crc, len) = (crc32fast::hash(text.as_bytes()), text.len());
        writeln!(text, "{crc:08x} {len} {SEALS}").expect("a string can be written to");
        text
    }

    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ModelError> {
        let read = || {
            let mut seals = Vec::new();
            for line in std::str::from_utf8(bytes).ok()?.lines() {
                let mut parts = line.splitn(3, ' ');
                seals.push(Seal {
                    crc: u32::from_str_radix(parts.next()?, 16).ok()?,
                    len: parts.next()?.parse().ok()?,
                    name: parts.next()?.to_owned(),
                });
            }
            seals.pop()?;
            Some(Self(seals))
        };
        // Written anew it has to be the same to the byte, last line included.
        read()
            .filter(|seals| seals.render().as_bytes() == bytes)
            .ok_or_else(|| broken(path, CheckpointError::Seals))
    }

    /// Refuses a file that is not as it was written.
    pub(super) fn verify(&self, path: &Path, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
        let Some(seal) = self.0.iter().find(|s| s.name == name) else {
            return Err(broken(path, CheckpointError::Absent));
        };
        let actual = bytes.len() as u64;
        if actual != seal.len {
            let expected = seal.len;
            return Err(broken(path, CheckpointError::Length { expected, actual }));
        }
        let (expected, actual) = (seal.crc, crc32fast::hash(bytes));
        if actual != expected {
            return Err(broken(path, CheckpointError::Checksum { expected, actual }));
        }
        Ok(())
    }
}
