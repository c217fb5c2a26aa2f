//! The memory snapshots of popped chains: a chain has the number of its snapshot, not a reference to it, so that a pop
//! touches no reference count. A snapshot that is not the current one is kept as long as a slot of its number is taken.
use std::mem;

use super::{Arena, OLD, Slot};
use crate::memory::GuestRam;

/// The memory snapshots that chains of this queue are from.
pub(super) struct Epochs {
    pub(super) current: GuestRam,
    pub(super) number: u32,
    /// Earlier ones: number, snapshot, slots of it that are still taken.
    pub(super) old: Vec<(u32, GuestRam, usize)>,
}

impl Arena {
    /// Whether the slot is of a former snapshot: then [`Self::leave_epoch`] is due when it is released.
    #[inline(always)]
    pub(in super::super) fn is_old(&self, slot: &Slot) -> bool {
        slot.class.get() & OLD != 0
    }

    /// One slot less of a former snapshot, which is free now; the last one lets it go.
    #[cold]
    pub(in super::super) fn leave_epoch(&mut self, slot: u32) {
        let Some(slot) = self.at(slot) else { return };
        let epoch = slot.epoch.replace(self.epochs.number);
        slot.class.set(slot.class());
        if let Some(at) = self.epochs.old.iter().position(|(number, ..)| *number == epoch)
            && let Some((.., taken)) = self.epochs.old.get_mut(at)
        {
            *taken = taken.saturating_sub(1);
            if *taken == 0 {
                self.epochs.old.swap_remove(at);
            }
        }
    }

    /// Moves to another snapshot; taken slots keep theirs.
    pub(in super::super) fn set_ram(&mut self, ram: GuestRam) {
        let number = self.epochs.number;
        let mut here = 0;
        for slot in self.taken().filter(|slot| slot.epoch.get() == number) {
            slot.class.set(slot.class() | OLD);
            here += 1;
        }
        let former = mem::replace(&mut self.epochs.current, ram);
        if here > 0 {
            self.epochs.old.push((self.epochs.number, former, here));
        }
        // Wraps after 2^32 changes of the map; a chain that is out that long could let its snapshot go early, so
        // numbers that are still in use are passed over.
        loop {
            self.epochs.number = self.epochs.number.wrapping_add(1);
            if !self.epochs.old.iter().any(|(number, ..)| *number == self.epochs.number) {
                break;
            }
        }
        for slot in self.free_slots() {
            slot.epoch.set(self.epochs.number);
        }
    }

    #[inline(always)]
    pub(in super::super) fn ram(&self) -> &GuestRam {
        &self.epochs.current
    }

    /// The snapshot that a taken slot is from.
    pub(in super::super) fn ram_of(&self, slot: &Slot) -> &GuestRam {
        let old = self.epochs.old.iter().find(|(number, ..)| *number == slot.epoch.get());
        old.map_or(&self.epochs.current, |(_, ram, _)| ram)
    }

    /// How many snapshots are kept for chains alone.
    pub(in super::super) fn old_snapshots(&self) -> usize {
        self.epochs.old.len()
    }
}
