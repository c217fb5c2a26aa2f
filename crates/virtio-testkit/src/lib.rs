//! The driver side of virtio, for tests of devices and hosts.
//!
//! It is an **oracle**: written from the specification alone, sharing no code with `vm-virtio`'s queues, and it checks
//! everything that a device owes to a driver. What breaks a rule is reported as a [`Violation`] that names the rule.
//!
//! | part | what for |
//! |---|---|
//! | [`TestRam`] | guest memory behind a memfd, with an allocator and guard bytes |
//! | [`RingDriver`] | one virtqueue, split or packed: chains of any shape, checks, raw access to break rules |
//! | [`MemoryHost`] | a device in this process, engine and lanes driven step by step in one thread |
//! | [`VhostUserDriver`] | a device behind a vhost-user socket, set up in the order in which QEMU does it |
//! | [`SharedMemory`] | a VMM that maps what a back-end asks it to |
//! | [`transport`] | drivers of transports, and a device behind one, stepped in one thread |
//! | [`hostile`] | a driver that breaks the rules of rings, one at a time or at random |
//! | [`mod@conformance`] | every rule for devices as a line that runs over any of these: one line in a device's tests |
//! | [`mod@daemon`] | a daemon as a process: started, ready, ended, never left behind |
//! | `second_opinion` (cargo feature `virtio-drivers`) | drivers of the `virtio-drivers` crate over our registers |
//! | [`load`] | a driver that is fast instead of strict, and the floors to measure back-ends by |
//!
//! # A device test
//! ```text
//! let mut host = MemoryHost::builder(MyDevice::new()).layout(RingLayout::Packed).start();
//! let reply = host.ram().writable(64);
//! host.ring(0).add(&[host.ram().readable(&request), reply]);
//! host.kick(0);
//! host.settle();
//! let used = host.ring(0).used().expect("an answer");
//! ```

pub mod conformance;
mod connect;
pub mod daemon;
pub mod hostile;
pub mod load;
mod memory_host;
mod ram;
pub mod ring;
#[cfg(feature = "virtio-drivers")]
pub mod second_opinion;
mod shared_memory;
pub mod transport;
mod vhost_user_driver;
mod violation;

pub use connect::connect;
pub use memory_host::{MemoryHost, MemoryHostBuilder};
pub use ram::{RamRegion, TestRam};
pub use ring::{Buf, Interrupts, RingDriver, RingFull, RingLayout, Shape, Used};
pub use shared_memory::SharedMemory;
pub use vhost_user_driver::{DriverError, PHYSICAL, VhostUserDriver, VhostUserOptions};
pub use violation::Violation;
