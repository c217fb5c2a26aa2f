//! The registers that all transports have, whatever their layout, as calls of the engine.
//!
//! * Features are written in words and given to the engine when the driver sets FEATURES_OK: a bit that was not offered is
//!   then what keeps FEATURES_OK clear (2.2.2).
//! * A queue's size and addresses may change between FEATURES_OK and its start, and while it is stopped.
//! * What has to wait for a lane is waited for outside of the lock: a queue that ends is [`Phase::Ending`] meanwhile.
//! * `epoch` counts resets: who waited while one came finds nothing of his own any more.
//! * What the driver reads is read without the lock ([`slot`]).
mod saved;
mod slot;

use crate::device::{HostEvent, HostEvents, Stop, VirtioDevice};
use crate::engine::Notification;
use crate::lane::{Call, EventFd, Interrupt, Kick, StartError};
use crate::{
    ConfigWriter, Engine, EngineError, EngineOptions, Features, GuestAddress, LaneRunner, QueueConfig,
    QueueStart, QueueState, Status, Ticket,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::BorrowedFd;
use slot::{Ending, Phase, Shown, Slot};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use saved::TransportError;
pub(super) use slot::{QueueRegisters, Seen};

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

struct State {
    /// What the driver has written of its features.
    driver: Features,
    /// It chose a bit that no word of ours has.
    beyond: bool,
    queues: Vec<Slot>,
    epoch: u64,
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
    /// What the driver reads of each queue.
    shown: Vec<Arc<Shown>>,
    no_queue: Shown,
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
        let queues: Vec<Slot> = engine.queues().iter().map(|spec| Slot::new(spec.max_size)).collect();
        let registers = Registers {
            kicks: (0..count).map(kick).collect::<io::Result<_>>()?,
            calls: (0..).zip(engine.queues()).map(|(queue, _)| Some(call(queue))).collect(),
            signals,
            patience: options.patience,
            carries_data: AtomicBool::new(false),
            ignored: Ignored::default(),
            shown: queues.iter().map(Slot::shown).collect(),
            no_queue: Shown::default(),
            state: Mutex::new(State { driver: Features::empty(), beyond: false, queues, epoch: 0 }),
            engine,
        };
        Ok((registers, lanes))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that runs under this lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
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
    #[inline]
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
        queues.iter_mut().for_each(Slot::clear);
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

    /// A queue as the driver sees it, if that can be said without the lock.
    #[inline]
    pub(super) fn glance(&self, queue: u32) -> Option<Seen<'_>> {
        Some(self.shown(queue).now()).filter(|seen| !seen.is_ending())
    }

    /// A queue as the driver sees it.
    pub(super) fn queue(&self, queue: u32) -> Seen<'_> {
        self.glance(queue).unwrap_or_else(|| {
            // Takes note of an end that has come.
            let _ = self.slot(&mut self.lock(), queue);
            self.shown(queue).now()
        })
    }

    #[inline]
    fn shown(&self, queue: u32) -> &Shown {
        let at = usize::try_from(queue).unwrap_or(usize::MAX);
        self.shown.get(at).map_or(&self.no_queue, |shown| &**shown)
    }

    /// The driver changes what is set of a queue.
    pub(super) fn set_queue(&self, queue: u32, change: impl FnOnce(&mut QueueRegisters)) {
        let mut state = self.lock();
        match self.slot(&mut state, queue) {
            Some(slot) if slot.is_off() && self.sets_up() => {
                let mut registers = slot.registers();
                change(&mut registers);
                slot.set_registers(registers);
            }
            _ => self.ignored.note(),
        }
    }

    fn slot<'a>(&self, state: &'a mut State, queue: u32) -> Option<&'a mut Slot> {
        let slot = state.queues.get_mut(usize::try_from(queue).ok()?)?;
        slot.poll();
        Some(slot)
    }

    /// The driver enables a queue: where and as large as was set. Returns whether it is enabled now.
    pub(super) fn enable(&self, queue: u32) -> bool {
        let mut state = self.lock();
        let epoch = state.epoch;
        let Some(slot) = self.slot(&mut state, queue) else {
            self.ignored.note();
            return false;
        };
        if !slot.is_off() || !self.sets_up() {
            self.ignored.note();
            return slot.is_on();
        }
        let QueueRegisters { size, desc, driver, device } = slot.registers();
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
        slot.set_phase(Phase::On);
        drop(state);
        match started.wait_for(self.patience) {
            None | Some(Ok(())) => true,
            Some(Err(_)) => {
                let mut state = self.lock();
                if state.epoch == epoch
                    && let Some(slot) = self.slot(&mut state, queue)
                    && slot.is_on()
                {
                    slot.set_phase(Phase::Off);
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
            Some(slot) if slot.is_on() && !self.engine.is_resetting() => {
                let ticket = self.engine.stop(queue as u16, Stop::Discard, None);
                slot.set_phase(Phase::Ending(Ending::Stop(Some(ticket))));
            }
            Some(slot) if slot.is_stopping() => {}
            Some(slot) if slot.is_off() => return,
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
            Some(slot) if negotiated && self.sets_up() && (slot.is_off() || slot.is_on()) => {
                let ticket = self.engine.reset_queue(queue as u16);
                slot.set_phase(Phase::Ending(Ending::Reset(Some(ticket))));
            }
            _ => return self.ignored.note(),
        }
        drop(state);
        self.await_end(queue, epoch);
    }

    /// Waits for the end of a queue, outside of the lock.
    fn await_end(&self, queue: u32, epoch: u64) {
        let mut state = self.lock();
        let Some(mut ending) = self.slot(&mut state, queue).and_then(Slot::await_end) else { return };
        drop(state);
        let over = ending.over(self.patience);
        let mut state = self.lock();
        if state.epoch == epoch
            && let Some(slot) = state.queues.get_mut(queue as usize)
        {
            slot.awaited(ending, over);
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

    /// The interrupt of a queue goes another way: whoever has its file has to hear of it. Waits for that, as for everything
    /// that a driver can have done by lanes: it cannot ask faster than they follow (failure policy 8).
    pub(super) fn renew_call(&self, queue: u32) {
        let mut state = self.lock();
        let on = self.slot(&mut state, queue).is_some_and(|slot| slot.is_on());
        if let (true, Ok(number)) = (on, u16::try_from(queue)) {
            let call = self.calls.get(usize::from(number)).cloned().flatten();
            let mut ticket = self.engine.set_call(number, call);
            drop(state);
            let _ = ticket.wait_for(self.patience);
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
}

fn features_word(features: Features, word: u32) -> u32 {
    match word {
        0..4 => (features.bits() >> (word * 32)) as u32,
        _ => 0,
    }
}
