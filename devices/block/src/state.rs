//! What a block device has to remember to go on elsewhere. The disk's bytes are in the image, the writeback register is
//! in the configuration space, requests are finished before: what is left is the rate limit.
use serde::{Deserialize, Serialize};
use vm_virtio::limit::LimiterState;

/// Newest version that is known.
pub(crate) const VERSION: u16 = 1;

/// Version 1.
#[derive(Serialize, Deserialize)]
pub(crate) struct BlockV1 {
    pub(crate) limit: Option<LimiterState>,
}
