//! What is saved of a proxied device beside its rings: what the back-end says, whose meaning is its own.
use serde::{Deserialize, Serialize};

/// Newest version that is known.
pub(crate) const VERSION: u16 = 1;

/// Version 1.
#[derive(Serialize, Deserialize)]
pub(crate) struct ProxyV1 {
    /// None: there is nothing to tell, no driver has used the device or the back-end keeps nothing.
    pub(crate) backend: Option<Vec<u8>>,
}
