//! Registration of devices while vCPUs run.
//!
//! Invariant: a slot that a table leads to is in `Work::slots`. It is taken from there only after a table without it
//! became the current one, and is given to the gate to be closed.
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::gate::Closed;
use super::table::{IoGate, Seat, Slot, Space, Work, show};
use super::{IoDevice, IoRange};
use crate::bus::{BusRange, Error};

/// How long [`Registration::remove`] waits for vCPUs that are inside of the device.
pub const REMOVAL_PATIENCE: Duration = Duration::from_secs(10);

/// Where devices are plugged in at run time. May be cloned and kept by devices: it does not keep the buses alive.
#[derive(Clone)]
pub struct IoSpace {
    gate: Weak<IoGate>,
}

impl IoSpace {
    pub(super) fn new(gate: &Arc<IoGate>) -> IoSpace {
        IoSpace { gate: Arc::downgrade(gate) }
    }

    /// Gives a device all these ranges, or none of them. There may be none yet.
    ///
    /// # Errors
    /// * [`Error::DeviceOverlap`]: one of them overlaps that of a device, or another of them.
    /// * [`Error::WrongBus`]: one is in a space that the device does not answer in.
    /// * [`Error::Closed`]: the owner of the buses is gone.
    pub fn register(&self, device: IoDevice, ranges: &[IoRange]) -> Result<Registration, Error> {
        self.register_slot(Slot::new(device, true), ranges)
    }

    /// As [`register`](Self::register), but accesses reach nothing until [`Registration::open`]: the ranges are taken.
    ///
    /// # Errors
    /// As of [`register`](Self::register).
    pub fn register_shut(&self, device: IoDevice, ranges: &[IoRange]) -> Result<Registration, Error> {
        self.register_slot(Slot::new(device, false), ranges)
    }

    fn register_slot(&self, slot: Slot, ranges: &[IoRange]) -> Result<Registration, Error> {
        let gate = self.gate.upgrade().ok_or(Error::Closed)?;
        let slot = Arc::new(slot);
        let mut keeper = gate.keeper();
        claim(&mut keeper.work, &slot, ranges)?;
        let work = &mut keeper.work;
        let key = work.free.pop().unwrap_or(work.slots.len());
        let weak = Arc::downgrade(&slot);
        match work.slots.get_mut(key) {
            Some(free) => *free = Some(slot),
            None => work.slots.push(Some(slot)),
        }
        if !ranges.is_empty() {
            show(&gate, &mut keeper);
        }
        drop(keeper);
        let ranges = Mutex::new(ranges.to_vec());
        Ok(Registration { gate: self.gate.clone(), slot: weak, key, ranges })
    }
}

impl fmt::Debug for IoSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoSpace").finish_non_exhaustive()
    }
}

/// All ranges or none.
fn claim(work: &mut Work, slot: &Arc<Slot>, ranges: &[IoRange]) -> Result<(), Error> {
    for (done, range) in ranges.iter().enumerate() {
        let claimed = match range {
            IoRange::Pio(range) => claim_one(work, slot, *range),
            IoRange::Mmio(range) => claim_one(work, slot, *range),
        };
        if let Err(error) = claimed {
            give_up(work, ranges.iter().take(done));
            return Err(error);
        }
    }
    Ok(())
}

fn claim_one<A: Space>(work: &mut Work, slot: &Arc<Slot>, range: BusRange<A>) -> Result<(), Error> {
    if A::device(&slot.device).is_none() {
        return Err(Error::WrongBus);
    }
    A::bus(work).register(range, Seat::of(slot))
}

fn give_up<'a>(work: &mut Work, ranges: impl IntoIterator<Item = &'a IoRange>) {
    for range in ranges {
        match range {
            IoRange::Pio(range) => drop(work.pio.deregister(range.base())),
            IoRange::Mmio(range) => drop(work.mmio.deregister(range.base())),
        }
    }
}

/// A device that is registered. Dropping it removes the device without waiting; [`remove`](Self::remove) waits.
///
/// A device may keep its own registration. When the owner of the buses is gone, all devices are.
#[must_use = "dropping it removes the device"]
pub struct Registration {
    gate: Weak<IoGate>,
    slot: Weak<Slot>,
    key: usize,
    /// Locked before the gate's keeper is.
    ranges: Mutex<Vec<IoRange>>,
}

impl Registration {
    /// The device's ranges, in the order in which they were given.
    pub fn ranges(&self) -> Vec<IoRange> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives the device these ranges in place of all that it had, at once: no vCPU sees some of them. This is how BARs are
    /// moved, and how they appear and disappear. Never waits for a vCPU, so it may be called from inside of any device's
    /// callback. An access that is inside of the device meanwhile ends with the address that it began with.
    ///
    /// # Errors
    /// As of [`IoSpace::register`]; then the device has the ranges that it had.
    pub fn set_ranges(&self, ranges: &[IoRange]) -> Result<(), Error> {
        let gate = self.gate.upgrade().ok_or(Error::Closed)?;
        let slot = self.slot.upgrade().ok_or(Error::Closed)?;
        let mut held = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if *held == ranges {
            return Ok(());
        }
        let mut keeper = gate.keeper();
        give_up(&mut keeper.work, held.iter());
        let claimed = claim(&mut keeper.work, &slot, ranges);
        if claimed.is_err() {
            // They were free a moment ago, and nobody else has the lock.
            let back = claim(&mut keeper.work, &slot, &held);
            debug_assert!(back.is_ok(), "{back:?}");
            return claimed;
        }
        ranges.clone_into(&mut held);
        show(&gate, &mut keeper);
        // The device may be dropped with the slot, if it was removed by its owner meanwhile: not under our locks.
        drop(keeper);
        drop(held);
        Ok(())
    }

    /// Lets accesses reach a device that was registered [shut](IoSpace::register_shut), or that failed.
    pub fn open(&self) {
        self.change(Slot::open);
    }

    /// The device panicked where the gate does not see it.
    pub(crate) fn fail(&self) {
        self.change(Slot::fail);
    }

    fn change(&self, change: impl FnOnce(&Slot)) {
        if let (Some(gate), Some(slot)) = (self.gate.upgrade(), self.slot.upgrade()) {
            let mut keeper = gate.keeper();
            change(&slot);
            keeper.work.changed(&slot);
            show(&gate, &mut keeper);
        }
    }

    /// Whether the device has panicked, and is not called any more.
    pub fn has_failed(&self) -> bool {
        self.slot.upgrade().is_some_and(|slot| slot.has_failed())
    }

    /// Removes the device: new accesses do not reach it, and when this returns [`Removal::Done`], no vCPU is inside of it
    /// and it is dropped, unless somebody else has an `Arc` of it. From inside of a device's callback, and if a vCPU does
    /// not come out of it within [`REMOVAL_PATIENCE`], that is [deferred](Removal::Deferred).
    pub fn remove(self) -> Removal {
        self.remove_within(REMOVAL_PATIENCE)
    }

    /// As [`remove`](Self::remove), with a patience of your own.
    pub fn remove_within(mut self, patience: Duration) -> Removal {
        self.take_out(patience)
    }

    fn take_out(&mut self, patience: Duration) -> Removal {
        let removed = Removed { slot: std::mem::take(&mut self.slot) };
        let Some(gate) = self.gate.upgrade() else { return Removal::Done };
        let ranges = std::mem::take(self.ranges.get_mut().unwrap_or_else(PoisonError::into_inner));
        let mut keeper = gate.keeper();
        give_up(&mut keeper.work, &ranges);
        let slot = keeper.work.slots.get_mut(self.key).and_then(Option::take);
        if slot.is_some() {
            keeper.work.free.push(self.key);
        }
        if !ranges.is_empty() {
            show(&gate, &mut keeper);
        }
        drop(keeper);
        // From now on this is a registration of nothing.
        self.gate = Weak::new();
        match slot.map(|slot| gate.close(slot, patience)) {
            Some(Closed::Later) => Removal::Deferred(removed),
            Some(Closed::Quiet) | None => Removal::Done,
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _ = self.take_out(Duration::ZERO);
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("ranges", &self.ranges()).finish_non_exhaustive()
    }
}

/// What became of a device that was removed.
#[derive(Debug)]
#[must_use = "a deferred removal is not over yet"]
pub enum Removal {
    /// No vCPU is inside of it.
    Done,
    /// A vCPU is, maybe the one that asked. Nobody can reach the device any more, and who leaves it last drops it.
    Deferred(Removed),
}

impl Removal {
    /// Whether no vCPU is inside of the device any more.
    pub fn is_over(&self) -> bool {
        match self {
            Removal::Done => true,
            Removal::Deferred(removed) => removed.is_over(),
        }
    }
}

/// A device whose removal was deferred.
#[derive(Clone, Debug)]
pub struct Removed {
    slot: Weak<Slot>,
}

impl Removed {
    /// Whether no vCPU is inside of it any more.
    pub fn is_over(&self) -> bool {
        self.slot.strong_count() == 0
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("failed", &self.has_failed()).finish_non_exhaustive()
    }
}
