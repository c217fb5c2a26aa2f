//! The registers that all transports have, whatever their layout, as calls of the engine.
//!
//! * Features are written in words and given to the engine when the driver sets FEATURES_OK: a bit that was not offered is
//!   then what keeps FEATURES_OK clear (2.2.2).
//! * A queue's size and addresses may change between FEATURES_OK and its start, and while it is stopped.
//! * What has to wait for a lane is waited for outside of the lock: a queue that ends is [`Phase::Ending`] meanwhile.
//! * `epoch` counts resets: who waited while one came finds nothing of his own any more.
use crate::device::{HostEvent, HostEvents, Stop, VirtioDevice};
use crate::engine::{Notification, QueueResetError};
use crate::lane::{Call, EventFd, Interrupt, Kick, StartError, StopError};
use crate::{
    ConfigWriter, Engine, EngineError, EngineOptions, Features, GuestAddress, LaneRunner, QueueConfig,
    QueueStart, QueueState, SavedQueue, SnapshotError, Status, Ticket,
};
use device_state::{SavedState, Section, StateError, Tag};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::BorrowedFd;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The part of a saved transport that is its engine.
const ENGINE: Tag = Tag(*b"devi");
/// The part that all transports have.
const REGISTERS: Tag = Tag(*b"regs");
/// The part of one transport.
const OWN: Tag = Tag(*b"tran");

/// How long saving and restoring wait for lanes: longer than any of their own deadlines.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(20);

/// How long an access of a guest's CPU waits if the VMM does not say otherwise: a little longer than the engine needs to
/// give up a backend that hangs ([`STOP_DEADLINE`](crate::engine::STOP_DEADLINE)).
pub const PATIENCE: Duration = Duration::from_millis(5_500);

/// How a queue's lane hears of notifications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kicks {
    /// By eventfds, one a queue. The VMM can give them to the hypervisor (ioeventfd), see [`Notifier`]; accesses that come
    /// as exits all the same are written to them.
    Files,
    /// By a call into the engine.
    Calls,
}

/// What a VMM decides about a transport.
pub struct Options {
    /// The device's part. What the transport carries is added to [`EngineOptions::carried`].
    pub engine: EngineOptions,
    /// How notifications reach the lanes.
    pub kicks: Kicks,
    /// How long an access may wait for a lane: [`PATIENCE`] by default. Zero: not at all, for VMMs that step lanes on
    /// the thread of the guest's CPU; then drivers have to read back what they wait for, as the standard demands of
    /// them but Linux does not do after every reset.
    pub patience: Duration,
}

impl Options {
    /// The defaults, with this listener.
    pub fn new(events: Arc<dyn HostEvents>) -> Self {
        Options { engine: EngineOptions::new(events), kicks: Kicks::Files, patience: PATIENCE }
    }
}

/// Where a driver's notifications of a queue are written, for an ioeventfd.
#[derive(Debug)]
pub struct Notifier<'a> {
    /// The queue.
    pub queue: u16,
    /// The register's offset from the beginning of the transport's registers (for PCI: of the BAR).
    pub offset: u64,
    /// Width of the access in bytes; 0 is any.
    pub width: u8,
    /// The value that is written; none: any.
    pub value: Option<u32>,
    /// The eventfd.
    pub fd: BorrowedFd<'a>,
}

/// Accesses that had no effect because a driver must not make them.
#[derive(Debug, Default)]
pub struct Ignored(AtomicU64);

impl Ignored {
    /// How many so far.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn note(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A transport is not saved or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The device is not.
    #[error(transparent)]
    Device(#[from] SnapshotError),
    /// The state is none, or none for this transport.
    #[error(transparent)]
    State(#[from] StateError),
    /// A restored queue does not start.
    #[error("a queue of the state cannot start")]
    Queue(#[from] StartError),
    /// A queue is being stopped or reset: try again when it is over.
    #[error("a queue is being stopped")]
    Busy,
    /// A lane does not answer.
    #[error("a lane does not answer")]
    Silent,
}

/// What a transport does with events, whatever its interrupts are.
pub(super) trait Signals: Send + Sync {
    /// A configuration-change notification is due.
    fn config_changed(&self);
    /// A reset begins: nothing is pending, nothing is sent.
    fn mute(&self);
    /// A driver is there again.
    fn unmute(&self);
}

/// The ear that a transport puts before the VMM's.
struct Ear {
    signals: Arc<dyn Signals>,
    vmm: Arc<dyn HostEvents>,
}

impl HostEvents for Ear {
    fn event(&self, event: HostEvent) {
        if matches!(event, HostEvent::ConfigChanged | HostEvent::NeedsReset { live: true, .. }) {
            self.signals.config_changed();
        }
        self.vmm.event(event);
    }
}

/// The end of a queue that is under way. None: somebody waits for it just now.
enum Ending {
    Stop(Option<Ticket<Result<QueueState, StopError>>>),
    Reset(Option<Ticket<Result<(), QueueResetError>>>),
}

impl Ending {
    /// Whether it is over, waiting for as long as said.
    fn over(&mut self, patience: Duration) -> bool {
        // However it ended: the queue is stopped. What remained is in the status (NEEDS_RESET).
        match self {
            Ending::Stop(ticket) => ticket.as_mut().is_some_and(|ticket| ticket.wait_for(patience).is_some()),
            Ending::Reset(ticket) => {
                ticket.as_mut().is_some_and(|ticket| ticket.wait_for(patience).is_some())
            }
        }
    }

    fn is_reset(&self) -> bool {
        matches!(self, Ending::Reset(_))
    }

    /// Leaves a sign that somebody waits.
    fn take(&mut self) -> Ending {
        match self {
            Ending::Stop(ticket) => Ending::Stop(ticket.take()),
            Ending::Reset(ticket) => Ending::Reset(ticket.take()),
        }
    }
}

enum Phase {
    Off,
    On,
    Ending(Ending),
}

/// What the driver has set of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    /// Entries; more than a queue can have is refused when it starts.
    pub(super) size: u32,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

struct Slot {
    max: u16,
    registers: QueueRegisters,
    phase: Phase,
}

impl Slot {
    fn initial(max: u16) -> Slot {
        let registers = QueueRegisters { size: u32::from(max), desc: 0, driver: 0, device: 0 };
        Slot { max, registers, phase: Phase::Off }
    }

    /// Takes note of an end that has come.
    fn poll(&mut self) {
        if let Phase::Ending(ending) = &mut self.phase
            && ending.over(Duration::ZERO)
        {
            self.ended();
        }
    }

    fn ended(&mut self) {
        let reset = matches!(&self.phase, Phase::Ending(ending) if ending.is_reset());
        self.phase = Phase::Off;
        if reset {
            // 2.6.1: as if it had never been set up.
            *self = Slot::initial(self.max);
        }
    }
}

struct State {
    /// What the driver has written of its features.
    driver: Features,
    /// It chose a bit that no word of ours has.
    beyond: bool,
    queues: Vec<Slot>,
    epoch: u64,
}

/// Version 1 of the part that all transports have.
#[derive(Serialize, Deserialize)]
struct RegistersV1 {
    driver: u128,
    beyond: bool,
    /// Those of queues that run are the engine's.
    queues: Vec<QueueRegisters>,
}

pub(super) struct Registers<D: VirtioDevice> {
    engine: Engine<D>,
    kicks: Vec<Option<EventFd>>,
    calls: Vec<Call>,
    signals: Arc<dyn Signals>,
    patience: Duration,
    /// Whether notifications carry data, for paths without the lock.
    carries_data: AtomicBool,
    pub(super) ignored: Ignored,
    state: Mutex<State>,
}

/// The registers of a device and the runners of its lanes.
pub(super) type RegistersAndLanes<D> = (Registers<D>, Vec<LaneRunner<<D as VirtioDevice>::Worker>>);

impl<D: VirtioDevice> Registers<D> {
    /// `carried`: what this transport carries. `call` makes the interrupt of each queue.
    pub(super) fn new(
        device: D,
        options: Options,
        carried: Features,
        signals: Arc<dyn Signals>,
        call: impl Fn(u16) -> Arc<dyn Interrupt>,
    ) -> Result<RegistersAndLanes<D>, EngineError> {
        let mut engine = options.engine;
        engine.carried |= carried;
        engine.events = Arc::new(Ear { signals: signals.clone(), vmm: engine.events });
        let (engine, lanes) = Engine::new(device, engine)?;
        let count = engine.queues().len();
        let kick = |_| -> io::Result<Option<EventFd>> {
            match options.kicks {
                Kicks::Calls => Ok(None),
                Kicks::Files => {
                    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                    Ok(Some(EventFd::new(fd)?))
                }
            }
        };
        let registers = Registers {
            kicks: (0..count).map(kick).collect::<io::Result<_>>()?,
            calls: (0..).zip(engine.queues()).map(|(queue, _)| Some(call(queue))).collect(),
            signals,
            patience: options.patience,
            carries_data: AtomicBool::new(false),
            ignored: Ignored::default(),
            state: Mutex::new(State {
                driver: Features::empty(),
                beyond: false,
                queues: engine.queues().iter().map(|spec| Slot::initial(spec.max_size)).collect(),
                epoch: 0,
            }),
            engine,
        };
        Ok((registers, lanes))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that runs under this lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn engine(&self) -> &Engine<D> {
        &self.engine
    }

    /// The eventfd of each queue.
    pub(super) fn kick_files(&self) -> impl Iterator<Item = (u16, BorrowedFd<'_>)> {
        (0..).zip(&self.kicks).filter_map(|(queue, kick)| Some((queue, kick.as_ref()?.as_fd()?)))
    }

    /// 32 of the offered features (2.2). Words beyond what there is are empty.
    pub(super) fn device_features(&self, word: u32) -> u32 {
        features_word(self.engine.offered(), word)
    }

    /// 32 of the features that the driver chose.
    pub(super) fn driver_features(&self, word: u32) -> u32 {
        features_word(self.lock().driver, word)
    }

    /// The driver chooses 32 of its features, until FEATURES_OK. Whether it still can.
    pub(super) fn set_driver_features(&self, word: u32, bits: u32) -> bool {
        let mut state = self.lock();
        if self.engine.status().contains(Status::FEATURES_OK) || self.engine.is_resetting() {
            self.ignored.note();
            return false;
        }
        if word < 4 {
            let shift = word * 32;
            let kept = state.driver.bits() & !(u128::from(u32::MAX) << shift);
            state.driver = Features::from_bits_retain(kept | u128::from(bits) << shift);
        } else {
            state.beyond |= bits != 0;
        }
        true
    }

    /// The status field (2.1).
    pub(super) fn status(&self) -> Status {
        self.engine.status()
    }

    /// The driver writes the status field. Whether it reads now what was written is for the caller to find out.
    pub(super) fn set_status(&self, status: Status) {
        if status.is_empty() {
            return self.reset();
        }
        let mut status = status;
        let state = self.lock();
        if self.engine.is_resetting() {
            return self.ignored.note();
        }
        let negotiated = self.engine.status().contains(Status::FEATURES_OK);
        if status.contains(Status::FEATURES_OK) && !negotiated {
            if state.beyond || self.engine.set_driver_features(state.driver).is_err() {
                status -= Status::FEATURES_OK | Status::DRIVER_OK;
            }
            let data = state.driver.contains(Features::NOTIFICATION_DATA);
            self.carries_data.store(data, Ordering::SeqCst);
        }
        self.signals.unmute();
        let mut ticket = self.engine.set_status(status);
        drop(state);
        // Suspending takes as long as requests are under way; the driver asks for it (3.4.1).
        if !status.contains(Status::SUSPEND) {
            let _ = ticket.wait_for(self.patience);
        }
    }

    /// Resets the device, as writing 0 to the status (2.4): it reads 0 when that is done.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        self.signals.mute();
        let mut ticket = self.engine.reset();
        let State { driver, beyond, queues, epoch } = &mut *state;
        *driver = Features::empty();
        *beyond = false;
        queues.iter_mut().for_each(|slot| *slot = Slot::initial(slot.max));
        *epoch += 1;
        self.carries_data.store(false, Ordering::SeqCst);
        drop(state);
        let _ = ticket.wait_for(self.patience);
    }

    /// Whether the driver may set queues up: after FEATURES_OK (3.1.1), not while it has suspended the device (3.4.2).
    fn sets_up(&self) -> bool {
        let status = self.engine.status();
        status.contains(Status::FEATURES_OK)
            && !status.contains(Status::SUSPEND)
            && !self.engine.is_resetting()
    }

    /// The largest size of a queue; 0 if there is none of that number.
    pub(super) fn queue_max(&self, queue: u32) -> u16 {
        let spec = usize::try_from(queue).ok().and_then(|at| self.engine.queues().get(at));
        spec.map_or(0, |spec| spec.max_size)
    }

    /// What is set of a queue.
    pub(super) fn queue(&self, queue: u32) -> Option<QueueRegisters> {
        let mut state = self.lock();
        Some(self.slot(&mut state, queue)?.registers)
    }

    /// The driver changes what is set of a queue.
    pub(super) fn set_queue(&self, queue: u32, change: impl FnOnce(&mut QueueRegisters)) {
        let mut state = self.lock();
        match self.slot(&mut state, queue) {
            Some(slot) if matches!(slot.phase, Phase::Off) && self.sets_up() => change(&mut slot.registers),
            _ => self.ignored.note(),
        }
    }

    fn slot<'a>(&self, state: &'a mut State, queue: u32) -> Option<&'a mut Slot> {
        let slot = state.queues.get_mut(usize::try_from(queue).ok()?)?;
        slot.poll();
        Some(slot)
    }

    /// Whether the queue is enabled: also while it is being stopped.
    pub(super) fn is_ready(&self, queue: u32) -> bool {
        let mut state = self.lock();
        self.slot(&mut state, queue).is_some_and(|slot| !matches!(slot.phase, Phase::Off))
    }

    /// Whether the queue is being reset.
    pub(super) fn is_queue_resetting(&self, queue: u32) -> bool {
        let mut state = self.lock();
        let slot = self.slot(&mut state, queue);
        slot.is_some_and(|slot| matches!(&slot.phase, Phase::Ending(ending) if ending.is_reset()))
    }

    /// The driver enables a queue: where and as large as was set. Returns whether it is enabled now.
    pub(super) fn enable(&self, queue: u32) -> bool {
        let mut state = self.lock();
        let epoch = state.epoch;
        let Some(slot) = self.slot(&mut state, queue) else {
            self.ignored.note();
            return false;
        };
        if !matches!(slot.phase, Phase::Off) || !self.sets_up() {
            self.ignored.note();
            return matches!(slot.phase, Phase::On);
        }
        let QueueRegisters { size, desc, driver, device } = slot.registers;
        let Ok(size) = u16::try_from(size) else {
            self.ignored.note();
            return false;
        };
        let config = QueueConfig {
            size,
            desc: GuestAddress(desc),
            driver: GuestAddress(driver),
            device: GuestAddress(device),
        };
        // Fits: there is a slot.
        let number = queue as u16;
        let Ok(mut started) = self.start(number, config, None) else { return false };
        drop(self.engine.enable(number, true));
        slot.phase = Phase::On;
        drop(state);
        match started.wait_for(self.patience) {
            None | Some(Ok(())) => true,
            Some(Err(_)) => {
                let mut state = self.lock();
                if state.epoch == epoch
                    && let Some(slot) = self.slot(&mut state, queue)
                    && matches!(slot.phase, Phase::On)
                {
                    slot.phase = Phase::Off;
                }
                false
            }
        }
    }

    fn start(
        &self,
        queue: u16,
        config: QueueConfig,
        state: Option<QueueState>,
    ) -> io::Result<Ticket<Result<(), StartError>>> {
        let kick = match self.kicks.get(usize::from(queue)).and_then(|kick| kick.as_ref()?.as_fd()) {
            Some(fd) => Kick::Fd(fd.try_clone_to_owned()?),
            None => Kick::Manual,
        };
        let call = self.calls.get(usize::from(queue)).cloned().flatten();
        Ok(self.engine.start(queue, QueueStart { config, state, inflight: None, kick, call }))
    }

    /// The driver stops using a queue: what it holds is given up, and the queue is enabled until nothing touches it any
    /// more. Waits for that. (MMIO: 4.2.2.2.)
    pub(super) fn disable(&self, queue: u32) {
        let mut state = self.lock();
        let epoch = state.epoch;
        match self.slot(&mut state, queue) {
            Some(slot) if matches!(slot.phase, Phase::On) && !self.engine.is_resetting() => {
                let ticket = self.engine.stop(queue as u16, Stop::Discard, None);
                slot.phase = Phase::Ending(Ending::Stop(Some(ticket)));
            }
            Some(slot) if matches!(slot.phase, Phase::Ending(Ending::Stop(_))) => {}
            Some(slot) if matches!(slot.phase, Phase::Off) => return,
            _ => return self.ignored.note(),
        }
        drop(state);
        self.await_end(queue, epoch);
    }

    /// The driver resets a queue by itself (2.6.1). The driver reads whether that is done.
    pub(super) fn reset_queue(&self, queue: u32) {
        let mut state = self.lock();
        let epoch = state.epoch;
        let negotiated = self.engine.driver_features().contains(Features::RING_RESET);
        match self.slot(&mut state, queue) {
            Some(slot) if negotiated && self.sets_up() && !matches!(slot.phase, Phase::Ending(_)) => {
                let ticket = self.engine.reset_queue(queue as u16);
                slot.phase = Phase::Ending(Ending::Reset(Some(ticket)));
            }
            _ => return self.ignored.note(),
        }
        drop(state);
        self.await_end(queue, epoch);
    }

    /// Waits for the end of a queue, outside of the lock.
    fn await_end(&self, queue: u32, epoch: u64) {
        let mut state = self.lock();
        let Some(Slot { phase: Phase::Ending(ending), .. }) = self.slot(&mut state, queue) else { return };
        let mut ending = ending.take();
        drop(state);
        let over = ending.over(self.patience);
        let mut state = self.lock();
        if state.epoch != epoch {
            return;
        }
        let Some(slot) = state.queues.get_mut(queue as usize) else { return };
        if let Phase::Ending(now) = &mut slot.phase {
            let waits = match &*now {
                Ending::Stop(ticket) => ticket.is_none(),
                Ending::Reset(ticket) => ticket.is_none(),
            };
            if over {
                slot.ended();
            } else if waits {
                *now = ending;
            }
        }
    }

    /// The driver wrote this to notify a queue (2.9). Whether there is such a queue.
    pub(super) fn notify(&self, value: u32) -> bool {
        let data = self.carries_data.load(Ordering::Relaxed);
        let features = if data { Features::NOTIFICATION_DATA } else { Features::empty() };
        let known = |notification: &Notification| usize::from(notification.queue) < self.kicks.len();
        let notification = Notification::decode(value, features).filter(known);
        match notification {
            Some(Notification { queue, .. }) => self.kick(queue),
            None => self.ignored.note(),
        }
        notification.is_some()
    }

    /// The driver notified this queue.
    pub(super) fn kick(&self, queue: u16) {
        match self.kicks.get(usize::from(queue)) {
            Some(Some(file)) => file.signal(),
            Some(None) => self.engine.kick(queue),
            None => self.ignored.note(),
        }
    }

    /// Reads configuration bytes (2.5); behind the end there are zeros.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        match u32::try_from(offset) {
            Ok(offset) => {
                self.engine.config().read(offset, data);
            }
            Err(_) => data.fill(0),
        }
    }

    /// Writes configuration bytes; all of them are within the space, or nothing happens.
    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        let written = u32::try_from(offset)
            .is_ok_and(|offset| self.engine.write_config(offset, data, ConfigWriter::Driver).is_ok());
        if !written {
            self.ignored.note();
        }
    }

    /// Saves device and registers, and what the transport has beside them. The device has to be at rest:
    /// [`Engine::suspend`].
    pub(super) fn save<T: Serialize>(&self, version: u16, own: &T) -> Result<Vec<u8>, TransportError> {
        let engine = self.engine.save().wait_for(SNAPSHOT_PATIENCE).ok_or(TransportError::Silent)??;
        let mut state = self.lock();
        state.queues.iter_mut().for_each(Slot::poll);
        if self.engine.is_resetting()
            || state.queues.iter().any(|slot| matches!(slot.phase, Phase::Ending(_)))
        {
            return Err(TransportError::Busy);
        }
        let registers = RegistersV1 {
            driver: state.driver.bits(),
            beyond: state.beyond,
            queues: state.queues.iter().map(|slot| slot.registers).collect(),
        };
        drop(state);
        let mut saved = SavedState::new(self.engine.device_type().0);
        saved.put(ENGINE, Section::from_bytes(1, engine));
        saved.put(REGISTERS, Section::encode(1, &registers)?);
        saved.put(OWN, Section::encode(version, own)?);
        Ok(saved.to_bytes()?)
    }

    /// Takes over what [`Registers::save`] returned, from outside and not to be trusted; memory is there. `install` takes the
    /// transport's own part, before anything runs that could interrupt. An error leaves a reset device.
    pub(super) fn restore<T: DeserializeOwned>(
        &self,
        bytes: &[u8],
        version: u16,
        install: impl FnOnce(T) -> Result<(), TransportError>,
    ) -> Result<(), TransportError> {
        let mut saved = SavedState::parse(bytes)?;
        if saved.device() != self.engine.device_type().0 {
            return Err(SnapshotError::DeviceType(crate::DeviceType(saved.device())).into());
        }
        let engine = saved.take(ENGINE)?;
        let registers: RegistersV1 = saved.take(REGISTERS)?.decode(1)?;
        let own: T = saved.take(OWN)?.decode(version)?;
        saved.finish()?;
        if registers.queues.len() != self.engine.queues().len() {
            return Err(StateError::refused("it has another number of queues").into());
        }
        if self.engine.is_resetting() || !self.engine.status().is_empty() {
            return Err(SnapshotError::NotReset.into());
        }
        let outcome = install(own).and_then(|()| {
            let queues = self.engine.restore(engine.bytes()).wait_for(SNAPSHOT_PATIENCE);
            self.take_over(registers, queues.ok_or(TransportError::Silent)??)
        });
        if outcome.is_err() {
            self.reset();
        }
        outcome
    }

    fn take_over(&self, registers: RegistersV1, queues: Vec<SavedQueue>) -> Result<(), TransportError> {
        let mut state = self.lock();
        let features = self.engine.driver_features();
        let fixed = self.engine.status().contains(Status::FEATURES_OK);
        state.driver = if fixed { features } else { Features::from_bits_retain(registers.driver) };
        state.beyond = registers.beyond && !fixed;
        self.carries_data.store(features.contains(Features::NOTIFICATION_DATA), Ordering::SeqCst);
        for (slot, registers) in state.queues.iter_mut().zip(registers.queues) {
            *slot = Slot { registers, ..Slot::initial(slot.max) };
        }
        for SavedQueue { index, enabled, config, state: at } in queues {
            // A driver has no other way to disable one than to stop it.
            let slot = state.queues.get_mut(usize::from(index)).filter(|_| enabled);
            let slot = slot.ok_or(SnapshotError::Queue(index))?;
            let QueueConfig { size, desc, driver, device } = config;
            slot.registers =
                QueueRegisters { size: u32::from(size), desc: desc.0, driver: driver.0, device: device.0 };
            let mut started = self.start(index, config, Some(at)).map_err(StartError::Kick)?;
            started.wait_for(SNAPSHOT_PATIENCE).ok_or(TransportError::Silent)??;
            drop(self.engine.enable(index, true));
            slot.phase = Phase::On;
        }
        Ok(())
    }
}

fn features_word(features: Features, word: u32) -> u32 {
    match word {
        0..4 => (features.bits() >> (word * 32)) as u32,
        _ => 0,
    }
}
