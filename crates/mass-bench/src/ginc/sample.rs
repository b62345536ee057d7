use ndarray::ArrayView1;
use ndarray_rand::rand::Rng;

use super::{Ginc, GincError, check_tokens};

/// One document: a single concept's tokens and the hidden states that emitted them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The concept θ, kept throughout.
    pub concept: usize,
    /// Observed tokens.
    pub tokens: Vec<u32>,
    /// Hidden states, one a token: `entity * properties + property`.
    pub states: Vec<u32>,
}

impl Ginc {
    /// Draws a document of `length` tokens from a concept, beginning with its start distribution.
    ///
    /// # Errors
    /// [`GincError::UnknownConcept`]; [`GincError::Empty`] when `length` is 0; [`GincError::Parameter`]
    /// when it is above 2^32.
    pub fn sample_document(
        &self,
        concept: usize,
        length: usize,
        rng: &mut impl Rng,
    ) -> Result<Document, GincError> {
        self.check_concept(concept)?;
        if length == 0 {
            return Err(GincError::Empty { what: "a document" });
        }
        check_tokens("document", [length])?;
        let mut states = Vec::with_capacity(length);
        let mut tokens = Vec::with_capacity(length);
        self.sample_into(concept, length, rng, &mut tokens, &mut states);
        Ok(Document {
            concept,
            tokens,
            states,
        })
    }

    pub(super) fn check_concept(&self, concept: usize) -> Result<(), GincError> {
        if concept < self.concepts() {
            Ok(())
        } else {
            Err(GincError::UnknownConcept {
                concept,
                concepts: self.concepts(),
            })
        }
    }

    /// Appends a document's tokens and states; the concept has been checked.
    pub(super) fn sample_into(
        &self,
        concept: usize,
        length: usize,
        rng: &mut impl Rng,
        tokens: &mut Vec<u32>,
        states: &mut Vec<u32>,
    ) {
        let tables = &self.transition_tables[concept * self.states()..][..self.states()];
        let mut state = self.start_tables[concept].sample(rng);
        for _ in 0..length {
            states.push(state);
            tokens.push(self.emission[state as usize]);
            state = tables[state as usize].sample(rng);
        }
    }
}

/// Walker's alias method over the outcomes of positive probability: one draw, one look-up.
#[derive(Debug, Clone)]
pub(super) struct AliasTable {
    // (probability of keeping the outcome, outcome, outcome taken instead)
    slots: Vec<(f64, u32, u32)>,
}

impl AliasTable {
    /// `probabilities` must be a checked distribution.
    pub(super) fn new(probabilities: ArrayView1<'_, f64>) -> Self {
        let support: Vec<(u32, f64)> = probabilities
            .iter()
            .enumerate()
            .filter(|&(_, &p)| p > 0.0)
            .map(|(outcome, &p)| (outcome as u32, p))
            .collect();
        let total: f64 = support.iter().map(|&(_, p)| p).sum();
        let scale = support.len() as f64 / total;
        let mut slots: Vec<(f64, u32, u32)> =
            support.iter().map(|&(o, p)| (p * scale, o, o)).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) =
            (0..slots.len()).partition(|&i| slots[i].0 < 1.0);
        while let (Some(&s), Some(&l)) = (small.last(), large.last()) {
            small.pop();
            slots[s].2 = slots[l].1;
            slots[l].0 -= 1.0 - slots[s].0;
            if slots[l].0 < 1.0 {
                large.pop();
                small.push(l);
            }
        }
        // What is left differs from one by rounding alone.
        for i in small.into_iter().chain(large) {
            slots[i].0 = 1.0;
        }
        Self { slots }
    }

    pub(super) fn sample(&self, rng: &mut impl Rng) -> u32 {
        // High half of a 128-bit product picks the slot, the low half is the fraction within it.
        let product = u128::from(rng.next_u64()) * self.slots.len() as u128;
        let (keep, outcome, alias) = self.slots[(product >> 64) as usize];
        let fraction = ((product as u64) >> 11) as f64 / (1u64 << 53) as f64;
        if fraction < keep { outcome } else { alias }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, stream};
    use ndarray::Array1;
    use proptest::prelude::*;

    /// The probability of each outcome that the table's slots imply.
    fn implied(table: &AliasTable, n: usize) -> Vec<f64> {
        let mut p = vec![0.0; n];
        for &(keep, outcome, alias) in &table.slots {
            p[outcome as usize] += keep / table.slots.len() as f64;
            p[alias as usize] += (1.0 - keep) / table.slots.len() as f64;
        }
        p
    }

    proptest! {
        #[test]
        fn alias_table_keeps_every_probability(
            weights in proptest::collection::vec(prop_oneof![Just(0.0), 1e-9..1.0f64], 1..60)
        ) {
            let sum: f64 = weights.iter().sum();
            prop_assume!(sum > 0.0);
            let p = Array1::from_iter(weights.iter().map(|w| w / sum));
            let table = AliasTable::new(p.view());
            for (got, want) in implied(&table, p.len()).iter().zip(&p) {
                prop_assert!((got - want).abs() < 1e-12, "{got} {want}");
            }
            let mut rng = stream(1, Purpose::Training, 0);
            for _ in 0..50 {
                let outcome = table.sample(&mut rng);
                prop_assert!(p[outcome as usize] > 0.0);
            }
        }
    }

    #[test]
    fn alias_table_frequencies_match() {
        let p = Array1::from(vec![0.5, 0.0, 0.3, 0.15, 0.05]);
        let table = AliasTable::new(p.view());
        let mut rng = stream(3, Purpose::Training, 0);
        let n = 200_000;
        let mut counts = [0usize; 5];
        for _ in 0..n {
            counts[table.sample(&mut rng) as usize] += 1;
        }
        for (count, p) in counts.iter().zip(&p) {
            let sd = (p * (1.0 - p) / n as f64).sqrt();
            assert!(
                (*count as f64 / n as f64 - p).abs() <= 5.0 * sd,
                "{counts:?}"
            );
        }
    }
}
