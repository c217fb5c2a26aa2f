//! The vhost-user protocol: typed messages, back-end and front-end endpoints.
//!
//! The document is "Vhost-user Protocol" of QEMU 11.1 (docs/interop/vhost-user.rst); section names in this crate's
//! comments are its headings. The *front-end* is the VMM, the *back-end* the process that serves the virtqueues. This
//! crate knows messages and sockets; what a message does to a device is the host's business (crate `vhost-device`).
//!
//! * [`BackendEndpoint`]: the back-end's side of the socket, non-blocking.
//! * [`BackendChannel`]: requests of the back-end to the front-end, on the socket of `SET_BACKEND_REQ_FD`.
//! * [`FrontendEndpoint`]: the front-end's side, blocking with a time-out.
//! * [`BackendListener`]: the front-end's side of the back-end's requests.
//!
//! # What is refused, and what happens then
//!
//! Everything that arrives is untrusted. There are two kinds of faults:
//!
//! * A message that cannot be delimited ([`Error::Header`], an end of file within it): the place where the next one
//!   begins is unknown, so the endpoint takes nothing more and the connection has to be closed.
//! * A message that is complete but wrong ([`Error::Invalid`]): the endpoint goes on. The error carries the ticket to
//!   answer with, so that a front-end which asked for an acknowledgement (section "VHOST_USER_PROTOCOL_F_REPLY_ACK")
//!   is told of the failure, and one that asked nothing is told nothing. Whether to go on is the host's choice.
//!
//! Every descriptor that arrives is owned from its arrival: with a refused message it is closed.

mod backend;
mod backend_request;
mod body;
mod channel;
mod code;
mod deadline;
mod error;
mod features;
mod frame;
mod frontend;
mod header;
mod listener;
mod output;
mod payload;
mod reply;
mod request;
mod rules;
mod socket;

pub use backend::{BackendEndpoint, Received};
pub use backend_request::BackendRequest;
pub use body::{
    ConfigHeader, InflightArea, IotlbAccess, IotlbChange, IotlbReport, LogArea, MAX_CONFIG_SIZE,
    MemoryRegion, MigrationPhase, ObjectId, ShmemRange, SingleRegion, TransferDirection, VringAddr,
    VringState, XenMapping, config_flags, xen_flags,
};
pub use channel::{BackendChannel, ChannelReply, MAX_UNANSWERED, RequestId, Sent};
pub use code::{BackendCode, FrontendCode};
pub use error::{Error, HeaderFault, Reason};
pub use features::{F_LOG_ALL, F_PROTOCOL_FEATURES, ProtocolFeatures};
pub use frontend::{FrontendEndpoint, Reply};
pub use header::{HEADER_LEN, Header, MAX_BODY, MAX_FDS, VERSION, flags};
pub use listener::{BackendListener, BackendReceived};
pub use output::MAX_OUTPUT;
pub use reply::{Answer, ReplyTicket};
pub use request::FrontendRequest;
