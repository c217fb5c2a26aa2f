//! What can be seen of a device while it runs.
use std::sync::atomic::Ordering;

use vm_virtio::controls::{ControlRequest, Controls, Kind, Property, Value};
use vm_virtio::{HostError, HostReply};

use crate::worker::Gauges;

const CID: &str = "guest-cid";
const CONNECTIONS: &str = "connections";
const OPENED: &str = "opened";
const RESETS: &str = "resets";

pub(crate) fn list() -> Controls {
    Controls {
        properties: vec![
            Property::read_only(CID, Kind::ANY_U64, "the guest's context ID"),
            Property::read_only(CONNECTIONS, Kind::ANY_U64, "connections there are, with those that begin"),
            Property::read_only(OPENED, Kind::ANY_U64, "connections there were"),
            Property::read_only(RESETS, Kind::ANY_U64, "RST packets that the guest was sent"),
        ],
        commands: Vec::new(),
    }
}

pub(crate) fn carry_out(request: ControlRequest, cid: u32, gauges: &Gauges) -> Result<HostReply, HostError> {
    let ControlRequest::Get(name) = request else { return Err(HostError::Unsupported) };
    let value = match name.as_str() {
        CID => cid.into(),
        CONNECTIONS => gauges.connections.load(Ordering::Relaxed),
        OPENED => gauges.opened.load(Ordering::Relaxed),
        RESETS => gauges.resets.load(Ordering::Relaxed),
        _ => return Err(HostError::NoSuchProperty(name)),
    };
    Ok(HostReply::Value(Value::U64(value)))
}
