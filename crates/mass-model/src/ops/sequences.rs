use std::sync::Arc;

use crate::error::ModelError;
use crate::param::room;

/// Which rows of a batch belong together.
///
/// Sequences lie end to end, without padding unless the caller pads: sequence i is rows `offsets[i]..offsets[i + 1]`. Rows
/// may be kept from being attended to by a key mask, which is how padded batches are computed.
///
/// ```
/// use mass_model::ops::Sequences;
/// let packed = Sequences::packed(vec![0, 3, 8])?;
/// assert_eq!((packed.len(), packed.rows()), (2, 8));
/// let padded = Sequences::uniform(2, 2)?.with_keys(vec![true, false, true, true])?;
/// assert_eq!(padded.rows(), 4);
/// # Ok::<(), mass_model::ModelError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    offsets: Arc<[usize]>,
    keys: Option<Arc<[bool]>>,
}

impl Sequences {
    /// `batch` sequences of `seq` rows.
    ///
    /// # Errors
    /// [`ModelError::Config`] if either is zero, or there are 2^32 rows or more, or more sequences than memory has room for.
    pub fn uniform(batch: usize, seq: usize) -> Result<Self, ModelError> {
        let rows = batch.saturating_mul(seq);
        if rows == 0 || u32::try_from(rows).is_err() {
            return Err(ModelError::Config(format!(
                "{batch} sequences of {seq} rows: each must be at least 1, and all together fewer than 2^32"
            )));
        }
        let mut offsets = room(batch + 1, || format!("a batch of {batch} sequences"))?;
        offsets.extend((0..=batch).map(|i| i * seq));
        Ok(Self {
            offsets: offsets.into(),
            keys: None,
        })
    }

    /// Sequences of any lengths.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the offsets do not begin at zero, do not rise, or hold no sequence.
    pub fn packed(offsets: Vec<usize>) -> Result<Self, ModelError> {
        let rises = offsets.windows(2).all(|w| w[0] < w[1]);
        if offsets.len() < 2 || offsets[0] != 0 || !rises {
            let what =
                "offsets of sequences must begin at 0 and rise, and hold at least one sequence";
            return Err(ModelError::Config(what.into()));
        }
        Ok(Self {
            offsets: offsets.into(),
            keys: None,
        })
    }

    /// The same rows, of which only those marked true may be attended to.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if there is not one mark a row, [`ModelError::Config`] if a sequence has none that is true.
    pub fn with_keys(self, keys: Vec<bool>) -> Result<Self, ModelError> {
        if keys.len() != self.rows() {
            return Err(ModelError::shape("key mask", &[self.rows()], &[keys.len()]));
        }
        if let Some(i) = (0..self.len()).find(|&i| !keys[self.range(i)].contains(&true)) {
            return Err(ModelError::Config(format!(
                "sequence {i} is masked altogether"
            )));
        }
        Ok(Self {
            keys: Some(keys.into()),
            ..self
        })
    }

    /// Number of sequences.
    #[allow(clippy::len_without_is_empty)] // there is always one
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of rows of all sequences together.
    pub fn rows(&self) -> usize {
        self.offsets[self.len()]
    }

    /// Length of the longest sequence.
    pub fn longest(&self) -> usize {
        self.offsets
            .windows(2)
            .map(|w| w[1] - w[0])
            .max()
            .unwrap_or(0)
    }

    /// Rows of a sequence.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn range(&self, sequence: usize) -> std::ops::Range<usize> {
        self.offsets[sequence]..self.offsets[sequence + 1]
    }

    /// Where each sequence begins, and the number of rows.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// Whether each row may be attended to, if there is a mask.
    pub fn keys(&self) -> Option<&[bool]> {
        self.keys.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_batch_is_refused() {
        assert!(Sequences::uniform(0, 3).is_err());
        for bad in [vec![], vec![0], vec![1, 2], vec![0, 2, 2], vec![0, 3, 2]] {
            assert!(Sequences::packed(bad).is_err());
        }
        let two = Sequences::uniform(2, 2).unwrap();
        assert!(two.clone().with_keys(vec![true; 3]).is_err());
        assert!(two.with_keys(vec![true, true, false, false]).is_err());
    }
}
