//! What is stored of a bank, and its check when it is read back.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::{Bank, BankParams, Block, LANES, StreamId};
use crate::{
    CpdError, Reference,
    cusum::{General, lagged::Lagged},
    error::MOST,
};

#[derive(Serialize, Deserialize)]
#[serde(rename = "Bank", deny_unknown_fields)]
pub(super) struct Stored {
    params: BankParams,
    ids: Vec<StreamId>,
    next_id: u64,
    blocks: Vec<Block>,
    rolling: Vec<Lagged>,
    windows: Vec<f64>,
    gaps: Vec<bool>,
    general: Vec<General>,
    alarms: Vec<usize>,
}

impl From<Bank> for Stored {
    fn from(bank: Bank) -> Self {
        Self {
            params: bank.params,
            ids: bank.ids,
            next_id: bank.next_id,
            blocks: bank.blocks,
            rolling: bank.rolling,
            windows: bank.windows,
            gaps: bank.gaps,
            general: bank.general,
            alarms: bank.alarms,
        }
    }
}

impl TryFrom<Stored> for Bank {
    type Error = CpdError;

    fn try_from(mut stored: Stored) -> Result<Self, CpdError> {
        stored.params.validate()?;
        let n = stored.ids.len();
        // Room is made when the rest bears it out: the capacity is the file's word alone.
        let mut bank = stored.params.make(0);
        let state = |ok: bool, reason| {
            if ok {
                Ok(())
            } else {
                Err(CpdError::State { reason })
            }
        };
        let distinct: HashSet<_> = stored.ids.iter().collect();
        state(
            distinct.len() == n
                && stored.next_id <= MOST
                && stored.ids.iter().all(|id| id.0 < stored.next_id),
            "stream names are not distinct, not yet given out, or all given out",
        )?;
        state(
            stored.blocks.len() == n.div_ceil(LANES),
            "the number of blocks is not that of the streams",
        )?;
        state(
            (0..stored.blocks.len() * LANES)
                .all(|place| stored.blocks[place / LANES].is_valid(place % LANES)),
            "the state of a stream is impossible",
        )?;
        let lagged = matches!(stored.params.detector.reference, Reference::Lagged { .. });
        let size = bank.shape.capacity();
        state(
            stored.rolling.len() == if lagged { n } else { 0 }
                && stored.gaps.len() == stored.rolling.len()
                && stored.windows.len() == stored.rolling.len() * size,
            "the reference windows are not those of the streams",
        )?;
        state(
            stored
                .rolling
                .iter()
                .zip(stored.windows.chunks_exact(size.max(1)))
                .enumerate()
                .all(|(place, (rolling, values))| {
                    let count = stored.blocks[place / LANES].count[place % LANES] as u64;
                    rolling.is_valid(values, &bank.shape) && rolling.seen() <= count
                }),
            "a reference window is impossible",
        )?;
        let detector = &stored.params.detector;
        state(
            stored.general.len() == if detector.general().is_some() { n } else { 0 }
                && stored
                    .general
                    .iter_mut()
                    .all(|general| general.revive(detector)),
            "a reference is impossible, or not what the parameters name",
        )?;
        state(
            stored.alarms.iter().all(|&place| place < n),
            "an alarm has no stream",
        )?;
        bank.reserve(n);
        bank.ids.extend(stored.ids);
        bank.next_id = stored.next_id;
        bank.blocks.extend(stored.blocks);
        bank.rolling.extend(stored.rolling);
        bank.windows.extend(stored.windows);
        bank.gaps.extend(stored.gaps);
        bank.general.extend(stored.general);
        bank.alarms.extend(stored.alarms);
        bank.relevel();
        Ok(bank)
    }
}
