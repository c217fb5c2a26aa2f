//! The lane runtime: what happens around a worker so that a device only has to pop and complete.
//!
//! A [`LaneRunner`] owns the queues of one lane, the files that wake it and the worker that serves them. One turn is:
//! collect events, carry out the engine's orders, serve the queues that are ready (each within its budget), let the
//! worker flush, publish completions and signal once per queue, look for broken rings, arm kicks.
//!
//! Invariants:
//! * A queue is open (pops) exactly while `LaneRunner::serves` says so; every change of a condition goes through
//!   `LaneRunner::regate`.
//! * A queue that is open and not armed either has a turn coming, or its worker left buffers in it on purpose and will
//!   come back by itself (rate limits). Kicks are armed only after the ring was seen empty, and checked again after.
//! * The worker is called through `LaneRunner::enter` only: its errors and panics end there and fail this lane
//!   (failure policy 5), not the thread.
mod command;
mod delegated;
mod iommu;
mod pool;
mod ring;
mod snapshot;
mod stop;
mod suspend;
mod tally;
mod upcalls;

pub use command::WaitFor;
pub(crate) use command::{Command, LaneHandle, Meeting};
pub use pool::run_in_pool;
pub use ring::{Call, EventFd, Interrupt, Kick, StartError, StopError};
pub(crate) use suspend::{By, Gathering};
pub(crate) use tally::QueueTotals;
pub use tally::{LATENCY_BUCKETS, Latency, QueueStats};

use crate::delegated::Change;
use crate::device::{DeviceError, HostEvent, HostEvents, Lane, Queues, Worker};
use crate::shared_memory::ShmRegion;
use crate::upcall::{Upcall, UpcallHandler, UpcallId, UpcallResult};
use crate::{DirtyLog, GuestRam, Queue, Status};
use reactor::{Event, Inbox, Interest, Reactor, SpinPolicy, Spinner, Token};
use ring::Ring;
use rustix::fd::AsFd;
use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How often a ring without a kick file is looked at ([`Kick::Poll`]).
pub const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Orders that a lane carries out in one turn, before it serves its queues.
const ORDERS_A_TURN: usize = 256;

/// Messages that a worker's mailbox holds.
pub(crate) const MAILBOX: usize = 256;

// Tokens of the runtime: kicks have the number of their queue.
const ORDERS: Token = Token::host(0x1_0000);
const MAIL: Token = Token::host(0x1_0001);
const DEADLINE: Token = Token::host(0x1_0002);
const PAUSE_DEADLINE: Token = Token::host(0x1_0003);
const POLL: Token = Token::host(0x1_0004);
const RELEASE: Token = Token::host(0x1_0005);
const UPCALL: Token = Token::host(0x1_0006);

/// What went wrong so far; never reset. Failure policy 8: every failure is counted.
#[derive(Debug, Default)]
pub struct FailureCounters {
    /// Rings whose rules the driver broke.
    pub queue_faults: AtomicU64,
    /// Errors and panics of workers and devices.
    pub worker_failures: AtomicU64,
    /// Stops that ended with chains still out.
    pub stuck: AtomicU64,
    /// Invalidations of an IOMMU's translations that did not wait for all chains.
    pub unreleased: AtomicU64,
    /// Questions of workers that the host did not answer in time.
    pub unanswered: AtomicU64,
    /// Queues whose memory was lost.
    pub memory: AtomicU64,
}

impl FailureCounters {
    /// A queue that stops, or cannot start, because of this.
    pub(crate) fn queue(&self, error: &crate::QueueError) {
        let of = if matches!(error, crate::QueueError::Poisoned) { &self.memory } else { &self.queue_faults };
        of.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the lanes of a device and its engine share: nothing that a request touches, but for kicks that are calls.
pub(crate) struct Shared {
    status: AtomicU8,
    /// Of each queue: a kick that came as a call is on its way to the lane.
    kicked: Vec<AtomicBool>,
    pub(crate) events: Arc<dyn HostEvents>,
    pub(crate) failures: FailureCounters,
    /// Who answers workers, if anybody does.
    pub(crate) upcalls: Option<Arc<dyn UpcallHandler>>,
    /// The device's shared memory regions.
    pub(crate) regions: Vec<ShmRegion>,
}

impl Shared {
    pub(crate) fn new(
        events: Arc<dyn HostEvents>,
        upcalls: Option<Arc<dyn UpcallHandler>>,
        regions: Vec<ShmRegion>,
        queues: usize,
    ) -> Self {
        let (status, failures) = (AtomicU8::new(0), FailureCounters::default());
        let kicked = (0..queues).map(|_| AtomicBool::new(false)).collect();
        Shared { status, kicked, events, failures, upcalls, regions }
    }

    /// A driver kicks a queue by a call. Whether the lane has to be told: one order stands for all kicks until it is heard,
    /// so that a driver cannot fill memory with them (failure policy 8).
    pub(crate) fn kick(&self, queue: u16) -> bool {
        self.kicked.get(usize::from(queue)).is_some_and(|kicked| !kicked.swap(true, Ordering::AcqRel))
    }

    /// The lane heard the order, and looks into the ring next. A swap, so that it sees what came before each of the kicks.
    fn heard(&self, queue: u16) {
        if let Some(kicked) = self.kicked.get(usize::from(queue)) {
            kicked.swap(false, Ordering::AcqRel);
        }
    }

    #[inline]
    pub(crate) fn status(&self) -> Status {
        Status::from_bits_retain(self.status.load(Ordering::SeqCst))
    }

    pub(crate) fn set_status(&self, status: Status) {
        self.status.store(status.bits(), Ordering::SeqCst);
    }

    /// Adds bits; `DEVICE_NEEDS_RESET` that a lane sets meanwhile is not lost.
    pub(crate) fn add_status(&self, bits: Status) {
        self.status.fetch_or(bits.bits(), Ordering::SeqCst);
    }

    /// Adds and takes bits away at once.
    pub(crate) fn change_status(&self, add: Status, remove: Status) {
        let change = |status: u8| Some((status | add.bits()) & !remove.bits());
        let _ = self.status.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
    }

    /// 2.1.2: an unrecoverable error sets DEVICE_NEEDS_RESET, and the driver is told.
    pub(crate) fn needs_reset(&self, reason: String) {
        self.add_status(Status::DEVICE_NEEDS_RESET);
        let live = self.status().contains(Status::DRIVER_OK);
        self.events.event(HostEvent::NeedsReset { reason, live });
    }
}

/// Runs one lane. The host decides which thread.
pub struct LaneRunner<W: Worker> {
    index: u16,
    reactor: Reactor,
    orders: Receiver<Command<W>>,
    mail: Inbox<W::Msg>,
    /// Not here while it is with the device ([`Meeting`]).
    worker: Option<W>,
    queues: Queues,
    /// Beside `queues.slots`, the same order.
    rings: Vec<Ring>,
    up: Upcall,
    /// To what the worker asked.
    answers: Receiver<(UpcallId, UpcallResult)>,
    /// When the first of its questions is given up.
    patience: Option<Instant>,
    /// Where pages that are written are marked.
    log: Option<Arc<DirtyLog>>,
    /// For chains that are dropped on other threads.
    waker: reactor::Waker,
    budget: u32,
    spinner: Option<Spinner>,
    attached: bool,
    /// Between DRIVER_OK and reset.
    live: bool,
    /// The worker failed: it is not called until a reset.
    failed: bool,
    /// The worker was called since it was last flushed.
    called: bool,
    mail_waiting: bool,
    /// There may be more orders than one turn carries out.
    orders_waiting: bool,
    check_in: Option<stop::CheckIn<W>>,
    /// The worker is with the device to be saved or restored, and comes back soon. Orders that mean it wait.
    is_visiting: bool,
    later: VecDeque<Command<W>>,
    pause: suspend::Pause,
    running: bool,
}

/// What the engine gives a lane when it makes it.
pub(crate) struct LaneParts<W: Worker> {
    pub(crate) index: u16,
    /// Each with its totals.
    pub(crate) queues: Vec<(u16, Arc<QueueTotals>)>,
    pub(crate) orders: Receiver<Command<W>>,
    pub(crate) waker: reactor::Waker,
    pub(crate) mail: Inbox<W::Msg>,
    pub(crate) worker: W,
    pub(crate) shared: Arc<Shared>,
    pub(crate) budget: u32,
    pub(crate) spin: SpinPolicy,
}

impl<W: Worker> LaneRunner<W> {
    pub(crate) fn new(parts: LaneParts<W>) -> std::io::Result<Self> {
        let mut reactor = Reactor::new()?;
        reactor.watch(parts.waker.as_fd(), ORDERS, Interest::READ_EDGE)?;
        reactor.watch(parts.mail.as_fd(), MAIL, Interest::READ_EDGE)?;
        let (answer, answers) = std::sync::mpsc::channel();
        Ok(LaneRunner {
            index: parts.index,
            reactor,
            orders: parts.orders,
            mail: parts.mail,
            worker: Some(parts.worker),
            queues: Queues::new(parts.queues.iter().map(|(queue, _)| *queue)),
            rings: parts.queues.iter().map(|(queue, totals)| Ring::new(*queue, totals.clone())).collect(),
            up: Upcall::new(parts.shared, answer, parts.waker.clone()),
            answers,
            patience: None,
            log: None,
            waker: parts.waker,
            budget: parts.budget,
            spinner: (!parts.spin.limit.is_zero()).then(|| Spinner::new(parts.spin)),
            attached: false,
            live: false,
            failed: false,
            called: false,
            mail_waiting: false,
            orders_waiting: false,
            check_in: None,
            is_visiting: false,
            later: VecDeque::new(),
            pause: suspend::Pause::default(),
            running: true,
        })
    }

    /// The lane's number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Serves the lane until the engine is dropped or shut down.
    pub fn run(mut self) {
        while self.running {
            self.turn(None);
        }
    }

    /// One turn: waits for something to do, at most `timeout` (none: for ever), and does it. With a time-out of zero
    /// it goes on until nothing is left to do now, for hosts and tests that step through a device. Returns whether
    /// anything was done.
    pub fn turn(&mut self, timeout: Option<Duration>) -> bool {
        if !self.attached {
            self.attached = true;
            self.enter(|worker, lane| worker.attached(lane));
        }
        let stepping = timeout == Some(Duration::ZERO);
        let mut worked = false;
        loop {
            let worked_now = self.one_turn(timeout);
            worked |= worked_now;
            if !stepping || !self.running || !(worked_now || self.pending()) {
                return worked;
            }
        }
    }

    /// One turn without waiting, for a thread that carries other lanes, too. When there is nothing to do the reactor
    /// becomes readable as soon as there is.
    fn step(&mut self) -> pool::Step {
        if !self.attached {
            self.attached = true;
            self.enter(|worker, lane| worker.attached(lane));
        }
        let worked = self.one_turn(Some(Duration::ZERO));
        if !self.running {
            return pool::Step::Over;
        }
        if worked || self.pending() {
            return pool::Step::More;
        }
        if (0..self.rings.len()).any(|at| self.polled(at)) {
            self.reactor.set_timer(POLL, Instant::now() + POLL_INTERVAL);
        }
        pool::Step::Idle
    }

    fn one_turn(&mut self, timeout: Option<Duration>) -> bool {
        let Some(mut worked) = self.collect(timeout) else {
            return self.wait_for_order(timeout);
        };
        while let Some(event) = self.reactor.next() {
            worked |= self.handle(event);
        }
        worked |= self.read_orders();
        worked |= self.hear_upcalls();
        if self.mail_waiting && !self.failed && !self.at_rest() {
            self.read_mail();
            worked = true;
        }
        worked |= self.serve();
        if self.called {
            self.enter(|worker, lane| worker.flush(lane));
            // What is called from here on, and while the lane waits for an order, is flushed at the end of the next turn.
            self.called = false;
        }
        self.renew();
        if !self.at_rest() {
            self.publish();
        }
        self.take_back();
        self.find_misses();
        self.find_faults();
        self.progress_moves();
        self.progress_releases();
        self.progress_stops();
        self.progress_pause();
        self.watch_upcalls();
        if self.spinner.is_none() {
            self.arm();
        }
        if self.log.is_some() {
            self.queues.slots.iter_mut().filter_map(|(_, queue)| queue.as_mut()).for_each(Queue::signal_log);
        }
        worked
    }

    /// Something is left to do without waiting.
    fn pending(&self) -> bool {
        // A failed worker reads no mail: it waits for the reset.
        self.mail_waiting && self.worker.is_some() && !self.failed && !self.at_rest()
            || self.orders_waiting
            || self.rings.iter().any(|ring| ring.ready)
    }

    /// Waits until there is something to do. None: the worker is away, there is nothing to do but to wait for it.
    fn collect(&mut self, timeout: Option<Duration>) -> Option<bool> {
        self.worker.as_ref()?;
        if self.failed || self.at_rest() {
            // Only orders matter to a failed or suspended lane, and its worker's files may be ready for ever.
            return Some(self.wait_for_order(timeout));
        }
        let mut timeout = timeout;
        if self.pending() {
            timeout = Some(Duration::ZERO);
        }
        let mut worked = false;
        if timeout != Some(Duration::ZERO) && self.spinner.is_some() {
            worked = self.spin();
            if !worked {
                self.arm();
            }
            if worked || self.pending() {
                timeout = Some(Duration::ZERO);
            }
        }
        if self.live && (0..self.rings.len()).any(|at| self.polled(at)) {
            timeout = Some(timeout.map_or(POLL_INTERVAL, |limit| limit.min(POLL_INTERVAL)));
        }
        let slept = (timeout != Some(Duration::ZERO) && self.spinner.is_some()).then(Instant::now);
        if let Err(error) = self.reactor.wait(timeout) {
            // The kernel refuses to wait on our own epoll: nothing can be served any more.
            self.fail(format!("waiting for events failed: {error}"));
            std::thread::sleep(POLL_INTERVAL);
        }
        if let (Some(slept), Some(spinner)) = (slept, self.spinner.as_mut()) {
            spinner.woke(slept.elapsed());
        }
        for at in 0..self.rings.len() {
            if self.polled(at) && self.queue(at).is_some_and(|queue| queue.has_available()) {
                self.rings[at].ready = true;
            }
        }
        Some(worked)
    }

    /// Whether the lane has to look into this ring by itself.
    fn polled(&self, at: usize) -> bool {
        self.serves(at) && self.rings.get(at).is_some_and(|ring| matches!(ring.kick, Kick::Poll))
    }

    /// Polls before sleeping (bounded and adaptive). True: there is work.
    fn spin(&mut self) -> bool {
        let Some(mut spinner) = self.spinner.take() else { return false };
        let found = spinner.spin(|| {
            let mut found = false;
            for at in 0..self.rings.len() {
                if self.serves(at) && self.queue(at).is_some_and(|queue| news(queue)) {
                    if let Some(ring) = self.rings.get_mut(at) {
                        ring.ready = true;
                    }
                    found = true;
                }
            }
            if !found && self.live {
                self.enter_quietly(|worker, lane| found = worker.poll(lane));
            }
            found
        });
        self.spinner = Some(spinner);
        found
    }

    /// The worker is with the device, or failed: nothing can be served, only orders matter (its return, a reset).
    fn wait_for_order(&mut self, timeout: Option<Duration>) -> bool {
        let order = match timeout {
            None => self.orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(limit) => self.orders.recv_timeout(limit),
        };
        match order {
            Ok(order) => {
                self.obey(order);
                true
            }
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => {
                self.running = false;
                false
            }
        }
    }

    fn handle(&mut self, event: Event) -> bool {
        match event {
            Event::Ready { token: ORDERS, .. } => false, // read in every turn
            Event::Ready { token: MAIL, .. } => {
                self.mail_waiting = true;
                true
            }
            Event::Ready { token, .. } if token.is_host() && W::DELEGATES => {
                // An interrupt on its way to a host without a file for it.
                if let Some(at) = self.rings.iter().position(|ring| u32::from(ring.index) == token.number()) {
                    self.signal_unheard(at);
                }
                true
            }
            Event::Ready { token, .. } if token.is_host() => {
                if let Some(ring) = self.rings.iter_mut().find(|ring| u32::from(ring.index) == token.number())
                {
                    ring.ready = true;
                    ring.tally.kicked();
                    // Before the ring is looked at, so that no kick is taken for what came after that.
                    if ring.piles_up {
                        ring.kick.take();
                    }
                }
                true
            }
            Event::Ready { token, ready } => {
                self.enter(|worker, lane| worker.source_ready(token, ready, lane));
                true
            }
            Event::Registered { number, ready } => {
                self.enter(|worker, lane| worker.registered_ready(number, ready, lane));
                true
            }
            Event::Timer { token } if token.is_host() => true, // deadlines are looked at in every turn
            Event::Timer { token } => {
                self.enter(|worker, lane| worker.timer(token, lane));
                true
            }
        }
    }

    fn read_mail(&mut self) {
        // Bounded, so that a flood of messages does not keep the queues waiting.
        for _ in 0..MAILBOX {
            if self.worker.is_none() || self.failed {
                return;
            }
            match self.mail.recv() {
                Some(message) => self.enter(|worker, lane| worker.message(message, lane)),
                None => {
                    self.mail_waiting = false;
                    return;
                }
            }
        }
    }

    fn read_orders(&mut self) -> bool {
        // Bounded, too: drivers that notify by calls can give some as fast as they are carried out.
        for at in 0..ORDERS_A_TURN {
            match self.orders.try_recv() {
                Ok(order) => self.obey(order),
                Err(_) => {
                    self.orders_waiting = false;
                    return at > 0;
                }
            }
        }
        self.orders_waiting = true;
        true
    }

    fn obey(&mut self, order: Command<W>) {
        if self.is_visiting && !order.needs_no_worker() {
            return self.later.push_back(order);
        }
        match order {
            Command::Start { queue, ring, kick, call, done } => {
                done.complete(self.start(queue, *ring, kick, call));
            }
            Command::Enable { queue, on, done } => {
                if let Some(at) = self.find(queue) {
                    self.rings[at].enabled = on;
                    self.regate(at);
                    return self.pass_on_of(at, Change::Enabled { queue, on }, done);
                }
                done.complete(());
            }
            Command::SetCall { queue, call, done } => {
                if let Some(at) = self.find(queue) {
                    self.rings[at].call = call;
                    // What was published for the old file may have gone unheard: better one interrupt too many.
                    // Also while the ring is disabled: it completes what is out.
                    if self.queue(at).is_some() {
                        self.signal_unheard(at);
                    }
                    if self.is_away(at) {
                        return self.pass_on_call(at, done);
                    }
                }
                done.complete(());
            }
            Command::Stop { queue, how, deadline, done } => self.begin_stop(queue, how, deadline, done),
            Command::ResetQueue { queue, deadline, done } => self.begin_reset_queue(queue, deadline, done),
            Command::Suspend { by, deadline, done } => self.suspend(by, deadline, done),
            Command::Resume { by, done } => {
                self.resume(by);
                drop(done);
            }
            Command::Memory { ram, wait, done } => {
                for at in 0..self.rings.len() {
                    self.move_to(at, &ram, wait, &done);
                }
                if W::DELEGATES {
                    self.pass_on(Change::Memory(ram), &done);
                }
            }
            Command::Activate { session, done } => {
                if !self.failed {
                    self.live = true;
                    self.enter(|worker, lane| worker.activated(&session, lane));
                    // 3.1.1: buffers may be in the rings already.
                    for at in 0..self.rings.len() {
                        self.regate(at);
                        if self.rings[at].unheard {
                            self.signal_unheard(at);
                        }
                    }
                }
                drop(done);
            }
            Command::Log { log, done } => {
                self.log = log;
                (0..self.rings.len()).for_each(|at| self.renew_log(at));
                if W::DELEGATES {
                    self.pass_on(Change::Log(self.log.clone()), &done);
                }
                drop(done);
            }
            Command::LogRing { queue, device, done } => {
                if let Some(at) = self.find(queue) {
                    self.rings[at].logged = device;
                    self.renew_log(at);
                    return self.pass_on_of(at, Change::LogRing { queue, logged: device }, done);
                }
                done.complete(());
            }
            Command::Kick { queue, done } => {
                if done.is_none() {
                    self.up.shared.heard(queue);
                }
                if let Some(at) = self.find(queue) {
                    self.rings[at].ready = !W::DELEGATES;
                    self.rings[at].tally.kicked();
                    self.pass_on_kick(at);
                }
            }
            Command::Signal { interrupt, done } => {
                interrupt.signal();
                done.complete(());
            }
            Command::CheckIn { meeting, deadline } => self.begin_check_in(meeting, deadline),
            Command::Save { meeting, collected } => self.save(&meeting, &collected),
            Command::Restore { meeting } => self.hand_in_for_restore(&meeting),
            Command::Return { worker, reset } => {
                self.is_visiting = false;
                self.worker = Some(worker);
                self.failed &= !reset;
                self.up.close(false);
                self.mail_waiting = true;
                // One of them may send it away again.
                while !self.is_visiting
                    && let Some(order) = self.later.pop_front()
                {
                    self.obey(order);
                }
            }
            Command::Shutdown => self.running = false,
        }
    }

    fn start(&mut self, number: u16, queue: Queue, kick: Kick, call: Call) -> Result<(), StartError> {
        let at = self.find(number).ok_or(StartError::NoSuchQueue(number))?;
        let slot = &mut self.queues.slots[at].1;
        if slot.is_some() {
            return Err(StartError::Started(number));
        }
        let piles_up = !W::DELEGATES && kick.piles_up().map_err(StartError::Kick)?;
        if let Kick::Fd(fd) = &kick
            && !W::DELEGATES
        {
            self.reactor
                .watch(fd.as_fd(), Token::host(u32::from(number)), Interest::READ_EDGE)
                .map_err(StartError::Kick)?;
        }
        queue.set_waker(self.waker.clone());
        let follows = queue.follows();
        *slot = Some(queue);
        let ring = &mut self.rings[at];
        ring.stopped();
        ring.kick = kick;
        ring.piles_up = piles_up;
        ring.call = call;
        self.renew_log(at);
        self.regate(at);
        if W::DELEGATES {
            self.delegate(at).inspect_err(|_| self.queues.slots[at].1 = None).map_err(StartError::Kick)?;
        }
        if follows {
            // Whoever had the queue before may have died between a publication and its interrupt.
            self.signal_unheard(at);
        }
        Ok(())
    }

    /// Sends an interrupt that the driver may have missed; later, if nothing may be sent now.
    fn signal_unheard(&mut self, at: usize) {
        self.rings[at].unheard = true;
        if self.live && !self.pause.asked() {
            self.rings[at].unheard = false;
            self.signal(at);
        }
    }

    /// The log, or what of the ring is logged, has changed.
    fn renew_log(&mut self, at: usize) {
        let (log, device) = (self.log.clone(), self.rings[at].logged);
        if let Some(queue) = self.queue(at) {
            queue.set_log(log, device);
        }
    }

    fn find(&self, queue: u16) -> Option<usize> {
        self.rings.iter().position(|ring| ring.index == queue)
    }

    fn queue(&mut self, at: usize) -> Option<&mut Queue> {
        self.queues.slots.get_mut(at)?.1.as_mut()
    }

    /// Whether the queue may pop now.
    fn serves(&self, at: usize) -> bool {
        self.finishes(at) && self.rings.get(at).is_some_and(Ring::may_serve)
    }

    /// Whether the queue may finish what was taken before.
    fn finishes(&self, at: usize) -> bool {
        !W::DELEGATES
            && self.live
            && !self.failed
            && !self.pause.asked()
            && self.rings.get(at).is_some_and(Ring::may_finish)
            && self.queues.slots.get(at).is_some_and(|(_, queue)| queue.is_some())
    }

    /// Opens or closes a queue after one of the conditions changed. An opened one is scanned.
    fn regate(&mut self, at: usize) {
        let serves = self.serves(at);
        let Some(queue) = self.queue(at) else { return };
        if serves {
            queue.open();
        } else {
            queue.close();
        }
        self.rings[at].ready = serves;
    }

    fn serve(&mut self) -> bool {
        let mut worked = false;
        for at in 0..self.rings.len() {
            if !std::mem::take(&mut self.rings[at].ready) || !self.serves(at) {
                continue;
            }
            let budget = self.budget;
            let armed = std::mem::take(&mut self.rings[at].armed);
            let number = self.rings[at].index;
            self.rings[at].tally.begin();
            if let Some(queue) = self.queue(at) {
                queue.set_budget(budget);
                if armed {
                    queue.disarm();
                }
            }
            self.enter(|worker, lane| worker.queue_ready(number, lane));
            // The first time after a restore was the time to adopt them.
            if let Some(queue) = self.queue(at) {
                queue.drop_unclaimed();
            }
            worked = true;
        }
        worked
    }

    /// Queues whose budget was spent, in whatever callback, have another turn coming.
    fn renew(&mut self) {
        for at in 0..self.rings.len() {
            if self.serves(at) && self.queue(at).is_some_and(|queue| queue.budget_spent()) {
                self.rings[at].ready = true;
            }
        }
    }

    /// Makes completions visible, one interrupt a queue at most.
    fn publish(&mut self) {
        for at in 0..self.rings.len() {
            if self.queue(at).is_some_and(|queue| queue.publish()) {
                self.signal(at);
            }
            if let (Some((_, Some(queue))), Some(ring)) = (self.queues.slots.get(at), self.rings.get_mut(at))
            {
                ring.tally.count(queue);
            }
        }
    }

    fn signal(&self, at: usize) {
        let Some(ring) = self.rings.get(at) else { return };
        if let Some(call) = &ring.call {
            call.signal();
            ring.tally.interrupted();
        }
    }

    /// Failure policies 1 and 6: a broken ring stops, everything else goes on; rings whose memory was lost are broken.
    fn find_faults(&mut self) {
        for at in 0..self.rings.len() {
            if self.rings[at].faulted {
                continue;
            }
            let Some(queue) = self.queue(at) else { continue };
            queue.check_memory();
            let Some(error) = queue.fault().copied() else { continue };
            self.fault(at, error);
        }
    }

    fn fault(&mut self, at: usize, error: crate::QueueError) {
        let queue = self.rings[at].index;
        self.rings[at].faulted = true;
        self.rings[at].tally.faulted();
        self.regate(at);
        self.unwatch_kick(at);
        if self.is_away(at) {
            self.abandon(at);
        }
        let shared = &self.up.shared;
        shared.failures.queue(&error);
        let reason = format!("queue {queue}: {error}");
        // Before anybody hears of it: who then looks at the status has to find it there.
        shared.add_status(Status::DEVICE_NEEDS_RESET);
        shared.events.event(HostEvent::QueueFault { queue, error });
        shared.needs_reset(reason);
    }

    fn unwatch_kick(&mut self, at: usize) {
        let ring = &mut self.rings[at];
        if matches!(ring.kick, Kick::Fd(_)) && !W::DELEGATES {
            self.reactor.unwatch(Token::host(u32::from(ring.index)));
        }
        // The file closes after its watch is gone: the peer holds it too, closing alone would not end the watch.
        ring.kick = Kick::Manual;
    }

    /// Asks for kicks on every ring that was emptied, and looks once more.
    fn arm(&mut self) {
        for at in 0..self.rings.len() {
            let ring = &self.rings[at];
            if ring.armed || ring.ready || !self.serves(at) {
                continue;
            }
            let polled = matches!(ring.kick, Kick::Poll);
            let Some(queue) = self.queue(at) else { continue };
            // A worker that stopped popping before the ring was empty comes back by itself; kicks would be noise.
            if polled || (!queue.drained() && queue.has_available()) {
                continue;
            }
            // Memory that was lost just now is for the next turn to find.
            let more = queue.arm() || !queue.check_memory();
            self.rings[at].armed = !more;
            self.rings[at].ready = more;
        }
    }

    /// Calls the worker. Its error or panic fails the lane.
    fn enter(&mut self, call: impl FnOnce(&mut W, &mut Lane<'_>) -> Result<(), DeviceError>) {
        if self.failed {
            return;
        }
        let Some(worker) = self.worker.as_mut() else { return };
        self.called = true;
        let mut lane = Lane { queues: &mut self.queues, reactor: &mut self.reactor, up: &self.up };
        match catch_unwind(AssertUnwindSafe(|| call(worker, &mut lane))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.fail(format!("lane {}: {error}", self.index)),
            Err(panic) => self.fail(format!("lane {} panicked: {}", self.index, panic_text(panic.as_ref()))),
        }
    }

    /// As `LaneRunner::enter`, without counting as work.
    fn enter_quietly(&mut self, call: impl FnOnce(&mut W, &mut Lane<'_>)) {
        let called = self.called;
        self.enter(|worker, lane| {
            call(worker, lane);
            Ok(())
        });
        self.called = called;
    }

    /// Failure policy 5: this lane's queues stop, the device needs a reset.
    fn fail(&mut self, reason: String) {
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        for at in 0..self.rings.len() {
            self.regate(at);
            self.unwatch_kick(at);
        }
        // What it asked for is nobody's: the host undoes what is still to come.
        self.up.give_up();
        self.up.shared.failures.worker_failures.fetch_add(1, Ordering::Relaxed);
        self.up.shared.needs_reset(reason);
    }

    fn move_to(
        &mut self,
        at: usize,
        ram: &GuestRam,
        wait: WaitFor,
        done: &Arc<crate::ticket::Completer<()>>,
    ) {
        let Some(queue) = self.queue(at) else { return };
        if !wait.satisfied(queue.outstanding()) {
            self.rings[at].moving = Some((ram.clone(), done.clone()));
            self.regate(at);
            return;
        }
        // Used entries that nobody was told of lie in the memory that goes.
        if queue.publish() {
            self.signal(at);
        }
        let Some(queue) = self.queue(at) else { return };
        match queue.set_ram(ram) {
            // The new memory may show what the old one hid; a latched fault stays.
            Ok(()) => self.regate(at),
            Err(error) if iommu::waits(queue, &error) => self.rings[at].armed = false,
            Err(error) => self.fault(at, error),
        }
        self.release(at, wait, done);
    }

    fn progress_moves(&mut self) {
        for at in 0..self.rings.len() {
            if self.rings[at].moving.is_none() || self.queue(at).is_some_and(|queue| queue.outstanding() > 0)
            {
                continue;
            }
            if let Some((ram, done)) = self.rings[at].moving.take() {
                self.move_to(at, &ram, WaitFor::NewRequests, &done);
            }
        }
    }
}

/// Whether something came since the ring was seen empty. What a worker left in it on purpose is none: it comes back by
/// itself, and a lane that spun for it would never sleep.
fn news(queue: &Queue) -> bool {
    let left = !queue.drained();
    queue.has_available() && !left
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
