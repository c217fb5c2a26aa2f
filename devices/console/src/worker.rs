//! The lane: all ports and the control queues on one thread.
//!
//! One thread is enough, since nothing on it waits: a port whose host or guest is slow is skipped until a file, a timer or
//! a kick says otherwise, and each ring's budget keeps one port from holding up the others.
//!
//! Files are watched so that a port that must not be read costs no wake-ups: input and arrivals by their edges, room for
//! output while it is waited for.
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use reactor::{Interest, Readiness, Token, Trigger};
use vm_virtio::{ConfigSpace, DeviceError, Features, Lane, Session, StateError, Stop, Worker};

use crate::backend::{Next, Output, Presence, is_hung_up, next_is};
use crate::control::{Heard, Protocol, Size};
use crate::port::{Client, Event, Input, Port, of_token, token};
use crate::state::{ConsoleV1, PortV1};
use crate::{MULTIPORT, Queues, queues_of};

/// Clients of a port that are looked at before others have their turn.
const ROUNDS: usize = 16;

/// When to accept again after descriptors ran out.
const AGAIN: Duration = Duration::from_secs(1);

/// What the device tells its worker.
#[derive(Debug)]
pub struct Order(pub(crate) Kind);

#[derive(Debug)]
pub(crate) enum Kind {
    /// A port that was not there before.
    Add(Box<Port>),
    /// A port goes.
    Remove(u32),
    /// An operator says how large a console is.
    Resize(u32, Size),
    /// A character of an emergency (5.3.4).
    Emergency(u8),
}

/// The part of the console device that serves its queues.
pub struct ConsoleWorker {
    ports: Vec<Option<Port>>,
    protocol: Protocol,
    config: Arc<ConfigSpace>,
    /// A driver is there.
    live: bool,
    multiport: bool,
    /// Clients so far.
    clients: u64,
}

impl ConsoleWorker {
    pub(crate) fn new(ports: Vec<Option<Port>>, config: Arc<ConfigSpace>) -> ConsoleWorker {
        let max = u32::try_from(ports.len()).unwrap_or(u32::MAX);
        ConsoleWorker {
            ports,
            protocol: Protocol::new(max),
            config,
            live: false,
            multiport: false,
            clients: 0,
        }
    }

    pub(crate) fn reset(&mut self) {
        let ConsoleWorker { ports, protocol, config: _, live, multiport, clients: _ } = self;
        (*live, *multiport) = (false, false);
        protocol.reset();
        for port in ports.iter_mut().flatten() {
            port.reset();
            port.seen.guest_open.store(false, Ordering::Relaxed);
        }
    }

    pub(crate) fn save(&self) -> ConsoleV1 {
        let ports = self.ports.iter().flatten().map(|port| {
            let (skip, kept) = port.save();
            PortV1 { id: port.id, skip, kept }
        });
        ConsoleV1 { protocol: self.protocol.save(), ports: ports.collect() }
    }

    pub(crate) fn restore(&mut self, state: ConsoleV1) -> Result<(), StateError> {
        let refused = |error: crate::control::WrongPort| StateError::refused(error.to_string());
        self.protocol.restore(state.protocol).map_err(refused)?;
        for PortV1 { id, skip, kept } in state.ports {
            // What was kept for a port that is not here is nobody's.
            if let Some(port) = self.port(id) {
                port.restore(skip, &kept);
            }
        }
        Ok(())
    }

    fn port(&mut self, id: u32) -> Option<&mut Port> {
        self.ports.get_mut(usize::try_from(id).ok()?)?.as_mut()
    }

    /// Does what there is to do for a port.
    fn run(&mut self, id: u32, lane: &mut Lane<'_>) {
        for _ in 0..ROUNDS {
            if !self.run_once(id, lane) {
                return;
            }
        }
        // Clients that come and go faster than they are served: the others' turn.
        lane.reactor.set_timer(token(id, Event::Arrival), Instant::now());
    }

    /// Returns whether another client came in place of one that is gone.
    fn run_once(&mut self, id: u32, lane: &mut Lane<'_>) -> bool {
        let usable = self.live && (id == 0 || self.multiport);
        let takes_input = self.live && if self.multiport { self.protocol.takes_input(id) } else { id == 0 };
        let Queues { receive, transmit } = queues_of(id);
        let Some(port) = self.port(id) else {
            // Its guest has not heard yet that it is gone, or does not care: nobody keeps this.
            if usable && let Some(queue) = lane.queues.get(transmit) {
                while let Some(chain) = queue.pop() {
                    queue.note_refused();
                    queue.add_used(chain, 0);
                }
            }
            return false;
        };
        let queue = if usable { lane.queues.get(transmit) } else { None };
        let client = port.transmit(queue, lane.reactor);
        let mut input = port.read_keys();
        if input == Input::Waits
            && takes_input
            && let Some(queue) = lane.queues.get(receive)
        {
            input = port.receive(queue, lane.reactor);
        }
        let mut another = false;
        if client == Client::Deaf {
            another |= self.deaf(id, lane);
        }
        if input == Input::Ended {
            another |= self.input_ended(id, lane);
        }
        another
    }

    /// The client takes no output any more. What it sent before may still be read.
    fn deaf(&mut self, id: u32, lane: &mut Lane<'_>) -> bool {
        if self.port(id).is_some_and(|port| port.input.is_none()) {
            self.leave(id, lane);
        }
        self.accept(id, lane)
    }

    /// Returns whether another client came.
    fn input_ended(&mut self, id: u32, lane: &mut Lane<'_>) -> bool {
        let Some(port) = self.port(id) else { return false };
        match &port.presence {
            Presence::Pty(_) => self.look_at_pty(id, lane),
            Presence::Always | Presence::Stdio(_) => {
                port.input = None;
                lane.reactor.unwatch(token(id, Event::Read));
            }
            Presence::Socket(listener) => {
                let stays = listener.can_half_close()
                    && matches!(port.output, Output::To(_))
                    && port.input.as_ref().is_some_and(|file| !is_hung_up(file.as_fd()));
                if stays
                    && let Some(file) = port.input.take()
                    && lane.reactor.watch(file.as_fd(), token(id, Event::HangUp), GONE).is_ok()
                {
                    lane.reactor.unwatch(token(id, Event::Read));
                    return false;
                }
                self.leave(id, lane);
                return self.accept(id, lane);
            }
        }
        false
    }

    /// Takes the next client of a socket, unless one is there. Returns whether there was one: it is to be [run](Self::run).
    fn accept(&mut self, id: u32, lane: &mut Lane<'_>) -> bool {
        let Some(port) = self.port(id) else { return false };
        let Presence::Socket(listener) = &port.presence else { return false };
        if matches!(port.output, Output::To(_)) {
            return false;
        }
        let again = match listener.accept() {
            Ok(None) => return false,
            Ok(Some(client)) => {
                // One that is there but deaf gives way.
                self.leave(id, lane);
                let Some(port) = self.port(id) else { return false };
                let client = Arc::new(client);
                let watched = lane.reactor.watch(client.as_fd(), token(id, Event::Read), Interest::READ_EDGE);
                if watched.is_ok() {
                    port.input = Some(client.clone());
                    port.output = Output::To(client);
                    self.arrive(id);
                    return true;
                }
                watched.err()
            }
            Err(error) => Some(error),
        };
        if let Some(error) = again {
            tracing::warn!("port {id}: nobody can connect: {error}");
            lane.reactor.set_timer(token(id, Event::Arrival), Instant::now() + AGAIN);
        }
        false
    }

    /// Somebody is there.
    fn arrive(&mut self, id: u32) {
        self.clients += 1;
        let number = self.clients;
        let Some(port) = self.port(id) else { return };
        port.set_readable();
        port.client = Some(number);
        port.seen.client.store(true, Ordering::Relaxed);
        self.protocol.client(id, Some(number));
    }

    /// Nobody is there any more.
    fn leave(&mut self, id: u32, lane: &mut Lane<'_>) {
        let Some(port) = self.port(id) else { return };
        if matches!(port.presence, Presence::Socket(_)) {
            port.input = None;
            lane.reactor.unwatch(token(id, Event::Read));
            lane.reactor.unwatch(token(id, Event::HangUp));
        }
        port.set_deaf(lane.reactor);
        port.client = None;
        port.seen.client.store(false, Ordering::Relaxed);
        self.protocol.client(id, None);
    }

    /// Whether somebody has the terminal open now, and how large it is.
    fn look_at_pty(&mut self, id: u32, lane: &mut Lane<'_>) {
        let Some(port) = self.port(id) else { return };
        let Presence::Pty(pty) = &port.presence else { return };
        let (is_open, size, output) = (pty.is_open(), pty.size(), pty.output());
        match (is_open, port.client.is_some()) {
            (true, false) => {
                port.output = output;
                self.arrive(id);
            }
            (false, true) => self.leave(id, lane),
            _ => {}
        }
        if is_open {
            self.resize(id, size, lane);
        }
    }

    /// A console has another size. Unknown is none.
    fn resize(&mut self, id: u32, size: Size, lane: &mut Lane<'_>) {
        let Some(port) = self.port(id) else { return };
        if size == port.seen.size() || size.cols == 0 || size.rows == 0 {
            return;
        }
        port.seen.set_size(size);
        self.protocol.resize(id, size);
        if id == 0 {
            self.publish_size(size, lane);
        }
    }

    /// The configuration space has the size of port 0 (5.3.6).
    fn publish_size(&mut self, size: Size, lane: &mut Lane<'_>) {
        let bytes = [size.cols.to_le_bytes(), size.rows.to_le_bytes()].concat();
        if self.config.set(0, &bytes) == Ok(true) {
            lane.up.config_changed();
        }
    }

    /// A port begins: its files are watched, and the driver will hear of it.
    fn begin(&mut self, id: u32, lane: &mut Lane<'_>) -> std::io::Result<()> {
        let Some(port) = self.port(id) else { return Ok(()) };
        let (name, console, size) = (port.name.clone(), port.console, port.seen.size());
        let reactor = &mut *lane.reactor;
        match &port.presence {
            Presence::Always => {}
            Presence::Socket(listener) => {
                reactor.watch(listener.as_fd(), token(id, Event::Arrival), Interest::READ_EDGE)?;
            }
            Presence::Pty(pty) => {
                reactor.watch(pty.notices(), token(id, Event::Arrival), Interest::READ_EDGE)?;
            }
            Presence::Stdio(stdio) => {
                if let Some(resizes) = stdio.resizes() {
                    reactor.watch(resizes.as_fd(), token(id, Event::Resize), Interest::READ_EDGE)?;
                }
            }
        }
        if let Some(input) = &port.input {
            match reactor.watch(input.as_fd(), token(id, Event::Read), Interest::READ_EDGE) {
                // A regular file is always ready.
                Err(error) if error.kind() != std::io::ErrorKind::PermissionDenied => return Err(error),
                _ => {}
            }
        }
        let is_there = matches!(port.presence, Presence::Always | Presence::Stdio(_));
        self.protocol.add(id, &name, console);
        self.protocol.resize(id, size);
        if is_there {
            self.arrive(id);
        }
        self.look_at_pty(id, lane);
        self.accept(id, lane);
        self.run(id, lane);
        Ok(())
    }

    fn end(&mut self, id: u32, lane: &mut Lane<'_>) {
        lane.reactor.retain(|token| token.is_host() || of_token(token).is_none_or(|(port, _)| port != id));
        if let Some(slot) = usize::try_from(id).ok().and_then(|id| self.ports.get_mut(id)) {
            *slot = None;
        }
        self.protocol.remove(id);
    }

    /// Control queues that do not begin at the beginning have a driver that a predecessor of this device was in dialogue with.
    /// Returns whether it can be listened to: that takes both queues.
    fn meet(&mut self, lane: &mut Lane<'_>) -> bool {
        let mut goes_on = |queue| lane.queues.get(queue).map(|queue| queue.goes_on());
        match (self.protocol.is_met(), goes_on(CONTROL_TRANSMIT), goes_on(CONTROL_RECEIVE)) {
            (false, Some(true), Some(told)) => {
                self.protocol.take_over(told);
                for port in self.ports.iter().flatten() {
                    port.seen.guest_open.store(self.protocol.is_open(port.id), Ordering::Relaxed);
                }
                // Input may wait for it.
                (0u32..).take(self.ports.len()).for_each(|id| self.run(id, lane));
                true
            }
            (false, Some(true), None) => false,
            _ => true,
        }
    }

    /// Reads what the driver says on the control queue.
    fn hear(&mut self, lane: &mut Lane<'_>) {
        while let Some(queue) = lane.queues.get(CONTROL_TRANSMIT)
            && let Some(chain) = queue.pop()
        {
            let mut bytes = [0; 8];
            let count = queue.reader(&chain).read(&mut bytes);
            let heard = self.protocol.hear(bytes.get(..count).unwrap_or(&[]));
            queue.note_read(count as u64);
            if heard == Heard::Ignored {
                queue.note_refused();
            }
            queue.add_used(chain, 0);
            match heard {
                Heard::Open(id, open) => {
                    if let Some(port) = self.port(id) {
                        port.seen.guest_open.store(open, Ordering::Relaxed);
                    }
                    self.run(id, lane);
                }
                Heard::Port(id, _) => self.run(id, lane),
                Heard::Device(_) | Heard::Ignored => {}
            }
        }
    }

    /// Tells the driver what it does not know yet, as far as it has buffers for it.
    fn tell(&mut self, lane: &mut Lane<'_>) {
        if !self.live || !self.multiport {
            return;
        }
        let Some(queue) = lane.queues.get(CONTROL_RECEIVE) else { return };
        while let Some(message) = self.protocol.next()
            && let Some(chain) = queue.pop()
        {
            let bytes = message.to_bytes();
            let fits = queue.writer(&chain).write_all(&bytes).is_ok();
            if fits {
                self.protocol.sent(&message);
            } else {
                queue.note_refused();
            }
            let written = if fits { u32::try_from(bytes.len()).unwrap_or(u32::MAX) } else { 0 };
            queue.add_used(chain, written);
        }
    }

    fn happened(&mut self, id: u32, event: Event, lane: &mut Lane<'_>) {
        let Some(port) = self.port(id) else { return };
        match event {
            Event::Read => {
                port.set_readable();
                self.run(id, lane);
                let Some(port) = self.port(id) else { return };
                match (&port.presence, &port.input) {
                    (Presence::Pty(_), _) => self.look_at_pty(id, lane),
                    // Gone, while the guest takes no input.
                    (Presence::Socket(_), Some(input)) if port.is_readable() => match next_is(input) {
                        Next::End => drop(self.input_ended(id, lane)),
                        // It has left something. If somebody else wants its place, that is lost.
                        Next::Bytes if is_hung_up(input.as_fd()) => {
                            port.set_deaf(lane.reactor);
                            self.accept(id, lane);
                        }
                        Next::Bytes => {}
                    },
                    _ => {}
                }
            }
            Event::Write => port.set_writable(lane.reactor),
            Event::Stall => port.set_stalled(),
            Event::HangUp => {
                self.leave(id, lane);
                self.accept(id, lane);
            }
            Event::Arrival => match &port.presence {
                Presence::Pty(pty) => {
                    pty.take_notices();
                    // Who came, wrote and went is read all the same.
                    port.set_readable();
                    self.look_at_pty(id, lane);
                }
                _ => drop(self.accept(id, lane)),
            },
            Event::Resize => {
                let size = match &port.presence {
                    Presence::Stdio(stdio) => {
                        stdio.resizes().into_iter().for_each(|resizes| resizes.take());
                        stdio.size()
                    }
                    _ => None,
                };
                self.resize(id, size.unwrap_or_default(), lane);
            }
        }
        self.run(id, lane);
    }
}

/// Only that the other side is gone.
const GONE: Interest = Interest { readable: false, writable: false, trigger: Trigger::Edge };

const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

impl Worker for ConsoleWorker {
    type Msg = Order;

    fn attached(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        for id in (0u32..).take(self.ports.len()) {
            self.begin(id, lane)?;
        }
        Ok(())
    }

    fn activated(&mut self, session: &Session, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.live = true;
        self.multiport = session.features.contains(Features::from(MULTIPORT));
        // A restored configuration has the size of where it was saved.
        if let Some(size) = self.port(0).map(|port| port.seen.size()).filter(|size| *size != Size::default())
        {
            self.publish_size(size, lane);
        }
        // What came while nobody could listen is not announced again.
        self.ports.iter_mut().flatten().for_each(Port::set_readable);
        Ok(())
    }

    fn queue_ready(&mut self, queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        match queue {
            // 5.3.2: there are no such queues then.
            2.. if !self.multiport => {}
            CONTROL_RECEIVE | CONTROL_TRANSMIT if self.meet(lane) => self.hear(lane),
            CONTROL_RECEIVE | CONTROL_TRANSMIT => {}
            0 | 1 => self.run(0, lane),
            _ => self.run(u32::from(queue / 2 - 1), lane),
        }
        self.tell(lane);
        Ok(())
    }

    fn queue_stop(&mut self, queue: u16, how: Stop, _lane: &mut Lane<'_>) {
        let port = match queue {
            1 => 0,
            2 | 3 => return,
            _ => u32::from(queue / 2).saturating_sub(1),
        };
        // The driver takes its chains back, and with them the rest of the one that was begun.
        if how == Stop::Discard
            && queue == queues_of(port).transmit
            && let Some(port) = self.port(port)
        {
            port.reset();
        }
    }

    fn source_ready(&mut self, token: Token, _: Readiness, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        if let Some((id, event)) = of_token(token) {
            self.happened(id, event, lane);
        }
        self.tell(lane);
        Ok(())
    }

    fn timer(&mut self, token: Token, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        if let Some((id, event)) = of_token(token) {
            self.happened(id, event, lane);
        }
        self.tell(lane);
        Ok(())
    }

    fn message(&mut self, Order(order): Order, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        match order {
            Kind::Add(port) => {
                let id = port.id;
                if let Some(slot) = usize::try_from(id).ok().and_then(|id| self.ports.get_mut(id)) {
                    *slot = Some(*port);
                }
                if let Err(error) = self.begin(id, lane) {
                    tracing::error!("port {id} cannot be served: {error}");
                    self.end(id, lane);
                }
            }
            Kind::Remove(id) => self.end(id, lane),
            Kind::Resize(id, size) => self.resize(id, size, lane),
            Kind::Emergency(byte) => {
                if let Some(port) = self.port(0) {
                    port.keep(&[byte]);
                }
                self.run(0, lane);
            }
        }
        self.tell(lane);
        Ok(())
    }
}
