//! Serves the request queue.
//!
//! Invariant: no chain outlives the call that popped it. A request that cannot be answered yet is put back, and the
//! worker is *held* until the timer or the watch that it has set: kicks meanwhile change nothing.
use std::time::Instant;

use reactor::{Interest, Readiness, Token};
use vm_virtio::limit::{Limiter, RateLimit};
use vm_virtio::{DeviceError, Lane, StateError, Stop, Worker};

use crate::backend::{Again, Filled, Source};
use crate::state::RngV1;

/// Most bytes that one request is answered with, however large its buffers are: one request must not keep the others
/// waiting for long. The driver looks at the length (5.4.6.1).
pub const MAX_REQUEST: usize = 64 << 10;

const REQUESTQ: u16 = 0;
/// Timer: the period is over, or the source may have something again.
const AGAIN: Token = Token::new(0);
/// Watch: the source's file.
const SOURCE: Token = Token::new(1);

/// Another limit for this guest, from now on.
#[derive(Clone, Copy, Debug)]
pub struct SetLimit(pub(crate) Option<RateLimit>);

/// The part of the entropy device that serves its queue.
pub struct RngWorker {
    source: Source,
    limiter: Option<Limiter>,
    /// A timer or a watch will come: until then there is nothing to hand out.
    held: bool,
}

impl RngWorker {
    pub(crate) fn new(source: Source, limit: Option<RateLimit>) -> RngWorker {
        RngWorker { source, limiter: limit.map(Limiter::new), held: false }
    }

    /// Bytes that were collected but not handed out are forgotten. The period goes on.
    pub(crate) fn reset(&mut self) {
        let RngWorker { source, limiter: _, held } = self;
        source.reset();
        *held = false;
    }

    pub(crate) fn save(&self) -> RngV1 {
        let now = Instant::now();
        RngV1 { limit: self.limiter.as_ref().map(|limiter| limiter.save(now)), seeded: self.source.save() }
    }

    /// A limit that only one of both has is the host's to decide.
    pub(crate) fn restore(&mut self, state: RngV1) -> Result<(), StateError> {
        self.source.restore(state.seeded)?;
        if let (Some(limiter), Some(period)) = (&mut self.limiter, state.limit) {
            limiter.restore(&period, Instant::now());
        }
        Ok(())
    }

    fn serve(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        if self.held {
            return Ok(());
        }
        let Some(queue) = lane.queues.get(REQUESTQ) else { return Ok(()) };
        loop {
            let (mut limit, mut now) = (MAX_REQUEST, None);
            if let Some(limiter) = &mut self.limiter {
                match limiter.allowed(*now.insert(Instant::now())) {
                    Ok(bytes) => limit = limit.min(usize::try_from(bytes).unwrap_or(usize::MAX)),
                    // Without a request there is nothing to wait for: its kick comes back here.
                    Err(_) if !queue.has_available() => return Ok(()),
                    Err(end) => {
                        lane.reactor.set_timer(AGAIN, end);
                        self.held = true;
                        return Ok(());
                    }
                }
            }
            let Some(chain) = queue.pop() else { return Ok(()) };
            let buffers = queue.writable(&chain);
            // A driver's error: no room for a single byte. The buffer goes back all the same.
            let nonsense = buffers.is_empty();
            let filled = if nonsense { Filled::Bytes(0) } else { self.source.fill(buffers, limit) };
            if nonsense {
                queue.note_refused();
            }
            match filled {
                Filled::Bytes(bytes) => {
                    if let (Some(limiter), Some(now)) = (&mut self.limiter, now) {
                        limiter.take(bytes as u64, now);
                    }
                    queue.add_used(chain, u32::try_from(bytes).unwrap_or(u32::MAX));
                }
                // The memory behind the buffer is gone (failure policy 6): this request's loss alone.
                Filled::Fault => {
                    queue.note_failed();
                    queue.add_used(chain, 0);
                }
                Filled::NotYet(again) => {
                    queue.unpop(chain).map_err(|_| DeviceError::new("a request could not be put back"))?;
                    return self.hold(again, lane);
                }
            }
        }
    }

    /// Comes back when the source may have something.
    fn hold(&mut self, again: Again, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.held = true;
        let pause = match (again, self.source.file()) {
            (Again::Readable(pause), Some(file)) => match lane.reactor.watch(file, SOURCE, Interest::READ) {
                Ok(()) => return Ok(()),
                // Files without readiness are asked again and again; so are all when descriptors run out.
                Err(_) => pause,
            },
            (Again::Readable(pause) | Again::After(pause), _) => pause,
        };
        lane.reactor.set_timer(AGAIN, Instant::now() + pause);
        Ok(())
    }

    fn release(&mut self, lane: &mut Lane<'_>) {
        if std::mem::take(&mut self.held) {
            lane.reactor.cancel_timer(AGAIN);
            lane.reactor.unwatch(SOURCE);
        }
    }
}

impl Worker for RngWorker {
    type Msg = SetLimit;

    fn queue_ready(&mut self, _queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.serve(lane)
    }

    fn queue_stop(&mut self, _queue: u16, _how: Stop, lane: &mut Lane<'_>) {
        // Nothing is out; and a stopped device watches nothing. A new start looks at once.
        self.release(lane);
    }

    fn source_ready(
        &mut self,
        _token: Token,
        _ready: Readiness,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        self.release(lane);
        self.serve(lane)
    }

    fn timer(&mut self, _token: Token, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.release(lane);
        self.serve(lane)
    }

    fn message(&mut self, SetLimit(limit): SetLimit, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        match (&mut self.limiter, limit) {
            (Some(limiter), Some(limit)) => limiter.change(limit),
            (limiter, limit) => *limiter = limit.map(Limiter::new),
        }
        // Who waits for the end of a period may be served now.
        self.release(lane);
        self.serve(lane)
    }
}
