//! Requests of the back-end to the front-end (section "Back-end communication").

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::SocketType;
use zerocopy::FromBytes;

use crate::frame::{Direction, Frame, FrameReader};
use crate::header::flags;
use crate::output::Output;
use crate::rules::{ReplyKind, backend_rule};
use crate::{BackendCode, BackendRequest, Error, ProtocolFeatures};

/// Most requests that wait for their answers on one channel: whoever leaves as many unanswered answers none.
pub const MAX_UNANSWERED: usize = 1024;

/// The back-end's side of the socket that `SET_BACKEND_REQ_FD` brought.
///
/// Nothing in it sleeps, and a front-end that does not read it costs nothing but its own news. Watch it for writing
/// while [`wants_write`](Self::wants_write), and for reading if anything is [asked](Self::request) that is answered;
/// else reading tells no more than its end.
#[derive(Debug)]
pub struct BackendChannel {
    socket: OwnedFd,
    negotiated: ProtocolFeatures,
    output: Output,
    frames: FrameReader,
    next_id: u64,
    /// Requests that will be answered, in the order of their sending, which is that of the answers.
    unanswered: VecDeque<(RequestId, BackendCode)>,
}

/// Stands for a request that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(u64);

/// What the front-end answered.
#[derive(Debug)]
pub struct ChannelReply {
    /// To which request.
    pub id: RequestId,
    /// What that was.
    pub code: BackendCode,
    /// Zero, or the front-end's error.
    pub value: u64,
    /// The object that was looked up.
    pub fd: Option<OwnedFd>,
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
        Ok(BackendChannel {
            socket,
            negotiated,
            output: Output::default(),
            frames: FrameReader::new(Direction::Replies),
            next_id: 0,
            unanswered: VecDeque::new(),
        })
    }

    /// Says which protocol features hold from now on.
    pub fn set_protocol_features(&mut self, negotiated: ProtocolFeatures) {
        self.negotiated = negotiated;
    }

    /// Tells the front-end that the configuration space has changed (`BACKEND_CONFIG_CHANGE_MSG`). Not acknowledged.
    ///
    /// # Errors
    ///
    /// [`Error::NotNegotiated`] without `CONFIG`; [`Error::Disconnected`] and [`Error::Io`] end the channel.
    pub fn config_changed(&mut self) -> Result<Sent, Error> {
        self.check(&BackendRequest::ConfigChange)?;
        self.flush()?;
        // The front-end reads the configuration space after the message, so one that is still to be sent covers this
        // change. One that is partly sent may have been seen, and does not.
        let (message, _) = BackendRequest::ConfigChange.message(0);
        if self.output.is_untouched(&message) {
            return Ok(Sent::Merged);
        }
        self.output.push(message, Vec::new())?;
        self.flush()?;
        Ok(if self.wants_write() { Sent::Later } else { Sent::Now })
    }

    /// Sends any request. It is answered if `acknowledge` asks for that and
    /// [`REPLY_ACK`](ProtocolFeatures::REPLY_ACK) is negotiated, and `BACKEND_SHARED_OBJECT_LOOKUP` always is: see
    /// [`receive`](Self::receive).
    ///
    /// # Errors
    ///
    /// [`Error::NotNegotiated`]: nothing was sent. [`Error::OutputFull`]: neither, because too many wait for the
    /// front-end to read or to answer them. [`Error::Argument`]: a ring that the message has no room for. Others end
    /// the channel.
    pub fn request(&mut self, request: BackendRequest, acknowledge: bool) -> Result<RequestId, Error> {
        self.check(&request)?;
        if let BackendRequest::VringHostNotifier { index: 256.., .. } = request {
            return Err(Error::Argument("index"));
        }
        let code = request.code();
        let own = backend_rule(code).reply != ReplyKind::Ack;
        let acknowledge = acknowledge && self.negotiated.contains(ProtocolFeatures::REPLY_ACK);
        let answered = own || acknowledge;
        if answered && self.unanswered.len() >= MAX_UNANSWERED {
            return Err(Error::OutputFull);
        }
        // A lookup is answered either way, and must not be answered twice.
        let (message, fd) = request.message(if acknowledge && !own { flags::NEED_REPLY } else { 0 });
        self.output.push(message, fd.into_iter().collect())?;
        let id = RequestId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        if answered {
            self.unanswered.push_back((id, code));
        }
        self.flush()?;
        Ok(id)
    }

    /// The front-end's next answer. `None`: it has not arrived completely.
    ///
    /// # Errors
    ///
    /// All end the channel; [`Error::BadChannelReply`] is an answer that belongs to no request.
    pub fn receive(&mut self) -> Result<Option<ChannelReply>, Error> {
        let Some(frame) = self.frames.read(self.socket.as_fd())? else { return Ok(None) };
        self.answered(frame).inspect_err(|_| self.frames.poison()).map(Some)
    }

    fn answered(&mut self, frame: Frame) -> Result<ChannelReply, Error> {
        let Frame { header, body, fds, fd_fault } = frame;
        let bad = |what| Err(Error::BadChannelReply { code: header.request, what });
        let Some((id, code)) = self.unanswered.pop_front() else { return bad("nothing was asked") };
        if header.request != code.code() {
            return bad("another request's");
        }
        let Ok(value) = u64::read_from_bytes(&body) else { return bad("wrong length") };
        let found = value == 0 && backend_rule(code).reply == ReplyKind::Lookup;
        if fd_fault.is_some() || fds.len() != usize::from(found) {
            return bad("wrong number of file descriptors");
        }
        Ok(ChannelReply { id, code, value, fd: fds.into_iter().next() })
    }

    fn check(&self, request: &BackendRequest) -> Result<(), Error> {
        let unmet = request.needs().difference(self.negotiated);
        if unmet.is_empty() { Ok(()) } else { Err(Error::NotNegotiated(unmet)) }
    }

    /// Whether a message waits for the socket to become writable.
    pub fn wants_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// Requests that the front-end has not answered yet, though it is to.
    pub fn unanswered(&self) -> usize {
        self.unanswered.len()
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
