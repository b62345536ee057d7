//! Reusable scratch buffers.
//!
//! A fresh multi-megabyte allocation is mapped page by page on first touch, which costs more than many a kernel that
//! runs in it. Buffers taken here go back to a pool when dropped and are handed out again.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Buffers kept for each size; more than this are freed.
const KEPT_PER_SIZE: usize = 64;

static POOL: Mutex<Option<HashMap<usize, Vec<Vec<f32>>>>> = Mutex::new(None);

/// A buffer of `f32` that returns to the pool when dropped.
#[derive(Debug)]
pub struct Scratch {
    data: Vec<f32>,
    len: usize,
}

/// The length that a buffer for `len` elements really has: a step of an eighth of a power of two, so that buffers of nearly
/// the same length are shared and at most an eighth is wasted.
fn class(len: usize) -> usize {
    len.next_multiple_of((len.next_power_of_two() / 16).max(64))
}

fn pop(class: usize) -> Vec<f32> {
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let reused = pool
        .as_mut()
        .and_then(|p| p.get_mut(&class))
        .and_then(Vec::pop);
    drop(pool);
    reused.unwrap_or_else(|| vec![0.0; class])
}

fn push(data: Vec<f32>) {
    if data.is_empty() {
        return;
    }
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let kept = pool
        .get_or_insert_with(HashMap::new)
        .entry(data.len())
        .or_insert_with(|| Vec::with_capacity(KEPT_PER_SIZE));
    if kept.len() < KEPT_PER_SIZE {
        kept.push(data);
    }
}

/// A vector of this length with unspecified (but initialised) contents; [`give_back`] returns it to the pool.
pub(crate) fn take_vec(len: usize) -> Vec<f32> {
    let mut data = pop(class(len));
    data.truncate(len);
    data
}

/// Returns a vector to the pool, if it came from there; others are freed.
pub(crate) fn give_back(mut data: Vec<f32>) {
    let class = class(data.len());
    if !data.is_empty() && data.capacity() >= class {
        data.resize(class, 0.0);
        push(data);
    }
}

impl Scratch {
    /// A buffer of this length with unspecified (but initialised) contents.
    pub fn take(len: usize) -> Self {
        Self {
            data: pop(class(len)),
            len,
        }
    }

    /// A buffer of this length, all zero.
    pub fn zeros(len: usize) -> Self {
        let mut scratch = Self::take(len);
        scratch.fill(0.0);
        scratch
    }

    /// Its contents, which do not go back to the pool.
    pub(crate) fn into_vec(mut self) -> Vec<f32> {
        let mut data = std::mem::take(&mut self.data);
        data.truncate(self.len);
        data
    }

    /// A copy of a slice.
    pub fn copy_of(src: &[f32]) -> Self {
        let mut scratch = Self::take(src.len());
        scratch.copy_from_slice(src);
        scratch
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        push(std::mem::take(&mut self.data));
    }
}

/// Frees every buffer that is not in use.
pub fn release_scratch() {
    *POOL.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_of_the_length_asked_for() {
        for len in [0, 1, 63, 64, 65, 1000] {
            assert_eq!(Scratch::take(len).len(), len);
            assert!(Scratch::zeros(len).iter().all(|&x| x == 0.0));
        }
        let src = [1.0, 2.0, 3.0];
        assert_eq!(&*Scratch::copy_of(&src), &src);
    }

    #[test]
    fn a_vector_comes_back_whole() {
        for len in [1, 63, 64, 65, 1000, 100_001] {
            assert!(class(len) >= len && class(len) <= len + len / 8 + 64);
            assert_eq!(class(class(len)), class(len));
            let taken = take_vec(len);
            assert_eq!(taken.len(), len);
            give_back(taken);
            assert_eq!(Scratch::take(len).data.len(), class(len));
        }
        give_back(Vec::new());
        give_back(vec![1.0; 5]);
    }
}
