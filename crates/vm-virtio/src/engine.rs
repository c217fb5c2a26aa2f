//! The engine: what virtio demands of every device, once.
//!
//! Negotiation and the status machine (virtio 1.4, 2.1, 2.2, 3.1), the life of queues, reset (2.4), NEEDS_RESET. A
//! host translates its registers or messages into calls here. Nothing blocks: what a lane has to do is a [`Ticket`].
//!
//! ```text
//!  status     features                     queues                     lanes
//!  0          may be set                   not served
//!  DRIVER     may be set                   not served
//!  FEATURES_OK fixed                       may be started             know the rings, serve none
//!  DRIVER_OK  fixed                        start, enable, stop        serve
//!  SUSPEND    fixed                        finished, none served      at rest, DRIVER_OK is clear
//!  -> 0       (ticket)                     discarded, then stopped    hand their workers to VirtioDevice::reset
//! ```
mod notification;
mod reset_queue;
mod snapshot;
mod suspend;

use crate::controls::Controls;
use crate::device::{ConfigWriter, DeviceError, HostEvents, QueueSpec, Session, Stop, VirtioDevice, Worker};
use crate::host_request::{HostError, HostReply, HostRequest, HostRequests};
use crate::lane::{
    Call, Command, FailureCounters, Kick, LaneHandle, LaneParts, LaneRunner, MAILBOX, Meeting, QueueStats,
    QueueTotals, Shared, StartError, StopError, WaitFor,
};
use crate::shared_memory::{ShmRegion, page_size};
use crate::ticket::{Completer, Ticket, ticket};
use crate::upcall::UpcallHandler;
use crate::{
    ConfigError, ConfigSpace, DeviceType, DirtyLog, Features, GuestAddress, GuestRam, InflightRegion, Queue,
    QueueConfig, QueueError, QueueState, Status,
};
use reactor::{SpinPolicy, Waker, mailbox};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use notification::Notification;
pub use reset_queue::QueueResetError;
pub(crate) use snapshot::Collected;
pub use snapshot::{SavedQueue, SnapshotError};
pub use suspend::SuspendError;

/// How long a stop or reset waits for chains unless the host says otherwise (failure policy 7).
pub const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// Buffers that one queue may take in one turn, so that it cannot hold its lane for ever.
pub const BUDGET: u32 = 256;

/// What a host decides about a device.
pub struct EngineOptions {
    /// Features to withhold although the device or the core has them.
    pub without: Features,
    /// What the host can carry of [`Features::CARRIED`]. Nothing else can be carried yet: no host has an admin queue.
    pub carried: Features,
    /// Buffers that a queue may take per turn.
    pub budget: u32,
    /// Polling before a lane sleeps.
    pub spin: SpinPolicy,
    /// Who hears of events.
    pub events: Arc<dyn HostEvents>,
    /// Who maps shared memory and looks up objects for the workers; none: nobody.
    pub upcalls: Option<Arc<dyn UpcallHandler>>,
}

impl EngineOptions {
    /// The defaults, with this listener.
    pub fn new(events: Arc<dyn HostEvents>) -> Self {
        EngineOptions {
            without: Features::empty(),
            carried: Features::empty(),
            budget: BUDGET,
            spin: SpinPolicy::OFF,
            events,
            upcalls: None,
        }
    }
}

/// A device cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device refused.
    #[error("the device cannot be made: {0}")]
    Device(#[source] DeviceError),
    /// The device's description contradicts itself.
    #[error("the device is described wrongly: {0}")]
    Description(String),
    /// No files left, most likely.
    #[error("cannot set up a lane")]
    Io(#[from] io::Error),
}

/// A feature set that cannot be negotiated.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FeatureError {
    /// Bits that were not offered.
    #[error("features {0:#x} were not offered")]
    NotOffered(u128),
    /// The features are fixed since FEATURES_OK.
    #[error("the features are fixed until the device is reset")]
    Fixed,
}

struct Control {
    driver: Features,
    ram: GuestRam,
    /// Those who wait for the reset that is under way.
    resetting: Option<Vec<Completer<()>>>,
    /// The suspension that the driver asked for and that is under way: its number and those who wait for it.
    suspending: Option<(u64, Vec<Completer<()>>)>,
    /// Suspensions that the driver asked for.
    suspensions: u64,
}

struct Core<D: VirtioDevice> {
    device: Mutex<D>,
    device_type: DeviceType,
    offered: Features,
    specs: Vec<QueueSpec>,
    config: Arc<ConfigSpace>,
    controls: Controls,
    host_requests: HostRequests,
    control: Mutex<Control>,
    /// Whether [`Control::resetting`] is there, for those who only look. Changed under the lock.
    is_resetting: AtomicBool,
    lanes: Vec<LaneHandle<D::Worker>>,
    /// Of each queue.
    totals: Vec<Arc<QueueTotals>>,
    shared: Arc<Shared>,
    can_save: bool,
}

/// The engine of a device and the runners of its lanes.
pub type EngineAndLanes<D> = (Engine<D>, Vec<LaneRunner<<D as VirtioDevice>::Worker>>);

/// A device under the rules of virtio. Dropping it ends its lanes.
pub struct Engine<D: VirtioDevice>(Arc<Core<D>>);

/// What a queue needs to start.
pub struct QueueStart {
    /// Size and addresses (guest-physical).
    pub config: QueueConfig,
    /// Where it continues; none: from the beginning.
    pub state: Option<QueueState>,
    /// Where it keeps what is in flight, so that a successor of this process takes it again; what a predecessor has
    /// left there comes first. No other queue that runs may have it. Not for queues that are
    /// [delegated](crate::Worker::DELEGATES): who serves them keeps that, too.
    pub inflight: Option<InflightRegion>,
    /// How kicks come in.
    pub kick: Kick,
    /// How interrupts go out.
    pub call: Call,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A device that panicked under the lock is reset before it is used again.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One more waits for something that is under way. Those who have gone are forgotten: a driver can ask again and again
/// (failure policy 8).
fn wait_too(waiting: &mut Vec<Completer<()>>, done: Completer<()>) {
    waiting.retain(Completer::is_awaited);
    waiting.push(done);
}

fn check_specs(specs: &[QueueSpec]) -> Result<u16, EngineError> {
    let wrong = |what: String| Err(EngineError::Description(what));
    if u16::try_from(specs.len()).is_err() {
        return wrong(format!("{} queues", specs.len()));
    }
    for spec in specs {
        if !spec.max_size.is_power_of_two() || spec.max_size > 32768 {
            return wrong(format!("queue {} with {} entries", spec.name, spec.max_size));
        }
    }
    let lanes = specs.iter().map(|spec| spec.lane).max().map_or(1, |last| last.saturating_add(1));
    match (0..lanes).find(|lane| !specs.is_empty() && specs.iter().all(|spec| spec.lane != *lane)) {
        Some(empty) => wrong(format!("no queue in lane {empty}")),
        None => Ok(lanes),
    }
}

fn check_regions(regions: &[ShmRegion]) -> Result<(), EngineError> {
    let mut ids = [false; 256];
    for ShmRegion { id, size } in regions.iter().copied() {
        let again = ids.get_mut(usize::from(id)).is_some_and(|seen| std::mem::replace(seen, true));
        if again || size == 0 || !size.is_multiple_of(page_size()) {
            return Err(EngineError::Description(format!("shared memory region {id} of {size} bytes")));
        }
    }
    Ok(())
}

impl<D: VirtioDevice> Engine<D> {
    /// Puts a device under the engine. The runners, one per lane, are the caller's to place on threads.
    pub fn new(mut device: D, options: EngineOptions) -> Result<EngineAndLanes<D>, EngineError> {
        let own = device.features();
        if own.intersects(Features::NOT_A_DEVICES) {
            return Err(EngineError::Description(format!(
                "feature bits {:#x} are not a device's to offer",
                (own & Features::NOT_A_DEVICES).bits()
            )));
        }
        if let excess = options.carried - Features::CARRIED
            && !excess.is_empty()
        {
            return Err(EngineError::Description(format!("nothing here serves {excess:?}")));
        }
        // 6.2: VERSION_1 must be offered, whatever is withheld. 2.2 gives bit 41 to devices, 6 to the admin queue.
        let rings = (Features::RING | options.carried) & device.ring_features();
        let all = (own | rings) - Features::ADMIN_VQ;
        let offered = (all - options.without) | Features::VERSION_1;
        let specs = device.queues(offered);
        let count = check_specs(&specs)?;
        let regions = device.shared_memory().to_vec();
        check_regions(&regions)?;
        let shared = Arc::new(Shared::new(options.events, options.upcalls, regions, specs.len()));

        let (mails, inboxes): (Vec<_>, Vec<_>) =
            (0..count).map(|_| mailbox(MAILBOX)).collect::<io::Result<Vec<_>>>()?.into_iter().unzip();
        let workers = device.workers(&mails).map_err(EngineError::Device)?;
        if workers.len() != usize::from(count) {
            return Err(EngineError::Description(format!("{} workers for {count} lanes", workers.len())));
        }
        let totals: Vec<_> = specs.iter().map(|_| Arc::<QueueTotals>::default()).collect();
        let can_save = catch_unwind(AssertUnwindSafe(|| device.save(&workers).is_ok())).unwrap_or(false);
        let mut lanes = Vec::new();
        let mut runners = Vec::new();
        for ((index, worker), mail) in (0..count).zip(workers).zip(inboxes) {
            let (commands, orders) = channel();
            let waker = Waker::new()?;
            lanes.push(LaneHandle { commands, waker: waker.clone() });
            let queues = (0..).zip(specs.iter().zip(&totals)).filter(|(_, (spec, _))| spec.lane == index);
            let queues = queues.map(|(queue, (_, totals))| (queue, totals.clone())).collect();
            runners.push(LaneRunner::new(LaneParts {
                index,
                queues,
                orders,
                waker,
                mail,
                worker,
                shared: shared.clone(),
                budget: options.budget.max(1),
                spin: options.spin,
            })?);
        }
        let core = Core {
            device_type: device.device_type(),
            config: device.config(),
            controls: device.controls(),
            host_requests: device.host_requests(),
            device: Mutex::new(device),
            offered,
            specs,
            is_resetting: AtomicBool::new(false),
            control: Mutex::new(Control {
                driver: Features::empty(),
                ram: GuestRam::empty(),
                resetting: None,
                suspending: None,
                suspensions: 0,
            }),
            lanes,
            totals,
            shared,
            can_save,
        };
        Ok((Engine(Arc::new(core)), runners))
    }

    /// The device type.
    pub fn device_type(&self) -> DeviceType {
        self.0.device_type
    }

    /// Everything that is offered to the driver.
    pub fn offered(&self) -> Features {
        self.0.offered
    }

    /// The queues, in the order of their numbers.
    pub fn queues(&self) -> &[QueueSpec] {
        &self.0.specs
    }

    /// The configuration space.
    #[inline]
    pub fn config(&self) -> &Arc<ConfigSpace> {
        &self.0.config
    }

    /// The shared memory regions (2.10). Constant.
    pub fn shared_memory(&self) -> &[ShmRegion] {
        &self.0.shared.regions
    }

    /// What can be read, set and run.
    pub fn controls(&self) -> &Controls {
        &self.0.controls
    }

    /// What went wrong since the device was made.
    pub fn failures(&self) -> &FailureCounters {
        &self.0.shared.failures
    }

    /// What happened on a queue since the device was made; none if there is no such queue.
    pub fn stats(&self, queue: u16) -> Option<QueueStats> {
        Some(self.0.totals.get(usize::from(queue))?.stats())
    }

    /// The driver's features.
    pub fn driver_features(&self) -> Features {
        lock(&self.0.control).driver
    }

    /// The driver (or front-end) chooses features. Possible until FEATURES_OK; the same set once more is always fine.
    pub fn set_driver_features(&self, features: Features) -> Result<(), FeatureError> {
        let excess = features - self.0.offered;
        if !excess.is_empty() {
            return Err(FeatureError::NotOffered(excess.bits()));
        }
        let mut control = lock(&self.0.control);
        if self.0.shared.status().contains(Status::FEATURES_OK) && control.driver != features {
            return Err(FeatureError::Fixed);
        }
        control.driver = features;
        Ok(())
    }

    /// The status field.
    #[inline]
    pub fn status(&self) -> Status {
        let status = self.0.shared.status();
        // 2.4.1: a driver that reads 0 goes on, so 0 means that the next write counts.
        if status.is_empty() && self.is_resetting() { Status::DEVICE_NEEDS_RESET } else { status }
    }

    /// Whether a reset is under way.
    pub fn is_resetting(&self) -> bool {
        self.0.is_resetting.load(Ordering::SeqCst)
    }

    /// The driver writes the status field: 0 resets, other bits are added (2.1.1: a driver clears none). FEATURES_OK
    /// stays clear if the features are refused, DRIVER_OK without FEATURES_OK. SUSPEND on a live device suspends it, if
    /// that was negotiated, and DRIVER_OK on a suspended one resumes it (3.4). When the ticket ends, [`Engine::status`]
    /// tells what became of it.
    pub fn set_status(&self, status: Status) -> Ticket<()> {
        if status.is_empty() {
            return self.reset();
        }
        let control = lock(&self.0.control);
        let old = self.0.shared.status();
        let mut new = status - old - Status::DEVICE_NEEDS_RESET - Status::SUSPEND;
        if control.resetting.is_some() {
            return Ticket::ready(());
        }
        if old.contains(Status::SUSPEND) {
            self.0.shared.add_status(new - Status::DRIVER_OK);
            let resumes = status.contains(Status::DRIVER_OK);
            return if resumes { self.resume_for_driver(control) } else { Ticket::ready(()) };
        }
        // 3.4.2: before the device is initialised, SUSPEND is ignored.
        let may_suspend = old.contains(Status::DRIVER_OK) && control.driver.contains(Features::SUSPEND);
        if status.contains(Status::SUSPEND) && may_suspend {
            self.0.shared.add_status(new);
            return self.suspend_for_driver(control);
        }
        if new.contains(Status::FEATURES_OK) && !self.accepts(control.driver) {
            new -= Status::FEATURES_OK;
        }
        if !(old | new).contains(Status::FEATURES_OK) {
            new -= Status::DRIVER_OK;
        }
        self.0.shared.add_status(new);
        if !new.contains(Status::DRIVER_OK) {
            return Ticket::ready(());
        }
        let session = Session { features: control.driver };
        let (done, ticket) = ticket(());
        let done = Arc::new(done);
        for lane in &self.0.lanes {
            lane.send(Command::Activate { session: session.clone(), done: done.clone() });
        }
        ticket
    }

    fn accepts(&self, driver: Features) -> bool {
        // 6.2: a device may refuse to go on without VERSION_1; ours know no legacy interface.
        driver.contains(Features::VERSION_1)
            && self.enter_device("check_features", |device| device.check_features(driver)).unwrap_or(false)
    }

    /// The driver writes to the configuration space.
    pub fn write_config(&self, offset: u32, data: &[u8], by: ConfigWriter) -> Result<(), ConfigError> {
        let size = self.0.config.len();
        let end = (offset as usize).checked_add(data.len());
        if end.is_none_or(|end| end > size) {
            return Err(ConfigError::OutOfRange { offset, len: data.len(), size });
        }
        // 3.4.2: a suspended device ignores its driver.
        if by == ConfigWriter::Driver && self.0.shared.status().contains(Status::SUSPEND) {
            return Ok(());
        }
        self.enter_device("write_config", |device| device.write_config(offset, data, by));
        Ok(())
    }

    /// The requests that the device knows, besides control requests.
    pub fn host_requests(&self) -> HostRequests {
        self.0.host_requests
    }

    /// Asks the device for something beyond virtio. Control requests are checked against [`Engine::controls`] first, the
    /// others against [`Engine::host_requests`].
    pub fn host_request(&self, request: HostRequest) -> Result<HostReply, HostError> {
        match &request {
            HostRequest::Control(control) => self.0.controls.check(control)?,
            other if self.0.host_requests.contains(other.needs()) => {}
            _ => return Err(HostError::Unsupported),
        }
        self.enter_device("host_request", |device| device.host_request(request))
            .unwrap_or(Err(HostError::Panicked))
    }

    /// Calls the device; a panic is its failure, not the caller's (failure policy 5).
    fn enter_device<R>(&self, what: &str, call: impl FnOnce(&mut D) -> R) -> Option<R> {
        let mut device = lock(&self.0.device);
        match catch_unwind(AssertUnwindSafe(|| call(&mut device))) {
            Ok(result) => Some(result),
            Err(_) => {
                self.0.shared.failures.worker_failures.fetch_add(1, Ordering::Relaxed);
                self.0.shared.needs_reset(format!("the device panicked in {what}"));
                None
            }
        }
    }

    fn lane(&self, queue: u16) -> Option<&LaneHandle<D::Worker>> {
        let spec = self.0.specs.get(usize::from(queue))?;
        self.0.lanes.get(usize::from(spec.lane))
    }

    /// Starts a queue on the current memory. It is served once it is enabled and the driver is ready (DRIVER_OK).
    pub fn start(&self, queue: u16, start: QueueStart) -> Ticket<Result<(), StartError>> {
        let (Some(lane), Some(spec)) = (self.lane(queue), self.0.specs.get(usize::from(queue))) else {
            return Ticket::ready(Err(StartError::NoSuchQueue(queue)));
        };
        if start.config.size > spec.max_size {
            let error = StartError::TooLarge { queue, size: start.config.size, max: spec.max_size };
            return Ticket::ready(Err(error));
        }
        let control = lock(&self.0.control);
        if control.resetting.is_some() {
            // The lanes wait for the queues that were there when it began.
            return Ticket::ready(Err(StartError::Resetting));
        }
        if <D::Worker as Worker>::DELEGATES
            && start.state.as_ref().is_some_and(|state| !state.held.is_empty())
        {
            return Ticket::ready(Err(QueueError::State("chains that are out cannot be delegated").into()));
        }
        let ring = match Queue::tracked(
            start.config,
            &control.ram,
            control.driver,
            start.state,
            start.inflight.as_ref().filter(|_| !<D::Worker as Worker>::DELEGATES),
        ) {
            Ok(ring) => Box::new(ring),
            // Nobody's mistake: the host asks for the translation and tries again.
            Err(error @ QueueError::Miss(_)) => return Ticket::ready(Err(error.into())),
            Err(error) => {
                // Size and addresses are the driver's: as bad as a broken ring (failure policy 1).
                self.0.shared.failures.queue(&error);
                self.0.shared.needs_reset(format!("queue {queue} cannot start: {error}"));
                return Ticket::ready(Err(error.into()));
            }
        };
        // Under the lock, so that a memory change comes before or after, not between.
        let (done, ticket) = ticket(Err(StartError::Gone));
        lane.send(Command::Start { queue, ring, kick: start.kick, call: start.call, done });
        ticket
    }

    /// Enables or disables a queue, started or not. A disabled one pops nothing but completes what is out.
    pub fn enable(&self, queue: u16, on: bool) -> Ticket<()> {
        self.tell(queue, |done| Command::Enable { queue, on, done })
    }

    /// Changes the interrupt of a queue; one is sent at once in case the last one went to the old file unheard.
    pub fn set_call(&self, queue: u16, call: Call) -> Ticket<()> {
        self.tell(queue, |done| Command::SetCall { queue, call, done })
    }

    fn tell(&self, queue: u16, command: impl FnOnce(Completer<()>) -> Command<D::Worker>) -> Ticket<()> {
        let (done, ticket) = ticket(());
        if let Some(lane) = self.lane(queue) {
            lane.send(command(done));
        }
        ticket
    }

    /// Stops a queue; the ticket holds where it stopped. After `deadline` (none: [`STOP_DEADLINE`]) chains that are
    /// still out are given up.
    pub fn stop(
        &self,
        queue: u16,
        how: Stop,
        deadline: Option<Instant>,
    ) -> Ticket<Result<QueueState, StopError>> {
        let Some(lane) = self.lane(queue) else {
            return Ticket::ready(Err(StopError::NotStarted(queue)));
        };
        let deadline = deadline.unwrap_or_else(|| Instant::now() + STOP_DEADLINE);
        let (done, ticket) = ticket(Err(StopError::Gone));
        lane.send(Command::Stop { queue, how, deadline, done });
        ticket
    }

    /// Changes guest memory: every queue moves to the new snapshot between two requests. A queue that waits for a
    /// translation ([`crate::HostEvent::Miss`]) looks for it there.
    pub fn memory(&self, ram: GuestRam, wait: WaitFor) -> Ticket<()> {
        let mut control = lock(&self.0.control);
        control.ram = ram.clone();
        let (done, ticket) = ticket(());
        let done = Arc::new(done);
        for lane in &self.0.lanes {
            lane.send(Command::Memory { ram: ram.clone(), wait, done: done.clone() });
        }
        ticket
    }

    /// Marks pages that the device writes in this log from here on; none: nowhere. When the ticket ends, every lane
    /// does, and nobody writes to the former log.
    pub fn log(&self, log: Option<Arc<DirtyLog>>) -> Ticket<()> {
        let (done, ticket) = ticket(());
        let done = Arc::new(done);
        for lane in &self.0.lanes {
            lane.send(Command::Log { log: log.clone(), done: done.clone() });
        }
        ticket
    }

    /// Whether what is written in the rings of a queue is logged, too: then with the guest-physical address of its
    /// Device Area. Remembered over a stop, forgotten by a reset.
    pub fn log_ring(&self, queue: u16, device: Option<GuestAddress>) -> Ticket<()> {
        self.tell(queue, |done| Command::LogRing { queue, device, done })
    }

    /// The driver notified this queue: for hosts whose kicks are no files. As with files, those that come before the lane
    /// has heard of the first are one.
    pub fn kick(&self, queue: u16) {
        if let Some(lane) = self.lane(queue)
            && self.0.shared.kick(queue)
        {
            lane.send(Command::Kick { queue, done: None });
        }
    }

    /// The driver notified this queue; the ticket ends when the queue's lane has heard it. For hosts whose kicks come as
    /// messages: one at a time is under way.
    pub fn kick_heard(&self, queue: u16) -> Ticket<()> {
        self.tell(queue, |done| Command::Kick { queue, done: Some(done) })
    }

    /// Signals on the thread of the queue's lane, for files that come from a guest's front-end: writing to one can
    /// block, whatever flags it had when it came, and must not hold the threads that serve other guests.
    pub fn signal(&self, queue: u16, interrupt: Arc<dyn crate::Interrupt>) -> Ticket<()> {
        self.tell(queue, |done| Command::Signal { interrupt, done })
    }

    /// Resets the device (2.4): queues are stopped and their buffers given up, the device and its workers go back to
    /// their first state, and the status reads 0 when the ticket ends. If a backend held on to chains beyond
    /// [`STOP_DEADLINE`], the status reads DEVICE_NEEDS_RESET instead; another reset may be tried.
    pub fn reset(&self) -> Ticket<()> {
        let (done, ticket) = ticket(());
        let mut control = lock(&self.0.control);
        if let Some(waiting) = control.resetting.as_mut() {
            wait_too(waiting, done);
            return ticket;
        }
        control.resetting = Some(vec![done]);
        self.0.is_resetting.store(true, Ordering::SeqCst);
        let overtaken = control.suspending.take();
        // A lane that is gone ends the reset at once, in `ResetOver`, which takes the lock.
        drop(control);
        drop(overtaken);
        let core = self.0.clone();
        let agenda = move |workers: &mut [D::Worker], stuck: bool| {
            // If the device panics half-way, this is what remains.
            let mut outcome = Outcome { shared: &core.shared, status: Status::DEVICE_NEEDS_RESET };
            // All lanes have given up what they asked for: nothing is mapped for them from here on.
            core.shared.upcalls.iter().for_each(|handler| handler.reset());
            lock(&core.device).reset(workers);
            core.config.release();
            lock(&core.control).driver = Features::empty();
            if !stuck {
                outcome.status = Status::empty();
            }
        };
        let over = ResetOver(self.0.clone());
        let afterwards = move || drop(over);
        let meeting =
            Arc::new(Meeting::new(self.0.lanes.clone(), Box::new(agenda), Box::new(afterwards), true));
        let deadline = Instant::now() + STOP_DEADLINE;
        for lane in &self.0.lanes {
            lane.send(Command::CheckIn { meeting: meeting.clone(), deadline });
        }
        ticket
    }

    /// Ends the lanes. Queues that still run are given up: stop them first to finish requests.
    pub fn shutdown(&self) {
        for lane in &self.0.lanes {
            lane.send(Command::Shutdown);
        }
    }
}

/// Sets the status at the end of a reset, however it ends.
struct Outcome<'a> {
    shared: &'a Shared,
    status: Status,
}

impl Drop for Outcome<'_> {
    fn drop(&mut self) {
        self.shared.set_status(self.status);
    }
}

/// Answers all who wait for a reset, also if a lane was gone and it never took place.
struct ResetOver<D: VirtioDevice>(Arc<Core<D>>);

impl<D: VirtioDevice> Drop for ResetOver<D> {
    fn drop(&mut self) {
        let mut control = lock(&self.0.control);
        let waiting = control.resetting.take();
        self.0.is_resetting.store(false, Ordering::SeqCst);
        drop(control);
        drop(waiting);
    }
}

impl<D: VirtioDevice> Drop for Engine<D> {
    fn drop(&mut self) {
        self.shutdown();
    }
}
