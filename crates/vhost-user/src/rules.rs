//! What the document demands of each request of the front-end, as a table: payload, descriptors, the protocol feature
//! that it depends on, and how it is answered.

use crate::{FrontendCode, ProtocolFeatures};

/// The payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Empty,
    U64,
    VringState,
    VringAddr,
    /// `u64`: bits 0-7 index, bit 8 no descriptor.
    VringFd,
    /// A count and as many regions.
    MemTable,
    SingleRegion,
    /// Offset, size, flags and as many bytes as size says.
    Config,
    /// The document has it, this crate has no type for it yet.
    Untyped,
}

/// The descriptors in the ancillary data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fds {
    None,
    One,
    /// As many as regions.
    PerRegion,
    /// One, or none with bit 8 of the payload.
    UnlessFlagged,
    /// None; one is tolerated and closed.
    OneClosed,
}

/// When the request may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    Always,
    /// The document says: when the feature "has been negotiated".
    Negotiated(ProtocolFeatures),
    /// The document says: when the feature is present in the answer to `GET_PROTOCOL_FEATURES`.
    Offered(ProtocolFeatures),
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplyKind {
    /// None of its own: an acknowledgement if one was asked for.
    Ack,
    /// A value; a failure cannot be expressed.
    U64,
    /// Zero or an error, always sent.
    Status,
    /// The index of the request and a number; a failure cannot be expressed.
    VringState,
    /// The request with bytes filled in, or nothing at all for a failure.
    Config,
    /// A payload or a descriptor that this crate has no type for yet.
    Untyped,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    pub(crate) body: Body,
    pub(crate) fds: Fds,
    pub(crate) gate: Gate,
    pub(crate) reply: ReplyKind,
}

/// The rule of a request. A match and not an array, so that a new code cannot be forgotten.
pub(crate) const fn rule(code: FrontendCode) -> Rule {
    use FrontendCode as C;
    use Gate::{Always, Negotiated, Offered};
    use ProtocolFeatures as P;
    use ReplyKind::Ack;

    const fn rule(body: Body, fds: Fds, gate: Gate, reply: ReplyKind) -> Rule {
        Rule { body, fds, gate, reply }
    }
    const fn untyped(reply: ReplyKind) -> Rule {
        rule(Body::Untyped, Fds::None, Always, reply)
    }

    match code {
        C::GetFeatures => rule(Body::Empty, Fds::None, Always, ReplyKind::U64),
        C::SetFeatures => rule(Body::U64, Fds::None, Always, Ack),
        C::SetOwner => rule(Body::Empty, Fds::None, Always, Ack),
        C::ResetOwner => rule(Body::Empty, Fds::None, Always, Ack),
        C::SetMemTable => rule(Body::MemTable, Fds::PerRegion, Always, Ack),
        C::SetVringNum => rule(Body::VringState, Fds::None, Always, Ack),
        C::SetVringAddr => rule(Body::VringAddr, Fds::None, Always, Ack),
        C::SetVringBase => rule(Body::VringState, Fds::None, Always, Ack),
        C::GetVringBase => rule(Body::VringState, Fds::None, Always, ReplyKind::VringState),
        C::SetVringKick => rule(Body::VringFd, Fds::UnlessFlagged, Always, Ack),
        C::SetVringCall => rule(Body::VringFd, Fds::UnlessFlagged, Always, Ack),
        C::SetVringErr => rule(Body::VringFd, Fds::UnlessFlagged, Always, Ack),
        // Both before SET_FEATURES too: bit 30 "does not need to be acknowledged".
        C::GetProtocolFeatures => rule(Body::Empty, Fds::None, Always, ReplyKind::U64),
        C::SetProtocolFeatures => rule(Body::U64, Fds::None, Always, Ack),
        C::GetQueueNum => rule(Body::Empty, Fds::None, Offered(P::MQ), ReplyKind::U64),
        // Bit 30 has to be negotiated, which is among the features that only the host knows.
        C::SetVringEnable => rule(Body::VringState, Fds::None, Always, Ack),
        C::SetBackendReqFd => rule(Body::Empty, Fds::One, Offered(P::BACKEND_REQ), Ack),
        C::GetConfig => rule(Body::Config, Fds::None, Negotiated(P::CONFIG), ReplyKind::Config),
        C::SetConfig => rule(Body::Config, Fds::None, Negotiated(P::CONFIG), Ack),
        C::ResetDevice => rule(Body::Empty, Fds::None, Offered(P::RESET_DEVICE), Ack),
        C::GetMaxMemSlots => rule(Body::Empty, Fds::None, Negotiated(P::CONFIGURE_MEM_SLOTS), ReplyKind::U64),
        C::AddMemReg => rule(Body::SingleRegion, Fds::One, Negotiated(P::CONFIGURE_MEM_SLOTS), Ack),
        C::RemMemReg => rule(Body::SingleRegion, Fds::OneClosed, Negotiated(P::CONFIGURE_MEM_SLOTS), Ack),
        C::SetStatus => rule(Body::U64, Fds::None, Negotiated(P::STATUS), Ack),
        C::GetStatus => rule(Body::Empty, Fds::None, Negotiated(P::STATUS), ReplyKind::U64),

        // Not typed yet. The kind of reply counts all the same: it decides how the refusal is told. SET_LOG_BASE has
        // a reply of its own only with LOG_SHMFD, which nothing here offers.
        C::SetLogBase | C::SetLogFd | C::SendRarp | C::NetSetMtu | C::SetVringEndian => untyped(Ack),
        C::CloseCryptoSession | C::PostcopyListen | C::SetInflightFd | C::GpuSetSocket | C::VringKick => {
            untyped(Ack)
        }
        C::IotlbMsg | C::PostcopyEnd | C::SetDeviceStateFd | C::CheckDeviceState => {
            untyped(ReplyKind::Status)
        }
        C::CreateCryptoSession | C::PostcopyAdvise | C::GetInflightFd => untyped(ReplyKind::Untyped),
        C::GetSharedObject | C::GetShmemConfig => untyped(ReplyKind::Untyped),
    }
}
