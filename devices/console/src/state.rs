//! What a console has to remember to go on elsewhere: the dialogue about ports, and for each of them what nobody has read
//! yet and how much of the chain at hand is written. Clients stay where they are.
use serde::{Deserialize, Serialize};

use crate::control::SavedProtocol;

/// Newest version that is known.
pub(crate) const VERSION: u16 = 1;

/// Version 1.
#[derive(Serialize, Deserialize)]
pub(crate) struct ConsoleV1 {
    pub(crate) protocol: SavedProtocol,
    pub(crate) ports: Vec<PortV1>,
}

/// A port.
#[derive(Serialize, Deserialize)]
pub(crate) struct PortV1 {
    pub(crate) id: u32,
    /// Bytes of the next chain that the host has already.
    pub(crate) skip: u64,
    /// Output for the next client.
    pub(crate) kept: Vec<u8>,
}
