//! What a device writes: [`VirtioDevice`], the part that exists once, and [`Worker`], the part that serves queues.
//!
//! The two never share a lock: a worker lives on the thread of its lane; the device is entered by the control side
//! only. They meet when every queue is stopped ([`VirtioDevice::reset`]), and talk through mailboxes otherwise.
use crate::controls::{ControlRequest, Controls};
use crate::delegated::{Change, QueueParts, Waiting};
use crate::host_request::{HostError, HostReply, HostRequest, HostRequests, ObjectId};
use crate::shared_memory::ShmRegion;
pub use crate::upcall::{Upcall, UpcallError, UpcallId, UpcallReply, UpcallResult};
use crate::{ConfigSpace, DeviceType, Features, Queue, QueueState};
pub use device_state::{Section as DeviceState, StateError};
use reactor::{Mail, Reactor, Readiness, Token};
use std::fmt;
use std::sync::Arc;

/// A device or worker cannot go on. Fails the lane (or the start of the device), never the process.
#[derive(Debug)]
pub struct DeviceError(Box<dyn std::error::Error + Send + Sync>);

impl DeviceError {
    /// An error with this cause (any error, or a message).
    pub fn new(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        DeviceError(cause.into())
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for DeviceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

impl From<std::io::Error> for DeviceError {
    fn from(error: std::io::Error) -> Self {
        DeviceError::new(error)
    }
}

/// One queue of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSpec {
    /// The standard's name of it, e.g. `requestq`.
    pub name: &'static str,
    /// Largest size in descriptors: 1 to 32768, a power of two (so that split rings can have it).
    pub max_size: u16,
    /// The lane that serves it: 0, 1, ... without gaps. Queues that must be served together share one.
    pub lane: u16,
}

/// Who writes to the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigWriter {
    /// The driver: read-only fields stay as they are.
    Driver,
    /// The front-end, restoring a migrated device: every field may change.
    Migration,
}

/// How a queue is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Finish what was taken: the driver gets every buffer back (GET_VRING_BASE, snapshot).
    Drain,
    /// Give up what was taken, nothing is marked used (device reset).
    Discard,
}

/// What was negotiated, as a worker sees it from DRIVER_OK to reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The negotiated features.
    pub features: Features,
}

/// The queues of a lane. One that is not started is not there.
pub struct Queues {
    pub(crate) slots: Vec<(u16, Option<Queue>)>,
    /// Given back by whoever served them elsewhere.
    pub(crate) returned: Vec<(u16, QueueState)>,
    /// Broken, as whoever serves them elsewhere says.
    pub(crate) broken: Vec<u16>,
}

impl Queues {
    pub(crate) fn new(numbers: impl Iterator<Item = u16>) -> Queues {
        let slots = numbers.map(|number| (number, None)).collect();
        Queues { slots, returned: Vec::new(), broken: Vec::new() }
    }

    /// A queue that was [delegated](Worker::queue_delegated) is not served any more: it got so far. The answer to
    /// [`Worker::queue_stop`]. `held` has to be empty.
    pub fn give_back(&mut self, queue: u16, state: QueueState) {
        self.returned.push((queue, state));
    }

    /// Whoever serves a [delegated](Worker::queue_delegated) queue says that its rules were broken: it stops (failure
    /// policy 1), and [`Worker::queue_stop`] follows.
    pub fn broken(&mut self, queue: u16) {
        self.broken.push(queue);
    }

    /// The queue of that number, if this lane serves it and it is started.
    #[inline]
    pub fn get(&mut self, queue: u16) -> Option<&mut Queue> {
        self.slots.iter_mut().find(|(index, _)| *index == queue)?.1.as_mut()
    }

    /// Every started queue with its number.
    pub fn iter(&mut self) -> impl Iterator<Item = (u16, &mut Queue)> {
        self.slots.iter_mut().filter_map(|(index, queue)| Some((*index, queue.as_mut()?)))
    }
}

/// What happens in a device that its host has to pass on.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum HostEvent {
    /// The configuration space changed: a configuration-change notification is due (2.5.2).
    ConfigChanged,
    /// The device gave up, `DEVICE_NEEDS_RESET` is set.
    NeedsReset {
        /// Why, for the log.
        reason: String,
        /// Whether a driver is there to be told (DRIVER_OK): then a configuration-change notification is due (2.1.2).
        live: bool,
    },
    /// The device exports this object to the other devices of its VM from now on.
    ObjectExported(ObjectId),
    /// It does so no more.
    ObjectWithdrawn(ObjectId),
    /// The driver broke a ring's rules; that queue is stopped. [`HostEvent::NeedsReset`] follows.
    QueueFault {
        /// The queue.
        queue: u16,
        /// The rule that was broken.
        error: crate::QueueError,
    },
    /// A queue waits for a translation of the IOMMU: bring it with the next [`Engine::memory`](crate::Engine::memory).
    Miss {
        /// The queue.
        queue: u16,
        /// What is missing.
        miss: crate::queue::Miss,
    },
}

/// The host's ear. Called from lane threads: must neither block nor call back into the engine.
pub trait HostEvents: Send + Sync {
    /// Something happened.
    fn event(&self, event: HostEvent);
}

/// What a worker may use during one callback.
pub struct Lane<'a> {
    /// The started queues of this lane.
    pub queues: &'a mut Queues,
    /// Files and timers of the worker, under tokens made by [`Token::new`].
    pub reactor: &'a mut Reactor,
    /// The way up.
    pub up: &'a Upcall,
}

/// The part of a device that exists once. Entered from the control side, one call at a time.
pub trait VirtioDevice: Send + 'static {
    /// The part that serves queues.
    type Worker: Worker;

    /// The device type. Constant.
    fn device_type(&self) -> DeviceType;

    /// The device's own feature bits; bits of rings and negotiation belong to the host. Constant.
    fn features(&self) -> Features;

    /// What it leaves to its host to offer and can work with, of [`Features::RING`] and [`Features::CARRIED`]: all of it,
    /// unless its queues are [delegated](Worker::DELEGATES) to somebody who can less. Constant.
    fn ring_features(&self) -> Features {
        Features::RING | Features::CARRIED
    }

    /// Whether the device can work with this negotiated set; asked when the driver writes FEATURES_OK. Bits that were
    /// not offered are refused before.
    fn check_features(&self, driver: Features) -> bool {
        let _ = driver;
        true
    }

    /// The queues under these features. Called with all offered features when the engine is made, which fixes queues
    /// and lanes.
    fn queues(&self, features: Features) -> Vec<QueueSpec>;

    /// The configuration space. Called once.
    fn config(&self) -> Arc<ConfigSpace> {
        Arc::new(ConfigSpace::empty())
    }

    /// The driver (or a migrating front-end) writes configuration bytes; the range lies within the space. A device
    /// decides which fields may change; by default none.
    fn write_config(&mut self, offset: u32, data: &[u8], by: ConfigWriter) {
        let _ = (offset, data, by);
    }

    /// Its shared memory regions (2.10), each id once. What is in them the workers [map](Upcall::map). Called once.
    fn shared_memory(&self) -> &[ShmRegion] {
        &[]
    }

    /// What whoever operates the device can read, set and run. Called once.
    fn controls(&self) -> Controls {
        Controls::default()
    }

    /// The host's requests that it knows, besides control requests. Constant: hosts offer front-ends what is in it, and
    /// bring nothing else.
    fn host_requests(&self) -> HostRequests {
        HostRequests::empty()
    }

    /// The host wants something beyond virtio. Must not block: what a worker has to do goes through its mailbox. May
    /// come at any time after [`VirtioDevice::workers`], whether or not a driver is there. Whoever has
    /// [`VirtioDevice::host_requests`] carries them out here, and passes control requests on.
    fn host_request(&mut self, request: HostRequest) -> Result<HostReply, HostError> {
        match request {
            HostRequest::Control(request) => self.control(request),
            _ => Err(HostError::Unsupported),
        }
    }

    /// A control request, which fits [`VirtioDevice::controls`]. As [`VirtioDevice::host_request`].
    fn control(&mut self, request: ControlRequest) -> Result<HostReply, HostError> {
        let _ = request;
        Err(HostError::Unsupported)
    }

    /// Makes the workers, one per lane. Called once, before any other thread knows the device. `mail` holds the
    /// address of each lane's mailbox.
    fn workers(
        &mut self,
        mail: &[Mail<<Self::Worker as Worker>::Msg>],
    ) -> Result<Vec<Self::Worker>, DeviceError>;

    /// What the device has to remember to go on elsewhere: not what the engine knows (features, status, configuration,
    /// queues), and nothing that a new device has anyway. Chains that workers keep are named by their ids
    /// ([`Queue::id`], asked in [`Worker::suspend`]). Every lane is at rest; the device may go on afterwards. Also called
    /// once when the device is new, to learn whether it can be saved: one that keeps nothing returns
    /// [`DeviceState::empty`].
    fn save(&self, workers: &[Self::Worker]) -> Result<DeviceState, StateError> {
        let _ = workers;
        Err(StateError::Unsupported)
    }

    /// Takes over what [`save`](Self::save) returned, from outside and not to be trusted. The device is new or reset and
    /// no queue runs; if it fails, [`reset`](Self::reset) follows. Then the configuration is written as by a migrating
    /// front-end and has to be the saved one, the workers are [activated](Worker::activated) if the driver was ready,
    /// and chains are [adopted](Queue::adopt) in the first [`Worker::queue_ready`]. Mappings of shared memory are no part of
    /// a state: workers ask for theirs again.
    fn restore(&mut self, workers: &mut [Self::Worker], state: &DeviceState) -> Result<(), StateError> {
        let _ = (workers, state);
        Err(StateError::Unsupported)
    }

    /// Back to the state after creation. Every queue is stopped and every worker is here, in the order of the lanes.
    /// Also the way back after a worker failed or panicked, so it must not rely on their state. May be called twice in
    /// a row.
    fn reset(&mut self, workers: &mut [Self::Worker]) {
        let _ = workers;
    }
}

/// The part of a device that serves the queues of one lane. Runs on one thread at a time and owns its files.
///
/// No method may block or sleep. An error (or a panic) fails the lane: its queues stop and the device needs a reset;
/// for anything that concerns one request, answer that request instead.
pub trait Worker: Send + 'static {
    /// What its mailbox carries.
    type Msg: Send + 'static;

    /// Whether its queues are served elsewhere: see [`crate::delegated`]. Then [`Worker::queue_ready`] is never called.
    const DELEGATES: bool = false;

    /// Once, on the lane's thread, before anything else.
    fn attached(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let _ = lane;
        Ok(())
    }

    /// The driver set DRIVER_OK. Followed by [`Worker::queue_ready`] for each queue that runs.
    fn activated(&mut self, session: &Session, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let _ = (session, lane);
        Ok(())
    }

    /// The queue may have buffers: it was started, enabled or kicked, its budget was refilled, or memory changed.
    /// Comes at least once after each of these; may come when there is nothing.
    fn queue_ready(&mut self, queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError>;

    /// With [`Worker::DELEGATES`]: the queue was started, or its device resumed. From here on, and once the device is
    /// [activated](Worker::activated), whoever the worker hands it to serves it, until [`Worker::queue_stop`].
    fn queue_delegated(
        &mut self,
        queue: u16,
        parts: QueueParts,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        let _ = (queue, parts, lane);
        Ok(())
    }

    /// With [`Worker::DELEGATES`]: something else is to be used from here on. The host waits until `waiting` is dropped.
    fn delegation_changed(
        &mut self,
        change: Change,
        waiting: Waiting,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        let _ = (change, waiting, lane);
        Ok(())
    }

    /// The queue is being stopped: it pops nothing from here on. It is stopped when no chain is out any more, so
    /// a worker that keeps chains gives them back now or when they are done. A delegated one is stopped when it is
    /// [given back](Queues::give_back).
    fn queue_stop(&mut self, queue: u16, how: Stop, lane: &mut Lane<'_>) {
        let _ = (queue, how, lane);
    }

    /// The device is being suspended: nothing is popped from here on. The lane comes to rest when no chain is out but
    /// those that are [kept](Worker::keeps); then nothing else is called until the device is resumed, and
    /// [`Worker::queue_ready`] follows for each queue that runs. Without anything of its own to do, a worker gives back
    /// what it has, as when its queues are drained.
    fn suspend(&mut self, lane: &mut Lane<'_>) {
        let queues: Vec<u16> = lane.queues.iter().map(|(queue, _)| queue).collect();
        for queue in queues {
            self.queue_stop(queue, Stop::Drain, lane);
        }
    }

    /// How many chains of the queue it keeps over a suspension: requests that wait for something and that nobody works
    /// on. Each of them has to be in what [`VirtioDevice::save`] returns.
    fn keeps(&self, queue: u16) -> usize {
        let _ = queue;
        0
    }

    /// A file that the worker watches is ready.
    fn source_ready(
        &mut self,
        token: Token,
        ready: Readiness,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        let _ = (token, ready, lane);
        Ok(())
    }

    /// A file that the worker has put into a [`Registry`](reactor::Registry) of its lane's reactor is ready.
    fn registered_ready(
        &mut self,
        number: u64,
        ready: Readiness,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        let _ = (number, ready, lane);
        Ok(())
    }

    /// A timer that the worker set is due.
    fn timer(&mut self, token: Token, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let _ = (token, lane);
        Ok(())
    }

    /// A message arrived in the mailbox.
    fn message(&mut self, message: Self::Msg, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let _ = (message, lane);
        Ok(())
    }

    /// The host's answer to what the worker [asked](Upcall::map), or that none came. Once for each question; also before
    /// the worker is handed in for a reset, when its queues are being [stopped](Worker::queue_stop) already.
    fn upcall_done(
        &mut self,
        id: UpcallId,
        result: UpcallResult,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        let _ = (id, result, lane);
        Ok(())
    }

    /// The end of a turn in which the worker was called: hand collected work to the kernel in one go.
    fn flush(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let _ = lane;
        Ok(())
    }

    /// Called again and again while the host polls instead of sleeping. True if there was something to do; the
    /// worker's files are looked at next.
    fn poll(&mut self, lane: &mut Lane<'_>) -> bool {
        let _ = lane;
        false
    }
}
