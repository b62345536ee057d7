use std::ops::Sub;

/// What a rank has sent to other ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of payload, without what a network adds to a message.
    pub bytes: u64,
    /// Messages.
    pub messages: u64,
}

impl Sub for Traffic {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            messages: self.messages - before.messages,
        }
    }
}
