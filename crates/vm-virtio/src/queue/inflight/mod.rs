//! In-flight tracking (vhost-user, "Inflight I/O tracking"): which chains the device has, in memory that survives this
//! process, so that its successor takes them again: each is given back once, however the process ended.
//!
//! What holds:
//! * A process that is killed between any two stores leaves a region and rings from which [`recover`] finds the chains
//!   that the driver has not seen used. Recovery itself can be killed as well, and done again.
//! * The region is written, never read, while a queue runs: it is a front-end's memory. What is needed of it is kept
//!   here, too. When it comes back it is hostile input: each word is read once, everything is checked, and the work is
//!   bounded by the size of the queue.
//! * Positions come from region and ring, not from whoever starts the queue: a killed process has told nobody.
//! * Version 0 is a region without contents. It becomes the layout's own by the last store of making it, and 0 again when the
//!   queue is reset: then there is nothing to take again.
//!
//! The format is ours. The document says how a region "can be implemented", and gives it a version: what is in it is between a
//! back-end and its successor, the front-end keeps it unread. Its own version 1 needs at least five stores for each chain
//! (split), or eleven (packed, two descriptors), because it says of a chain that it is not in flight any more *after* the ring
//! has said so: a chain, a batch and the ring's index are undone, or done to the end, from three places. Ours asks the ring: of a packed one, which
//! chains are out at all, as long as they are used in their order. A chain that is done has the number of its used entry, and is in flight as long as the ring's used index is not above that. So
//! the one store that gives a batch to the driver also takes it out of the region; before it, all of the batch is in flight, and behind it
//! nothing is left to be stored. Numbers are of 64 bits and never used twice, so that what is left of former chains
//! cannot be taken for anything else. Regions of earlier versions are refused.
//!
//! Why a kill does no harm. Between two chains nothing is shared but the order of their numbers, and each step is one
//! store that decides: a chain is out by [`OUT`] (split; packed: if it was saved) or by the ring itself, done by a number that is not
//! published yet (still in flight), and the ring's own store publishes. Stores that come before such a one mean nothing until then. What a kill can leave behind is a number that
//! was taken, but not used: the next one takes it again.
//!
//! | file | what for |
//! |---|---|
//! | `split.rs`, `packed.rs` | the two formats: what is stored when, and what is found again |
//! | `again.rs` | chains that are to be popped once more |
//! | `table.rs` | accessors: the unsafe part of both |
pub(super) mod again;
pub(super) mod packed;
pub(super) mod split;
mod table;

use std::sync::Arc;

use super::config::Areas;
use super::error::QueueError;
use super::state::QueueState;
use crate::memory::SharedMemory;
use again::Pending;
use packed::PackedInflight;
use split::SplitInflight;

/// Of a chain: the device has it.
const OUT: u64 = u64::MAX;
/// Of a chain: as if it was given back before all others.
const NEVER: u64 = 0;
/// No number is as large: they would have to be counted for a hundred thousand years.
const LIMIT: u64 = 1 << 62;

/// Why a region cannot be used. What is in it may come from anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InflightError {
    /// It is not inside of the memory, or not aligned to eight bytes.
    #[error("the region is not an aligned part of the memory")]
    Place,
    /// It has no room for the queue.
    #[error("the region has {len} bytes, the queue needs {needed}")]
    TooSmall {
        /// What there is.
        len: usize,
        /// What the queue needs.
        needed: usize,
    },
    /// A format of the future.
    #[error("version {version}, features {features:#x}")]
    Format {
        /// `version`.
        version: u16,
        /// `features`.
        features: u64,
    },
    /// It is another queue's.
    #[error("the region is of a queue with {0} entries")]
    QueueSize(u16),
    /// An index, position or flag that cannot be.
    #[error("the region's {0} cannot be")]
    Value(&'static str),
    /// The used index is not one that the ring had when its chains were popped: index and region are not of the same time.
    #[error("the used index is {0} behind the latest chain")]
    Behind(u16),
    /// The lists of descriptors meet, have no end, or are longer than the ring.
    #[error("the region's lists contradict themselves")]
    Lists,
    /// Two chains have the same age.
    #[error("two chains in flight have the same number")]
    Number,
    /// A fresh region, but chains are out already, which it does not know.
    #[error("chains are out that the region does not know")]
    Unknown,
}

/// Where one queue keeps what is in flight: part of memory that survives this process. No two queues that run may have
/// the same.
#[derive(Debug)]
pub struct InflightRegion {
    memory: Arc<SharedMemory>,
    offset: usize,
    len: usize,
}

impl InflightRegion {
    /// `len` bytes of the memory from `offset` on, aligned to eight bytes. All zero: there is nothing in flight.
    pub fn new(
        memory: Arc<SharedMemory>,
        offset: usize,
        len: usize,
    ) -> Result<InflightRegion, InflightError> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= memory.len());
        // The smallest has room for a header.
        let aligned = memory.as_ptr().addr().wrapping_add(offset).is_multiple_of(8);
        if fits && aligned && len >= Self::bytes_for(1) {
            return Ok(InflightRegion { memory, offset, len });
        }
        Err(InflightError::Place)
    }

    /// Whether there is nothing in it.
    pub fn is_fresh(&self) -> bool {
        table::version_word(self).is_none_or(|word| table::field(word.load(), 0) == 0)
    }

    /// Makes it one without contents. No queue that runs may have it.
    pub fn clear(&self) {
        if let Some(word) = table::version_word(self) {
            word.store(0);
        }
    }

    /// How many bytes a queue of this many entries needs, in either layout; a multiple of 64.
    pub const fn bytes_for(size: u16) -> usize {
        (32 + 56 * size as usize).next_multiple_of(64)
    }
}

/// What a region and a ring tell about a queue.
pub(super) struct Recovered {
    pub(super) tracker: Tracker,
    /// Where the queue goes on; none: as it was told to, there was nothing in the region.
    pub(super) state: Option<QueueState>,
    /// To be popped again, in this order, before anything else.
    pub(super) again: Vec<Pending>,
}

/// What a layout has of its region.
pub(super) enum Tracker {
    Split(SplitInflight),
    Packed(PackedInflight),
}

/// Takes a region over, for a queue that would else begin with `state`.
pub(super) fn recover(
    region: &InflightRegion,
    areas: &Areas,
    size: u16,
    packed: bool,
    state: &QueueState,
) -> Result<Recovered, QueueError> {
    if packed {
        packed::recover(region, areas, size, state)
    } else {
        split::recover(region, areas, size, state)
    }
}

/// Where a queue begins whose region knows nothing: with nothing out, or chains that the region does not know would be
/// taken twice after the next kill.
fn check_fresh(state: &QueueState) -> Result<(), InflightError> {
    if state.held.is_empty() && state.avail == state.used { Ok(()) } else { Err(InflightError::Unknown) }
}

/// Features and version; whether there is something in the region.
fn check_format(ours: u16, features: u64, version: u16) -> Result<bool, InflightError> {
    match (version, features) {
        (0, _) => Ok(false),
        (_, 0) if version == ours => Ok(true),
        _ => Err(InflightError::Format { version, features }),
    }
}

/// The header's word of version and size.
fn sizes(version: u16, size: u16) -> u64 {
    u64::from(version) | u64::from(size) << 16
}

/// Puts what was found into its order.
fn in_order<T>(found: &mut [(u64, T)]) -> Result<(), InflightError> {
    found.sort_unstable_by_key(|(number, _)| *number);
    if found.windows(2).any(|pair| matches!(pair, [(a, _), (b, _)] if a == b)) {
        return Err(InflightError::Number);
    }
    Ok(())
}
