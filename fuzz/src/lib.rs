//! What fuzzers feed with bytes. Each function takes any bytes, plays a hostile driver, front-end, back-end or control
//! client from them, and panics if a promise is broken; see SECURITY.md for the promises.
//!
//! Plain functions of a plain crate: `cargo test` replays the inputs in `corpus/` with any compiler, `cargo xtask fuzz` looks
//! for new ones with libFuzzer (`libfuzzer/`, a workspace of its own).
mod block;
mod bus;
mod bytes;
mod console;
mod daemon;
mod guarded;
mod pci;
mod proxy;
mod qcow2;
mod ring;
mod stepped;
mod transport;
mod vsock;
mod wire;

pub use block::block;
pub use bus::bus;
pub use console::console;
pub use daemon::{control, session};
pub use pci::pci;
pub use proxy::proxy;
pub use qcow2::qcow2;
pub use ring::{ring_packed, ring_split};
pub use transport::{transport_ccw, transport_mmio, transport_pci};
pub use vsock::vsock;
pub use wire::{wire_backend, wire_channel, wire_frontend};

/// A fuzz target: its name, and what takes the bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 17] = [
    ("block", block),
    ("vsock", vsock),
    ("bus", bus),
    ("console", console),
    ("pci", pci),
    ("ring_split", ring_split),
    ("ring_packed", ring_packed),
    ("wire_backend", wire_backend),
    ("wire_frontend", wire_frontend),
    ("wire_channel", wire_channel),
    ("session", session),
    ("proxy", proxy),
    ("qcow2", qcow2),
    ("control", control),
    ("transport_mmio", transport_mmio),
    ("transport_pci", transport_pci),
    ("transport_ccw", transport_ccw),
];
