//! Random damage to valid files, the same for the same seed; shared by all fuzz tests.

use ndarray_rand::rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Numbers that readers stumble over.
const NUMBERS: [&str; 12] = [
    "0",
    "1",
    "-1",
    "3",
    "255",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e308",
    "-0.0",
    "null",
];

/// Bytes that mean something to JSON.
const SYNTAX: &[u8] = b"\"{}[],:0189-.eE\\ \0\xff";

/// Changes one thing in a file: a bit, a byte, a number, a piece, its length. Pieces come from `files`.
pub(crate) fn damage(bytes: &mut Vec<u8>, files: &[&[u8]], rng: &mut ChaCha8Rng) {
    if bytes.is_empty() {
        bytes.push(rng.random());
        return;
    }
    // The header of a tensor file, and all of the others, is where a change matters most.
    let header = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
    let end = match header.and_then(|n| usize::try_from(n).ok()?.checked_add(8)) {
        Some(end) if end < bytes.len() && rng.random_range(0..8) > 0 => end,
        _ => bytes.len(),
    };
    let at = rng.random_range(0..end);
    match rng.random_range(0..10) {
        0 | 1 => bytes[at] ^= 1 << rng.random_range(0..8),
        2 => bytes[at] = SYNTAX[rng.random_range(0..SYNTAX.len())],
        3 => bytes.truncate(at),
        4 => bytes.insert(at, SYNTAX[rng.random_range(0..SYNTAX.len())]),
        5 => {
            let to = (at + rng.random_range(1..32)).min(bytes.len());
            bytes.drain(at..to);
        }
        6 => {
            // A piece of this or another file.
            let other = files[rng.random_range(0..files.len())];
            let from = rng.random_range(0..=other.len());
            let to = (from + rng.random_range(1..64)).min(other.len());
            let replaced = at..(at + rng.random_range(0..64)).min(bytes.len());
            bytes.splice(replaced, other[from..to].iter().copied());
        }
        7 => {
            // The length of the header.
            let length = match rng.random_range(0..4) {
                0 => rng.random::<u64>(),
                1 => bytes.len() as u64,
                2 => u64::MAX >> rng.random_range(0..64),
                _ => header
                    .unwrap_or(0)
                    .wrapping_add(rng.random_range(0..9))
                    .wrapping_sub(4),
            };
            for (b, new) in bytes.iter_mut().zip(length.to_le_bytes()) {
                *b = new;
            }
        }
        _ => replace_number(bytes, at, rng),
    }
}

/// Replaces the next run of digits.
fn replace_number(bytes: &mut Vec<u8>, at: usize, rng: &mut ChaCha8Rng) {
    let Some(from) = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) else {
        return;
    };
    let digits = bytes[from..].iter().take_while(|b| b.is_ascii_digit());
    let to = from + digits.count();
    let number = match rng.random_range(0..4) {
        0 => rng.random_range(0..100_000u32).to_string(),
        _ => NUMBERS[rng.random_range(0..NUMBERS.len())].to_owned(),
    };
    bytes.splice(from..to, number.into_bytes());
}
