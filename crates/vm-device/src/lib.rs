//! The device model of a VMM: buses, resources, interrupts, topology and PCI.
//!
//! A guest accesses ports and memory that no RAM is behind; the hypervisor hands each access to the VMM; here it finds its
//! device, on any number of vCPUs at once, while devices come, move and go.
//!
//! Begin with the [`guide`]: it leads from an empty machine to a device that is reached, interrupts, and is unplugged again.
//!
//! * [`device_manager`]: who owns devices and buses. `DeviceManager` gives devices what they need and keeps them as a
//!   tree; `IoManager` only dispatches.
//! * [`dispatch`]: a handle for each vCPU, and devices that are plugged in, moved and removed at run time.
//! * [`bus`]: addresses, ranges, and what a device has to do to be on a bus.
//! * [`resources`]: who gets which ports, addresses, interrupts, slots.
//! * [`interrupt`]: lines and messages. `kvm` (cargo feature): both, and kicks of the guest, through the kernel.
//! * `legacy`: an I/O APIC for hypervisors that have none (cargo feature `io-apic`).
//! * [`pci`]: a root complex, bridges, hot plug, and devices whose addresses the guest chooses.
//!
//! If you come from rust-vmm's `vm-device` 0.1: its names are here and mean the same, with these differences. Reads that
//! end with an error are filled with ones. Registration of several resources is all or nothing, and an impossible range is an
//! error instead of a panic. A device that panics fails alone. [`bus::Error`] has more variants.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
#![allow(unexpected_cfgs, reason = "`loom` is set by hand, for the test of the dispatch protocol")]

pub mod bus;
pub mod device_manager;
pub mod dispatch;
pub mod guide;
pub mod interrupt;
#[cfg(feature = "kvm")]
pub mod kvm;
#[cfg(feature = "io-apic")]
pub mod legacy;
pub mod pci;
pub mod resources;
mod sync;

pub use bus::{DeviceMmio, DevicePio, MutDeviceMmio, MutDevicePio};
