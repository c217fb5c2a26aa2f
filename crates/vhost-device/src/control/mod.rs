//! The control socket: what whoever runs the daemon can see and change while guests use it.
//!
//! One JSON object a line in both directions; `CONTROL.md` of this crate is its description. The main thread serves it
//! and never waits for a client: a request is answered from counters and from what devices keep, in one go.
//!
//! A client is not trusted to behave. What it can cost is bounded: a line has at most [`MAX_LINE`] bytes; the next
//! request is not read before the reply to the last one has gone, so there is one reply in memory at most; each client
//! has a few requests and no more before guests get their turn; [`MAX_CLIENTS`] are served, one more takes the place of
//! the one that was silent for longest.
//!
//! | module | what for |
//! |---|---|
//! | [`protocol`] | requests and replies, as they are on the wire; for clients, too |
//! | [`report`] | what is told of guests, their queues and the process |
//! | [`prometheus`] | the same as Prometheus text |
//! | `plane` | carries requests out |
//! | `client`, `server` | connections |
mod client;
mod plane;
pub mod prometheus;
pub mod protocol;
pub mod report;
mod server;

pub(crate) use plane::Plane;
pub(crate) use server::Server;

/// Longest line that a client may send, in bytes, without its end.
pub const MAX_LINE: usize = 64 << 10;
/// Most clients at a time.
pub const MAX_CLIENTS: usize = 64;
/// Most properties that a client may watch at a time.
pub const MAX_WATCHES: usize = 64;
/// Shortest interval between two looks at a watched property, in milliseconds.
pub const MIN_INTERVAL_MS: u64 = 50;
