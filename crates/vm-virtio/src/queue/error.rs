//! What is wrong with a queue: a configuration that cannot be taken, or a rule of the ring that the driver broke.
use std::fmt;

use super::MAX_CHAIN_BYTES;
use super::inflight::InflightError;
use crate::memory::Access;

/// One of the three areas of a virtqueue (2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueArea {
    /// Descriptor table or descriptor ring.
    Descriptor,
    /// Available ring or driver event suppression.
    Driver,
    /// Used ring or device event suppression.
    Device,
}

impl fmt::Display for QueueArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            QueueArea::Descriptor => "descriptor area",
            QueueArea::Driver => "driver area",
            QueueArea::Device => "device area",
        })
    }
}

/// An access through an IOMMU for which the translation, or the right, is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// The first address.
    pub iova: u64,
    /// Whether it is to be written.
    pub write: bool,
    /// There is a translation, but it does not allow that.
    pub denied: bool,
}

/// Why a queue was not made, or takes no more buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    // Configuration and state: answers of `Queue::new` and `Queue::set_ram`.
    /// Split rings have a power of two of entries, up to 32768 (2.7); packed rings any number up to it (2.8).
    #[error("a queue cannot have {0} entries")]
    Size(u16),
    /// An area is not aligned as 2.7 and 2.8.10.1 demand.
    #[error("the {area} at {addr:#x} is misaligned")]
    Misaligned {
        /// Which area.
        area: QueueArea,
        /// Its guest address.
        addr: u64,
    },
    /// An area is not, or not as one piece, in guest memory.
    #[error("the {area} of {len} bytes at {addr:#x} is not in one piece of guest memory")]
    AreaUnmapped {
        /// Which area.
        area: QueueArea,
        /// Its guest address.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The state to begin with contradicts itself or the queue.
    #[error("the queue's state is not valid: {0}")]
    State(&'static str),

    /// What is in flight cannot be tracked there, or not be taken over from there.
    #[error("in-flight tracking: {0}")]
    Inflight(#[from] InflightError),

    // Violations: latched as faults.
    /// The available index is further ahead than the ring has entries (2.7.13.3).
    #[error("available index {idx} is too far ahead of {next}")]
    AvailIndex {
        /// The index that the driver wrote.
        idx: u16,
        /// The index that the device is at.
        next: u16,
    },
    /// The available ring names a descriptor that does not exist (2.7.6).
    #[error("available ring names descriptor {0}, which does not exist")]
    Head(u16),
    /// A descriptor's next is beyond its table (2.7.5).
    #[error("descriptor chain continues at {0}, beyond its table")]
    Next(u16),
    /// More elements than the queue has entries, or a loop (2.7.5.2, 2.7.5.3.1, 2.8.17).
    #[error("descriptor chain is longer than the queue, or a loop")]
    ChainTooLong,
    /// More than 2^32 bytes in one chain (2.7.5.2).
    #[error("descriptor chain has {0} bytes, more than {MAX_CHAIN_BYTES}")]
    ChainTooLarge(u64),
    /// A device-readable element behind a device-writable one (2.7.4.2, 2.8.17).
    #[error("device-readable element behind a device-writable one")]
    ReadableAfterWritable,
    /// An indirect descriptor, but the feature was not negotiated (2.7.5.3.1, 2.8.19).
    #[error("indirect descriptor without the feature")]
    IndirectNotNegotiated,
    /// An indirect descriptor within an indirect table (2.7.5.3.1).
    #[error("indirect descriptor within an indirect table")]
    NestedIndirect,
    /// An indirect descriptor with a next one (2.7.5.3.1, 2.8.19), or in a packed list of direct ones (2.8.5).
    #[error("indirect descriptor in a list of others")]
    IndirectInList,
    /// The length of an indirect table is 0 or no multiple of 16 (2.7.5.3, 2.8.7).
    #[error("indirect table of {0} bytes")]
    IndirectLength(u32),
    /// A buffer or an indirect table is not in guest memory.
    #[error("no guest memory for {len} bytes at {addr:#x}")]
    Unmapped {
        /// First guest address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// More buffers or descriptors made available than the ring has, with none used in between.
    #[error("more buffers made available than the queue has entries")]
    TooManyOutstanding,
    /// A list of the packed ring goes on with a descriptor that is not available (2.8.6, 2.8.15).
    #[error("descriptor list goes on at {0}, which is not available")]
    NotAvailable(u16),
    /// The chains that are out together have more elements than this implementation keeps (2.7.4.1 allows a limit).
    #[error("too many elements in the chains that are out")]
    OutOfSegments,
    /// A file behind guest memory, or behind its log, was truncated: what they hold is void (failure policy 6).
    #[error("guest memory or its log was lost: a file behind it was truncated")]
    Poisoned,
    /// The IOMMU does not allow the access.
    #[error("the IOMMU does not allow to {} at {:#x}", if .0.write { "write" } else { "read" }, .0.iova)]
    Denied(Miss),

    /// Whoever serves a [delegated](crate::delegated) queue says that its rules were broken.
    #[error("the rules of the ring were broken, as whoever serves it reports")]
    Delegated,

    // No violation: the queue goes on when the host has brought it (`Engine::memory`).
    /// A translation of the IOMMU is missing.
    #[error("the IOMMU's translation of {:#x} is missing", .0.iova)]
    Miss(Miss),
}

impl From<crate::MemFault> for QueueError {
    fn from(fault: crate::MemFault) -> Self {
        match fault {
            crate::MemFault::Unmapped { addr, len } => QueueError::Unmapped { addr, len },
            crate::MemFault::Poisoned => QueueError::Poisoned,
            crate::MemFault::Miss { iova, access, denied } => {
                QueueError::Miss(Miss { iova, write: access == Access::Write, denied })
            }
        }
    }
}
