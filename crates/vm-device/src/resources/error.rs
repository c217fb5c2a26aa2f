//! Why a resource could not be given or taken back.

use super::Pool;

/// Why a resource could not be given or taken back. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResourceError {
    /// Nothing was asked for.
    #[error("{pool}: a size of zero")]
    ZeroSize {
        /// Of which kind.
        pool: Pool,
    },
    /// The alignment is zero or no power of two.
    #[error("{pool}: an alignment of {align:#x}, which is no power of two")]
    Alignment {
        /// Of which kind.
        pool: Pool,
        /// The alignment.
        align: u64,
    },
    /// An exact place that contradicts the alignment asked for with it.
    #[error("{pool}: {base:#x} is not aligned to {align:#x}")]
    Misaligned {
        /// Of which kind.
        pool: Pool,
        /// The place.
        base: u64,
        /// The alignment.
        align: u64,
    },
    /// A range that ends beyond the largest number.
    #[error("{pool}: {size:#x} from {base:#x} on wraps around")]
    WrapsAround {
        /// Of which kind.
        pool: Pool,
        /// Where it begins.
        base: u64,
        /// How much.
        size: u64,
    },
    /// A window whose end is before its beginning.
    #[error("{pool}: a window from {min:#x} to {max:#x}")]
    Window {
        /// Of which kind.
        pool: Pool,
        /// First of the window.
        min: u64,
        /// Last of the window.
        max: u64,
    },
    /// An exact place outside of what there is to give, or outside of the window asked for with it.
    #[error("{pool}: {size:#x} from {base:#x} on is not within {min:#x} to {max:#x}")]
    Outside {
        /// Of which kind.
        pool: Pool,
        /// Where it begins.
        base: u64,
        /// How much.
        size: u64,
        /// First that could be given.
        min: u64,
        /// Last that could be given.
        max: u64,
    },
    /// Some of an exact place belongs to somebody else.
    #[error("{pool}: {size:#x} from {base:#x} on is in use")]
    InUse {
        /// Of which kind.
        pool: Pool,
        /// Where it begins.
        base: u64,
        /// How much.
        size: u64,
    },
    /// No free place is large enough and meets alignment and window.
    #[error("{pool}: no place for {size:#x}, aligned to {align:#x}, within {min:#x} to {max:#x}")]
    Exhausted {
        /// Of which kind.
        pool: Pool,
        /// How much.
        size: u64,
        /// The alignment.
        align: u64,
        /// First that would do.
        min: u64,
        /// Last that would do.
        max: u64,
    },
    /// What is given back was not given, or not as this range, or has been given back before.
    #[error("{pool}: {size:#x} from {base:#x} on was not allocated")]
    NotAllocated {
        /// Of which kind.
        pool: Pool,
        /// Where it begins.
        base: u64,
        /// How much.
        size: u64,
    },
    /// A number of messages that a PCI function cannot have: MSI allows 1, 2, 4, 8, 16 or 32, MSI-X 1 to 2048.
    #[error("{count} message interrupts are not possible")]
    MessageCount {
        /// The number.
        count: u32,
    },
    /// Text that is no unicast MAC address of the form `52:54:00:12:34:56`.
    #[error("{0:?} is not the MAC address of one station")]
    MacAddress(String),
    /// The extent of a pool can only be changed while nothing of it is given away.
    #[error("{pool}: some of it is in use")]
    PoolInUse {
        /// Of which kind.
        pool: Pool,
    },
}
