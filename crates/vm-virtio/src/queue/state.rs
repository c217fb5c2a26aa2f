//! Positions of a queue and the chains it had out: what a snapshot, a migration or `GET_VRING_BASE` needs.
//!
//! What comes in here comes from outside - a saved file, a front-end - and is checked when a queue is made of it.
use super::chain::ChainId;
use super::error::QueueError;
use crate::memory::GuestAddress;

/// A position in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPos {
    /// Split: the free-running index. Packed: the offset in the ring, in descriptors.
    pub index: u16,
    /// Packed: the wrap counter (2.8.1). Split: without meaning, kept true.
    pub wrap: bool,
}

impl RingPos {
    /// Where a queue starts: index 0, wrap counter 1.
    pub const START: RingPos = RingPos { index: 0, wrap: true };
}

/// A buffer that the device had, and had not given back, when the state was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldChain {
    /// Head index (split) or buffer id (packed).
    pub id: ChainId,
    /// How many descriptors of the ring it takes: 1 for split.
    pub descs: u16,
    /// Device-readable pieces of guest memory, in order: address and length in bytes.
    pub readable: Vec<(GuestAddress, u32)>,
    /// Device-writable pieces of guest memory, in order: address and length in bytes.
    pub writable: Vec<(GuestAddress, u32)>,
    /// With `IN_ORDER`: the device was done with it, having written so many bytes, but not with one before it.
    pub completed: Option<u32>,
}

/// Everything that a queue's successor needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// The next buffer to pop.
    pub avail: RingPos,
    /// The next entry to write.
    pub used: RingPos,
    /// Buffers between the two that the device still has, in the order in which they were popped.
    pub held: Vec<HeldChain>,
}

impl Default for QueueState {
    fn default() -> Self {
        QueueState::new()
    }
}

impl QueueState {
    /// The state of a queue that has never run.
    pub fn new() -> QueueState {
        QueueState { avail: RingPos::START, used: RingPos::START, held: Vec::new() }
    }

    /// From vhost-user's `SET_VRING_BASE`. Split rings have the available index only, and the used index equals it:
    /// a front-end stops a queue when it has drained, or starts one over at the used index.
    pub fn from_vring_base(base: u32, packed: bool) -> Result<QueueState, QueueError> {
        let position = |bits: u32| RingPos {
            // Masked to 15 bits.
            index: (bits & 0x7fff) as u16,
            wrap: bits & 0x8000 != 0,
        };
        let (avail, used) = if packed {
            (position(base), position(base >> 16))
        } else {
            let index =
                u16::try_from(base).map_err(|_| QueueError::State("a split index has 16 bits only"))?;
            let position = RingPos { index, wrap: true };
            (position, position)
        };
        Ok(QueueState { avail, used, held: Vec::new() })
    }

    /// For vhost-user's `GET_VRING_BASE`.
    pub fn to_vring_base(&self, packed: bool) -> u32 {
        let bits = |position: RingPos| u32::from(position.index & 0x7fff) | (u32::from(position.wrap) << 15);
        if packed { bits(self.avail) | (bits(self.used) << 16) } else { u32::from(self.avail.index) }
    }
}
