//! What a request is answered with. The rules of acknowledgements are here and nowhere else.

use zerocopy::IntoBytes;

use crate::body::{ConfigHeader, VringState};
use crate::header::{self, flags};
use crate::rules::ReplyKind;
use crate::{Error, ProtocolFeatures};

/// Stands for the answer that a request is to get. Belongs to the endpoint that gave it out, and is used up by
/// [`BackendEndpoint::reply`](crate::BackendEndpoint::reply), which every request should end in, also one that asks
/// for no answer.
#[derive(Debug)]
#[must_use = "a request has to be answered"]
pub struct ReplyTicket {
    pub(crate) id: u64,
    pub(crate) code: u32,
    pub(crate) kind: ReplyKind,
    /// The need_reply bit of the request.
    pub(crate) need_reply: bool,
    /// What the reply repeats of a request for configuration space.
    pub(crate) config: ConfigHeader,
    /// What the reply repeats of a request for a ring's base.
    pub(crate) index: u32,
}

/// How a request went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was carried out. For requests without a reply of their own.
    Done,
    /// It was not. For every request; some cannot tell ([`Error::CannotFail`]).
    Failed,
    /// The value that was asked for: features, protocol features, number of queues or slots, status.
    U64(u64),
    /// The base of the ring that `GET_VRING_BASE` was about.
    VringBase(u32),
    /// As many bytes of configuration space as `GET_CONFIG` asked for.
    Config(Vec<u8>),
}

/// Value of the acknowledgement of a failure: anything but zero.
const FAILURE: u64 = 1;

impl ReplyTicket {
    /// The code of the request.
    pub fn code(&self) -> u32 {
        self.code
    }

    /// Whether something has to be sent: always for requests with a reply of their own, else when the front-end asked
    /// for it and may ask (section "VHOST_USER_PROTOCOL_F_REPLY_ACK").
    pub(crate) fn owes_reply(&self, negotiated: ProtocolFeatures) -> bool {
        self.kind != ReplyKind::Ack || (self.need_reply && negotiated.contains(ProtocolFeatures::REPLY_ACK))
    }

    /// The message to send for `answer`, if any.
    pub(crate) fn message(
        &self,
        answer: &Answer,
        negotiated: ProtocolFeatures,
    ) -> Result<Option<Vec<u8>>, Error> {
        let code = self.code;
        let u64_reply = |value: u64| Ok(Some(header::message(code, flags::REPLY, &[value.as_bytes()])));
        match (self.kind, answer) {
            (ReplyKind::Ack, Answer::Done | Answer::Failed) if !self.owes_reply(negotiated) => Ok(None),
            (ReplyKind::Ack | ReplyKind::Status, Answer::Done) => u64_reply(0),
            (ReplyKind::Ack | ReplyKind::Status, Answer::Failed) => u64_reply(FAILURE),
            (ReplyKind::U64, Answer::U64(value)) => u64_reply(*value),
            (ReplyKind::VringState, Answer::VringBase(num)) => {
                let state = VringState { index: self.index, num: *num };
                Ok(Some(header::message(code, flags::REPLY, &[state.as_bytes()])))
            }
            // "Payload size MUST match the front-end's request".
            (ReplyKind::Config, Answer::Config(data))
                if u32::try_from(data.len()) == Ok(self.config.size) =>
            {
                Ok(Some(header::message(code, flags::REPLY, &[self.config.as_bytes(), data])))
            }
            // "Zero length of payload to indicate an error": QEMU takes any other length than the right one for an
            // error. The front-end of the `vhost` crate waits for the full length whatever comes, so a host does well
            // to fail only where there is nothing else to say.
            (ReplyKind::Config, Answer::Failed) => Ok(Some(header::message(code, flags::REPLY, &[]))),
            (_, Answer::Failed) => Err(Error::CannotFail { code }),
            _ => Err(Error::WrongAnswer { code }),
        }
    }
}
