//! A queue behind an IOMMU: what it does while a translation is missing, and what it holds of a range.
//!
//! * A buffer that is missing: nothing is popped ([`Queue::pop`] moves nothing), everything else goes on.
//! * A ring that is missing - its translation was taken away while the queue runs: nothing is popped, and completions are
//!   withheld, for the ring must not be touched. They are written when the ring is back, or the queue ends.
//!
//! Either ends with a snapshot of memory that has the translation. It may miss again.
use super::arena::{Mark, Slot};
use super::error::{Miss, QueueError};
use super::{Queue, Ring};
use crate::memory::GuestRam;

/// What is missing.
#[derive(Default)]
pub(super) struct Missing {
    pub(super) miss: Option<Miss>,
    /// It is the ring.
    pub(super) ring: bool,
    /// Slots of completions that were withheld, in their order. Not for IN_ORDER, which has an order of its own.
    withheld: Vec<u32>,
    /// Chains up to this one (a count of popped ones) were waited for long enough.
    forgiven: u64,
}

impl Queue {
    /// The translation that the queue waits for.
    pub fn miss(&self) -> Option<Miss> {
        self.missing.miss
    }

    pub(super) fn misses(&mut self, miss: Miss) {
        self.missing.miss = Some(miss);
        self.allowed = 0;
        self.limit = 0;
    }

    /// The ring is not where it was, and nowhere else for now.
    pub(super) fn ring_misses(&mut self, miss: Miss) {
        // What was completed before has been published.
        self.missing.ring = true;
        self.misses(miss);
        self.choose_way();
    }

    /// The new memory is there.
    pub(super) fn end_miss(&mut self) {
        if self.missing.miss.take().is_some() {
            self.missing.ring = false;
            self.put_withheld();
            self.choose_way();
        }
    }

    /// A completion while the ring is missing; true: it is withheld.
    pub(super) fn withhold(&mut self, slot: u32, written: u32) -> bool {
        if !self.missing.ring || self.in_order.is_some() {
            return false;
        }
        if let Some(at) = self.arena.at(slot) {
            at.hold(Mark::Done, written);
            self.missing.withheld.push(slot);
        }
        true
    }

    fn put_withheld(&mut self) {
        for slot in std::mem::take(&mut self.missing.withheld) {
            let Some(at) = self.arena.at(slot) else { continue };
            let written = at.written();
            at.hold(Mark::Out, 0);
            self.complete_slowly(slot, written);
        }
        self.put_ordered();
    }

    /// The queue ends: what was withheld is written where the ring was. The driver has not taken it back before it hears
    /// of the end.
    pub(super) fn end_withholding(&mut self) {
        if self.missing.ring {
            self.missing.ring = false;
            self.put_withheld();
        }
    }

    /// For the lane runtime: whether a chain is out that has memory in this range of the addresses that its descriptors
    /// have, and that nobody has [forgiven](Self::forgive).
    pub fn holds(&self, first: u64, last: u64) -> bool {
        let (latest, fresh) = (self.arena.latest(), self.arena.popped() - self.missing.forgiven);
        let touches = |slot: &Slot| {
            let directory = self.arena.ram_of(slot).directory();
            let (readable, writable) = slot.segments();
            readable.iter().chain(writable).any(|segment| {
                let start = directory.guest_address(segment.as_ptr());
                start.is_some_and(|start| {
                    start <= last && start.saturating_add(segment.len() as u64 - 1) >= first
                })
            })
        };
        self.arena
            .taken()
            .filter(|slot| slot.mark() == Mark::Out && u64::from(latest.wrapping_sub(slot.seq())) < fresh)
            .any(touches)
    }

    /// For the lane runtime: does not wait for the chains that are out any more.
    pub fn forgive(&mut self) {
        self.missing.forgiven = self.arena.popped();
    }

    /// Whether the ring may be touched.
    pub(super) fn has_ring(&self) -> bool {
        !self.missing.ring
    }

    /// Moves the rings to another snapshot. One that is missing there is not a violation.
    pub(super) fn move_rings(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        let areas = match self.config.resolve(ram, self.is_packed()) {
            Ok(areas) => areas,
            Err(error @ QueueError::Miss(miss)) => {
                self.ring_misses(miss);
                return Err(error);
            }
            Err(error) => {
                self.latch(error);
                return Err(error);
            }
        };
        match &mut self.ring {
            Ring::Split(ring) => ring.set_areas(&areas),
            Ring::Packed(ring) => ring.set_areas(&areas),
        }
        Ok(())
    }
}
