use crate::error::ModelError;
use crate::ops::Sequences;

/// Sequences of tokens laid end to end without padding: sequence i is `ids[offsets[i]..offsets[i + 1]]`.
///
/// ```
/// use mass_model::bert::TextBatch;
/// // Two sequences, [CLS] a b [SEP] and [CLS] c [SEP].
/// let packed = TextBatch::packed(vec![1, 5, 6, 2, 1, 7, 2], vec![0; 7], vec![0, 4, 7]);
/// assert_eq!(packed.len(), 2);
/// // The same as PyTorch would lay them out.
/// let mask = [true, true, true, true, true, true, true, false];
/// let padded = TextBatch::padded(vec![1, 5, 6, 2, 1, 7, 2, 0], vec![0; 8], &mask, 4)?;
/// assert_eq!(padded.len(), 2);
/// # Ok::<(), mass_model::ModelError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextBatch {
    /// Token of each row.
    pub ids: Vec<u32>,
    /// Segment of each row.
    pub types: Vec<u32>,
    /// Where each sequence begins, and the number of rows.
    pub offsets: Vec<usize>,
    /// Whether each row may be attended to, as a padded batch says; without it all may be.
    pub keys: Option<Vec<bool>>,
}

impl TextBatch {
    /// Sequences laid end to end. What does not fit together is an error of the model that is given it.
    pub fn packed(ids: Vec<u32>, types: Vec<u32>, offsets: Vec<usize>) -> Self {
        Self {
            ids,
            types,
            offsets,
            keys: None,
        }
    }

    /// A batch `[batch, seq]` with padding, of which the rows are kept but not attended to.
    ///
    /// With all padding at the end of a row, the results at real tokens are those of the packed batch; padding costs time. In a
    /// mixture layer rows of padding are routed as tokens are: they count in the plan, in routing losses and in what an adapting
    /// router learns, and experts that choose their tokens may choose them. Where that matters, pack.
    /// Positions count from the start of a row, marked or not, and the head reads the row's first token, as in transformers: padding
    /// before the tokens or between them moves their positions.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if `seq` does not divide the number of ids, or there are other numbers of types or marks.
    pub fn padded(
        ids: Vec<u32>,
        types: Vec<u32>,
        attention_mask: &[bool],
        seq: usize,
    ) -> Result<Self, ModelError> {
        let rows = ids.len();
        if seq == 0 || rows == 0 || !rows.is_multiple_of(seq) {
            return Err(ModelError::shape("padded ids", &[1, seq], &[rows]));
        }
        if types.len() != rows || attention_mask.len() != rows {
            let found = [types.len(), attention_mask.len()];
            return Err(ModelError::shape("types and mask", &[rows, rows], &found));
        }
        Ok(Self {
            ids,
            types,
            offsets: (0..=rows / seq).map(|i| i * seq).collect(),
            keys: Some(attention_mask.to_vec()),
        })
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sequences and the position of each row in its own.
    pub(super) fn sequences(
        &self,
        longest: usize,
        types: usize,
    ) -> Result<(Sequences, Vec<u32>), ModelError> {
        let mut sequences = Sequences::packed(self.offsets.clone())?;
        let rows = sequences.rows();
        if self.ids.len() != rows || self.types.len() != rows {
            let found = [self.ids.len(), self.types.len()];
            return Err(ModelError::shape("ids and types", &[rows, rows], &found));
        }
        if sequences.longest() > longest {
            let found = [sequences.longest()];
            return Err(ModelError::shape("longest sequence", &[longest], &found));
        }
        if let Some(position) = self.types.iter().position(|&t| t as usize >= types) {
            return Err(ModelError::Index {
                what: "segment",
                index: self.types[position],
                position,
                len: types,
            });
        }
        if let Some(keys) = &self.keys {
            sequences = sequences.with_keys(keys.clone())?;
        }
        let positions = (0..sequences.len())
            .flat_map(|i| 0..sequences.range(i).len() as u32)
            .collect();
        Ok((sequences, positions))
    }
}

/// What the sequences of a batch should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Targets<'a> {
    /// A class each: the loss is the cross-entropy, nats.
    Classes(&'a [u32]),
    /// A value each, of a model with one output: the loss is the squared error.
    Values(&'a [f32]),
}
