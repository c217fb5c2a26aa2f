//! The back-end's side of the socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use crate::code::frontend_name;
use crate::frame::{Direction, Frame, FrameReader};
use crate::output::Output;
use crate::reply::{Answer, ReplyTicket};
use crate::request::FrontendRequest;
use crate::rules::{Gate, ReplyKind, brings_memory, frontend_rule};
use crate::{Error, FrontendCode, ProtocolFeatures, Reason};

/// The back-end's side of a vhost-user socket. Nothing in it sleeps: watch its descriptor for reading, and for writing
/// while [`wants_write`](Self::wants_write).
///
/// For each request: [`receive`](Self::receive), carry it out, [`reply`](Self::reply). Requests are handed out one
/// after the other, because replies are matched to requests by their order only.
#[derive(Debug)]
pub struct BackendEndpoint {
    socket: UnixStream,
    frames: FrameReader,
    output: Output,
    /// What the host said in its answer to `GET_PROTOCOL_FEATURES`.
    offered: ProtocolFeatures,
    negotiated: ProtocolFeatures,
    /// `POSTCOPY_LISTEN` was carried out: messages that bring memory are answered with bases.
    postcopy: bool,
    /// Such an answer is out, and the front-end is going to say that it has heard it.
    bases_told: Option<FrontendCode>,
    next_ticket: u64,
    /// The ticket whose reply has to go out before the next request is handed out, and its code.
    owed: Option<(u64, u32)>,
}

/// A request and what to answer it with.
#[derive(Debug)]
pub struct Received {
    /// The request.
    pub request: FrontendRequest,
    /// To be given to [`BackendEndpoint::reply`].
    pub ticket: ReplyTicket,
}

impl BackendEndpoint {
    /// Takes a connected socket and makes it non-blocking.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(BackendEndpoint {
            socket,
            frames: FrameReader::new(Direction::Requests),
            output: Output::default(),
            offered: ProtocolFeatures::empty(),
            negotiated: ProtocolFeatures::empty(),
            postcopy: false,
            bases_told: None,
            next_ticket: 0,
            owed: None,
        })
    }

    /// The next request. `None`: it has not arrived completely.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a request to refuse, after which the next one can be received; [`Error::ReplyOwed`] while
    /// the last request waits for a reply that the front-end is going to wait for; all others end the connection.
    pub fn receive(&mut self) -> Result<Option<Received>, Error> {
        if let Some((_, code)) = self.owed {
            return Err(Error::ReplyOwed { code });
        }
        let Some(frame) = self.frames.read(self.socket.as_fd())? else { return Ok(None) };
        let code = frame.header.request;
        let heard = self.bases_heard(&frame);
        let ticket = self.ticket(&frame, heard.is_some());
        // Asked for by SET_PROTOCOL_FEATURES itself, a reply may be owed by what that negotiates.
        let may_owe = match FrontendCode::from_code(code) {
            Some(FrontendCode::SetProtocolFeatures) => ticket.need_reply,
            _ => ticket.owes_reply(self.negotiated),
        };
        if may_owe {
            self.owed = Some((ticket.id, code));
        }
        if let Some(code) = heard {
            self.bases_told = None;
            return Ok(Some(Received { request: FrontendRequest::BasesHeard(code), ticket }));
        }
        match self.understand(frame) {
            Ok(request) => Ok(Some(Received { request, ticket })),
            Err(reason) => Err(Error::Invalid { code, reason, ticket }),
        }
    }

    /// Answers a request: sends a reply if the request has one of its own, or an acknowledgement if the front-end asked
    /// for one and [`REPLY_ACK`](ProtocolFeatures::REPLY_ACK) is negotiated by now, or nothing.
    ///
    /// # Errors
    ///
    /// [`Error::CannotFail`]: close the connection. [`Error::WrongAnswer`]: the caller's mistake. Others are of sending
    /// and end the connection.
    pub fn reply(&mut self, ticket: ReplyTicket, answer: Answer) -> Result<(), Error> {
        let code = FrontendCode::from_code(ticket.code);
        let (mut offered, mut postcopy, mut told) = (self.offered, self.postcopy, self.bases_told);
        match (code, &answer) {
            (Some(FrontendCode::GetProtocolFeatures), Answer::U64(bits)) => {
                offered = ProtocolFeatures::from_bits_retain(*bits);
            }
            (Some(FrontendCode::PostcopyListen), Answer::Done) => postcopy = true,
            (Some(FrontendCode::PostcopyEnd), Answer::Done) => (postcopy, told) = (false, None),
            (code, Answer::Bases(_)) => told = code,
            _ => {}
        }
        let message = ticket.message(answer, self.negotiated)?;
        (self.offered, self.postcopy, self.bases_told) = (offered, postcopy, told);
        if self.owed.is_some_and(|(id, _)| id == ticket.id) {
            self.owed = None;
        }
        let Some((bytes, fds)) = message else { return Ok(()) };
        // A reply that is lost would make the front-end take the next one for it.
        self.output.push(bytes, fds).inspect_err(|_| self.frames.poison())?;
        self.flush()
    }

    /// Whether the last request waits for a reply that the front-end is going to wait for. Until then
    /// [`receive`](Self::receive) hands out nothing, so there is no use in watching for reading.
    pub fn reply_owed(&self) -> bool {
        self.owed.is_some()
    }

    /// Says which protocol features hold from now on: those that the front-end set and the host accepted. Which
    /// requests are legal, and whether acknowledgements are sent, depends on it.
    pub fn set_protocol_features(&mut self, negotiated: ProtocolFeatures) {
        self.negotiated = negotiated;
    }

    /// The protocol features that hold.
    pub fn protocol_features(&self) -> ProtocolFeatures {
        self.negotiated
    }

    /// Whether replies wait for the socket to become writable.
    pub fn wants_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.output.flush(self.socket.as_fd()).inspect_err(|_| self.frames.poison()).map(|_| ())
    }

    fn understand(&self, frame: Frame) -> Result<FrontendRequest, Reason> {
        let code = FrontendCode::from_code(frame.header.request).ok_or(Reason::Unknown)?;
        let rule = frontend_rule(code);
        let (allowed, feature) = match rule.gate {
            Gate::Always => (true, ProtocolFeatures::empty()),
            Gate::Negotiated(feature) => (self.negotiated.contains(feature), feature),
            Gate::Offered(feature) => ((self.offered | self.negotiated).contains(feature), feature),
        };
        if !allowed {
            return Err(Reason::NotNegotiated(feature));
        }
        FrontendRequest::parse(code, rule, self.negotiated, frame)
    }

    /// Which answer's bases this says to have been heard, which looks like a table without regions.
    fn bases_heard(&self, frame: &Frame) -> Option<FrontendCode> {
        let bare = frame.body == [0; size_of::<u64>()] && frame.fds.is_empty() && frame.fd_fault.is_none();
        self.bases_told.filter(|code| bare && code.code() == frame.header.request)
    }

    /// `heard`: it only says that bases were heard.
    fn ticket(&mut self, frame: &Frame, heard: bool) -> ReplyTicket {
        let id = self.next_ticket;
        self.next_ticket = id.wrapping_add(1);
        let kind = match FrontendCode::from_code(frame.header.request) {
            Some(code) if brings_memory(code) && self.postcopy && !heard => ReplyKind::Bases,
            Some(code) => match frontend_rule(code).reply {
                ReplyKind::Log if !self.negotiated.contains(ProtocolFeatures::LOG_SHMFD) => ReplyKind::Ack,
                kind => kind,
            },
            None => ReplyKind::Ack,
        };
        ReplyTicket::new(id, kind, frontend_name(frame.header.request), frame)
    }
}

impl AsFd for BackendEndpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
