//! Serves the three queues of a guest, and the sockets of its connections, on one lane.
//!
//! | file | what for |
//! |---|---|
//! | `worker.rs` | what is called by the lane, and the state |
//! | `from_guest.rs` | the tx queue: packets of the guest, payload to sockets |
//! | `to_guest.rs` | the rx queue: what is owed to the guest, payload from sockets; the event queue |
//! | `host_side.rs` | clients that come, calls that are answered, sockets that are ready, time-outs |
//!
//! What holds:
//! * No chain outlives the call that popped it, so a stop or a reset finds nothing to wait for.
//! * Nothing waits: a socket that takes nothing leaves its bytes in the backlog of its connection, whose size is what
//!   was promised to the guest; a guest that takes nothing leaves the bytes in the socket.
//! * tx is served while rx is full (5.10.6.1.2): what is owed to a connection is a set of flags, and RSTs to flows that do
//!   not exist wait in a queue. Only when that is full tx waits for rx.
//! * The guest's buffers go round the connections that have something for it.
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use reactor::{Readiness, Token};
use vm_virtio::{Chain, DeviceError, Features, Lane, Session, Worker};

use crate::backend::Host;
use crate::backend::sibling::{Exchange, Visitor};
use crate::packet::{Header, Kind};
use crate::poller::{Poller, Ready};
use crate::table::{Id, NO_GENERATION, Table};
use crate::{NO_IMPLIED_STREAM, SEQPACKET, Settings, Timeouts};

pub(crate) const RX: u16 = 0;
pub(crate) const TX: u16 = 1;
pub(crate) const EVENT: u16 = 2;

/// Timer: the first deadline of a connection.
const DEADLINE: Token = Token::new(1);
/// Timer: descriptors may be there again for clients.
pub(crate) const LISTEN: Token = Token::new(2);

/// RSTs that wait for buffers of the guest, at most; then its packets wait, too.
pub(crate) const STRAY: usize = 256;

/// What can be seen of a device from outside.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    /// Connections there are.
    pub(crate) connections: AtomicU64,
    /// Connections there were.
    pub(crate) opened: AtomicU64,
    /// RSTs that answered a guest's packet or ended a connection.
    pub(crate) resets: AtomicU64,
}

/// Payload of one connection that goes to its socket in one system call.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) id: Option<Id>,
    pub(crate) chains: Vec<(Chain, u32)>,
    pub(crate) bytes: usize,
}

/// The part of the socket device that serves its queues.
pub struct VsockWorker {
    pub(crate) cid: u32,
    pub(crate) buffer: u32,
    pub(crate) groups: Vec<String>,
    pub(crate) timeouts: Timeouts,
    pub(crate) host: Host,
    pub(crate) exchange: Exchange,
    pub(crate) poller: Poller,
    pub(crate) table: Table,
    /// RSTs to flows that do not exist.
    pub(crate) stray: VecDeque<Header>,
    pub(crate) batch: Batch,
    /// The next port of the host for clients that have none.
    pub(crate) next_port: u32,
    pub(crate) gauges: Arc<Gauges>,
    streams: bool,
    seqpackets: bool,
    /// Between DRIVER_OK and reset.
    pub(crate) live: bool,
    /// The driver is there, and its rings have not been looked at: it may have had another device before this one.
    stranger: bool,
    /// The guest is to be told that its connections are gone (5.10.6.7).
    pub(crate) event_due: bool,
    timer: Option<Instant>,
    /// Clients are not accepted until then: no descriptors.
    pub(crate) deaf: Option<Instant>,
    pub(crate) crowd: Crowd,
}

/// How many clients are accepted in a row. To find out that there is no other one is a system call, too, so more than one is
/// tried only where that was right for some time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Crowd {
    size: usize,
    /// How often there were as many.
    found: u8,
}

impl Crowd {
    /// At most: those that wait keep their listener ready.
    const MOST: usize = 16;
    const OFTEN: u8 = 8;

    const fn new() -> Crowd {
        Crowd { size: 1, found: 0 }
    }

    pub(crate) fn size(self) -> usize {
        self.size
    }

    /// There were so many.
    pub(crate) fn learn(&mut self, clients: usize) {
        if clients < self.size {
            *self = Crowd { size: clients.max(1), found: 0 };
        } else if self.found < Crowd::OFTEN {
            self.found += 1;
        } else {
            *self = Crowd { size: (self.size * 2).min(Crowd::MOST), found: 0 };
        }
    }
}

impl VsockWorker {
    pub(crate) fn new(
        cid: u32,
        settings: &Settings,
        host: Host,
        exchange: Exchange,
        gauges: Arc<Gauges>,
    ) -> VsockWorker {
        VsockWorker {
            cid,
            buffer: settings.buffer_size,
            groups: settings.groups.clone(),
            timeouts: settings.timeouts,
            host,
            exchange,
            poller: Poller::default(),
            table: Table::default(),
            stray: VecDeque::new(),
            batch: Batch::default(),
            next_port: FIRST_PORT,
            gauges,
            streams: true,
            seqpackets: true,
            live: false,
            stranger: false,
            event_due: false,
            timer: None,
            deaf: None,
            crowd: Crowd::new(),
        }
    }

    /// All connections are dropped, and what was to be sent is forgotten. What is the host's stays: listeners, and
    /// their poller.
    pub(crate) fn reset(&mut self) {
        let VsockWorker {
            cid: _,
            buffer: _,
            groups: _,
            timeouts: _,
            host: _,
            exchange: _,
            poller: _,
            table,
            stray,
            batch,
            next_port: _,
            gauges: _,
            streams: _,
            seqpackets: _,
            live,
            stranger,
            event_due,
            timer: _,
            deaf: _,
            crowd: _,
        } = self;
        table.clear();
        stray.clear();
        *batch = Batch::default();
        (*live, *stranger) = (false, false);
        *event_due = false;
        self.count();
    }

    /// 5.10.6.7: after a migration.
    pub(crate) fn announce_reset(&mut self) {
        self.event_due = true;
    }

    /// A driver that had received packets before this device began has connections of a predecessor, of a process that was
    /// killed for one: as after a migration they are gone, and it has to hear of it.
    fn meet(&mut self, lane: &mut Lane<'_>) {
        if self.stranger
            && let Some(queue) = lane.queues.get(RX)
        {
            self.stranger = false;
            self.event_due |= queue.goes_on() && self.table.len() == 0;
        }
    }

    /// 5.10.3.2.
    pub(crate) fn knows(&self, kind: Kind) -> bool {
        match kind {
            Kind::Stream => self.streams,
            Kind::SeqPacket => self.seqpackets,
        }
    }

    /// What is promised to a new connection.
    pub(crate) fn promise(&self, kind: Kind) -> u32 {
        self.host.cap(kind, self.table.promise(self.buffer))
    }

    pub(crate) fn count(&self) {
        self.gauges.connections.store(self.table.len() as u64, Ordering::Relaxed);
    }

    /// A connection whose state may have changed: it gets in line if it has something for the guest, or goes.
    pub(crate) fn settle(&mut self, id: Id) {
        let Some(slot) = self.table.get(id) else { return };
        if !slot.writable
            && !slot.room_watched
            && let Some(socket) = &slot.socket
        {
            slot.room_watched = true;
            if self.poller.change(socket.as_fd(), id.number(), true).is_err() {
                // Nobody would ever send the rest.
                slot.flow.abort();
            }
        }
        if slot.flow.owed().is_none() && slot.has_input() && slot.flow.room() == 0 {
            slot.flow.starve();
        }
        if slot.flow.owed().is_some() || slot.has_input() && slot.flow.room() > 0 {
            self.table.activate(id);
        } else {
            self.table.retire(id);
        }
    }

    fn keep_time(&mut self, lane: &mut Lane<'_>) {
        let Some(first) = self.table.first_deadline() else { return };
        // One that comes too early costs less than moving it at each connection.
        if self.timer.is_none_or(|at| first < at) {
            self.timer = Some(first);
            lane.reactor.set_timer(DEADLINE, first);
        }
    }
}

/// Ports from here on are given to clients of the host, as by other implementations.
pub(crate) const FIRST_PORT: u32 = 1 << 30;

/// The poller's number of a listener: no connection has that generation.
pub(crate) fn listener_number(index: u32) -> u64 {
    u64::from(NO_GENERATION) << 32 | u64::from(index)
}

impl Worker for VsockWorker {
    type Msg = Visitor;

    fn attached(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.poller.attach(lane.reactor)?;
        for (number, listener) in (0..).zip(&self.host.listeners) {
            self.poller.listen(listener.socket.as_fd(), listener_number(number))?;
        }
        Ok(())
    }

    fn activated(&mut self, session: &Session, _lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.seqpackets = session.features.contains(SEQPACKET);
        self.streams = session.features.contains(crate::STREAM)
            || !session.features.contains(NO_IMPLIED_STREAM)
            || !self.seqpackets;
        (self.live, self.stranger) = (true, true);
        Ok(())
    }

    fn queue_ready(&mut self, queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.meet(lane);
        match queue {
            TX => self.serve_tx(lane),
            EVENT => self.serve_event(lane),
            // The rx queue is served at the end of the turn.
            _ => {}
        }
        Ok(())
    }

    fn registered_ready(
        &mut self,
        number: u64,
        ready: Readiness,
        _lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        self.socket_ready(Ready::of(number, ready));
        Ok(())
    }

    fn timer(&mut self, token: Token, _lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        if token == LISTEN {
            self.listen_again();
            return Ok(());
        }
        self.timer = None;
        let now = Instant::now();
        while let Some(id) = self.table.due(now) {
            self.time_out(id, now);
        }
        Ok(())
    }

    fn message(&mut self, visitor: Visitor, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        // A guest that has not booted, or whose queue is stopped, refuses: the socket closes.
        if self.live && lane.queues.get(RX).is_some() {
            self.visited(visitor);
        }
        Ok(())
    }

    fn flush(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.serve_rx(lane);
        if self.stray.len() < STRAY {
            // It may have waited for that. A ring that is empty costs a look.
            self.serve_tx(lane);
            self.serve_rx(lane);
        }
        if self.event_due {
            self.serve_event(lane);
        }
        self.count();
        self.keep_time(lane);
        if let Some(until) = self.deaf {
            lane.reactor.set_timer(LISTEN, until);
        }
        Ok(())
    }

    fn poll(&mut self, _lane: &mut Lane<'_>) -> bool {
        self.poller.has_news()
    }
}

impl VsockWorker {
    /// What this driver may use is decided by [`Features`].
    pub(crate) fn features() -> Features {
        crate::STREAM | SEQPACKET | NO_IMPLIED_STREAM
    }
}

#[cfg(test)]
mod tests {
    use super::Crowd;

    #[test]
    fn clients_one_after_another_are_seldom_looked_for_in_vain_and_a_crowd_is_taken_in_rows() {
        let mut crowd = Crowd::new();
        let in_vain = (0..90).filter(|_| {
            let in_vain = crowd.size() > 1;
            crowd.learn(1);
            in_vain
        });
        assert_eq!(in_vain.count(), 9);
        (0..100).for_each(|_| crowd.learn(crowd.size()));
        assert_eq!(crowd.size(), Crowd::MOST);
        crowd.learn(0);
        assert_eq!(crowd.size(), 1);
    }
}
