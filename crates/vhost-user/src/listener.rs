//! The front-end's side of the back-end's requests (section "Back-end communication").

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::code::UNKNOWN;
use crate::deadline::Deadline;
use crate::frame::{Direction, FrameReader};
use crate::output::Output;
use crate::reply::{Answer, ReplyTicket};
use crate::rules::{ReplyKind, backend_rule};
use crate::{BackendCode, BackendRequest, Error, ProtocolFeatures};

/// Receives the back-end's requests.
#[derive(Debug)]
pub struct BackendListener {
    socket: UnixStream,
    frames: FrameReader,
    output: Output,
    negotiated: ProtocolFeatures,
}

/// A request of the back-end and what to answer it with.
#[derive(Debug)]
pub struct BackendReceived {
    /// The request.
    pub request: BackendRequest,
    /// To be given to [`BackendListener::reply`].
    pub ticket: ReplyTicket,
}

impl BackendListener {
    /// A listener, and the other end of its socket for
    /// [`set_backend_req_fd`](crate::FrontendEndpoint::set_backend_req_fd).
    pub fn pair(negotiated: ProtocolFeatures) -> Result<(BackendListener, OwnedFd), Error> {
        let (socket, other) = UnixStream::pair()?;
        let frames = FrameReader::new(Direction::Requests);
        Ok((BackendListener { socket, frames, output: Output::default(), negotiated }, other.into()))
    }

    /// Says which protocol features hold from now on.
    pub fn set_protocol_features(&mut self, negotiated: ProtocolFeatures) {
        self.negotiated = negotiated;
    }

    /// The next request, without waiting for it. `None`: it has not arrived completely.
    ///
    /// # Errors
    ///
    /// As [`BackendEndpoint::receive`](crate::BackendEndpoint::receive).
    pub fn receive(&mut self) -> Result<Option<BackendReceived>, Error> {
        let Some(frame) = self.frames.read(self.socket.as_fd())? else { return Ok(None) };
        let code = frame.header.request;
        let known = BackendCode::from_code(code);
        let kind = known.map_or(ReplyKind::Ack, |code| backend_rule(code).reply);
        let name = known.map_or(UNKNOWN, BackendCode::name);
        let ticket = ReplyTicket::new(0, kind, name, &frame);
        match BackendRequest::parse(self.negotiated, frame) {
            Ok(request) => Ok(Some(BackendReceived { request, ticket })),
            Err(reason) => Err(Error::Invalid { code, reason, ticket }),
        }
    }

    /// The next request, waiting for it at most `timeout`. `None`: the time is over.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<BackendReceived>, Error> {
        let deadline = Deadline::after(timeout);
        loop {
            if let Some(received) = self.receive()? {
                return Ok(Some(received));
            }
            match deadline.readable(self.socket.as_fd()) {
                Err(Error::TimedOut) => return Ok(None),
                other => other?,
            }
        }
    }

    /// Answers a request: a lookup with [`Answer::Fd`] or [`Answer::Failed`], any other with an acknowledgement, if the
    /// back-end asked for it and [`REPLY_ACK`](ProtocolFeatures::REPLY_ACK) is negotiated.
    pub fn reply(&mut self, ticket: ReplyTicket, answer: Answer) -> Result<(), Error> {
        if let Some((bytes, fds)) = ticket.message(answer, self.negotiated)? {
            self.output.push(bytes, fds)?;
        }
        self.output.flush(self.socket.as_fd()).map(|_| ())
    }
}

impl AsFd for BackendListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
