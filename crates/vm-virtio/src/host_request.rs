//! What a host asks of a device beyond virtio itself: what a front-end's device-specific messages say, and what
//! whoever operates the device wants. One way in for all of it: [`VirtioDevice::host_request`](crate::VirtioDevice::host_request),
//! through [`Engine::host_request`](crate::Engine::host_request).
use crate::controls::{ControlRequest, Kind, Value};
use crate::device::DeviceError;

/// A request of the host.
#[derive(Debug)]
#[non_exhaustive]
pub enum HostRequest {
    /// From whoever operates the device; fits the [`Controls`](crate::controls::Controls) that it lists.
    Control(ControlRequest),
}

/// What a device answers.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostReply {
    /// It is done, or under way for certain.
    Done,
    /// The value of a property, or what a command found out.
    Value(Value),
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
