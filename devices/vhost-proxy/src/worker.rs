//! The one worker of a proxied device: what its lane tells it becomes what is wanted of the back-end, and what the back-end
//! answers goes back to the lane.
//!
//! Nothing here waits. Messages are exchanged by jobs on the blocking pool, one at a time; each takes the connection along and
//! brings it back, with a deadline for all it does. The lane watches the socket meanwhile idle (a back-end that closes it, or speaks
//! unasked, is lost), the channel of the back-end's own requests always (it may wait for an answer while we wait for
//! one of its), and an error eventfd for each ring.
//!
//! ```text
//!  Idle  --something is wanted-->  Busy  --done-->  Idle
//!                                   |
//!  Down  <----lost, refused---------+        Down  --retry timer-->  Busy  --connected-->  Idle
//! ```
//! Invariants: `version` counts what is wanted, `brought` is what the back-end has; whoever waits does so for a version. A ring
//! that no back-end can have (`ran` is false, or the connection is gone) comes back to the lane without a message.
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use reactor::{Desk, Interest, JobPanicked, Readiness, Token};
use rustix::event::{EventfdFlags, eventfd};
use vhost_user::{Answer, BackendListener, BackendRequest, Error, ProtocolFeatures};
use vm_virtio::delegated::{Change, QueueParts, Waiting};
use vm_virtio::engine::STOP_DEADLINE;
use vm_virtio::{ConfigSpace, DeviceError, GuestRam, Lane, Session, StateError, Stop, Worker};

use crate::link::Link;
use crate::offer::Offer;
use crate::target::{Report, Ring, Target, Write};
use crate::{ProxyError, Shared};

const RESULTS: Token = Token::new(0);
const WIRE: Token = Token::new(1);
const CHANNEL: Token = Token::new(2);
const RETRY: Token = Token::new(3);
const GIVE_UP: Token = Token::new(4);
/// Error files: this and the queue's number.
const ERRORS: u32 = 0x1_0000;

/// The first pause before a lost back-end is looked for again; it doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Writes to the configuration space that wait for the back-end at most: a driver can write faster than they are passed on.
const MAX_WRITES: usize = 256;

/// Requests of the back-end that are answered before the lane does something else.
const TURN: usize = 32;

/// What waits in the mailbox.
#[derive(Debug)]
pub enum ProxyMsg {
    /// Somebody wrote to the configuration space.
    Write(ConfigWrite),
    /// The device was reset.
    Reset,
}

/// A write to the configuration space.
#[derive(Debug)]
pub struct ConfigWrite(pub(crate) Write);

enum Place {
    Idle(Box<Link>),
    Busy,
    Down,
}

/// A back-end that takes the place of one that was lost.
struct Found {
    link: Box<Link>,
    channel: Option<BackendListener>,
    config: Vec<u8>,
}

/// What a job brings back.
enum Done {
    Brought {
        version: u64,
        /// The reset after which it was wanted.
        epoch: u64,
        link: Result<Box<Link>, ProxyError>,
        report: Box<Report>,
        /// What of the wishes was for this once.
        writes: usize,
        refresh: bool,
    },
    Connected(Result<Box<Found>, ProxyError>),
}

/// Serves all queues of a proxied device, by having them served.
pub struct ProxyWorker {
    shared: Arc<Shared>,
    config: Arc<ConfigSpace>,
    desk: Desk<Done>,
    place: Place,
    /// The connection's socket.
    wire: Option<UnixStream>,
    channel: Option<BackendListener>,
    target: Target,
    version: u64,
    brought: u64,
    serial: u64,
    /// A back-end was brought live since the last reset.
    lived: bool,
    /// The state of a suspended back-end.
    saved: Option<Vec<u8>>,
    waiting: Vec<(u64, Waiting)>,
    /// Nothing but a reset helps.
    broken: bool,
    /// The driver knows that the device needs one.
    told_reset: bool,
    /// Since when the back-end is gone, or the driver waits for it.
    lost_since: Option<Instant>,
    pause: Duration,
    retry_at: Instant,
    told_at: Option<Instant>,
}

impl ProxyWorker {
    pub(crate) fn new(
        shared: Arc<Shared>,
        config: Arc<ConfigSpace>,
        link: Link,
        channel: Option<BackendListener>,
    ) -> std::io::Result<ProxyWorker> {
        // One at a time; the one before may not have left its thread when its result is here.
        let desk = shared.pool.desk(2)?;
        let queues = usize::from(shared.first.queues);
        let target = Target {
            epoch: 0,
            session: None,
            ram: GuestRam::empty(),
            log: None,
            rings: vec![None; queues],
            inflight: None,
            inflight_size: shared.options.queue_size,
            load: None,
            save: false,
            writes: Vec::new(),
            refresh: false,
        };
        Ok(ProxyWorker {
            desk,
            wire: Some(link.socket()?),
            place: Place::Idle(Box::new(link)),
            channel,
            target,
            config,
            version: 0,
            brought: 0,
            serial: 0,
            lived: false,
            saved: None,
            waiting: Vec::new(),
            broken: false,
            told_reset: false,
            lost_since: None,
            pause: SHORTEST_PAUSE,
            retry_at: Instant::now(),
            told_at: None,
            shared,
        })
    }

    fn ring(&mut self, queue: u16) -> Option<&mut Ring> {
        self.target.rings.get_mut(usize::from(queue))?.as_mut()
    }

    fn want(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    /// The next step, if there is one.
    fn go_on(&mut self, lane: &mut Lane<'_>) {
        self.take_back_idle(lane);
        match self.place {
            Place::Busy => {}
            Place::Idle(_) if self.version != self.brought => self.bring(lane),
            Place::Idle(_) => self.waiting.clear(),
            Place::Down => {
                // Nobody uses what was to be changed.
                self.waiting.clear();
                self.seek(lane);
            }
        }
    }

    /// Rings that are to be stopped and that no back-end has.
    fn take_back_idle(&mut self, lane: &mut Lane<'_>) {
        let gone = matches!(self.place, Place::Down);
        let idle = |ring: &Ring| ring.stop.is_some_and(|how| !ring.ran || (gone && how == Stop::Discard));
        for queue in 0..self.shared.first.queues {
            if let Some(state) = self.ring(queue).filter(|ring| idle(ring)).map(|ring| ring.state.clone()) {
                self.forget_ring(queue, lane);
                lane.queues.give_back(queue, state);
            }
        }
    }

    fn forget_ring(&mut self, queue: u16, lane: &mut Lane<'_>) {
        lane.reactor.unwatch(error_token(queue));
        if let Some(ring) = self.target.rings.get_mut(usize::from(queue)) {
            *ring = None;
        }
    }

    /// Has the back-end told what it does not know yet.
    fn bring(&mut self, lane: &mut Lane<'_>) {
        let Place::Idle(mut link) = std::mem::replace(&mut self.place, Place::Busy) else { return };
        lane.reactor.unwatch(WIRE);
        let (version, target) = (self.version, self.target.clone());
        // A reset does not wait for a back-end that does not stop: rather the connection ends.
        let discards = target.rings.iter().flatten().any(|ring| ring.stop == Some(Stop::Discard));
        let patience = self.shared.options.patience;
        let patience = if discards { patience.min(STOP_DEADLINE / 2) } else { patience };
        if target.session.is_some() {
            self.lived = true;
            let rings = self.target.rings.iter_mut().flatten();
            rings.filter(|ring| ring.stop.is_none()).for_each(|ring| ring.ran = true);
        }
        self.target.refresh = false;
        let job = move || {
            let mut report = Box::<Report>::default();
            let outcome = link.bring(&target, Instant::now() + patience, &mut report);
            let (writes, refresh) = (target.writes.len(), target.refresh);
            let epoch = target.epoch;
            Done::Brought { version, epoch, link: outcome.map(|()| link), report, writes, refresh }
        };
        if self.desk.submit(job).is_err() {
            self.lost(busy(), lane);
        }
    }

    /// Looks for a back-end, now or later.
    fn seek(&mut self, lane: &mut Lane<'_>) {
        if self.broken {
            return;
        }
        if Instant::now() < self.retry_at {
            lane.reactor.set_timer(RETRY, self.retry_at);
            return;
        }
        let shared = self.shared.clone();
        let epoch = self.lived.then_some(self.target.epoch);
        let job = move || {
            Done::Connected(shared.connect().and_then(|fresh| {
                fresh.offer.replaces(&shared.first)?;
                let Offer { config, .. } = &fresh.offer;
                let config = config.clone();
                let link = Link::new(fresh.endpoint, Arc::new(fresh.offer), epoch);
                Ok(Box::new(Found { link: Box::new(link), channel: fresh.channel, config }))
            }))
        };
        self.place = Place::Busy;
        if self.desk.submit(job).is_err() {
            self.lost(busy(), lane);
        }
    }

    fn finished(&mut self, done: Result<Done, JobPanicked>, lane: &mut Lane<'_>) {
        match done {
            Ok(Done::Brought { version, epoch, link, report, writes, refresh }) => {
                let mut report = *report;
                if self.target.save && link.is_err() {
                    // Stopped, but its state was not heard: the next one is stopped once more, and asked.
                    report.stopped.clear();
                }
                if epoch == self.target.epoch {
                    self.take_report(report, refresh && link.is_ok(), lane);
                }
                match link {
                    Ok(link) => {
                        self.target.writes.drain(..writes.min(self.target.writes.len()));
                        self.brought = version;
                        self.waiting.retain(|(wanted, _)| *wanted > version);
                        self.rest(link, lane);
                        self.is_back(lane);
                    }
                    Err(error) => {
                        self.target.refresh |= refresh;
                        self.lost(error, lane);
                    }
                }
            }
            Ok(Done::Connected(Ok(_))) if self.broken => self.place = Place::Down,
            Ok(Done::Connected(Ok(found))) => {
                let Found { link, channel, config } = *found;
                match link.socket() {
                    Ok(wire) => self.wire = Some(wire),
                    Err(error) => return self.lost(error.into(), lane),
                }
                self.shared.stats.connections.fetch_add(1, Ordering::Relaxed);
                self.channel = channel;
                if !self.watch_channel(lane) {
                    return;
                }
                self.take_config(&config, true, lane);
                self.want();
                self.rest(link, lane);
            }
            Ok(Done::Connected(Err(error))) => self.lost(error, lane),
            Err(JobPanicked) => self.lost(busy(), lane),
        }
    }

    /// A connection that waits for something to do is watched.
    fn rest(&mut self, link: Box<Link>, lane: &mut Lane<'_>) {
        self.place = Place::Idle(link);
        self.shared.stats.connected.store(true, Ordering::Relaxed);
        let watched = self.wire.as_ref().map(|wire| lane.reactor.watch(wire.as_fd(), WIRE, Interest::READ));
        if let Some(Err(error)) = watched {
            self.lost(error.into(), lane);
        }
    }

    fn is_back(&mut self, lane: &mut Lane<'_>) {
        self.pause = SHORTEST_PAUSE;
        lane.reactor.cancel_timer(GIVE_UP);
        if let Some(since) = self.lost_since.take()
            && self.told_at.is_some()
        {
            tracing::info!(after = ?since.elapsed(), "the back-end serves the device again");
        }
    }

    fn take_report(&mut self, report: Report, changed: bool, lane: &mut Lane<'_>) {
        let Report { stopped, inflight, config, state, loaded, needs_reset, refused_writes } = report;
        self.shared.stats.refused_writes.fetch_add(refused_writes, Ordering::Relaxed);
        self.target.inflight = inflight.or(self.target.inflight.take());
        self.saved = state.or(self.saved.take());
        if loaded {
            self.target.load = None;
        }
        for (queue, serial, state) in stopped {
            // Others were given up.
            if self.ring(queue).is_some_and(|ring| ring.serial == serial && ring.stop.is_some()) {
                self.forget_ring(queue, lane);
                lane.queues.give_back(queue, state);
            }
        }
        if let Some(config) = config {
            self.take_config(&config, changed, lane);
        }
        if needs_reset {
            self.need_reset("the back-end says so".to_owned(), lane);
        }
    }

    /// The back-end's configuration space. What changed by itself is news to the driver.
    fn take_config(&mut self, bytes: &[u8], by_itself: bool, lane: &mut Lane<'_>) {
        if matches!(self.config.set(0, bytes), Ok(true)) && by_itself {
            lane.up.config_changed();
        }
    }

    /// The connection is over, or there is none.
    fn lost(&mut self, error: ProxyError, lane: &mut Lane<'_>) {
        self.disconnect();
        lane.reactor.unwatch(WIRE);
        lane.reactor.unwatch(CHANNEL);
        let now = Instant::now();
        self.retry_at = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        let first = self.lost_since.is_none();
        let since = *self.lost_since.get_or_insert(now);
        // Failure policy 8: a back-end that comes and goes is not worth a line each time.
        if first && self.told_at.is_none_or(|at| now - at >= LONGEST_PAUSE) {
            self.told_at = Some(now);
            tracing::warn!(error = %error, "the back-end is lost");
        }
        if self.target.session.is_none() {
            return;
        }
        if error.may_heal() {
            lane.reactor.set_timer(GIVE_UP, since + self.shared.options.give_up);
        } else {
            self.give_up(error.to_string(), lane);
        }
    }

    /// Only the driver can help, by a reset.
    fn give_up(&mut self, reason: String, lane: &mut Lane<'_>) {
        self.broken = true;
        lane.reactor.cancel_timer(GIVE_UP);
        self.need_reset(reason, lane);
    }

    /// Once: who says it again and again is not heard again and again.
    fn need_reset(&mut self, reason: String, lane: &mut Lane<'_>) {
        if !std::mem::replace(&mut self.told_reset, true) {
            lane.up.needs_reset(reason);
        }
    }

    /// Ends the connection, also under a job that uses it.
    fn cut(&mut self) {
        if let Some(wire) = &self.wire {
            let _ = wire.shutdown(std::net::Shutdown::Both);
        }
    }

    fn disconnect(&mut self) {
        self.cut();
        if !matches!(self.place, Place::Down) {
            self.shared.stats.losses.fetch_add(1, Ordering::Relaxed);
        }
        self.place = Place::Down;
        self.wire = None;
        self.channel = None;
        self.shared.stats.connected.store(false, Ordering::Relaxed);
    }

    /// False: the connection is lost over it.
    fn watch_channel(&mut self, lane: &mut Lane<'_>) -> bool {
        let watched =
            self.channel.as_ref().map(|channel| lane.reactor.watch(channel.as_fd(), CHANNEL, Interest::READ));
        match watched {
            Some(Err(error)) => {
                self.lost(error.into(), lane);
                false
            }
            _ => true,
        }
    }

    /// Requests of the back-end. The only one that means something here is that its configuration has changed.
    fn read_channel(&mut self, lane: &mut Lane<'_>) {
        for _ in 0..TURN {
            let Some(channel) = &mut self.channel else { return };
            let answered = match channel.receive() {
                Ok(None) => return,
                Ok(Some(received)) => {
                    let answer = match received.request {
                        BackendRequest::ConfigChange => Answer::Done,
                        _ => Answer::Failed,
                    };
                    let news = matches!(answer, Answer::Done);
                    let answered = channel.reply(received.ticket, answer);
                    if news {
                        self.target.refresh = true;
                        self.want();
                    }
                    answered
                }
                Err(Error::Invalid { ticket, .. }) => channel.reply(ticket, Answer::Failed),
                Err(error) => Err(error),
            };
            if answered.is_err() {
                // Its news are lost; if the back-end is, the other socket tells.
                lane.reactor.unwatch(CHANNEL);
                self.channel = None;
            }
        }
    }

    /// Every ring is stopped, and the device is one that nobody has used.
    pub(crate) fn reset(&mut self) {
        // Only if the lane failed: whoever has rings must not go on.
        if self.target.rings.iter().any(Option::is_some) {
            self.cut();
            if matches!(self.place, Place::Idle(_)) {
                self.disconnect();
            }
        }
        if matches!(self.place, Place::Busy) && self.desk.outstanding() == 0 {
            self.disconnect();
        }
        self.target.epoch += 1;
        self.target.session = None;
        self.target.rings.fill(None);
        self.target.inflight = None;
        self.target.load = None;
        self.target.save = false;
        self.target.writes.clear();
        self.lived = false;
        self.saved = None;
        self.broken = false;
        self.told_reset = false;
        self.lost_since = None;
        self.waiting.clear();
        self.want();
    }

    /// What the back-end said when it was suspended. A device that no driver has used yet needs none.
    pub(crate) fn saved(&self) -> Result<Option<Vec<u8>>, StateError> {
        if !self.shared.first.protocol.contains(ProtocolFeatures::DEVICE_STATE) {
            return Ok(None);
        }
        match (&self.saved, self.target.session) {
            (Some(state), _) => Ok(Some(state.clone())),
            (None, None) => Ok(None),
            (None, Some(_)) => Err(StateError::refused("the back-end has not given its state")),
        }
    }

    pub(crate) fn load(&mut self, state: Option<Vec<u8>>) {
        self.target.load = state.map(Arc::new);
        self.want();
    }
}

impl Drop for ProxyWorker {
    fn drop(&mut self) {
        // Also under a job that still runs.
        self.cut();
    }
}

impl Worker for ProxyWorker {
    type Msg = ProxyMsg;
    const DELEGATES: bool = true;

    fn attached(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        lane.reactor.watch(self.desk.as_fd(), RESULTS, Interest::READ_EDGE)?;
        if self.watch_channel(lane)
            && let Place::Idle(link) = std::mem::replace(&mut self.place, Place::Busy)
        {
            self.rest(link, lane);
        }
        Ok(())
    }

    fn activated(&mut self, session: &Session, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.target.session = Some(session.features);
        self.want();
        if self.lost_since.is_some() {
            // From here on somebody waits.
            let now = Instant::now();
            self.lost_since = Some(now);
            lane.reactor.set_timer(GIVE_UP, now + self.shared.options.give_up);
        }
        Ok(())
    }

    fn queue_ready(&mut self, _queue: u16, _lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn queue_delegated(
        &mut self,
        queue: u16,
        parts: QueueParts,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        let QueueParts { config, state, kick, call, enabled, ram, log, logged } = parts;
        let err = error_file(queue, lane).inspect_err(|_| {
            // The lane fails, and with it ends what the back-end still does.
            self.cut();
        })?;
        let serial = self.want();
        self.serial = serial;
        self.target.ram = ram;
        self.target.log = log;
        self.target.save = false;
        self.saved = None;
        let ring = Ring {
            serial,
            config,
            state,
            ran: false,
            kick: kick.map(Arc::new),
            call: (serial, call.map(Arc::new)),
            err: Arc::new(err),
            enabled,
            logged,
            stop: None,
        };
        if let Some(place) = self.target.rings.get_mut(usize::from(queue)) {
            *place = Some(ring);
        }
        Ok(())
    }

    fn delegation_changed(
        &mut self,
        change: Change,
        waiting: Waiting,
        _lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        let version = self.want();
        self.waiting.push((version, waiting));
        match change {
            Change::Memory(ram) => self.target.ram = ram,
            Change::Log(log) => self.target.log = log,
            Change::LogRing { queue, logged } => {
                self.ring(queue).into_iter().for_each(|ring| ring.logged = logged);
            }
            Change::Enabled { queue, on } => self.ring(queue).into_iter().for_each(|ring| ring.enabled = on),
            Change::Call { queue, call } => {
                let call = (version, call.map(Arc::new));
                self.ring(queue).into_iter().for_each(|ring| ring.call = call.clone());
            }
        }
        Ok(())
    }

    fn queue_stop(&mut self, queue: u16, how: Stop, lane: &mut Lane<'_>) {
        let Some(ring) = self.ring(queue) else { return };
        if ring.stop.is_some() {
            // Nobody waits any more: whoever has it loses the connection, and must not go on.
            let state = ring.state.clone();
            self.forget_ring(queue, lane);
            lane.queues.give_back(queue, state);
            self.cut();
            if matches!(self.place, Place::Idle(_)) {
                self.lost(Error::TimedOut.into(), lane);
            }
        } else {
            ring.stop = Some(how);
            self.want();
        }
        self.go_on(lane);
    }

    fn suspend(&mut self, lane: &mut Lane<'_>) {
        self.saved = None;
        self.target.save = self.target.session.is_some()
            && self.shared.first.protocol.contains(ProtocolFeatures::DEVICE_STATE);
        // All at once, so that one exchange stops the rings and asks for the state: with the last ring the lane rests.
        self.target.rings.iter_mut().flatten().for_each(|ring| ring.stop = ring.stop.or(Some(Stop::Drain)));
        self.want();
        self.go_on(lane);
    }

    fn source_ready(
        &mut self,
        token: Token,
        _ready: Readiness,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        match token {
            RESULTS => {
                while let Some(done) = self.desk.take() {
                    self.finished(done, lane);
                }
            }
            // It was asked nothing: whatever comes is the end.
            WIRE => self.lost(Error::Disconnected.into(), lane),
            CHANNEL => self.read_channel(lane),
            other => {
                let queue = other.number().checked_sub(ERRORS).and_then(|queue| u16::try_from(queue).ok());
                let Some(queue) = queue else { return Ok(()) };
                match self.ring(queue) {
                    Some(ring) if ring.stop.is_none() => lane.queues.broken(queue),
                    Some(_) => self.need_reset(format!("the back-end lost requests of queue {queue}"), lane),
                    None => {}
                }
            }
        }
        Ok(())
    }

    fn timer(&mut self, token: Token, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        if token == GIVE_UP && self.lost_since.is_some() && self.target.session.is_some() {
            let limit = self.shared.options.give_up;
            self.give_up(format!("the back-end has been gone for {limit:?}"), lane);
        }
        Ok(())
    }

    fn message(&mut self, message: ProxyMsg, _lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let ProxyMsg::Write(ConfigWrite(write)) = message else { return Ok(()) };
        if self.target.writes.len() < MAX_WRITES {
            self.target.writes.push(write);
            self.want();
        } else {
            self.shared.stats.dropped_writes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn flush(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.go_on(lane);
        Ok(())
    }
}

/// Where the back-end tells that a ring is broken.
fn error_file(queue: u16, lane: &mut Lane<'_>) -> std::io::Result<OwnedFd> {
    let file = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    lane.reactor.watch(file.as_fd(), error_token(queue), Interest::READ_EDGE)?;
    Ok(file)
}

fn error_token(queue: u16) -> Token {
    Token::new(ERRORS + u32::from(queue))
}

/// The pool does not take, or does not finish, what it always does.
fn busy() -> ProxyError {
    ProxyError::Io(std::io::Error::other("an exchange of messages was not finished"))
}
