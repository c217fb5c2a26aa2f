//! Serves one queue.
//!
//! Invariants: a chain that was popped is answered before the next one is popped, or is owned by a [`Request`] that `io`
//! has. Such a request's status byte says IOERR from the beginning, so that a chain that goes back without an answer,
//! for whatever reason, is never taken for a success: Linux looks at nothing else.
use std::io;
use std::sync::Arc;
use std::time::Instant;

use reactor::{BlockingPool, Reactor, Readiness, Token};
use vm_virtio::{Chain, DeviceError, Features, Lane, Queue, Session, Stop, Upcall, Worker};

use crate::backend::{Payload, Room};
use crate::io::{Action, Aio, Done, Io, Request};
use crate::request::{self, Asked, HEADER, ID, Status, Terms, feature};
use crate::shared::Shared;

/// Timer: the period of the rate limit is over.
const AGAIN: Token = Token::new(0);

/// What a device tells its workers.
#[derive(Clone, Copy, Debug)]
pub struct Order(pub(crate) What);

#[derive(Clone, Copy, Debug)]
pub(crate) enum What {
    /// Make the image this large, or look how large it is.
    Resize(Option<u64>),
    /// The rate limit is another one.
    LookAgain,
}

/// What all workers of a device begin with.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) shared: Arc<Shared>,
    pub(crate) serial: [u8; ID],
    pub(crate) aio: Aio,
    pub(crate) queue_size: u16,
    /// Writes are stable unless the driver says that it flushes them itself, by the register.
    pub(crate) write_through: bool,
    pub(crate) pool: BlockingPool,
}

/// The part of the block device that serves a queue.
pub struct BlockWorker {
    queue: u16,
    shared: Arc<Shared>,
    serial: [u8; ID],
    write_through: bool,
    io: Io,
    terms: Terms,
    cache: Cache,
    /// Lives of the queue: what a former one began is not answered.
    epoch: u32,
    /// A timer will come: until then nothing is popped.
    held: bool,
    /// Room for pieces of payloads.
    spare: Vec<Room>,
}

/// When a write is on the storage (5.2.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    /// Before it is answered.
    Through,
    /// When it was flushed.
    Back,
    /// As the register says at that time.
    Register,
}

impl BlockWorker {
    pub(crate) fn new(queue: u16, setup: Setup) -> BlockWorker {
        let Setup { shared, serial, aio, queue_size, write_through, pool } = setup;
        let io = Io::new(Arc::clone(&shared.image), aio, queue_size, pool);
        let terms = Terms::new(shared.read_only, shared.unmaps, Features::empty());
        BlockWorker {
            queue,
            shared,
            serial,
            write_through,
            io,
            terms,
            cache: Cache::Through,
            epoch: 0,
            held: false,
            spare: Vec::new(),
        }
    }

    /// Forgets the session. The period of the limit goes on.
    pub(crate) fn reset(&mut self) {
        self.terms = Terms::new(self.shared.read_only, self.shared.unmaps, Features::empty());
        self.cache = Cache::Through;
        self.held = false;
        self.give_up();
    }

    fn give_up(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.io.give_up();
    }

    fn stable(&self) -> bool {
        match self.cache {
            Cache::Through => true,
            Cache::Back => false,
            Cache::Register => !self.shared.writeback(),
        }
    }

    fn serve(&mut self, lane: &mut Lane<'_>) {
        if self.held {
            return;
        }
        let Some(queue) = lane.queues.get(self.queue) else { return };
        self.terms.capacity = self.shared.capacity();
        loop {
            if let Some(end) = self.limited(queue) {
                // Without a request there is nothing to wait for: its kick comes back here.
                if queue.has_available() {
                    lane.reactor.set_timer(AGAIN, end);
                    self.held = true;
                }
                return;
            }
            let Some(chain) = queue.pop() else { return };
            self.take(queue, chain, lane.reactor);
        }
    }

    /// Until when nothing may be popped.
    #[inline]
    fn limited(&self, _queue: &Queue) -> Option<Instant> {
        self.shared.limiter()?.as_mut()?.allowed(Instant::now()).err()
    }

    fn count(&self, bytes: u64) {
        if let Some(mut limiter) = self.shared.limiter()
            && let Some(limiter) = limiter.as_mut()
        {
            limiter.take(bytes, Instant::now());
        }
    }

    fn take(&mut self, queue: &mut Queue, chain: Chain, reactor: &mut Reactor) {
        let writable = queue.writer(&chain).remaining();
        let asked = request::parse(queue.reader(&chain), writable, &self.terms);
        let stable = self.stable();
        let (action, fills, moved) = match asked {
            Asked::Nothing => {
                // No place for a status: back it goes, and nothing is done.
                queue.note_refused();
                self.count(0);
                return queue.add_used(chain, 0);
            }
            Asked::Refused(status) => {
                queue.note_refused();
                self.count(0);
                return answer(queue, chain, status, 0);
            }
            Asked::GetId => {
                self.count(0);
                let mut writer = queue.writer(&chain);
                // Not the status byte.
                let id = usize::try_from(writable - 1).map_or(ID, |len| len.min(ID));
                writer.write(self.serial.get(..id).unwrap_or(&[]));
                return answer(queue, chain, Status::Ok, id as u64);
            }
            Asked::Read { offset, len } => (Action::Read(offset), len, len),
            Asked::Write { offset, len } => {
                queue.note_read(len);
                (Action::Write { offset, stable }, 0, len)
            }
            Asked::Flush => (Action::Flush, 0, 0),
            Asked::Discard(ranges) => (Action::Discard(ranges), 0, 0),
            Asked::WriteZeroes(ranges) => (Action::WriteZeroes { ranges, stable }, 0, 0),
        };
        self.count(moved);
        let room = self.spare.pop().unwrap_or_default();
        let payload = match &action {
            Action::Read(_) => Payload::writable(queue, chain, room),
            Action::Write { .. } => Payload::readable(queue, chain, HEADER, room),
            _ => Payload::none(chain, room),
        };
        let mut request = Request { payload, action, fills, epoch: self.epoch };
        match self.io.attempt(&mut request) {
            Some(result) => self.finish(queue, request, result),
            None => {
                if let Some(chain) = request.payload.chain() {
                    write_status(queue, chain, Status::IoErr);
                }
                self.io.begin(request, reactor);
            }
        }
    }

    /// Answers a request that was carried out, or failed.
    fn finish(&mut self, queue: &mut Queue, request: Request, result: io::Result<()>) {
        let Request { payload, action, fills, .. } = request;
        let (chain, room) = payload.into_parts();
        if self.spare.len() < SPARE {
            self.spare.push(room);
        }
        let Some(chain) = chain else { return };
        match result {
            Ok(()) => answer(queue, chain, Status::Ok, fills),
            Err(error) => self.fail(queue, chain, &action, &error),
        }
    }

    #[cold]
    fn fail(&self, queue: &mut Queue, chain: Chain, action: &Action, error: &io::Error) {
        queue.note_failed();
        let what = match action {
            Action::Read(_) => "a read",
            Action::Write { .. } => "a write",
            Action::Flush => "a flush",
            Action::Discard(_) => "a discard",
            Action::WriteZeroes { .. } => "writing zeros",
        };
        tracing::warn!(queue = self.queue, %error, "{what} failed");
        // The storage cannot do it at all, which the driver may want to know: it asks no more.
        let never = error.kind() == io::ErrorKind::Unsupported
            && matches!(action, Action::Discard(_) | Action::WriteZeroes { .. });
        answer(queue, chain, if never { Status::Unsupp } else { Status::IoErr }, 0);
    }

    /// Answers what has come back.
    fn collect(&mut self, lane: &mut Lane<'_>) {
        while let Some(done) = self.io.next() {
            match done {
                Done::Request(request, result) => match lane.queues.get(self.queue) {
                    Some(queue) if request.epoch == self.epoch => self.finish(queue, request, result),
                    // Nobody waits for it: its queue is being reset, or was. The chain ends here.
                    _ => drop(request),
                },
                Done::Size(size) => self.resized(size, lane.up),
            }
        }
    }

    fn resized(&self, size: io::Result<u64>, up: &Upcall) {
        match size {
            Ok(bytes) => {
                if self.shared.set_size(bytes) {
                    tracing::info!(bytes, "the disk has another size");
                    up.config_changed();
                }
            }
            Err(error) => tracing::warn!(%error, "the disk keeps its size"),
        }
    }

    fn release(&mut self, lane: &mut Lane<'_>) {
        if std::mem::take(&mut self.held) {
            lane.reactor.cancel_timer(AGAIN);
        }
    }
}

/// Lists of pieces that are kept for the next requests.
const SPARE: usize = 64;

/// Writes the status: the last device-writable byte.
#[inline]
fn write_status(queue: &Queue, chain: &Chain, status: Status) {
    if let Some(last) = queue.writable(chain).last() {
        last.write(last.len() - 1, &[status as u8]);
    }
}

/// Gives a chain back with its status, of whose data the first `filled` bytes are written. The length covers the status
/// only if it covers all before it: it is never more than what was written (2.7.8.2).
#[inline]
fn answer(queue: &mut Queue, chain: Chain, status: Status, filled: u64) {
    write_status(queue, &chain, status);
    let room = queue.writer(&chain).remaining();
    let written = if filled + 1 == room { room } else { filled };
    queue.add_used(chain, u32::try_from(written).unwrap_or(u32::MAX));
}

impl Worker for BlockWorker {
    type Msg = Order;

    fn activated(&mut self, session: &Session, _lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let driver = session.features;
        self.terms = Terms::new(self.shared.read_only, self.shared.unmaps, driver);
        self.cache = if driver.contains(feature::CONFIG_WCE) {
            Cache::Register
        } else if driver.contains(feature::FLUSH) && !self.write_through {
            Cache::Back
        } else {
            // 5.2.6.2, case 1: a driver that cannot flush.
            Cache::Through
        };
        Ok(())
    }

    fn queue_ready(&mut self, _queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.serve(lane);
        Ok(())
    }

    fn queue_stop(&mut self, _queue: u16, how: Stop, lane: &mut Lane<'_>) {
        // What the limit holds back is in the ring.
        self.release(lane);
        if how == Stop::Discard {
            self.give_up();
            self.collect(lane);
        }
    }

    fn source_ready(&mut self, _: Token, _: Readiness, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.collect(lane);
        Ok(())
    }

    fn timer(&mut self, _token: Token, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.release(lane);
        self.serve(lane);
        Ok(())
    }

    fn message(&mut self, Order(what): Order, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        match what {
            What::Resize(bytes) => {
                if !self.io.begin_resize(bytes, lane.reactor) {
                    tracing::warn!("the disk keeps its size: there is no thread for it");
                }
            }
            What::LookAgain => {
                self.release(lane);
                self.serve(lane);
            }
        }
        Ok(())
    }

    fn flush(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        while self.io.flush() {
            // Answers of what is done by now belong to this turn. What is half done is queued again.
            self.collect(lane);
        }
        Ok(())
    }

    fn poll(&mut self, _lane: &mut Lane<'_>) -> bool {
        self.io.has_news()
    }
}
