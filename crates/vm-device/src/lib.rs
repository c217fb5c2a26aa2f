//! The device model of a VMM: buses, resources, interrupts, topology and PCI.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
#![allow(unexpected_cfgs, reason = "`loom` is set by hand, for the test of the dispatch protocol")]

pub mod bus;
pub mod device_manager;
pub mod dispatch;
pub mod interrupt;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod resources;
mod sync;

pub use bus::{DeviceMmio, DevicePio, MutDeviceMmio, MutDevicePio};
