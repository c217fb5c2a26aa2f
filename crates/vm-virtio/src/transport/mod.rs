//! Transports: what a driver sees of a device (virtio 1.4, section 4), as calls of the [`Engine`](crate::Engine).
//!
//! A transport owns the engine of its device. The VMM gives it the guest's accesses, carries its interrupts, places the
//! lanes on threads and brings guest memory ([`Engine::memory`](crate::Engine::memory)).
//!
//! | module | what for |
//! |---|---|
//! | [`mmio`] | virtio-mmio version 2 (4.2) |
//! | [`pci`] | the structures of virtio over PCI (4.1) |
//! | [`ccw`] | virtio over channel I/O (4.3) |
//! | `registers` | what transports have in common: features in words, status, each queue until it is started and after it is stopped |
//! | `interrupt` | the two events of a shared interrupt, and the line that they hold up |
//!
//! Rules for all of them:
//! * **No access holds a guest's CPU for ever.** What a lane has to do is waited for as long as the VMM says
//!   ([`Options::patience`]), and goes on by itself after that: the registers tell when it is done.
//! * **What a driver must not do changes nothing** and is counted ([`Ignored`]): wrong widths, reserved offsets, fields out
//!   of the order of 3.1.1, queues that do not exist. What it does to its rings is the engine's business.
//! * After a reset began no interrupt is sent until the driver writes a status again.
#[cfg(feature = "vm-device")]
mod bus;
pub mod ccw;
mod interrupt;
pub mod mmio;
pub mod pci;
mod registers;

pub use interrupt::Line;
pub use registers::{Ignored, Kicks, Notifier, Options, PATIENCE, TransportError};
