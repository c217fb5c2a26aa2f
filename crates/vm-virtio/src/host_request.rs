//! What a host asks of a device beyond virtio itself: what a front-end's device-specific messages say, and what
//! whoever operates the device wants. One way in for all of it: [`VirtioDevice::host_request`](crate::VirtioDevice::host_request),
//! through [`Engine::host_request`](crate::Engine::host_request).
use crate::controls::{ControlRequest, Kind, Value};
use crate::device::DeviceError;
use bitflags::bitflags;
use std::os::fd::OwnedFd;

/// The name of an object that devices of a VM share (virtio 1.4, 2.12): a UUID, as it is sent.
pub type ObjectId = [u8; 16];

bitflags! {
    /// The requests, control requests aside, that a device knows
    /// ([`VirtioDevice::host_requests`](crate::VirtioDevice::host_requests)). A host offers the others to nobody.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct HostRequests: u32 {
        /// [`HostRequest::Announce`].
        const ANNOUNCE = 1 << 0;
        /// [`HostRequest::NetMtu`].
        const NET_MTU = 1 << 1;
        /// [`HostRequest::GpuSocket`].
        const GPU_SOCKET = 1 << 2;
        /// [`HostRequest::CreateCryptoSession`] and [`HostRequest::CloseCryptoSession`].
        const CRYPTO_SESSIONS = 1 << 3;
        /// [`HostRequest::SharedObject`]. Also of a device that only [looks up](crate::Upcall::look_up) others' objects: it
        /// is asked for none of its own.
        const SHARED_OBJECTS = 1 << 4;
    }
}

/// A request of the host.
#[derive(Debug)]
#[non_exhaustive]
pub enum HostRequest {
    /// From whoever operates the device; fits the [`Controls`](crate::controls::Controls) that it lists.
    Control(ControlRequest),
    /// Announce this Ethernet address to the network, for a driver that cannot do so itself (vhost-user SEND_RARP).
    Announce([u8; 6]),
    /// The MTU that the driver gets to see (NET_SET_MTU). Refused if it is none for this device.
    NetMtu(u16),
    /// Where the GPU protocol is spoken (GPU_SET_SOCKET). Not known to be a socket.
    GpuSocket(OwnedFd),
    /// Make a crypto session from this description, whose layout is the front-end's
    /// (CREATE_CRYPTO_SESSION). Answered with [`HostReply::CryptoSession`].
    CreateCryptoSession(Vec<u8>),
    /// End a crypto session (CLOSE_CRYPTO_SESSION).
    CloseCryptoSession(u64),
    /// The file of an object that the device [exports](crate::device::Upcall::export) (GET_SHARED_OBJECT). Answered
    /// with [`HostReply::File`].
    SharedObject(ObjectId),
}

impl HostRequest {
    /// What a device has to know for it; nothing for control requests, which its list of controls rules.
    pub fn needs(&self) -> HostRequests {
        match self {
            HostRequest::Control(_) => HostRequests::empty(),
            HostRequest::Announce(_) => HostRequests::ANNOUNCE,
            HostRequest::NetMtu(_) => HostRequests::NET_MTU,
            HostRequest::GpuSocket(_) => HostRequests::GPU_SOCKET,
            HostRequest::CreateCryptoSession(_) | HostRequest::CloseCryptoSession(_) => {
                HostRequests::CRYPTO_SESSIONS
            }
            HostRequest::SharedObject(_) => HostRequests::SHARED_OBJECTS,
        }
    }
}

/// A file that a device hands out. No two are the same.
#[derive(Debug)]
pub struct HostFile(pub OwnedFd);

impl PartialEq for HostFile {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for HostFile {}

/// What a device answers.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostReply {
    /// It is done, or under way for certain.
    Done,
    /// The value of a property, or what a command found out.
    Value(Value),
    /// The id of a new crypto session, not negative.
    CryptoSession(i64),
    /// The file that was asked for.
    File(HostFile),
}

/// Why a request was not carried out. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// This type of device knows no such request.
    #[error("the device does not know this request")]
    Unsupported,
    /// No such property.
    #[error("there is no property {0:?}")]
    NoSuchProperty(String),
    /// No such command.
    #[error("there is no command {0:?}")]
    NoSuchCommand(String),
    /// No such argument.
    #[error("the command has no argument {0:?}")]
    NoSuchArgument(String),
    /// An argument is missing.
    #[error("the command needs an argument {0:?}")]
    ArgumentMissing(String),
    /// An argument is there twice.
    #[error("the argument {0:?} is given twice")]
    ArgumentTwice(String),
    /// The property can be read only.
    #[error("the property {0:?} cannot be set")]
    ReadOnly(String),
    /// The value is of another kind, or out of range.
    #[error("{name:?} must be {wanted}")]
    Value {
        /// The property or argument.
        name: String,
        /// What it can be.
        wanted: Kind,
    },
    /// It makes sense, but not now, or not for this device.
    #[error("{0}")]
    Refused(String),
    /// The device tried and failed.
    #[error("the device failed: {0}")]
    Failed(#[source] DeviceError),
    /// The device panicked: it needs a reset (failure policy 5).
    #[error("the device panicked")]
    Panicked,
}
