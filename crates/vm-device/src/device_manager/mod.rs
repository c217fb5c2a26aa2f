//! Who owns the buses of a machine and the devices on them.
//!
//! [`IoManager`] dispatches: ranges are given to devices, accesses find them.
mod io_manager;
mod managers;

pub use io_manager::{Error, IoManager};
pub use managers::{MmioManager, PioManager};
