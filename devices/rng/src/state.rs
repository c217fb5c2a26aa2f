//! What an entropy device has to remember to go on elsewhere: how much of its period's bytes is left, and for tests the
//! generator's position. Bytes that were collected and not handed out are not saved: they would be handed out twice if
//! the saved device went on.
use serde::{Deserialize, Serialize};
use vm_virtio::device::StateError;
use vm_virtio::limit::LimiterState;

/// Newest version that is known.
pub(crate) const VERSION: u16 = 1;

/// Version 1.
#[derive(Serialize, Deserialize)]
pub(crate) struct RngV1 {
    pub(crate) limit: Option<LimiterState>,
    pub(crate) seeded: Option<SeededV1>,
}

/// Where a seeded generator is.
#[derive(Serialize, Deserialize)]
pub(crate) struct SeededV1 {
    pub(crate) seed: u64,
    pub(crate) guest: u32,
    /// Bytes handed out.
    pub(crate) position: u64,
}

/// The state is of a device with another source of bytes.
pub(crate) fn other_source() -> StateError {
    StateError::refused(
        "the state is of an entropy device with another source: start it with the same --seed",
    )
}
