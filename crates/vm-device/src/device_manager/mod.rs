//! Who owns the buses of a machine and the devices on them.
//!
//! * [`DeviceManager`] knows [devices](Device): it gives each what it needs from the machine's resources, keeps them as a
//!   tree of buses and devices, resets, saves and restores them, and finds the one that an access is for.
//! * [`IoManager`] only dispatches: a VMM that does the rest itself gives ranges to devices, and accesses find them.
//!
//! Both hand out the same two things: a handle for each vCPU, and a place to plug in devices while the machine runs. See
//! [`dispatch`](crate::dispatch).
mod device;
mod io_manager;
mod managers;
mod taken;
mod topology;

pub use device::{Device, IoResource, IoType, IrqResource};
pub use io_manager::{Error, IoManager};
pub use managers::{MmioManager, PioManager};
pub use topology::{DeviceError, DeviceManager, DeviceNode};
