//! What whole-system tests stand on: a Linux guest that runs a script under QEMU, a daemon beside it, and a way to
//! say that a test was skipped.
//!
//! A guest test asks [`lab::require`] for the lab (QEMU, kernel, initramfs: `cargo xtask lab` makes it), starts a
//! [`daemon::Daemon`], boots a [`guest::Guest`] attached to its socket, and looks at what the guest's script printed.
//! Everything that a test starts ends with it: processes are killed and folders removed when their owners are dropped.

pub mod bundle;
pub mod cpio;
pub mod daemon;
pub mod failure;
pub mod guest;
pub mod interrupt;
pub mod lab;
mod message;
pub mod process;
pub mod qmp;
pub mod relay;
pub mod running;
pub mod scratch;
pub mod skip;
pub mod virtio;
pub mod vsock;
