//! What happens to a parameter by other hands than an optimiser's: it is split off another, or moved at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts parameters and moves, so that each has a number of its own and later ones have larger numbers.
static CLOCK: AtomicU64 = AtomicU64::new(1);

/// A number larger than all before it.
pub(crate) fn tick() -> u64 {
    CLOCK.fetch_add(1, Ordering::Relaxed)
}

/// A change of a parameter's values that is no learning, such as a bisection's.
#[derive(Clone, Debug)]
pub(crate) struct Move {
    pub(crate) at: u64,
    pub(crate) by: Arc<Vec<f32>>,
}

/// Who a parameter is, what it was split from, and how it was moved.
#[derive(Clone, Debug)]
pub(crate) struct Lineage {
    pub(crate) id: u64,
    pub(crate) parent: Option<u64>,
    /// Oldest first. A parameter that was split off has the moves that its source had until then.
    pub(crate) moves: Vec<Move>,
}

impl Lineage {
    pub(crate) fn new() -> Self {
        Self {
            id: tick(),
            parent: None,
            moves: Vec::new(),
        }
    }

    /// Of a copy of the same values that is no part of the same model.
    pub(crate) fn of_a_copy(&self) -> Self {
        Self {
            id: tick(),
            parent: None,
            moves: self.moves.clone(),
        }
    }

    /// Of a parameter that is split off this one.
    pub(crate) fn of_a_newcomer(&self) -> Self {
        Self {
            parent: Some(self.id),
            ..self.of_a_copy()
        }
    }

    pub(crate) fn moved(&mut self, by: Vec<f32>) {
        self.moves.push(Move {
            at: tick(),
            by: Arc::new(by),
        });
    }
}
