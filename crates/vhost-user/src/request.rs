//! Requests of the front-end, understood and checked.
//!
//! Checked here is what the message itself must keep: payload length, number of descriptors, defined values. Whether a
//! ring of that index exists, or an address lies in memory, is for the host.

use std::os::fd::OwnedFd;

use crate::body::{
    ConfigHeader, InflightArea, IotlbChange, LogArea, MigrationPhase, ObjectId, TransferDirection,
    VringState, XenMapping, XenRegion,
};
use crate::frame::Frame;
use crate::payload::{Payload, counted};
use crate::rules::Rule;
use crate::{FrontendCode, MemoryRegion, ProtocolFeatures, Reason, VringAddr};

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
    /// Where written pages are marked.
    SetLogBase(LogArea, OwnedFd),
    /// What to write to when pages were marked.
    SetLogFd(OwnedFd),
    /// Announce this Ethernet address, for a guest that cannot do so itself.
    SendRarp([u8; 6]),
    /// The MTU that the guest gets to see.
    NetSetMtu(u16),
    /// A change of the IOTLB.
    Iotlb(IotlbChange),
    /// The byte order of a legacy ring.
    SetVringEndian {
        /// Which ring.
        index: u32,
        /// Big or little endian.
        big: bool,
    },
    /// Make a crypto session from this description, whose layout the document does not say. QEMU (11.1) begins with an
    /// operation code of eight bytes and has eight bytes for the session's id at the end, which the answer fills in.
    CreateCryptoSession(Vec<u8>),
    /// End the crypto session of this id.
    CloseCryptoSession(u64),
    /// Postcopy will come: make a userfaultfd.
    PostcopyAdvise,
    /// Postcopy begins: register memory with the userfaultfd.
    PostcopyListen,
    /// Postcopy is over.
    PostcopyEnd,
    /// Make an area for tracking requests. Sizes and offset of the area are the back-end's to say.
    GetInflightFd(InflightArea),
    /// Track requests in this area, and submit those again that it holds.
    SetInflightFd(InflightArea, OwnedFd),
    /// Where the GPU protocol is spoken (vhost-user-gpu.rst). Not known to be a socket.
    GpuSetSocket(OwnedFd),
    /// Buffers were added to a ring; starts the ring if need be.
    VringKick {
        /// Which ring.
        index: u32,
    },
    /// The file of an exported object?
    GetSharedObject(ObjectId),
    /// Transfer the device's state over this channel, or over a better one that the answer names.
    SetDeviceStateFd {
        /// Which way.
        direction: TransferDirection,
        /// When.
        phase: MigrationPhase,
        /// The back-end's end of the front-end's channel.
        fd: OwnedFd,
    },
    /// Is the transfer complete, and the state understood?
    CheckDeviceState,
    /// Which shared memory regions does the device have?
    GetShmemConfig,
    /// The front-end has taken note of [`Answer::Bases`](crate::Answer::Bases) to this request: from now on memory may be
    /// touched and faults are served. A `SET_MEM_TABLE` (or `ADD_MEM_REG`) again, with eight bytes of zeros.
    BasesHeard(FrontendCode),
    /// [`SetMemTable`](Self::SetMemTable) with [`XEN_MMAP`](ProtocolFeatures::XEN_MMAP).
    SetXenMemTable(Vec<(MemoryRegion, XenMapping, OwnedFd)>),
    /// [`AddMemReg`](Self::AddMemReg) with [`XEN_MMAP`](ProtocolFeatures::XEN_MMAP).
    AddXenMemReg(MemoryRegion, XenMapping, OwnedFd),
    /// [`RemMemReg`](Self::RemMemReg) with [`XEN_MMAP`](ProtocolFeatures::XEN_MMAP).
    RemXenMemReg(MemoryRegion, XenMapping),
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
            Self::SetLogBase(..) => FrontendCode::SetLogBase,
            Self::SetLogFd(_) => FrontendCode::SetLogFd,
            Self::SendRarp(_) => FrontendCode::SendRarp,
            Self::NetSetMtu(_) => FrontendCode::NetSetMtu,
            Self::Iotlb(_) => FrontendCode::IotlbMsg,
            Self::SetVringEndian { .. } => FrontendCode::SetVringEndian,
            Self::CreateCryptoSession(_) => FrontendCode::CreateCryptoSession,
            Self::CloseCryptoSession(_) => FrontendCode::CloseCryptoSession,
            Self::PostcopyAdvise => FrontendCode::PostcopyAdvise,
            Self::PostcopyListen => FrontendCode::PostcopyListen,
            Self::PostcopyEnd => FrontendCode::PostcopyEnd,
            Self::GetInflightFd(_) => FrontendCode::GetInflightFd,
            Self::SetInflightFd(..) => FrontendCode::SetInflightFd,
            Self::GpuSetSocket(_) => FrontendCode::GpuSetSocket,
            Self::VringKick { .. } => FrontendCode::VringKick,
            Self::GetSharedObject(_) => FrontendCode::GetSharedObject,
            Self::SetDeviceStateFd { .. } => FrontendCode::SetDeviceStateFd,
            Self::CheckDeviceState => FrontendCode::CheckDeviceState,
            Self::GetShmemConfig => FrontendCode::GetShmemConfig,
            Self::BasesHeard(code) => *code,
            Self::SetXenMemTable(_) => FrontendCode::SetMemTable,
            Self::AddXenMemReg(..) => FrontendCode::AddMemReg,
            Self::RemXenMemReg(..) => FrontendCode::RemMemReg,
        }
    }

    /// Understands a message. What is dropped on the way to an error closes its descriptors.
    pub(crate) fn parse(
        code: FrontendCode,
        rule: Rule,
        negotiated: ProtocolFeatures,
        frame: Frame,
    ) -> Result<Self, Reason> {
        let Frame { body, fds, fd_fault, .. } = frame;
        if let Some(fault) = fd_fault {
            return Err(fault);
        }
        let payload = Payload::parse(rule.body, negotiated.contains(ProtocolFeatures::XEN_MMAP), &body)?;
        let mut fds = counted(rule.fds, &payload, fds)?.into_iter();
        let request = match (code, payload) {
            (FrontendCode::GetFeatures, _) => Self::GetFeatures,
            (FrontendCode::SetFeatures, Payload::U64(bits)) => Self::SetFeatures(bits),
            (FrontendCode::SetOwner, _) => Self::SetOwner,
            (FrontendCode::ResetOwner, _) => Self::ResetOwner,
            (FrontendCode::SetMemTable, Payload::Regions(regions)) => {
                Self::SetMemTable(regions.into_iter().zip(fds).collect())
            }
            (FrontendCode::SetMemTable, Payload::XenRegions(regions)) => {
                let regions = regions.into_iter().zip(fds);
                Self::SetXenMemTable(
                    regions.map(|(XenRegion { region, xen }, fd)| (region, xen, fd)).collect(),
                )
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
                Self::SetVringEnable { index, enable: switch(num)? }
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
            (FrontendCode::RemMemReg, Payload::XenRegion(XenRegion { region, xen })) => {
                Self::RemXenMemReg(region, xen)
            }
            (FrontendCode::SetStatus, Payload::U64(value)) => {
                // The device status has eight bits (virtio 1.4, section 2.1).
                Self::SetStatus(u8::try_from(value).map_err(|_| Reason::Value { field: "status", value })?)
            }
            (FrontendCode::GetStatus, _) => Self::GetStatus,
            (FrontendCode::SendRarp, Payload::U64(value)) => {
                // "The first 6 bytes of the payload contain the mac address": as they lie in memory.
                let [a, b, c, d, e, f, _, _] = value.to_ne_bytes();
                Self::SendRarp([a, b, c, d, e, f])
            }
            (FrontendCode::NetSetMtu, Payload::U64(value)) => {
                // A field of 16 bits in the configuration space (virtio 1.4, section 5.1.4).
                Self::NetSetMtu(u16::try_from(value).map_err(|_| Reason::Value { field: "mtu", value })?)
            }
            (FrontendCode::IotlbMsg, Payload::Iotlb(body)) => Self::Iotlb(body.change()?),
            (FrontendCode::SetVringEndian, Payload::VringState(VringState { index, num })) => {
                Self::SetVringEndian { index, big: switch(num)? }
            }
            (FrontendCode::CreateCryptoSession, Payload::CryptoSession(description)) => {
                Self::CreateCryptoSession(description.to_vec())
            }
            (FrontendCode::CloseCryptoSession, Payload::U64(id)) => Self::CloseCryptoSession(id),
            (FrontendCode::PostcopyAdvise, _) => Self::PostcopyAdvise,
            (FrontendCode::PostcopyListen, _) => Self::PostcopyListen,
            (FrontendCode::PostcopyEnd, _) => Self::PostcopyEnd,
            (FrontendCode::GetInflightFd, Payload::Inflight(area)) => Self::GetInflightFd(area),
            // The number is reserved here as well.
            (FrontendCode::VringKick, Payload::VringState(VringState { index, .. })) => {
                Self::VringKick { index }
            }
            (FrontendCode::GetSharedObject, Payload::ObjectId(id)) => Self::GetSharedObject(id),
            (FrontendCode::CheckDeviceState, _) => Self::CheckDeviceState,
            (FrontendCode::GetShmemConfig, _) => Self::GetShmemConfig,
            (code, payload) => match (code, payload, fds.next()) {
                (FrontendCode::SetBackendReqFd, _, Some(fd)) => Self::SetBackendReqFd(fd),
                (FrontendCode::AddMemReg, Payload::Region(region), Some(fd)) => Self::AddMemReg(region, fd),
                (FrontendCode::AddMemReg, Payload::XenRegion(XenRegion { region, xen }), Some(fd)) => {
                    Self::AddXenMemReg(region, xen, fd)
                }
                (FrontendCode::SetLogBase, Payload::Log(area), Some(fd)) => Self::SetLogBase(area, fd),
                (FrontendCode::SetLogFd, _, Some(fd)) => Self::SetLogFd(fd),
                (FrontendCode::SetInflightFd, Payload::Inflight(area), Some(fd)) => {
                    Self::SetInflightFd(area, fd)
                }
                (FrontendCode::GpuSetSocket, _, Some(fd)) => Self::GpuSetSocket(fd),
                (FrontendCode::SetDeviceStateFd, Payload::TransferState(body), Some(fd)) => {
                    let (direction, phase) = body.typed()?;
                    Self::SetDeviceStateFd { direction, phase, fd }
                }
                // The rules give every code its payload and its descriptors.
                _ => return Err(Reason::Unsupported),
            },
        };
        Ok(request)
    }
}

/// A number that stands for no or yes.
fn switch(num: u32) -> Result<bool, Reason> {
    match num {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Reason::Value { field: "num", value: num.into() }),
    }
}
