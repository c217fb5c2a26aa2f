//! Requests of the front-end, understood and checked.
//!
//! Checked here is what the message itself must keep: payload length, number of descriptors, defined values. Whether a
//! ring of that index exists, or an address lies in memory, is for the host.

use std::os::fd::OwnedFd;

use zerocopy::FromBytes;

use crate::body::{ConfigHeader, MemTableHeader, SingleRegion, VRING_INDEX_MASK, VRING_NO_FD};
use crate::frame::Frame;
use crate::rules::{Body, Fds, Rule};
use crate::{FrontendCode, MAX_FDS, MemoryRegion, ProtocolFeatures, Reason, VringAddr, VringState};

/// A request of the front-end (section "Front-end message types").
#[derive(Debug)]
#[non_exhaustive]
pub enum FrontendRequest {
    /// Which features are there?
    GetFeatures,
    /// These features, of those that are there.
    SetFeatures(u64),
    /// A session begins.
    SetOwner,
    /// Deprecated: ignore it, or disable all rings.
    ResetOwner,
    /// All memory there is, in place of what there was. At most eight regions, each with its file.
    SetMemTable(Vec<(MemoryRegion, OwnedFd)>),
    /// The size of a ring.
    SetVringNum {
        /// Which ring.
        index: u32,
        /// Its size in descriptors.
        num: u32,
    },
    /// Where a ring is.
    SetVringAddr(VringAddr),
    /// Where a ring goes on.
    SetVringBase {
        /// Which ring.
        index: u32,
        /// Split: the next index of the available ring. Packed: both positions (section "Vring descriptor indices for
        /// packed virtqueues").
        base: u32,
    },
    /// Stop a ring; where would it go on?
    GetVringBase {
        /// Which ring.
        index: u32,
    },
    /// Start a ring.
    SetVringKick {
        /// Which ring, 0 to 255.
        index: u32,
        /// Readable when buffers were added. None: poll the ring.
        fd: Option<OwnedFd>,
    },
    /// How to tell that buffers were used.
    SetVringCall {
        /// Which ring, 0 to 255.
        index: u32,
        /// To write to. None: the driver polls.
        fd: Option<OwnedFd>,
    },
    /// How to tell that a ring is broken.
    SetVringErr {
        /// Which ring, 0 to 255.
        index: u32,
        /// To write to, if anybody wants to know.
        fd: Option<OwnedFd>,
    },
    /// Which protocol features are there?
    GetProtocolFeatures,
    /// These protocol features. To be passed to
    /// [`set_protocol_features`](crate::BackendEndpoint::set_protocol_features) when they are accepted.
    SetProtocolFeatures(ProtocolFeatures),
    /// How many queues are there at most?
    GetQueueNum,
    /// Enable or disable a ring.
    SetVringEnable {
        /// Which ring.
        index: u32,
        /// Whether it is to be enabled.
        enable: bool,
    },
    /// Where the back-end's own requests go. Not known to be a socket.
    SetBackendReqFd(OwnedFd),
    /// What is in the configuration space?
    GetConfig {
        /// First byte.
        offset: u32,
        /// Number of bytes, at most [`MAX_CONFIG_SIZE`](crate::MAX_CONFIG_SIZE).
        size: u32,
        /// See [`config_flags`](crate::config_flags).
        flags: u32,
    },
    /// A write to the configuration space.
    SetConfig {
        /// First byte.
        offset: u32,
        /// See [`config_flags`](crate::config_flags).
        flags: u32,
        /// The bytes.
        data: Vec<u8>,
    },
    /// Disable all rings and reset the device.
    ResetDevice,
    /// How many memory regions can there be?
    GetMaxMemSlots,
    /// One more memory region, with its file.
    AddMemReg(MemoryRegion, OwnedFd),
    /// One region less: that of this guest address, user address and size.
    RemMemReg(MemoryRegion),
    /// The device status as virtio defines it.
    SetStatus(u8),
    /// What is the device status?
    GetStatus,
}

impl FrontendRequest {
    /// The request's code.
    pub fn code(&self) -> FrontendCode {
        match self {
            Self::GetFeatures => FrontendCode::GetFeatures,
            Self::SetFeatures(_) => FrontendCode::SetFeatures,
            Self::SetOwner => FrontendCode::SetOwner,
            Self::ResetOwner => FrontendCode::ResetOwner,
            Self::SetMemTable(_) => FrontendCode::SetMemTable,
            Self::SetVringNum { .. } => FrontendCode::SetVringNum,
            Self::SetVringAddr(_) => FrontendCode::SetVringAddr,
            Self::SetVringBase { .. } => FrontendCode::SetVringBase,
            Self::GetVringBase { .. } => FrontendCode::GetVringBase,
            Self::SetVringKick { .. } => FrontendCode::SetVringKick,
            Self::SetVringCall { .. } => FrontendCode::SetVringCall,
            Self::SetVringErr { .. } => FrontendCode::SetVringErr,
            Self::GetProtocolFeatures => FrontendCode::GetProtocolFeatures,
            Self::SetProtocolFeatures(_) => FrontendCode::SetProtocolFeatures,
            Self::GetQueueNum => FrontendCode::GetQueueNum,
            Self::SetVringEnable { .. } => FrontendCode::SetVringEnable,
            Self::SetBackendReqFd(_) => FrontendCode::SetBackendReqFd,
            Self::GetConfig { .. } => FrontendCode::GetConfig,
            Self::SetConfig { .. } => FrontendCode::SetConfig,
            Self::ResetDevice => FrontendCode::ResetDevice,
            Self::GetMaxMemSlots => FrontendCode::GetMaxMemSlots,
            Self::AddMemReg(..) => FrontendCode::AddMemReg,
            Self::RemMemReg(_) => FrontendCode::RemMemReg,
            Self::SetStatus(_) => FrontendCode::SetStatus,
            Self::GetStatus => FrontendCode::GetStatus,
        }
    }

    /// Understands a message. What is dropped on the way to an error closes its descriptors.
    pub(crate) fn parse(code: FrontendCode, rule: Rule, frame: Frame) -> Result<Self, Reason> {
        let Frame { body, fds, fd_fault, .. } = frame;
        if let Some(fault) = fd_fault {
            return Err(fault);
        }
        let payload = Payload::parse(rule.body, &body)?;
        let mut fds = counted(rule.fds, &payload, fds)?.into_iter();
        let request = match (code, payload) {
            (FrontendCode::GetFeatures, _) => Self::GetFeatures,
            (FrontendCode::SetFeatures, Payload::U64(bits)) => Self::SetFeatures(bits),
            (FrontendCode::SetOwner, _) => Self::SetOwner,
            (FrontendCode::ResetOwner, _) => Self::ResetOwner,
            (FrontendCode::SetMemTable, Payload::Regions(regions)) => {
                Self::SetMemTable(regions.into_iter().zip(fds).collect())
            }
            (FrontendCode::SetVringNum, Payload::VringState(VringState { index, num })) => {
                Self::SetVringNum { index, num }
            }
            (FrontendCode::SetVringAddr, Payload::VringAddr(addr)) => Self::SetVringAddr(addr),
            (FrontendCode::SetVringBase, Payload::VringState(VringState { index, num: base })) => {
                Self::SetVringBase { index, base }
            }
            // The number is reserved here, and ignored.
            (FrontendCode::GetVringBase, Payload::VringState(VringState { index, .. })) => {
                Self::GetVringBase { index }
            }
            (FrontendCode::SetVringKick, Payload::VringFd { index, .. }) => {
                Self::SetVringKick { index, fd: fds.next() }
            }
            (FrontendCode::SetVringCall, Payload::VringFd { index, .. }) => {
                Self::SetVringCall { index, fd: fds.next() }
            }
            (FrontendCode::SetVringErr, Payload::VringFd { index, .. }) => {
                Self::SetVringErr { index, fd: fds.next() }
            }
            (FrontendCode::GetProtocolFeatures, _) => Self::GetProtocolFeatures,
            (FrontendCode::SetProtocolFeatures, Payload::U64(bits)) => {
                Self::SetProtocolFeatures(ProtocolFeatures::from_bits_retain(bits))
            }
            (FrontendCode::GetQueueNum, _) => Self::GetQueueNum,
            (FrontendCode::SetVringEnable, Payload::VringState(VringState { index, num })) => {
                let enable = match num {
                    0 => false,
                    1 => true,
                    _ => return Err(Reason::Value { field: "num", value: num.into() }),
                };
                Self::SetVringEnable { index, enable }
            }
            (FrontendCode::GetConfig, Payload::Config(ConfigHeader { offset, size, flags }, _)) => {
                Self::GetConfig { offset, size, flags }
            }
            (FrontendCode::SetConfig, Payload::Config(ConfigHeader { offset, flags, .. }, data)) => {
                Self::SetConfig { offset, flags, data: data.to_vec() }
            }
            (FrontendCode::ResetDevice, _) => Self::ResetDevice,
            (FrontendCode::GetMaxMemSlots, _) => Self::GetMaxMemSlots,
            // A descriptor that came with it all the same goes out of scope here: it must be closed and not used.
            (FrontendCode::RemMemReg, Payload::Region(region)) => Self::RemMemReg(region),
            (FrontendCode::SetStatus, Payload::U64(value)) => {
                // The device status has eight bits (virtio 1.4, section 2.1).
                Self::SetStatus(u8::try_from(value).map_err(|_| Reason::Value { field: "status", value })?)
            }
            (FrontendCode::GetStatus, _) => Self::GetStatus,
            (code, payload) => match (code, payload, fds.next()) {
                (FrontendCode::SetBackendReqFd, _, Some(fd)) => Self::SetBackendReqFd(fd),
                (FrontendCode::AddMemReg, Payload::Region(region), Some(fd)) => Self::AddMemReg(region, fd),
                _ => return Err(Reason::Unsupported),
            },
        };
        Ok(request)
    }
}

/// A payload of the right length.
enum Payload<'a> {
    Empty,
    U64(u64),
    VringState(VringState),
    VringAddr(VringAddr),
    VringFd { index: u32, no_fd: bool },
    Regions(Vec<MemoryRegion>),
    Region(MemoryRegion),
    Config(ConfigHeader, &'a [u8]),
}

impl<'a> Payload<'a> {
    fn parse(kind: Body, body: &'a [u8]) -> Result<Self, Reason> {
        Ok(match kind {
            Body::Empty => {
                length(body, 0)?;
                Payload::Empty
            }
            Body::U64 => Payload::U64(whole(body)?),
            Body::VringState => Payload::VringState(whole(body)?),
            Body::VringAddr => Payload::VringAddr(whole(body)?),
            Body::SingleRegion => Payload::Region(whole::<SingleRegion>(body)?.region),
            Body::VringFd => {
                let value: u64 = whole(body)?;
                if value & !(VRING_INDEX_MASK | VRING_NO_FD) != 0 {
                    return Err(Reason::Value { field: "vring index and flags", value });
                }
                // The mask leaves eight bits.
                let index = (value & VRING_INDEX_MASK) as u32;
                Payload::VringFd { index, no_fd: value & VRING_NO_FD != 0 }
            }
            Body::MemTable => {
                let (table, rest) = prefix::<MemTableHeader>(body)?;
                let count = usize::try_from(table.num_regions).ok().filter(|count| *count <= MAX_FDS);
                let Some(count) = count else {
                    return Err(Reason::Value { field: "num regions", value: table.num_regions.into() });
                };
                length(body, size_of::<MemTableHeader>() + count * size_of::<MemoryRegion>())?;
                let regions = rest.chunks_exact(size_of::<MemoryRegion>());
                Payload::Regions(
                    regions.filter_map(|bytes| MemoryRegion::read_from_bytes(bytes).ok()).collect(),
                )
            }
            Body::Config => {
                let (config, data) = prefix::<ConfigHeader>(body)?;
                let expected = usize::try_from(config.size).ok();
                let expected = expected.and_then(|size| size.checked_add(size_of::<ConfigHeader>()));
                length(body, expected.unwrap_or(usize::MAX))?;
                Payload::Config(config, data)
            }
            Body::Untyped => return Err(Reason::Unsupported),
        })
    }
}

fn length(body: &[u8], expected: usize) -> Result<(), Reason> {
    if body.len() == expected { Ok(()) } else { Err(Reason::BodySize { expected, got: body.len() }) }
}

fn whole<T: FromBytes>(body: &[u8]) -> Result<T, Reason> {
    T::read_from_bytes(body).map_err(|_| Reason::BodySize { expected: size_of::<T>(), got: body.len() })
}

fn prefix<T: FromBytes>(body: &[u8]) -> Result<(T, &[u8]), Reason> {
    T::read_from_prefix(body).map_err(|_| Reason::BodySize { expected: size_of::<T>(), got: body.len() })
}

/// Passes the descriptors on if they are as many as the rule says.
fn counted(rule: Fds, payload: &Payload<'_>, fds: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Reason> {
    let got = fds.len();
    let expected = match (rule, payload) {
        (Fds::OneClosed, _) if got <= 1 => got,
        (Fds::None | Fds::OneClosed, _) => 0,
        (Fds::PerRegion, Payload::Regions(regions)) => regions.len(),
        (Fds::UnlessFlagged, Payload::VringFd { no_fd: true, .. }) => 0,
        (Fds::One | Fds::PerRegion | Fds::UnlessFlagged, _) => 1,
    };
    if got == expected { Ok(fds) } else { Err(Reason::FdCount { expected, got }) }
}
