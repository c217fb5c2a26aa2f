//! Requests of the back-end to the front-end (section "Back-end communication").

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::SocketType;

use crate::output::Output;
use crate::{BackendCode, Error, ProtocolFeatures, header};

/// The back-end's side of the socket that `SET_BACKEND_REQ_FD` brought.
///
/// Nothing in it sleeps, and a front-end that does not read it costs nothing but its own news. It never asks for
/// acknowledgements, so it has nothing to read; watch it only to learn of its end, and for writing while
/// [`wants_write`](Self::wants_write).
#[derive(Debug)]
pub struct BackendChannel {
    socket: OwnedFd,
    negotiated: ProtocolFeatures,
    output: Output,
}

/// What became of a message on the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The socket has it.
    Now,
    /// It waits for the socket to become writable.
    Later,
    /// One that says the same waits already; this one is not needed.
    Merged,
}

impl BackendChannel {
    /// Takes the descriptor that the front-end sent.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it is not a stream socket.
    pub fn new(socket: OwnedFd, negotiated: ProtocolFeatures) -> Result<Self, Error> {
        let kind = rustix::net::sockopt::socket_type(&socket).map_err(io::Error::from)?;
        if kind != SocketType::STREAM {
            return Err(Error::Io(io::Error::new(io::ErrorKind::InvalidInput, "not a stream socket")));
        }
        Ok(BackendChannel { socket, negotiated, output: Output::default() })
    }

    /// Says which protocol features hold from now on.
    pub fn set_protocol_features(&mut self, negotiated: ProtocolFeatures) {
        self.negotiated = negotiated;
    }

    /// Tells the front-end that the configuration space has changed (`BACKEND_CONFIG_CHANGE_MSG`).
    ///
    /// # Errors
    ///
    /// [`Error::NotNegotiated`] without `CONFIG`; [`Error::Disconnected`] and [`Error::Io`] end the channel.
    pub fn config_changed(&mut self) -> Result<Sent, Error> {
        if !self.negotiated.contains(ProtocolFeatures::CONFIG) {
            return Err(Error::NotNegotiated(ProtocolFeatures::CONFIG));
        }
        self.flush()?;
        // The front-end reads the configuration space after the message, so one that is still to be sent covers this
        // change. One that is partly sent may have been seen, and does not.
        if self.output.untouched() > 0 {
            return Ok(Sent::Merged);
        }
        self.output.push(header::message(BackendCode::ConfigChangeMsg.code(), 0, &[]), Vec::new())?;
        self.flush()?;
        Ok(if self.wants_write() { Sent::Later } else { Sent::Now })
    }

    /// Whether a message waits for the socket to become writable.
    pub fn wants_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.output.flush(self.socket.as_fd()).map(|_| ())
    }
}

impl AsFd for BackendChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
