//! What can go wrong, by who has to do what about it.

use std::io;

use crate::code::frontend_name;
use crate::{HEADER_LEN, MAX_BODY, ProtocolFeatures, ReplyTicket};

/// An error of an endpoint.
///
/// After [`Invalid`](Self::Invalid) a receiving endpoint goes on. After any other error of receiving it does not:
/// every later attempt gives [`Poisoned`](Self::Poisoned).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("the vhost-user socket failed")]
    Io(#[from] io::Error),
    /// The other side closed the connection between two messages.
    #[error("the other side closed the connection")]
    Disconnected,
    /// The other side closed the connection within a message.
    #[error("the other side closed the connection {have} bytes into a message")]
    Truncated {
        /// How much of the message, header included, had arrived.
        have: usize,
    },
    /// A header that no message can be taken by.
    #[error("bad header (request {request}, flags {flags:#x}, size {size}): {fault}")]
    Header {
        /// The header's request.
        request: u32,
        /// The header's flags.
        flags: u32,
        /// The header's size.
        size: u32,
        /// What is wrong with it.
        fault: HeaderFault,
    },
    /// A complete message that breaks a rule. Its descriptors are closed. Answer with the ticket
    /// ([`Answer::Failed`](crate::Answer::Failed)) and go on, or close the connection.
    #[error("{} ({code}) refused: {reason}", ticket.name)]
    Invalid {
        /// The code in the header.
        code: u32,
        /// The rule.
        reason: Reason,
        /// What the request is answered with.
        ticket: ReplyTicket,
    },
    /// An earlier error has ended this endpoint.
    #[error("the connection cannot go on after an earlier error")]
    Poisoned,
    /// The next message was asked for while a reply to this one is owed. Replies go out in the order of requests, and
    /// none may be left out (section "VHOST_USER_PROTOCOL_F_REPLY_ACK"): an error of the caller.
    #[error("{} ({code}) has not been answered", frontend_name(*code))]
    ReplyOwed {
        /// The code of the request.
        code: u32,
    },
    /// The request's reply has no way to say that it failed; the connection has to be closed.
    #[error("{} ({code}) failed, which its reply cannot say", frontend_name(*code))]
    CannotFail {
        /// The code of the request.
        code: u32,
    },
    /// The answer is not one of this request: an error of the caller. Nothing was sent.
    #[error("wrong kind of answer to {} ({code})", frontend_name(*code))]
    WrongAnswer {
        /// The code of the request.
        code: u32,
    },
    /// The other side does not read: more than [`MAX_OUTPUT`](crate::MAX_OUTPUT) bytes wait to be sent.
    #[error("the other side does not read what it is sent")]
    OutputFull,
    /// The message needs protocol features that were not negotiated. Nothing was sent.
    #[error("the protocol feature {0:?} is not negotiated")]
    NotNegotiated(ProtocolFeatures),
    /// Front-end: the back-end did not answer, or did not read, in time.
    #[error("the back-end did not answer in time")]
    TimedOut,
    /// Front-end: the back-end says that the request failed.
    #[error("the back-end refused {} ({code}) with {value}", frontend_name(*code))]
    Refused {
        /// The code of the request.
        code: u32,
        /// The value of the acknowledgement; zero for a reply without a payload.
        value: u64,
    },
    /// Front-end: a reply that does not belong to the request.
    #[error("bad reply to {} ({code}): {what}", frontend_name(*code))]
    BadReply {
        /// The code of the request.
        code: u32,
        /// What is wrong with the reply.
        what: &'static str,
    },
    /// Back-end: an answer on the channel for its requests that belongs to none of them.
    #[error("bad answer to request {code} of the back-end: {what}")]
    BadChannelReply {
        /// The code in the header.
        code: u32,
        /// What is wrong with the answer.
        what: &'static str,
    },
    /// An argument that the message has no room for. Nothing was sent.
    #[error("argument out of range: {0}")]
    Argument(&'static str),
}

/// Why a header cannot be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderFault {
    /// The version's bits are not 1 (section "Header").
    #[error("the version is not 1")]
    Version,
    /// The reply bit is set in a request, or is not set in a reply (section "Header").
    #[error("the reply bit is wrong")]
    ReplyBit,
    /// The payload is longer than any that is accepted.
    #[error("the payload is longer than {MAX_BODY} bytes")]
    Oversized,
}

/// The rule that a complete message breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The document has no such request.
    #[error("there is no such request")]
    Unknown,
    /// The document has the request, this crate does not serve it.
    #[error("the request is not supported")]
    Unsupported,
    /// The request depends on a protocol feature that was not negotiated.
    #[error("the protocol feature {0:?} is not negotiated")]
    NotNegotiated(ProtocolFeatures),
    /// The payload is too short or too long for the request, or for what it says itself.
    #[error("the payload has {got} bytes instead of {expected}")]
    BodySize {
        /// Bytes that there should be. A payload too short for its fixed part should have at least this many.
        expected: usize,
        /// Bytes that there are.
        got: usize,
    },
    /// Too few or too many descriptors.
    #[error("{got} file descriptors instead of {expected}")]
    FdCount {
        /// Descriptors that there should be.
        expected: usize,
        /// Descriptors that there are.
        got: usize,
    },
    /// Descriptors came with another byte than the header's first (section "Communication").
    #[error("file descriptors in the middle of the message")]
    StrayFds,
    /// There were more descriptors than any message has, or than this process may open.
    #[error("more file descriptors than could be received")]
    FdsTruncated,
    /// A field has a value that is not defined for it.
    #[error("{field} is {value}")]
    Value {
        /// The document's name of the field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
}

const _: () = assert!(HEADER_LEN == size_of::<crate::Header>());
