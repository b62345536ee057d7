//! A window over the last values of a stream: fixed capacity, no allocation after it is made. One that was read back grows until
//! it is full: its capacity is the file's word alone.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ring {
    values: Vec<f64>,
    capacity: usize,
    /// Where the next value goes, and, once full, where the oldest lies.
    next: usize,
}

impl Ring {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            values: Vec::with_capacity(capacity),
            capacity,
            next: 0,
        }
    }

    /// Adds `x` and returns the value that it pushed out, if the window was full.
    #[inline]
    pub(crate) fn push(&mut self, x: f64) -> Option<f64> {
        let out = if self.is_full() {
            Some(std::mem::replace(&mut self.values[self.next], x))
        } else {
            self.values.push(x);
            None
        };
        self.next += 1;
        if self.next == self.capacity {
            self.next = 0;
        }
        out
    }

    /// The values held, oldest first only when the window has not wrapped.
    pub(crate) fn unordered(&self) -> &[f64] {
        &self.values
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.values.len() == self.capacity
    }

    pub(crate) fn clear(&mut self) {
        self.values.clear();
        self.next = 0;
    }

    /// Whether a deserialised window could have been made by pushes into a window of `capacity`.
    pub(crate) fn is_valid(&self, capacity: usize) -> bool {
        self.capacity == capacity
            && self.values.len() <= capacity
            && self.next < capacity
            && (self.is_full() || self.next == self.values.len())
            && self.values.iter().all(|x| x.is_finite())
    }
}

/// Sum with four partial sums: faster than, and at least as exact as, adding from left to right.
pub(crate) fn sum(values: &[f64], f: impl Fn(f64) -> f64) -> f64 {
    let mut partial = [0.0; 4];
    let chunks = values.chunks_exact(4);
    let rest: f64 = chunks.remainder().iter().map(|&x| f(x)).sum();
    for chunk in chunks {
        for (acc, &x) in partial.iter_mut().zip(chunk) {
            *acc += f(x);
        }
    }
    (partial[0] + partial[1]) + (partial[2] + partial[3]) + rest
}
