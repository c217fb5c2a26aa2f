//! Saving a device and restoring it: in the same process, in another one, on another machine.
//!
//! A saved state has three parts: what the engine knows (features, status, configuration), the queues that run (where
//! they are, how far they got, which chains the device holds), and what the device itself says
//! ([`VirtioDevice::save`]). Guest memory and the files of kicks and interrupts are the host's.
//!
//! * **Save**: [`Engine::suspend`] first (or the driver has suspended it, or nothing runs), then [`Engine::save`]. The
//!   device may go on afterwards.
//! * **Restore**: on a device that is new or reset, [`Engine::memory`] and [`Engine::restore`], then [`Engine::start`]
//!   each of the returned queues with its own kick and interrupt. Its worker adopts held chains by their ids in the first
//!   [`queue_ready`](crate::Worker::queue_ready); those that it does not are given back to the driver with length 0.
//!
//! What is restored is not trusted: features have to be offered and acceptable, the status possible, the
//! configuration the device's own, queues in range; rings and positions are checked when they start. Whatever is
//! refused leaves a reset device.
use super::{Core, Engine, lock};
use crate::device::{ConfigWriter, VirtioDevice};
use crate::lane::{By, Command, Gathering, Meeting};
use crate::queue::{ChainId, HeldChain};
use crate::ticket::{Completer, Ticket, ticket};
use crate::{DeviceType, Features, GuestAddress, QueueConfig, QueueState, RingPos, Status};
use device_state::{SavedState, Section, StateError, Tag};
use serde::{Deserialize, Serialize};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

const ENGINE: Tag = Tag(*b"engn");
const QUEUES: Tag = Tag(*b"ques");
const DEVICE: Tag = Tag(*b"devc");

/// Most bytes of the queues' section: decoded they are some twenty times as many.
const MAX_QUEUES: usize = 2 << 20;

/// Version 1 of the engine's part.
#[derive(Serialize, Deserialize)]
struct EngineV1 {
    features: u128,
    status: u8,
    config: Vec<u8>,
    generation: u32,
}

/// Version 1 of a queue.
#[derive(Serialize, Deserialize)]
struct QueueV1 {
    index: u16,
    enabled: bool,
    size: u16,
    desc: u64,
    driver: u64,
    device: u64,
    /// Index and wrap counter.
    avail: (u16, bool),
    used: (u16, bool),
    held: Vec<HeldV1>,
}

/// Version 1 of a chain.
#[derive(Serialize, Deserialize)]
struct HeldV1 {
    id: u16,
    descs: u16,
    readable: Vec<(u64, u32)>,
    writable: Vec<(u64, u32)>,
    completed: Option<u32>,
}

/// A queue that ran when its device was saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedQueue {
    /// Its number.
    pub index: u16,
    /// Whether it was enabled.
    pub enabled: bool,
    /// Where it is.
    pub config: QueueConfig,
    /// How far it got.
    pub state: QueueState,
}

/// A device is not saved or restored.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The state is none, or none for this device.
    #[error(transparent)]
    State(#[from] StateError),
    /// Queues are being served: suspend the device first.
    #[error("the device is running, or being reset")]
    Running,
    /// A lane has failed: its worker's state means nothing.
    #[error("the device has failed and needs a reset")]
    Failed,
    /// It panicked. It is reset, or needs to be.
    #[error("the device panicked")]
    Panicked,
    /// To be restored it has to be new or reset, without queues.
    #[error("the device has to be reset before it is restored")]
    NotReset,
    /// It is the state of another type of device.
    #[error("this is the state of a {0} device")]
    DeviceType(DeviceType),
    /// Features that are not offered here, or that the device does not accept together.
    #[error("the state has features {0:#x}, which this device does not accept")]
    Features(u128),
    /// A status that no device can have.
    #[error("the state has an impossible status {0:#x}")]
    Status(u8),
    /// A device with another configuration space.
    #[error("the configuration space differs from byte {0} on")]
    Config(usize),
    /// A queue that this device does not have, or not of that size, or twice.
    #[error("the state has a queue {0} that this device cannot have")]
    Queue(u16),
    /// The lanes are gone.
    #[error("the device is shutting down")]
    Gone,
}

impl SavedQueue {
    fn to_v1(&self) -> QueueV1 {
        let position = |at: RingPos| (at.index, at.wrap);
        let pieces = |list: &[(GuestAddress, u32)]| list.iter().map(|(addr, len)| (addr.0, *len)).collect();
        let held = |chain: &HeldChain| HeldV1 {
            id: chain.id.0,
            descs: chain.descs,
            readable: pieces(&chain.readable),
            writable: pieces(&chain.writable),
            completed: chain.completed,
        };
        QueueV1 {
            index: self.index,
            enabled: self.enabled,
            size: self.config.size,
            desc: self.config.desc.0,
            driver: self.config.driver.0,
            device: self.config.device.0,
            avail: position(self.state.avail),
            used: position(self.state.used),
            held: self.state.held.iter().map(held).collect(),
        }
    }

    fn from_v1(queue: QueueV1) -> SavedQueue {
        let position = |(index, wrap): (u16, bool)| RingPos { index, wrap };
        let pieces =
            |list: Vec<(u64, u32)>| list.into_iter().map(|(addr, len)| (GuestAddress(addr), len)).collect();
        let held = |chain: HeldV1| HeldChain {
            id: ChainId(chain.id),
            descs: chain.descs,
            readable: pieces(chain.readable),
            writable: pieces(chain.writable),
            completed: chain.completed,
        };
        SavedQueue {
            index: queue.index,
            enabled: queue.enabled,
            config: QueueConfig {
                size: queue.size,
                desc: GuestAddress(queue.desc),
                driver: GuestAddress(queue.driver),
                device: GuestAddress(queue.device),
            },
            state: QueueState {
                avail: position(queue.avail),
                used: position(queue.used),
                held: queue.held.into_iter().map(held).collect(),
            },
        }
    }
}

/// The outcome of a save: the state's bytes.
type Saved = Result<Vec<u8>, SnapshotError>;

/// The outcome of a restore: the queues that ran.
type Restored = Result<Vec<SavedQueue>, SnapshotError>;

/// What the lanes put together for a save.
#[derive(Default)]
pub(crate) struct Collected {
    pub(crate) queues: Vec<SavedQueue>,
    /// Why a lane cannot be saved.
    pub(crate) obstacle: Option<SnapshotError>,
}

/// A state that has passed every check that needs no device.
struct Accepted {
    engine: EngineV1,
    queues: Vec<SavedQueue>,
    device: Section,
}

impl<D: VirtioDevice> Engine<D> {
    /// Whether the device can be saved at all: it says so when it is made.
    pub fn can_save(&self) -> bool {
        self.0.can_save
    }

    /// Saves the device, whose lanes have to be at rest: see the module. It stays as it is.
    pub fn save(&self) -> Ticket<Result<Vec<u8>, SnapshotError>> {
        let (done, ticket) = ticket(Err(SnapshotError::Running));
        let core = self.0.clone();
        let collected: Arc<Mutex<Collected>> = Arc::default();
        let lanes = collected.clone();
        let result: Arc<Mutex<Option<Saved>>> = Arc::default();
        let outcome = result.clone();
        let agenda = move |workers: &mut [D::Worker], _| {
            let collected = std::mem::take(&mut *lanes.lock().unwrap_or_else(PoisonError::into_inner));
            let saved = core.collect(workers, collected);
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        };
        // Not before the workers are on their way home: who saves again at once has to find them there.
        let afterwards = move || {
            let result = result.lock().unwrap_or_else(PoisonError::into_inner).take();
            done.complete(result.unwrap_or(Err(SnapshotError::Panicked)));
        };
        let meeting =
            Arc::new(Meeting::new(self.0.lanes.clone(), Box::new(agenda), Box::new(afterwards), false));
        for lane in &self.0.lanes {
            lane.send(Command::Save { meeting: meeting.clone(), collected: collected.clone() });
        }
        ticket
    }

    /// Restores the device: see the module. Returns the queues that ran.
    pub fn restore(&self, bytes: &[u8]) -> Ticket<Result<Vec<SavedQueue>, SnapshotError>> {
        let accepted = match self.accept(bytes) {
            Ok(accepted) => accepted,
            Err(error) => return Ticket::ready(Err(error)),
        };
        let (done, ticket) = ticket(Err(SnapshotError::Running));
        let result: Arc<Mutex<Option<Restored>>> = Arc::default();
        let (core, outcome) = (self.0.clone(), result.clone());
        let agenda = move |workers: &mut [D::Worker], refused: bool| {
            let restored =
                if refused { Err(SnapshotError::NotReset) } else { core.take_over(workers, accepted) };
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(restored);
        };
        let core = self.0.clone();
        let afterwards = move || {
            let result = result.lock().unwrap_or_else(PoisonError::into_inner).take();
            let result = result.unwrap_or(Err(SnapshotError::Panicked));
            if result.is_ok() {
                core.activate_restored();
            }
            done.complete(result);
        };
        let meeting =
            Arc::new(Meeting::new(self.0.lanes.clone(), Box::new(agenda), Box::new(afterwards), false));
        for lane in &self.0.lanes {
            lane.send(Command::Restore { meeting: meeting.clone() });
        }
        ticket
    }

    /// Everything that can be said without the lanes.
    fn accept(&self, bytes: &[u8]) -> Result<Accepted, SnapshotError> {
        let mut state = SavedState::parse(bytes)?;
        if state.device() != self.0.device_type.0 {
            return Err(SnapshotError::DeviceType(DeviceType(state.device())));
        }
        let engine: EngineV1 = state.take(ENGINE)?.decode(1)?;
        let queues = state.take(QUEUES)?;
        let device = state.take(DEVICE)?;
        state.finish()?;
        let features = Features::from_bits_retain(engine.features);
        let status = Status::from_bits_retain(engine.status);
        self.check_status(features, status)?;
        if queues.bytes().len() > MAX_QUEUES {
            return Err(StateError::TooLarge(queues.bytes().len() as u64).into());
        }
        let queues: Vec<QueueV1> = queues.decode(1)?;
        let mut seen = vec![false; self.0.specs.len()];
        for queue in &queues {
            let at = usize::from(queue.index);
            let max = self.0.specs.get(at).map_or(0, |spec| spec.max_size);
            let new = seen.get_mut(at).is_some_and(|seen| !std::mem::replace(seen, true));
            if !new || queue.size == 0 || queue.size > max || queue.held.len() > usize::from(queue.size) {
                return Err(SnapshotError::Queue(queue.index));
            }
        }
        let queues: Vec<SavedQueue> = queues.into_iter().map(SavedQueue::from_v1).collect();
        if !queues.is_empty() && !status.contains(Status::FEATURES_OK) {
            return Err(SnapshotError::Status(engine.status));
        }
        let control = lock(&self.0.control);
        if control.resetting.is_some() || !self.0.shared.status().is_empty() {
            return Err(SnapshotError::NotReset);
        }
        Ok(Accepted { engine, queues, device })
    }

    fn check_status(&self, features: Features, status: Status) -> Result<(), SnapshotError> {
        let negotiated = status.contains(Status::FEATURES_OK);
        let excess = features - self.0.offered;
        if !excess.is_empty() {
            return Err(SnapshotError::Features(excess.bits()));
        }
        if negotiated && !self.accepts(features) {
            return Err(SnapshotError::Features(features.bits()));
        }
        let known = Status::ACKNOWLEDGE
            | Status::DRIVER
            | Status::DRIVER_OK
            | Status::FEATURES_OK
            | Status::SUSPEND
            | Status::DEVICE_NEEDS_RESET
            | Status::FAILED;
        let live = status.intersects(Status::DRIVER_OK | Status::SUSPEND);
        let both = status.contains(Status::DRIVER_OK | Status::SUSPEND);
        let suspended = status.contains(Status::SUSPEND) && !features.contains(Features::SUSPEND);
        if !known.contains(status) || (live && !negotiated) || both || suspended {
            return Err(SnapshotError::Status(status.bits()));
        }
        Ok(())
    }
}

impl<D: VirtioDevice> Core<D> {
    /// Calls the device with all workers; a panic is its failure.
    fn with_workers<R>(
        &self,
        what: &str,
        call: impl FnOnce(&mut D) -> Result<R, SnapshotError>,
    ) -> Result<R, SnapshotError> {
        let mut device = lock(&self.device);
        catch_unwind(AssertUnwindSafe(|| call(&mut device))).unwrap_or_else(|_| {
            self.shared.failures.worker_failures.fetch_add(1, Ordering::Relaxed);
            self.shared.needs_reset(format!("the device panicked in {what}"));
            Err(SnapshotError::Panicked)
        })
    }

    fn collect(&self, workers: &mut [D::Worker], collected: Collected) -> Result<Vec<u8>, SnapshotError> {
        if let Some(obstacle) = collected.obstacle {
            return Err(obstacle);
        }
        let device = self.with_workers("save", |device| Ok(device.save(workers)?))?;
        let (config, generation) = self.config.save();
        let control = lock(&self.control);
        let engine = EngineV1 {
            features: control.driver.bits(),
            status: self.shared.status().bits(),
            config,
            generation,
        };
        drop(control);
        let mut queues: Vec<QueueV1> = collected.queues.iter().map(SavedQueue::to_v1).collect();
        queues.sort_by_key(|queue| queue.index);
        let queues = Section::encode(1, &queues)?;
        if queues.bytes().len() > MAX_QUEUES {
            return Err(StateError::TooLarge(queues.bytes().len() as u64).into());
        }
        let mut state = SavedState::new(self.device_type.0);
        state.put(ENGINE, Section::encode(1, &engine)?);
        state.put(QUEUES, queues);
        state.put(DEVICE, device);
        Ok(state.to_bytes()?)
    }

    /// Puts an accepted state into the device. What is refused half-way leaves it reset.
    fn take_over(
        &self,
        workers: &mut [D::Worker],
        state: Accepted,
    ) -> Result<Vec<SavedQueue>, SnapshotError> {
        let Accepted { engine, queues, device: section } = state;
        let restored = self.with_workers("restore", |device| {
            device.restore(workers, &section)?;
            if engine.config.len() != self.config.len() {
                return Err(SnapshotError::Config(engine.config.len().min(self.config.len())));
            }
            device.write_config(0, &engine.config, ConfigWriter::Migration);
            let (now, _) = self.config.save();
            match now.iter().zip(&engine.config).position(|(now, then)| now != then) {
                Some(at) => Err(SnapshotError::Config(at)),
                None => Ok(()),
            }
        });
        if let Err(error) = restored {
            self.with_workers("reset", |device| {
                device.reset(workers);
                Ok(())
            })?;
            return Err(error);
        }
        let status = Status::from_bits_retain(engine.status);
        self.config.set_generation(engine.generation);
        if status.contains(Status::SUSPEND) {
            self.config.hold();
        }
        let mut control = lock(&self.control);
        control.driver = Features::from_bits_retain(engine.features);
        self.shared.add_status(status);
        Ok(queues)
    }

    /// The workers are home again: tell them that they are live, as DRIVER_OK did.
    fn activate_restored(&self) {
        let control = lock(&self.control);
        let status = self.shared.status();
        if control.resetting.is_some() || !status.intersects(Status::DRIVER_OK | Status::SUSPEND) {
            return;
        }
        let session = crate::Session { features: control.driver };
        let done: Arc<Completer<()>> = Arc::new(ticket(()).0);
        // Nobody waits: nothing is out of a queue that has not started.
        let rest = Gathering::new(|_| ());
        for lane in &self.lanes {
            if status.contains(Status::SUSPEND) {
                let (by, deadline) = (By::Driver, Instant::now());
                lane.send(Command::Suspend { by, deadline, done: rest.clone() });
            }
            lane.send(Command::Activate { session: session.clone(), done: done.clone() });
        }
    }
}
