//! The device model of a VMM: buses, resources, interrupts, topology and PCI.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

pub mod interrupt;
pub mod resources;
