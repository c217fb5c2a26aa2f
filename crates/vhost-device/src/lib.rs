//! Hosts any virtio device as a vhost-user daemon.

mod capabilities;
pub mod cli;
pub mod inherit;
pub mod listen;
pub mod logging;
mod notify;
mod signals;
#[cfg(test)]
mod testing;

pub use cli::CommonArgs;

/// Who a daemon is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Name of the program, e.g. `vhost-device-rng`.
    pub name: &'static str,
    /// The back-end type of `--print-capabilities`: `VHostUserBackendType` of `vhost-user.json`, or a name of our own
    /// for a device that the schema does not know.
    pub kind: &'static str,
    /// Version of the program.
    pub version: &'static str,
    /// Features of `--print-capabilities`, for types for which the schema defines some.
    pub capabilities: &'static [&'static str],
}

impl Identity {
    /// A daemon without features in `--print-capabilities`.
    pub const fn new(name: &'static str, kind: &'static str, version: &'static str) -> Self {
        Identity { name, kind, version, capabilities: &[] }
    }
}
