//! Guests of one process that reach each other.
//!
//! A guest that calls another one is, for the device of the called, a client on the host: both devices hold one end of a
//! pair of Unix sockets. So everything that holds for the host's side holds between guests, too: credit in both
//! directions, half-close, bounded memory, and neither waits for the other. The called device sends one byte when its
//! guest has accepted, and closes its end if that does not happen.
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use reactor::Mail;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags};

use super::socket_type;
use crate::packet::Kind;

/// A call from another guest.
pub struct Visitor {
    pub(crate) socket: OwnedFd,
    pub(crate) kind: Kind,
    pub(crate) from_cid: u32,
    pub(crate) from_port: u32,
    pub(crate) port: u32,
}

struct Member {
    groups: Vec<String>,
    mail: Mail<Visitor>,
}

/// Where the guests of a process find each other. Clones are the same place.
#[derive(Clone, Default)]
pub struct Exchange(Arc<Mutex<HashMap<u32, Member>>>);

impl Exchange {
    /// A place where nobody is.
    pub fn new() -> Exchange {
        Exchange::default()
    }

    fn members(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Member>> {
        // Nothing that runs under this lock can panic half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False if that context ID is taken.
    pub(crate) fn join(&self, cid: u32, groups: &[String], mail: Mail<Visitor>) -> bool {
        let mut members = self.members();
        if members.contains_key(&cid) {
            return false;
        }
        members.insert(cid, Member { groups: groups.to_vec(), mail });
        true
    }

    pub(crate) fn leave(&self, cid: u32) {
        self.members().remove(&cid);
    }

    /// Whether there is such a guest, in one of these groups.
    fn find(&self, cid: u32, groups: &[String]) -> Option<Mail<Visitor>> {
        let members = self.members();
        let member = members.get(&cid)?;
        member.groups.iter().any(|group| groups.contains(group)).then(|| member.mail.clone())
    }

    /// Calls a guest; the caller's end of the connection.
    pub(crate) fn call(
        &self,
        groups: &[String],
        kind: Kind,
        from: (u32, u32),
        to: (u32, u32),
        buffer: u32,
    ) -> Result<OwnedFd, Errno> {
        let mail = self.find(to.0, groups).ok_or(Errno::NETUNREACH)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, socket_type(kind), flags, None)?;
        if kind == Kind::SeqPacket {
            super::unix::set_longest_message(&ours, buffer);
            super::unix::set_longest_message(&theirs, buffer);
        }
        let visitor = Visitor { socket: theirs, kind, from_cid: from.0, from_port: from.1, port: to.1 };
        mail.send(visitor).map_err(|_| Errno::CONNREFUSED)?;
        Ok(ours)
    }
}
