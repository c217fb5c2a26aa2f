//! What the document demands of each request, as two tables, one for either side: payload, descriptors, the protocol
//! feature that it depends on, and how it is answered.

use crate::body::{ConfigHeader, InflightBody, LogArea, VringState};
use crate::{BackendCode, FrontendCode, MAX_BODY, ProtocolFeatures};

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
    Log,
    /// With or without padding at its end.
    Inflight,
    Iotlb,
    ObjectId,
    /// Of any length; see [`CRYPTO_SESSION_MIN`](crate::body::CRYPTO_SESSION_MIN).
    CryptoSession,
    TransferState,
    /// Index and flags as [`VringFd`](Body::VringFd), size, offset.
    VringArea,
    Mmap,
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
    /// The request again; a failure cannot be expressed. Only with `LOG_SHMFD`, else [`Ack`](ReplyKind::Ack).
    Log,
    /// The area and its descriptor; an area without size and no descriptor for a failure.
    Inflight,
    /// The request with the session's id filled in, which is negative for a failure.
    CryptoSession,
    /// No payload and a descriptor, or no descriptor for a failure.
    Fd,
    /// A value of flags, and perhaps a descriptor.
    TransferState,
    /// Zero and a descriptor, or an error and none.
    Lookup,
    /// The sizes of all shared memory regions; a failure cannot be expressed.
    ShmemConfig,
    /// The request with other user addresses; a failure cannot be expressed. Of messages that bring memory in postcopy
    /// mode, else [`Ack`](ReplyKind::Ack).
    Bases,
}

impl ReplyKind {
    /// How much of the request the reply repeats, at most.
    pub(crate) const fn repeats(self) -> usize {
        match self {
            ReplyKind::VringState => size_of::<VringState>(),
            ReplyKind::Config => size_of::<ConfigHeader>(),
            ReplyKind::Log => size_of::<LogArea>(),
            ReplyKind::Inflight => size_of::<InflightBody>(),
            ReplyKind::CryptoSession | ReplyKind::Bases => MAX_BODY,
            ReplyKind::Ack | ReplyKind::U64 | ReplyKind::Status | ReplyKind::Fd => 0,
            ReplyKind::TransferState | ReplyKind::Lookup | ReplyKind::ShmemConfig => 0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    pub(crate) body: Body,
    pub(crate) fds: Fds,
    pub(crate) gate: Gate,
    pub(crate) reply: ReplyKind,
}

/// Whether a request is answered with [`ReplyKind::Bases`] in postcopy mode.
pub(crate) const fn brings_memory(code: FrontendCode) -> bool {
    matches!(code, FrontendCode::SetMemTable | FrontendCode::AddMemReg)
}

const fn rule(body: Body, fds: Fds, gate: Gate, reply: ReplyKind) -> Rule {
    Rule { body, fds, gate, reply }
}

/// The rule of a front-end's request. A match and not an array, so that a new code cannot be forgotten.
pub(crate) const fn frontend_rule(code: FrontendCode) -> Rule {
    use FrontendCode as C;
    use Gate::{Always, Negotiated, Offered};
    use ProtocolFeatures as P;
    use ReplyKind::Ack;

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

        C::SetLogBase => rule(Body::Log, Fds::One, Negotiated(P::LOG_SHMFD), ReplyKind::Log),
        C::SetLogFd => rule(Body::Empty, Fds::One, Always, Ack),
        C::SendRarp => rule(Body::U64, Fds::None, Offered(P::RARP), Ack),
        C::NetSetMtu => rule(Body::U64, Fds::None, Offered(P::MTU), Ack),
        // VIRTIO_F_IOMMU_PLATFORM has to be negotiated, which only the host knows.
        C::IotlbMsg => rule(Body::Iotlb, Fds::None, Always, ReplyKind::Status),
        C::SetVringEndian => rule(Body::VringState, Fds::None, Negotiated(P::CROSS_ENDIAN), Ack),
        C::CreateCryptoSession => {
            rule(Body::CryptoSession, Fds::None, Negotiated(P::CRYPTO_SESSION), ReplyKind::CryptoSession)
        }
        C::CloseCryptoSession => rule(Body::U64, Fds::None, Negotiated(P::CRYPTO_SESSION), Ack),
        C::PostcopyAdvise => rule(Body::Empty, Fds::None, Offered(P::PAGEFAULT), ReplyKind::Fd),
        C::PostcopyListen => rule(Body::Empty, Fds::None, Offered(P::PAGEFAULT), Ack),
        C::PostcopyEnd => rule(Body::Empty, Fds::None, Offered(P::PAGEFAULT), ReplyKind::Status),
        C::GetInflightFd => {
            rule(Body::Inflight, Fds::None, Negotiated(P::INFLIGHT_SHMFD), ReplyKind::Inflight)
        }
        C::SetInflightFd => rule(Body::Inflight, Fds::One, Negotiated(P::INFLIGHT_SHMFD), Ack),
        // No feature stands for it: whether the device is a display is for the host to know.
        C::GpuSetSocket => rule(Body::Empty, Fds::One, Always, Ack),
        C::VringKick => rule(Body::VringState, Fds::None, Negotiated(P::INBAND_NOTIFICATIONS), Ack),
        C::GetSharedObject => rule(Body::ObjectId, Fds::None, Negotiated(P::SHARED_OBJECT), ReplyKind::Fd),
        C::SetDeviceStateFd => {
            rule(Body::TransferState, Fds::One, Negotiated(P::DEVICE_STATE), ReplyKind::TransferState)
        }
        C::CheckDeviceState => rule(Body::Empty, Fds::None, Negotiated(P::DEVICE_STATE), ReplyKind::Status),
        C::GetShmemConfig => rule(Body::Empty, Fds::None, Negotiated(P::SHMEM_MAP), ReplyKind::ShmemConfig),
    }
}

/// The rule of a back-end's request. Those that bring a descriptor need `BACKEND_SEND_FD` besides.
pub(crate) const fn backend_rule(code: BackendCode) -> Rule {
    use BackendCode as C;
    use Gate::{Always, Negotiated};
    use ProtocolFeatures as P;
    use ReplyKind::{Ack, Lookup};

    match code {
        C::IotlbMsg => rule(Body::Iotlb, Fds::None, Always, Ack),
        C::ConfigChangeMsg => rule(Body::Empty, Fds::None, Negotiated(P::CONFIG), Ack),
        C::VringHostNotifierMsg => {
            rule(Body::VringArea, Fds::UnlessFlagged, Negotiated(P::HOST_NOTIFIER), Ack)
        }
        C::VringCall => rule(Body::VringState, Fds::None, Negotiated(P::INBAND_NOTIFICATIONS), Ack),
        C::VringErr => rule(Body::VringState, Fds::None, Negotiated(P::INBAND_NOTIFICATIONS), Ack),
        C::SharedObjectAdd => rule(Body::ObjectId, Fds::None, Negotiated(P::SHARED_OBJECT), Ack),
        C::SharedObjectRemove => rule(Body::ObjectId, Fds::None, Negotiated(P::SHARED_OBJECT), Ack),
        C::SharedObjectLookup => rule(Body::ObjectId, Fds::None, Negotiated(P::SHARED_OBJECT), Lookup),
        C::ShmemMap => rule(Body::Mmap, Fds::One, Negotiated(P::SHMEM_MAP), Ack),
        C::ShmemUnmap => rule(Body::Mmap, Fds::None, Negotiated(P::SHMEM_MAP), Ack),
    }
}
