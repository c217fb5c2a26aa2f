//! The host's side of connections: where those of the guest go to, and where clients come from.
//!
//! | file | what is there |
//! |---|---|
//! | `unix.rs` | Unix sockets: `<path>_<port>` for the guest's connections, CONNECT lines on `<path>` for clients |
//! | `vsock.rs` | AF_VSOCK: another context ID for the guest's connections, ports of the host for clients |
//! | `sibling.rs` | other guests of the same process |
pub(crate) mod sibling;
pub(crate) mod unix;
pub(crate) mod vsock;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::packet::Kind;

/// Where connections of the guest to the host (context ID 2) go, and clients on the host come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostSide {
    /// Nowhere: only siblings are reached.
    Nobody,
    /// Unix sockets in the file system: see the README.
    Unix(PathBuf),
    /// AF_VSOCK of the host.
    Vsock {
        /// Where the guest's connections go, on the same port.
        forward_cid: u32,
        /// Ports of the host whose connections go to the same port of the guest.
        listen: Vec<ListenPort>,
    },
}

/// A port to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenPort {
    /// The port.
    pub port: u32,
    /// What connects.
    pub kind: Kind,
}

/// What became of a call.
pub(crate) enum Dialed {
    Connected(OwnedFd),
    /// It is connected, or refused, when it becomes writable.
    Pending(OwnedFd),
    /// The listener has too much to do.
    Busy,
    Refused(Errno),
}

/// A socket that clients connect to.
pub(crate) struct Listener {
    pub(crate) socket: OwnedFd,
    pub(crate) kind: Kind,
    /// The guest's port; none: the client says.
    pub(crate) port: Option<u32>,
    /// Its file, if it has one: removed at the end.
    _file: Option<unix::SocketFile>,
}

/// The host's side of one guest.
pub(crate) struct Host {
    side: HostSide,
    pub(crate) listeners: Vec<Listener>,
    /// Longest message that a socket takes.
    longest_message: u32,
}

/// The host's side cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// A socket address is too short for it.
    #[error(
        "{path:?} and a port have more than {} bytes, which is all that a socket address holds; use a shorter path",
        unix::PATH_MAX
    )]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Somebody serves that socket.
    #[error("another process listens on {0:?}; stop it or choose another path")]
    InUse(PathBuf),
    /// The name exists and is not a socket.
    #[error("{0:?} exists and is not a socket; remove it or choose another path")]
    NotSocket(PathBuf),
    /// Any other refusal of the system.
    #[error("cannot listen on {name}: {source}")]
    System {
        /// The socket.
        name: String,
        /// Why it failed.
        source: Errno,
    },
}

impl Host {
    /// Listens. `buffer` is how much of the guest's a socket has to take at once.
    pub(crate) fn open(side: HostSide, buffer: u32) -> Result<Host, HostError> {
        let listeners = match &side {
            HostSide::Nobody => Vec::new(),
            HostSide::Unix(path) => unix::listen(path)?,
            HostSide::Vsock { listen, .. } => vsock::listen(listen)?,
        };
        Ok(Host { side, listeners, longest_message: unix::longest_message(buffer) })
    }

    /// What can be promised for a flow of that kind: a message has to fit into the socket as a whole.
    pub(crate) fn cap(&self, kind: Kind, wanted: u32) -> u32 {
        match kind {
            Kind::Stream => wanted,
            Kind::SeqPacket => wanted.min(self.longest_message),
        }
    }

    /// Connects to what is at that port of the host. Does not wait.
    pub(crate) fn dial(&self, kind: Kind, port: u32) -> Dialed {
        match &self.side {
            HostSide::Nobody => Dialed::Refused(Errno::CONNREFUSED),
            HostSide::Unix(path) => unix::dial(path, kind, port, self.longest_message),
            HostSide::Vsock { forward_cid, .. } => vsock::dial(*forward_cid, kind, port),
        }
    }

    /// Makes a client's socket fit for use.
    pub(crate) fn prepare(&self, socket: &OwnedFd, kind: Kind) {
        if let (HostSide::Unix(_), Kind::SeqPacket) = (&self.side, kind) {
            unix::set_longest_message(socket, self.longest_message);
        }
    }
}

pub(crate) fn socket_type(kind: Kind) -> rustix::net::SocketType {
    match kind {
        Kind::Stream => rustix::net::SocketType::STREAM,
        Kind::SeqPacket => rustix::net::SocketType::SEQPACKET,
    }
}
