//! One queue as its driver sets it up and sees it.
//!
//! All changes happen under the lock of the registers, through [`Slot`]. What the driver reads is in [`Shown`], which is read
//! without the lock: a register access waits for nobody. Only a queue that is ending is looked at under the lock, since an end
//! that has come is noticed by who asks.
use crate::engine::QueueResetError;
use crate::lane::StopError;
use crate::{QueueState, Ticket};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// The end of a queue that is under way. None: somebody waits for it just now.
pub(super) enum Ending {
    Stop(Option<Ticket<Result<QueueState, StopError>>>),
    Reset(Option<Ticket<Result<(), QueueResetError>>>),
}

impl Ending {
    /// Whether it is over, waiting for as long as said.
    pub(super) fn over(&mut self, patience: Duration) -> bool {
        // However it ended: the queue is stopped. What remained is in the status (NEEDS_RESET).
        match self {
            Ending::Stop(ticket) => ticket.as_mut().is_some_and(|ticket| ticket.wait_for(patience).is_some()),
            Ending::Reset(ticket) => {
                ticket.as_mut().is_some_and(|ticket| ticket.wait_for(patience).is_some())
            }
        }
    }

    /// Leaves a sign that somebody waits.
    fn take(&mut self) -> Ending {
        match self {
            Ending::Stop(ticket) => Ending::Stop(ticket.take()),
            Ending::Reset(ticket) => Ending::Reset(ticket.take()),
        }
    }

    /// Whether somebody waits.
    fn is_awaited(&self) -> bool {
        match self {
            Ending::Stop(ticket) => ticket.is_none(),
            Ending::Reset(ticket) => ticket.is_none(),
        }
    }
}

pub(super) enum Phase {
    Off,
    On,
    Ending(Ending),
}

/// What the driver has set of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::transport) struct QueueRegisters {
    /// Entries; more than a queue can have is refused when it starts.
    pub(in crate::transport) size: u32,
    pub(in crate::transport) desc: u64,
    pub(in crate::transport) driver: u64,
    pub(in crate::transport) device: u64,
}

impl QueueRegisters {
    fn initial(max: u16) -> QueueRegisters {
        QueueRegisters { size: u32::from(max), desc: 0, driver: 0, device: 0 }
    }
}

/// What the driver reads of a queue. All zeros: there is no such queue.
#[derive(Default)]
pub(super) struct Shown {
    phase: AtomicU8,
    size: AtomicU32,
    desc: AtomicU64,
    driver: AtomicU64,
    device: AtomicU64,
}

const OFF: u8 = 0;
const ON: u8 = 1;
const STOPPING: u8 = 2;
const RESETTING: u8 = 3;

impl Shown {
    /// The queue as it is. While it ends that may have changed, and only the slot knows.
    #[inline]
    pub(super) fn now(&self) -> Seen<'_> {
        // With the registers of that phase: they are stored before it.
        Seen { phase: self.phase.load(Ordering::Acquire), shown: self }
    }
}

/// A queue as its driver sees it.
#[derive(Clone, Copy)]
pub(in crate::transport) struct Seen<'a> {
    phase: u8,
    shown: &'a Shown,
}

impl Seen<'_> {
    #[inline]
    pub(super) fn is_ending(self) -> bool {
        self.phase > ON
    }

    /// Whether it is enabled: also while it is being stopped.
    #[inline]
    pub(in crate::transport) fn is_ready(self) -> bool {
        self.phase != OFF
    }

    /// Whether it is being reset.
    #[inline]
    pub(in crate::transport) fn is_resetting(self) -> bool {
        self.phase == RESETTING
    }

    #[inline]
    pub(in crate::transport) fn size(self) -> u32 {
        self.shown.size.load(Ordering::Relaxed)
    }

    #[inline]
    pub(in crate::transport) fn desc(self) -> u64 {
        self.shown.desc.load(Ordering::Relaxed)
    }

    #[inline]
    pub(in crate::transport) fn driver(self) -> u64 {
        self.shown.driver.load(Ordering::Relaxed)
    }

    #[inline]
    pub(in crate::transport) fn device(self) -> u64 {
        self.shown.device.load(Ordering::Relaxed)
    }
}

/// A queue, for who has the lock.
pub(super) struct Slot {
    max: u16,
    phase: Phase,
    shown: Arc<Shown>,
}

impl Slot {
    pub(super) fn new(max: u16) -> Slot {
        let mut slot = Slot { max, phase: Phase::Off, shown: Arc::default() };
        slot.clear();
        slot
    }

    /// What may be read without the lock.
    pub(super) fn shown(&self) -> Arc<Shown> {
        self.shown.clone()
    }

    pub(super) fn is_off(&self) -> bool {
        matches!(self.phase, Phase::Off)
    }

    pub(super) fn is_on(&self) -> bool {
        matches!(self.phase, Phase::On)
    }

    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Ending(Ending::Stop(_)))
    }

    pub(super) fn set_phase(&mut self, phase: Phase) {
        let shown = match phase {
            Phase::Off => OFF,
            Phase::On => ON,
            Phase::Ending(Ending::Stop(_)) => STOPPING,
            Phase::Ending(Ending::Reset(_)) => RESETTING,
        };
        self.phase = phase;
        self.shown.phase.store(shown, Ordering::Release);
    }

    pub(super) fn registers(&self) -> QueueRegisters {
        let seen = self.shown.now();
        QueueRegisters { size: seen.size(), desc: seen.desc(), driver: seen.driver(), device: seen.device() }
    }

    pub(super) fn set_registers(&mut self, registers: QueueRegisters) {
        let QueueRegisters { size, desc, driver, device } = registers;
        self.shown.size.store(size, Ordering::Relaxed);
        self.shown.desc.store(desc, Ordering::Relaxed);
        self.shown.driver.store(driver, Ordering::Relaxed);
        self.shown.device.store(device, Ordering::Relaxed);
    }

    /// As if the queue had never been set up.
    pub(super) fn clear(&mut self) {
        self.set_registers(QueueRegisters::initial(self.max));
        self.set_phase(Phase::Off);
    }

    /// Takes note of an end that has come.
    pub(super) fn poll(&mut self) {
        if let Phase::Ending(ending) = &mut self.phase
            && ending.over(Duration::ZERO)
        {
            self.ended();
        }
    }

    fn ended(&mut self) {
        match &self.phase {
            // 2.6.1.
            Phase::Ending(Ending::Reset(_)) => self.clear(),
            _ => self.set_phase(Phase::Off),
        }
    }

    /// The end that is under way, for who waits for it without the lock and then says how that [went](Self::awaited).
    pub(super) fn await_end(&mut self) -> Option<Ending> {
        match &mut self.phase {
            Phase::Ending(ending) => Some(ending.take()),
            _ => None,
        }
    }

    /// The end came, or did not come in time.
    pub(super) fn awaited(&mut self, ending: Ending, over: bool) {
        if let Phase::Ending(now) = &mut self.phase {
            if over {
                self.ended();
            } else if now.is_awaited() {
                *now = ending;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ready, resetting, and whether only the slot knows.
    fn seen(shown: &Shown) -> (bool, bool, bool) {
        let seen = shown.now();
        (seen.is_ready(), seen.is_resetting(), seen.is_ending())
    }

    #[test]
    fn what_is_read_without_the_lock_is_what_the_slot_says() {
        let mut slot = Slot::new(64);
        let shown = slot.shown();
        let initial = QueueRegisters { size: 64, ..QueueRegisters::default() };
        let set = QueueRegisters { size: 32, desc: 1 << 40, driver: 2 << 40, device: 3 << 40 };
        assert_eq!((seen(&shown), slot.registers()), ((false, false, false), initial));
        for (ending, resets) in [(Ending::Stop(None), false), (Ending::Reset(None), true)] {
            slot.set_registers(set);
            slot.set_phase(Phase::On);
            assert_eq!((seen(&shown), shown.now().size()), ((true, false, false), 32));
            slot.set_phase(Phase::Ending(ending));
            // Somebody waits for it: asking does not end it.
            slot.poll();
            assert_eq!(seen(&shown), (true, resets, true));
            let ending = slot.await_end().expect("it is under way");
            slot.awaited(ending, true);
            assert_eq!(seen(&shown), (false, false, false));
            // 2.6.1: only a reset queue is as if it had never been set up.
            let now = shown.now();
            let read = QueueRegisters {
                size: now.size(),
                desc: now.desc(),
                driver: now.driver(),
                device: now.device(),
            };
            assert_eq!(read, if resets { initial } else { set });
        }
    }

    #[test]
    fn a_queue_that_there_is_not_is_neither_ready_nor_of_any_size() {
        let shown = Shown::default();
        assert_eq!((seen(&shown), shown.now().size()), ((false, false, false), 0));
    }
}
