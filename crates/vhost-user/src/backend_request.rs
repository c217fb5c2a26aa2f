//! Requests of the back-end: understood by the front-end's listener, and put into bytes by the back-end's channel.

use std::os::fd::OwnedFd;

use zerocopy::IntoBytes;

use crate::body::{IotlbBody, IotlbReport, MmapBody, ObjectId, ShmemRange, VRING_NO_FD, VringArea};
use crate::frame::Frame;
use crate::header;
use crate::payload::{Payload, counted};
use crate::rules::{Fds, Gate, backend_rule};
use crate::{BackendCode, ProtocolFeatures, Reason, VringState};

/// A request of the back-end (section "Back-end message types").
#[derive(Debug)]
#[non_exhaustive]
pub enum BackendRequest {
    /// A translation is missing, or does not allow what the driver wants. Only with `VIRTIO_F_IOMMU_PLATFORM`, which
    /// neither side of the channel knows of.
    Iotlb(IotlbReport),
    /// The configuration space has changed.
    ConfigChange,
    /// The driver's notifications of a ring go straight to this page from now on; without a file, to the front-end
    /// again.
    VringHostNotifier {
        /// Which ring, 0 to 255.
        index: u32,
        /// Size of the page in bytes.
        size: u64,
        /// Where in the file it begins.
        offset: u64,
        /// The file.
        fd: Option<OwnedFd>,
    },
    /// Buffers of a ring were used.
    VringCall {
        /// Which ring.
        index: u32,
    },
    /// A ring is broken.
    VringErr {
        /// Which ring.
        index: u32,
    },
    /// The back-end exports an object.
    SharedObjectAdd(ObjectId),
    /// It does so no more.
    SharedObjectRemove(ObjectId),
    /// The file of somebody's object? Always answered.
    SharedObjectLookup(ObjectId),
    /// Map a file into a shared memory region.
    ShmemMap {
        /// Where to.
        range: ShmemRange,
        /// The file.
        fd: OwnedFd,
        /// Where in the file it begins.
        fd_offset: u64,
        /// Whether the driver may write.
        writable: bool,
    },
    /// Unmap one whole mapping of a shared memory region.
    ShmemUnmap(ShmemRange),
}

impl BackendRequest {
    /// The request's code.
    pub fn code(&self) -> BackendCode {
        match self {
            Self::Iotlb(_) => BackendCode::IotlbMsg,
            Self::ConfigChange => BackendCode::ConfigChangeMsg,
            Self::VringHostNotifier { .. } => BackendCode::VringHostNotifierMsg,
            Self::VringCall { .. } => BackendCode::VringCall,
            Self::VringErr { .. } => BackendCode::VringErr,
            Self::SharedObjectAdd(_) => BackendCode::SharedObjectAdd,
            Self::SharedObjectRemove(_) => BackendCode::SharedObjectRemove,
            Self::SharedObjectLookup(_) => BackendCode::SharedObjectLookup,
            Self::ShmemMap { .. } => BackendCode::ShmemMap,
            Self::ShmemUnmap(_) => BackendCode::ShmemUnmap,
        }
    }

    /// Understands a message. What is dropped on the way to an error closes its descriptors.
    pub(crate) fn parse(negotiated: ProtocolFeatures, frame: Frame) -> Result<Self, Reason> {
        let Frame { header, body, fds, fd_fault } = frame;
        let code = BackendCode::from_code(header.request).ok_or(Reason::Unknown)?;
        let rule = backend_rule(code);
        let unmet = needs(code, !fds.is_empty()).difference(negotiated);
        if !unmet.is_empty() {
            return Err(Reason::NotNegotiated(unmet));
        }
        if let Some(fault) = fd_fault {
            return Err(fault);
        }
        let payload = Payload::parse(rule.body, false, &body)?;
        let fd = counted(rule.fds, &payload, fds)?.into_iter().next();
        Ok(match (code, payload, fd) {
            (BackendCode::IotlbMsg, Payload::Iotlb(body), _) => Self::Iotlb(body.report()?),
            (BackendCode::ConfigChangeMsg, ..) => Self::ConfigChange,
            (BackendCode::VringHostNotifierMsg, Payload::VringArea { index, size, offset, .. }, fd) => {
                Self::VringHostNotifier { index, size, offset, fd }
            }
            // The number is reserved in both.
            (BackendCode::VringCall, Payload::VringState(VringState { index, .. }), _) => {
                Self::VringCall { index }
            }
            (BackendCode::VringErr, Payload::VringState(VringState { index, .. }), _) => {
                Self::VringErr { index }
            }
            (BackendCode::SharedObjectAdd, Payload::ObjectId(id), _) => Self::SharedObjectAdd(id),
            (BackendCode::SharedObjectRemove, Payload::ObjectId(id), _) => Self::SharedObjectRemove(id),
            (BackendCode::SharedObjectLookup, Payload::ObjectId(id), _) => Self::SharedObjectLookup(id),
            (BackendCode::ShmemMap, Payload::Mmap(body), Some(fd)) => Self::ShmemMap {
                range: body.range(),
                fd,
                fd_offset: body.fd_offset,
                writable: body.writable()?,
            },
            (BackendCode::ShmemUnmap, Payload::Mmap(body), _) => Self::ShmemUnmap(body.range()),
            // The rules give every code its payload and its descriptors.
            _ => return Err(Reason::Unsupported),
        })
    }

    /// The protocol features without which it must not be sent.
    pub(crate) fn needs(&self) -> ProtocolFeatures {
        let brings_fd = match self {
            Self::VringHostNotifier { fd, .. } => fd.is_some(),
            other => backend_rule(other.code()).fds == Fds::One,
        };
        needs(self.code(), brings_fd)
    }

    /// The message, and the descriptor that goes with it.
    pub(crate) fn message(self, flags: u32) -> (Vec<u8>, Option<OwnedFd>) {
        let code = self.code().code();
        let message = |body: &[u8]| header::message(code, flags, &[body]);
        match self {
            Self::Iotlb(report) => (message(IotlbBody::from(report).as_bytes()), None),
            Self::ConfigChange => (message(&[]), None),
            Self::VringHostNotifier { index, size, offset, fd } => {
                let no_fd = if fd.is_none() { VRING_NO_FD } else { 0 };
                let area = VringArea { index_and_flags: u64::from(index) | no_fd, size, offset };
                (message(area.as_bytes()), fd)
            }
            Self::VringCall { index } | Self::VringErr { index } => {
                (message(VringState { index, num: 0 }.as_bytes()), None)
            }
            Self::SharedObjectAdd(id) | Self::SharedObjectRemove(id) | Self::SharedObjectLookup(id) => {
                (message(&id), None)
            }
            Self::ShmemMap { range, fd, fd_offset, writable } => {
                (message(MmapBody::new(range, fd_offset, writable).as_bytes()), Some(fd))
            }
            Self::ShmemUnmap(range) => (message(MmapBody::new(range, 0, false).as_bytes()), None),
        }
    }
}

/// The feature of the request, and that of sending descriptors if it brings any.
fn needs(code: BackendCode, brings_fd: bool) -> ProtocolFeatures {
    let feature = match backend_rule(code).gate {
        Gate::Always => ProtocolFeatures::empty(),
        Gate::Negotiated(feature) | Gate::Offered(feature) => feature,
    };
    if brings_fd { feature | ProtocolFeatures::BACKEND_SEND_FD } else { feature }
}
