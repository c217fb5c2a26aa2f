//! AF_VSOCK of the host: the guest's connections go to another context ID (1: the host itself, through the loopback),
//! and what connects to chosen ports of the host goes to the guest.
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags};

use super::{Dialed, HostError, ListenPort, Listener, socket_type};
use crate::packet::Kind;
use crate::syscall;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;

fn new_socket(kind: Kind) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::VSOCK, socket_type(kind), flags, None)
}

pub(super) fn listen(ports: &[ListenPort]) -> Result<Vec<Listener>, HostError> {
    let bind = |wanted: &ListenPort| {
        let socket = new_socket(wanted.kind)?;
        syscall::bind_vsock(socket.as_fd(), wanted.port)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Listener { socket, kind: wanted.kind, port: Some(wanted.port), _file: None })
    };
    let failed =
        |port: u32| move |source| HostError::System { name: format!("AF_VSOCK port {port}"), source };
    ports.iter().map(|wanted| bind(wanted).map_err(failed(wanted.port))).collect()
}

pub(super) fn dial(cid: u32, kind: Kind, port: u32) -> Dialed {
    let socket = match new_socket(kind) {
        Ok(socket) => socket,
        Err(error) => return Dialed::Refused(error),
    };
    match syscall::connect_vsock(socket.as_fd(), cid, port) {
        Ok(()) => Dialed::Connected(socket),
        Err(Errno::INPROGRESS) => Dialed::Pending(socket),
        Err(error) => Dialed::Refused(error),
    }
}
