//! The host's side: clients that come, calls that are answered, sockets that are ready, and what takes too long.
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::backend::sibling::Visitor;
use crate::backend::{Dialed, unix};
use crate::flow::{Flow, Key, Phase};
use crate::from_guest::{REDIAL, drain};
use crate::packet::{HOST_CID, Kind};
use crate::poller::Ready;
use crate::syscall::{self, Sink, Source};
use crate::table::{Id, Inbox, NO_GENERATION, Slot, Stage, Welcome};
use crate::worker::{FIRST_PORT, VsockWorker, listener_number};

/// Clients are not accepted for this long once descriptors have run out.
const DEAF: Duration = Duration::from_millis(100);
/// Longest first message of a SEQPACKET client: the line, and what follows it.
const FIRST_MESSAGE: usize = 4096;

impl VsockWorker {
    /// A socket says something. It may be gone by now.
    pub(crate) fn socket_ready(&mut self, ready: Ready) {
        if ready.number >> 32 == u64::from(NO_GENERATION) {
            return self.accept(ready.number as u32);
        }
        let id = Id::of(ready.number);
        let Some(slot) = self.table.get(id) else { return };
        slot.readable |= ready.readable;
        let was_writable = slot.writable;
        slot.writable |= ready.writable;
        if ready.writable && was_writable && slot.room_watched && slot.stage == Stage::Live {
            // Nothing was blocked. If this fails there are wake-ups for nothing.
            let socket = slot.socket.as_ref();
            slot.room_watched =
                socket.is_some_and(|socket| self.poller.change(socket.as_fd(), ready.number, false).is_err());
        }
        slot.ended |= ready.ended;
        slot.hung_up |= ready.hung_up;
        match slot.stage {
            Stage::Greeting => self.greeted(id),
            Stage::Dialing => self.dialed(id),
            Stage::Sibling => self.sibling_answered(id),
            Stage::Redial { .. } => {}
            Stage::Live => {
                if slot.flow.phase() == Phase::Open || slot.flow.phase() == Phase::Over {
                    drain(slot);
                }
                // The end of its input was seen before, so nobody will read to find out.
                if slot.hung_up && slot.flow.host_has_ended() {
                    slot.flow.host_gone();
                }
                let waits_for_guest = slot.flow.phase() == Phase::Asking;
                if slot.hung_up && (waits_for_guest || !slot.flow.guest_will_receive()) {
                    // Nobody to connect any more, or nobody who would read.
                    if waits_for_guest { slot.flow.abort() } else { slot.flow.host_gone() }
                }
                self.ended(id);
            }
        }
    }

    /// Takes clients of a listener.
    fn accept(&mut self, number: u32) {
        let mut clients = 0;
        while clients < self.crowd.size() {
            let Some(listener) = self.host.listeners.get(number as usize) else { return };
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&listener.socket, flags) {
                Ok(socket) => {
                    let (kind, port) = (listener.kind, listener.port);
                    self.host.prepare(&socket, kind);
                    self.client(socket, kind, port);
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    tracing::warn!("clients wait: no descriptors or memory left");
                    return self.listen(false);
                }
                // A client that has gone again.
                Err(_) => {}
            }
            clients += 1;
        }
        self.crowd.learn(clients);
    }

    fn listen(&mut self, on: bool) {
        self.deaf = (!on).then(|| Instant::now() + DEAF);
        for (number, listener) in (0..).zip(&self.host.listeners) {
            let _ = self.poller.mind(listener.socket.as_fd(), listener_number(number), on);
        }
    }

    pub(crate) fn listen_again(&mut self) {
        self.listen(true);
    }

    /// A client on the host. It is refused by the end of its connection.
    fn client(&mut self, socket: OwnedFd, kind: Kind, port: Option<u32>) {
        if !self.live || !self.knows(kind) {
            return;
        }
        let flow = Flow::asking(kind, 0);
        let Some(id) = self.table.insert(Slot::new(flow, Stage::Greeting, Some(socket))) else { return };
        match port {
            Some(port) => self.ask_guest(id, (HOST_CID, None), port, Welcome::Nothing),
            // The line is there already, mostly.
            None => self.greeted(id),
        }
        if !self.watch(id) {
            self.table.remove(id);
        }
    }

    /// Looks for the CONNECT line.
    fn greeted(&mut self, id: Id) {
        let Some(slot) = self.table.get(id) else { return };
        let Some(socket) = &slot.socket else { return };
        slot.readable = false;
        let found = match slot.flow.kind() {
            Kind::Stream => stream_line(socket, slot.inbox.take()),
            Kind::SeqPacket => message_line(socket),
        };
        match found {
            Line::Port { port, rest, more } => {
                // Of the end there is no further event.
                slot.readable = more || slot.ended;
                slot.inbox = (!rest.is_empty()).then_some(Inbox { bytes: rest, sent: 0, eor: false });
                self.ask_guest(id, (HOST_CID, None), port, Welcome::Line);
            }
            Line::NotYet(part) if !slot.ended => {
                slot.inbox = Some(Inbox { bytes: part, sent: 0, eor: false });
                if !slot.has_deadline() {
                    self.table.set_deadline(id, Some(Instant::now() + self.timeouts.greeting));
                }
            }
            Line::NotYet(_) | Line::Nonsense => self.table.remove(id),
        }
    }

    /// Another guest calls.
    pub(crate) fn visited(&mut self, visitor: Visitor) {
        let Visitor { socket, kind, from_cid, from_port, port } = visitor;
        if !self.knows(kind) {
            return;
        }
        let flow = Flow::asking(kind, 0);
        let Some(id) = self.table.insert(Slot::new(flow, Stage::Live, Some(socket))) else { return };
        if self.watch(id) {
            self.ask_guest(id, (from_cid, Some(from_port)), port, Welcome::Byte);
        } else {
            self.table.remove(id);
        }
    }

    /// Asks the guest whether it wants the connection.
    fn ask_guest(&mut self, id: Id, from: (u32, Option<u32>), guest_port: u32, welcome: Welcome) {
        let (peer_cid, peer_port) = from;
        let mut key = Key { peer_cid, peer_port: 0, guest_port };
        key.peer_port = match peer_port {
            Some(port) => port,
            None => loop {
                let port = self.next_port;
                self.next_port = if port == u32::MAX - 1 { FIRST_PORT } else { port + 1 };
                // There are far more ports than connections.
                if self.table.find(Key { peer_port: port, ..key }).is_none() {
                    break port;
                }
            },
        };
        if self.table.find(key).is_some() {
            return self.table.remove(id);
        }
        let Some(kind) = self.table.get(id).map(|slot| slot.flow.kind()) else { return };
        let flow = Flow::asking(kind, self.promise(kind));
        self.table.set_flow(id, flow);
        self.table.name(id, key);
        if let Some(slot) = self.table.get(id) {
            slot.stage = Stage::Live;
            slot.welcome = welcome;
        }
        self.table.set_deadline(id, Some(Instant::now() + self.timeouts.answer));
        self.settle(id);
    }

    /// The guest has accepted: the host's side hears of it.
    pub(crate) fn opened(&mut self, id: Id) {
        let Some(slot) = self.table.get(id) else { return };
        let port = slot.key().map_or(0, |key| key.peer_port);
        let line = match slot.welcome {
            Welcome::Nothing => String::new(),
            Welcome::Line => format!("OK {port}\n"),
            Welcome::Byte => "\0".to_owned(),
        };
        if let (Some(socket), false) = (&slot.socket, line.is_empty()) {
            let mut source = Source::new();
            source.own(line.as_bytes());
            if syscall::send(socket.as_fd(), source, false) != Ok(line.len()) {
                // Nothing was sent before, so there is room; it is gone.
                slot.flow.host_gone();
            }
        }
        self.gauges.opened.fetch_add(1, Ordering::Relaxed);
        self.table.set_deadline(id, None);
    }

    /// connect(2) is over.
    fn dialed(&mut self, id: Id) {
        let Some(slot) = self.table.get(id) else { return };
        let Some(socket) = &slot.socket else { return };
        // A fresh socket says that it is ready before it begins to connect.
        match rustix::net::sockopt::socket_error(socket) {
            Ok(Ok(())) if rustix::net::getpeername(socket).is_ok() => self.answered(id),
            Ok(Ok(())) if !slot.hung_up => {}
            _ => {
                slot.flow.abort();
                self.ended(id);
            }
        }
    }

    /// The other guest's device says that its guest has accepted, or hangs up.
    fn sibling_answered(&mut self, id: Id) {
        let Some(slot) = self.table.get(id) else { return };
        let Some(socket) = &slot.socket else { return };
        if !slot.readable {
            return;
        }
        let mut byte = [0];
        let mut sink = Sink::new();
        sink.own(&mut byte);
        match syscall::receive(socket.as_fd(), sink, false) {
            // More may have come with it: the socket is read again.
            Ok(received) if received.bytes == 1 => self.answered(id),
            Err(Errno::AGAIN) => slot.readable = false,
            _ => {
                slot.flow.abort();
                self.ended(id);
            }
        }
    }

    /// The time of a connection has come.
    pub(crate) fn time_out(&mut self, id: Id, now: Instant) {
        let Some(slot) = self.table.get(id) else { return };
        match slot.stage {
            Stage::Greeting => return self.table.remove(id),
            Stage::Redial { until } if now < until => return self.redial(id, now),
            // Nobody has taken the rest.
            Stage::Live if slot.flow.phase() == Phase::Over => {
                slot.socket = None;
                slot.backlog.clear();
            }
            // Nobody answers, or the guest does not end it (5.10.6.5).
            _ => slot.flow.abort(),
        }
        self.ended(id);
    }

    fn redial(&mut self, id: Id, now: Instant) {
        let Some(slot) = self.table.get(id) else { return };
        let (Some(key), kind) = (slot.key(), slot.flow.kind()) else { return };
        match self.host.dial(kind, key.peer_port) {
            Dialed::Busy => self.table.set_deadline(id, Some(now + REDIAL)),
            Dialed::Connected(socket) => {
                slot.socket = Some(socket);
                if self.watch(id) {
                    return self.answered(id);
                }
                self.table.remove(id);
            }
            Dialed::Pending(_) | Dialed::Refused(_) => {
                slot.flow.abort();
                self.ended(id);
            }
        }
    }
}

/// What a client has said.
enum Line {
    /// Where it wants to, what came behind that, and whether there may be more.
    Port {
        port: u32,
        rest: Vec<u8>,
        more: bool,
    },
    /// What there is of it.
    NotYet(Vec<u8>),
    Nonsense,
}

/// Takes what there is of the line, behind the part that was there before, and a little of what follows it.
fn stream_line(socket: &OwnedFd, part: Option<Inbox>) -> Line {
    let mut bytes = [0; unix::LINE_MAX];
    let part = part.map(|part| part.bytes).unwrap_or_default();
    let mut have = part.len();
    let Some(head) = bytes.get_mut(..have) else { return Line::Nonsense };
    head.copy_from_slice(&part);
    loop {
        let room = bytes.get_mut(have..).unwrap_or_default();
        let size = room.len();
        let mut sink = Sink::new();
        sink.own(room);
        let received = match syscall::receive(socket.as_fd(), sink, false) {
            Ok(received) if received.bytes > 0 => received,
            Err(Errno::AGAIN) => return Line::NotYet(bytes.get(..have).unwrap_or_default().to_vec()),
            _ => return Line::Nonsense,
        };
        have += received.bytes;
        let more = received.bytes == size || received.cut;
        let found = bytes.get(..have).unwrap_or_default();
        match unix::connect_line(found) {
            Ok(Some((port, len))) => {
                return Line::Port { port, rest: found.get(len..).unwrap_or_default().to_vec(), more };
            }
            // The next byte will be told of. There is room for it: a line of the longest length is nonsense.
            Ok(None) if !more => return Line::NotYet(found.to_vec()),
            Ok(None) => {}
            Err(()) => return Line::Nonsense,
        }
    }
}

/// The line is a message; if anything follows in it, that is the first one for the guest.
fn message_line(socket: &OwnedFd) -> Line {
    match syscall::message_len(socket.as_fd()) {
        Ok(len) if len <= FIRST_MESSAGE => {}
        Err(Errno::AGAIN) => return Line::NotYet(Vec::new()),
        _ => return Line::Nonsense,
    }
    let mut bytes = vec![0; FIRST_MESSAGE];
    let mut sink = Sink::new();
    sink.own(&mut bytes);
    let Ok(message) = syscall::receive(socket.as_fd(), sink, false) else { return Line::Nonsense };
    bytes.truncate(message.bytes);
    match unix::connect_line(&bytes) {
        Ok(Some((port, len))) => Line::Port { port, rest: bytes.split_off(len), more: true },
        _ => Line::Nonsense,
    }
}
