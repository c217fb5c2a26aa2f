//! What a request is answered with. The rules of acknowledgements are here and nowhere else.

use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, IntoBytes};

use crate::body::{
    ConfigHeader, InflightArea, InflightBody, MemTableHeader, MemoryRegion, ShmemConfigBody, VringState,
    XenRegion,
};
use crate::frame::Frame;
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
    /// The document's name of the request.
    pub(crate) name: &'static str,
    pub(crate) kind: ReplyKind,
    /// The need_reply bit of the request.
    pub(crate) need_reply: bool,
    /// The beginning of the request's payload, if the reply repeats it. Of a payload that turns out to be wrong
    /// nothing is repeated, because only a failure can be answered.
    pub(crate) request: Vec<u8>,
}

/// How a request went.
#[derive(Debug)]
pub enum Answer {
    /// It was carried out. For requests without a reply of their own, and for those whose reply brings nothing new:
    /// `SET_LOG_BASE`, `IOTLB_MSG`, `POSTCOPY_END`, `CHECK_DEVICE_STATE`, and `SET_DEVICE_STATE_FD` if the
    /// front-end's channel is used.
    Done,
    /// It was not. For every request; some cannot tell ([`Error::CannotFail`]).
    Failed,
    /// The value that was asked for: features, protocol features, number of queues or slots, status.
    U64(u64),
    /// The base of the ring that `GET_VRING_BASE` was about.
    VringBase(u32),
    /// As many bytes of configuration space as `GET_CONFIG` asked for.
    Config(Vec<u8>),
    /// What `GET_INFLIGHT_FD` asked for.
    Inflight(InflightArea, OwnedFd),
    /// The id of the session that `CREATE_CRYPTO_SESSION` made, not negative.
    CryptoSession(i64),
    /// A file: of `GET_SHARED_OBJECT` and `BACKEND_SHARED_OBJECT_LOOKUP` the object, of `POSTCOPY_ADVISE` the
    /// userfaultfd, of `SET_DEVICE_STATE_FD` the front-end's end of a better channel.
    Fd(OwnedFd),
    /// Id and size in bytes of each shared memory region, for `GET_SHMEM_CONFIG`.
    ShmemConfig(Vec<(u8, u64)>),
    /// Where the back-end has mapped each region that `SET_MEM_TABLE` or `ADD_MEM_REG` brought, in their order: its own
    /// addresses, which a userfaultfd reports. In postcopy mode only, that is after `POSTCOPY_LISTEN` was carried out
    /// and until `POSTCOPY_END` is.
    Bases(Vec<u64>),
}

/// Value of the acknowledgement of a failure: anything but zero.
const FAILURE: u64 = 1;

/// The reply to `SET_DEVICE_STATE_FD`, bit 8: no descriptor comes with it.
pub(crate) const TRANSFER_NO_FD: u64 = 1 << 8;

/// The session id that says that there is no session.
const NO_SESSION: i64 = -1;

/// A reply and the descriptors that go with it.
pub(crate) type Message = (Vec<u8>, Vec<OwnedFd>);

impl ReplyTicket {
    pub(crate) fn new(id: u64, kind: ReplyKind, name: &'static str, frame: &Frame) -> Self {
        let repeated = frame.body.get(..kind.repeats().min(frame.body.len())).unwrap_or_default();
        let (code, need_reply) = (frame.header.request, frame.header.needs_reply());
        ReplyTicket { id, code, name, kind, need_reply, request: repeated.to_vec() }
    }

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
        answer: Answer,
        negotiated: ProtocolFeatures,
    ) -> Result<Option<Message>, Error> {
        let code = self.code;
        let reply = |body: &[&[u8]], fd: Option<OwnedFd>| {
            Ok(Some((header::message(code, flags::REPLY, body), fd.into_iter().collect())))
        };
        let value = |value: u64, fd: Option<OwnedFd>| reply(&[value.as_bytes()], fd);
        match (self.kind, answer) {
            (ReplyKind::Ack, Answer::Done | Answer::Failed) if !self.owes_reply(negotiated) => Ok(None),
            (ReplyKind::Ack | ReplyKind::Status, Answer::Done) => value(0, None),
            (ReplyKind::Ack | ReplyKind::Status | ReplyKind::Lookup, Answer::Failed) => value(FAILURE, None),
            (ReplyKind::Lookup, Answer::Fd(fd)) => value(0, Some(fd)),
            (ReplyKind::U64, Answer::U64(number)) => value(number, None),
            (ReplyKind::VringState, Answer::VringBase(num)) => {
                let VringState { index, .. } = self.repeated();
                reply(&[VringState { index, num }.as_bytes()], None)
            }
            // "Payload size MUST match the front-end's request".
            (ReplyKind::Config, Answer::Config(data)) if self.wants_config(data.len()) => {
                reply(&[&self.request, &data], None)
            }
            // "Zero length of payload to indicate an error": QEMU takes any other length than the right one for an
            // error. The front-end of the `vhost` crate waits for the full length whatever comes, so a host does well
            // to fail only where there is nothing else to say.
            (ReplyKind::Config, Answer::Failed) => reply(&[], None),
            // The document says that there is a reply, not what is in it. QEMU takes any payload, libvhost-user sends
            // eight bytes, and the `vhost` crate's front-end (Cloud Hypervisor's) takes nothing but the request again.
            (ReplyKind::Log, Answer::Done) => reply(&[&self.request], None),
            (ReplyKind::Inflight, Answer::Inflight(area, fd)) => self.inflight(area, Some(fd), reply),
            // QEMU goes on without tracking when it is told of an area without size, as libvhost-user does.
            (ReplyKind::Inflight, Answer::Failed) => self.inflight(InflightArea::default(), None, reply),
            (ReplyKind::CryptoSession, Answer::CryptoSession(id)) if id >= 0 => self.session(id, reply),
            (ReplyKind::CryptoSession, Answer::Failed) => self.session(NO_SESSION, reply),
            (ReplyKind::Fd, Answer::Fd(fd)) => reply(&[], Some(fd)),
            (ReplyKind::Fd, Answer::Failed) => reply(&[], None),
            (ReplyKind::TransferState, Answer::Done) => value(TRANSFER_NO_FD, None),
            (ReplyKind::TransferState, Answer::Fd(fd)) => value(0, Some(fd)),
            // "The back-end must not both indicate an error and return a file descriptor."
            (ReplyKind::TransferState, Answer::Failed) => value(TRANSFER_NO_FD | FAILURE, None),
            (ReplyKind::ShmemConfig, Answer::ShmemConfig(regions)) => {
                reply(&[ShmemConfigBody::new(&regions).as_bytes()], None)
            }
            (ReplyKind::Bases, Answer::Bases(bases)) => {
                let body = self.rebased(&bases, negotiated).ok_or(Error::WrongAnswer { code })?;
                reply(&[&body], None)
            }
            (_, Answer::Failed) => Err(Error::CannotFail { code }),
            _ => Err(Error::WrongAnswer { code }),
        }
    }

    /// What of the request is repeated, as far as the request was right.
    fn repeated<T: FromBytes + Default>(&self) -> T {
        T::read_from_bytes(&self.request).unwrap_or_default()
    }

    fn wants_config(&self, length: usize) -> bool {
        let ConfigHeader { size, .. } = self.repeated();
        self.request.len() == size_of::<ConfigHeader>() && u32::try_from(length) == Ok(size)
    }

    /// The request with these user addresses, if it has as many regions. One region behind padding and a table behind
    /// its count look the same.
    fn rebased(&self, bases: &[u64], negotiated: ProtocolFeatures) -> Option<Vec<u8>> {
        let region = match negotiated.contains(ProtocolFeatures::XEN_MMAP) {
            true => size_of::<XenRegion>(),
            false => size_of::<MemoryRegion>(),
        };
        let mut body = self.request.clone();
        let (_, regions) = body.split_at_mut_checked(size_of::<MemTableHeader>())?;
        if Some(regions.len()) != bases.len().checked_mul(region) {
            return None;
        }
        for (place, base) in regions.chunks_exact_mut(region).zip(bases) {
            let (mut mapped, _) = MemoryRegion::read_from_prefix(place).ok()?;
            mapped.user_addr = *base;
            mapped.write_to_prefix(place).ok()?;
        }
        Some(body)
    }

    /// In the length that the front-end sent.
    fn inflight<R>(
        &self,
        area: InflightArea,
        fd: Option<OwnedFd>,
        reply: impl Fn(&[&[u8]], Option<OwnedFd>) -> R,
    ) -> R {
        let body = InflightBody::from(area);
        let short = self.request.len() == InflightBody::SHORT;
        let length = if short { InflightBody::SHORT } else { size_of::<InflightBody>() };
        reply(&[body.as_bytes().get(..length).unwrap_or_default()], fd)
    }

    /// The request with the id in its last eight bytes.
    fn session<R>(&self, id: i64, reply: impl Fn(&[&[u8]], Option<OwnedFd>) -> R) -> R {
        let described = self.request.len().saturating_sub(size_of::<i64>());
        reply(&[self.request.get(..described).unwrap_or_default(), id.as_bytes()], None)
    }
}
