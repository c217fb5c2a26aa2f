//! One port: its host's side, and the way of bytes between that and two queues.
//!
//! Invariants:
//! * No chain outlives the call that popped it. One that could be written in part only is put back, and `skip` says how
//!   much of it the host has; so a stop, a migration or a reset finds nothing to wait for.
//! * Output has one order: what is kept for a client goes first, then the ring.
//! * A client that takes nothing holds up its own port. If that is a console, for [`STALLED`] at most: Linux waits for its
//!   console's output with a spinning CPU (drivers/tty/hvc).
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reactor::{Interest, Reactor, Token};
use rustix::io::Errno;
use vm_virtio::{Chain, Queue};

use crate::backend::syscall::Pieces;
use crate::backend::{self, Got, Host, OpenError, Output, Presence, Wrote};
use crate::control::Size;
use crate::replay::Replay;
use crate::spec::PortSpec;

/// How long a console's output waits for a client that takes nothing; after that it is kept as if nobody were there.
pub(crate) const STALLED: Duration = Duration::from_secs(1);
/// When to try again what failed for want of descriptors or memory.
const AGAIN: Duration = Duration::from_millis(100);

/// Chains that are written with one system call.
const BATCH: usize = 64;
/// Bytes from which on one is worth its cost: more are no faster, and hold up other ports.
const LARGE: usize = 256 << 10;

/// Bytes that a port moves before others have their turn.
const TURN: usize = 4 << 20;

/// What each port has to watch and to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// There is something to read.
    Read,
    /// There is room to write again; or, as a timer, it is to be tried again.
    Write,
    /// Somebody connects, or has opened or closed a terminal; or, as a timer, it is to be tried again.
    Arrival,
    /// Who stopped sending has stopped receiving, too.
    HangUp,
    /// The terminal's size may have changed.
    Resize,
    /// The client of a console has taken nothing for a while.
    Stall,
}

const EVENTS: [Event; 6] =
    [Event::Read, Event::Write, Event::Arrival, Event::HangUp, Event::Resize, Event::Stall];

/// The token of a port's event.
pub(crate) fn token(id: u32, event: Event) -> Token {
    let at = EVENTS.iter().position(|each| *each == event).unwrap_or(0);
    Token::new(id * 8 + u32::try_from(at).unwrap_or(0))
}

/// The port and event of a token.
pub(crate) fn of_token(token: Token) -> Option<(u32, Event)> {
    let event = EVENTS.get(usize::try_from(token.number() % 8).ok()?)?;
    Some((token.number() / 8, *event))
}

/// What others may see of a port while its lane serves it.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) name: String,
    pub(crate) place: String,
    pub(crate) client: AtomicBool,
    pub(crate) guest_open: AtomicBool,
    /// Bytes from the guest.
    pub(crate) out: AtomicU64,
    /// Bytes to the guest.
    pub(crate) input: AtomicU64,
    /// Bytes from the guest that nobody got.
    pub(crate) dropped: AtomicU64,
    /// Columns in the upper half, rows in the lower.
    size: AtomicU32,
}

impl Seen {
    pub(crate) fn size(&self) -> Size {
        let both = self.size.load(Ordering::Relaxed);
        Size { cols: (both >> 16) as u16, rows: (both & 0xffff) as u16 }
    }

    pub(crate) fn set_size(&self, size: Size) {
        self.size.store(u32::from(size.cols) << 16 | u32::from(size.rows), Ordering::Relaxed);
    }
}

/// What became of a client in a callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    /// Nothing.
    Same,
    /// It takes no output any more.
    Deaf,
}

/// What became of a port's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// It waits for the host or for the guest.
    Waits,
    /// There will be no more.
    Ended,
}

/// A port.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) console: bool,
    pub(crate) presence: Presence,
    pub(crate) output: Output,
    pub(crate) input: Option<Arc<OwnedFd>>,
    /// The number of the client that is there.
    pub(crate) client: Option<u64>,
    pub(crate) seen: Arc<Seen>,
    replay: Replay,
    /// Bytes of the next chain that the host has already.
    skip: u64,
    /// A read may find something.
    readable: bool,
    /// A write would find no room.
    blocked: bool,
    /// The client takes nothing, and is not waited for.
    stalled: bool,
    /// A timer will say that it is.
    patient: bool,
    /// A failure was told of; the next ones are the same.
    failing: bool,
    /// Chains of the batch at hand; empty between calls.
    batch: VecDeque<Chain>,
}

impl Port {
    /// Opens the host's side. Does not block.
    ///
    /// # Errors
    /// The host's side cannot be had.
    pub(crate) fn open(id: u32, spec: &PortSpec) -> Result<Port, OpenError> {
        let Host { presence, input, output, size, place } = Host::open(&spec.target)?;
        let seen = Seen {
            name: spec.name.clone(),
            place,
            client: AtomicBool::new(false),
            guest_open: AtomicBool::new(false),
            out: AtomicU64::new(0),
            input: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            size: AtomicU32::new(0),
        };
        seen.set_size(size);
        Ok(Port {
            id,
            name: spec.name.clone(),
            console: spec.console,
            presence,
            output,
            input,
            client: None,
            seen: Arc::new(seen),
            replay: Replay::new(spec.buffer),
            skip: 0,
            readable: true,
            blocked: false,
            stalled: false,
            patient: false,
            failing: false,
            batch: VecDeque::with_capacity(BATCH),
        })
    }

    /// There may be something to read.
    pub(crate) fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Whether a read may find something.
    pub(crate) fn is_readable(&self) -> bool {
        self.readable
    }

    /// Who was waited for may take something again.
    pub(crate) fn set_writable(&mut self, reactor: &mut Reactor) {
        (self.blocked, self.stalled, self.patient) = (false, false, false);
        reactor.unwatch(token(self.id, Event::Write));
        reactor.cancel_timer(token(self.id, Event::Write));
        reactor.cancel_timer(token(self.id, Event::Stall));
    }

    /// The client takes nothing, and has had its time.
    pub(crate) fn set_stalled(&mut self) {
        (self.stalled, self.patient) = (self.blocked, false);
    }

    /// Whoever was there is gone; what its side of the port is watched for, too.
    pub(crate) fn set_deaf(&mut self, reactor: &mut Reactor) {
        self.output = Output::Nobody;
        self.set_writable(reactor);
    }

    /// The device was reset: the guest's chains are gone.
    pub(crate) fn reset(&mut self) {
        self.skip = 0;
    }

    /// How much of the next chain the host has already, and what is kept for a client.
    pub(crate) fn save(&self) -> (u64, Vec<u8>) {
        (self.skip, self.replay.to_vec())
    }

    pub(crate) fn restore(&mut self, skip: u64, kept: &[u8]) {
        self.skip = skip;
        self.dropped(self.replay.len() as u64);
        self.replay = Replay::new(self.replay.limit());
        self.keep(kept);
    }

    /// Output that came in another way than through the ring.
    pub(crate) fn keep(&mut self, bytes: &[u8]) {
        let lost = self.replay.push(bytes);
        self.dropped(lost);
    }

    fn dropped(&self, bytes: u64) {
        self.seen.dropped.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Moves output from what is kept and from the ring, if there is one, to the host.
    pub(crate) fn transmit(&mut self, mut queue: Option<&mut Queue>, reactor: &mut Reactor) -> Client {
        let mut client = Client::Same;
        let mut moved = 0;
        loop {
            if moved >= TURN {
                reactor.set_timer(token(self.id, Event::Write), Instant::now());
                return client;
            }
            let file = match &self.output {
                Output::To(file) if !self.blocked => file.clone(),
                Output::To(_) => {
                    if let Some(queue) = queue {
                        self.wait(queue, reactor);
                    }
                    return client;
                }
                Output::Nobody => {
                    if let Some(queue) = queue {
                        self.absorb(queue);
                    }
                    return client;
                }
                Output::Nowhere => {
                    if let Some(queue) = queue {
                        self.swallow(queue);
                    }
                    return client;
                }
            };
            let wrote = if !self.replay.is_empty() {
                self.write_kept(&file)
            } else {
                match queue.as_deref_mut().and_then(|queue| self.write_chains(&file, queue)) {
                    Some(wrote) => wrote,
                    None => return client,
                }
            };
            match wrote {
                Wrote::Bytes(count) => {
                    moved += count;
                    self.failing = false;
                }
                Wrote::Fault => {}
                Wrote::Full => self.block(&file, reactor),
                Wrote::Gone if matches!(self.presence, Presence::Socket(_)) => {
                    self.set_deaf(reactor);
                    client = Client::Deaf;
                }
                Wrote::Gone => self.fail(&Errno::PIPE.into(), queue.as_deref_mut()),
                Wrote::Failed(error) => self.fail(&error, queue.as_deref_mut()),
            }
        }
    }

    /// The client takes nothing: the ring waits. A console's does so for a while only.
    fn wait(&mut self, queue: &mut Queue, reactor: &mut Reactor) {
        if self.stalled {
            self.absorb(queue);
        } else if self.console && !self.patient && queue.has_available() {
            self.patient = true;
            reactor.set_timer(token(self.id, Event::Stall), Instant::now() + STALLED);
        }
    }

    fn block(&mut self, file: &OwnedFd, reactor: &mut Reactor) {
        self.blocked = true;
        let token = token(self.id, Event::Write);
        if reactor.watch(file.as_fd(), token, Interest::WRITE).is_err() {
            // Out of descriptors, or a file without readiness.
            reactor.set_timer(token, Instant::now() + AGAIN);
        }
    }

    /// Failure policy 3: what could not be written is lost, and counted; what comes next is tried.
    fn fail(&mut self, error: &std::io::Error, queue: Option<&mut Queue>) {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!("port {}: output to {} fails: {error}", self.id, self.seen.place);
        }
        if !self.replay.is_empty() {
            self.dropped(self.replay.len() as u64);
            self.replay.taken(usize::MAX);
        } else if let Some(queue) = queue
            && let Some(chain) = queue.pop()
        {
            let length = length(queue, &chain).saturating_sub(std::mem::take(&mut self.skip));
            self.dropped(length);
            queue.note_failed();
            queue.add_used(chain, 0);
        }
    }

    fn write_kept(&mut self, file: &OwnedFd) -> Wrote {
        let wrote = backend::write_own(file, &self.replay.slices());
        if let Wrote::Bytes(count) = wrote {
            self.replay.taken(count);
        }
        wrote
    }

    /// Writes a batch of chains. None: there are none.
    fn write_chains(&mut self, file: &OwnedFd, queue: &mut Queue) -> Option<Wrote> {
        let mut bytes = 0;
        while self.batch.len() < BATCH
            && bytes < LARGE as u64
            && let Some(chain) = queue.pop()
        {
            bytes += length(queue, &chain);
            self.batch.push_back(chain);
        }
        if self.batch.is_empty() {
            return None;
        }
        let mut pieces = Pieces::new();
        let mut skip = self.skip;
        for chain in &self.batch {
            if !pieces.add(queue.readable(chain), std::mem::take(&mut skip)) || pieces.bytes() >= LARGE {
                break;
            }
        }
        // Chains without a byte are written as they are.
        let wrote = if pieces.is_empty() { Wrote::Bytes(0) } else { backend::write_guest(file, &pieces) };
        let count = if let Wrote::Bytes(count) = wrote { count as u64 } else { 0 };
        self.settle(queue, count, matches!(wrote, Wrote::Fault));
        Some(wrote)
    }

    /// Gives back the chains of the batch whose bytes were written, and puts the others back. With `fault` the first one's
    /// memory is gone.
    fn settle(&mut self, queue: &mut Queue, mut written: u64, fault: bool) {
        if fault && let Some(chain) = self.batch.pop_front() {
            let rest = length(queue, &chain).saturating_sub(std::mem::take(&mut self.skip));
            self.dropped(rest);
            queue.note_failed();
            queue.add_used(chain, 0);
        }
        while let Some(chain) = self.batch.front() {
            let rest = length(queue, chain).saturating_sub(self.skip);
            if written < rest {
                self.skip += written;
                self.count(written);
                queue.note_read(written);
                break;
            }
            let Some(chain) = self.batch.pop_front() else { break };
            written -= rest;
            self.skip = 0;
            self.count(rest);
            queue.note_read(rest);
            queue.add_used(chain, 0);
        }
        while let Some(chain) = self.batch.pop_back() {
            // The latest first. One that does not go back is given back unwritten.
            let _ = queue.unpop(chain);
        }
    }

    fn count(&self, bytes: u64) {
        // One lane writes it: no two additions meet.
        let before = self.seen.out.load(Ordering::Relaxed);
        self.seen.out.store(before.wrapping_add(bytes), Ordering::Relaxed);
    }

    /// Keeps what is in the ring for whoever comes, the oldest goes.
    fn absorb(&mut self, queue: &mut Queue) {
        let mut buffer = [0; 4096];
        while let Some(chain) = queue.pop() {
            let length = length(queue, &chain);
            let mut skip = std::mem::take(&mut self.skip).min(length);
            self.count(length - skip);
            // Of a chain of 4 GiB its end is enough.
            let excess = (length - skip).saturating_sub(self.replay.limit() as u64);
            self.dropped(excess);
            skip += excess;
            let mut reader = queue.reader(&chain);
            while skip > 0 {
                let step = usize::try_from(skip).unwrap_or(usize::MAX);
                skip -= (reader.skip(step) as u64).clamp(1, skip);
            }
            loop {
                let count = reader.read(&mut buffer);
                if count == 0 {
                    break;
                }
                let lost = self.replay.push(buffer.get(..count).unwrap_or(&[]));
                self.seen.dropped.fetch_add(lost, Ordering::Relaxed);
            }
            queue.note_read(length);
            queue.add_used(chain, 0);
        }
    }

    fn swallow(&mut self, queue: &mut Queue) {
        self.replay.taken(usize::MAX);
        while let Some(chain) = queue.pop() {
            let length = length(queue, &chain);
            self.skip = 0;
            self.count(length);
            queue.note_read(length);
            queue.add_used(chain, 0);
        }
    }

    fn received(&self, queue: &mut Queue, chain: Chain, count: usize) {
        self.seen.input.fetch_add(count as u64, Ordering::Relaxed);
        queue.add_used(chain, u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// Reads what is typed at this process's terminal, if the port is there, as far as there is room: also while the guest
    /// takes nothing, since some keys are for us.
    pub(crate) fn read_keys(&mut self) -> Input {
        let Presence::Stdio(stdio) = &mut self.presence else { return Input::Waits };
        let Some(file) = self.input.as_ref().filter(|_| stdio.is_terminal()) else { return Input::Waits };
        while self.readable && stdio.has_room() {
            let mut keys = [0; 256];
            match backend::read_own(file, &mut keys) {
                Got::Bytes(count) => stdio.type_keys(keys.get(..count).unwrap_or(&[])),
                Got::Nothing | Got::Fault => self.readable = false,
                Got::End => {
                    self.readable = false;
                    return Input::Ended;
                }
            }
        }
        Input::Waits
    }

    /// Moves what was typed into the ring.
    fn receive_keys(&mut self, queue: &mut Queue) -> Input {
        loop {
            if self.read_keys() == Input::Ended {
                return Input::Ended;
            }
            let Presence::Stdio(stdio) = &mut self.presence else { return Input::Waits };
            if stdio.typed().iter().all(|part| part.is_empty()) {
                return Input::Waits;
            }
            let Some(chain) = queue.pop() else { return Input::Waits };
            let mut writer = queue.writer(&chain);
            let count = stdio.typed().iter().map(|part| writer.write(part)).sum();
            stdio.taken(count);
            if count == 0 {
                queue.note_refused();
            }
            self.received(queue, chain, count);
        }
    }

    /// Moves input from the host into the ring.
    pub(crate) fn receive(&mut self, queue: &mut Queue, reactor: &mut Reactor) -> Input {
        if matches!(&self.presence, Presence::Stdio(stdio) if stdio.is_terminal()) {
            return self.receive_keys(queue);
        }
        let mut moved = 0;
        while self.readable
            && let Some(file) = self.input.clone()
            && let Some(chain) = queue.pop()
        {
            if queue.writable(&chain).is_empty() {
                // A driver's error: no room for a byte.
                queue.note_refused();
                queue.add_used(chain, 0);
                continue;
            }
            let got = {
                let mut pieces = Pieces::new();
                pieces.add(queue.writable(&chain), 0);
                backend::read_guest(&file, &pieces)
            };
            match got {
                Got::Bytes(count) => {
                    self.received(queue, chain, count);
                    moved += count;
                    if moved >= TURN {
                        reactor.set_timer(token(self.id, Event::Read), Instant::now());
                        break;
                    }
                }
                Got::Nothing => {
                    self.readable = false;
                    let _ = queue.unpop(chain);
                }
                Got::End => {
                    self.readable = false;
                    let _ = queue.unpop(chain);
                    return Input::Ended;
                }
                Got::Fault => {
                    queue.note_failed();
                    queue.add_used(chain, 0);
                }
            }
        }
        Input::Waits
    }
}

/// Bytes of a chain that the device reads.
fn length(queue: &Queue, chain: &Chain) -> u64 {
    queue.readable(chain).iter().map(|segment| segment.len() as u64).sum()
}
