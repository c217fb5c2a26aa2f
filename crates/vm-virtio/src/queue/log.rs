//! What a queue marks in the log of dirty pages, while there is one (vhost-user, "Migration").
//!
//! * A chain, when it ends: all of its device-writable part, by the guest-physical addresses of its own snapshot,
//!   whoever wrote there and however much - the device may have written more than it says. Also a chain that is given up.
//! * Addresses are guest-physical, also of a queue behind an IOMMU.
//! * The rings, if the front-end wants that of this one: the Device Area (used ring, or device event suppression), as a
//!   whole whenever something in it changed, at the address that the front-end gave for it, and of a packed ring also
//!   the used descriptors, at the guest-physical address of the Descriptor Area.
//!
//! A queue without a log pays nothing: see `Way`.
use std::sync::Arc;

use super::arena::Slot;
use super::{Queue, Ring};
use crate::memory::{Access, DirtyLog, GuestAddress};

/// A queue's log.
pub(super) struct QueueLog {
    log: Arc<DirtyLog>,
    /// What the front-end said of its Device Area, if that is logged.
    said: Option<u64>,
    /// Where that is.
    device: Option<u64>,
    /// The Descriptor Area of a packed ring, if that is.
    desc: Option<(u64, u64)>,
    /// Something was marked since the last time that the lane asked.
    marked: bool,
}

impl QueueLog {
    /// Marks a range of the host: part of a chain.
    fn chain(&mut self, queue: &super::Arena, slot: &Slot) {
        let directory = queue.ram_of(slot).physical().directory();
        for segment in slot.segments().1 {
            // A segment is from one region.
            if let Some(addr) = directory.guest_address(segment.as_ptr()) {
                self.log.mark(addr, segment.len() as u64);
                self.marked = true;
            }
        }
    }
}

impl Queue {
    /// For the lane runtime: from here on, pages that are written are marked in this log. `device` is the
    /// address of the Device Area for that, if the rings are to be logged: guest-physical, or an IOVA behind an IOMMU.
    pub fn set_log(&mut self, log: Option<Arc<DirtyLog>>, device: Option<GuestAddress>) {
        self.log = log.map(|log| {
            Box::new(QueueLog {
                log,
                said: device.map(|addr| addr.0),
                device: None,
                desc: None,
                marked: false,
            })
        });
        self.renew_log();
        self.choose_way();
        // What was written there before may have been copied already.
        self.log_rings();
    }

    /// Guest-physical address and length of a packed ring's descriptors.
    fn packed_ring(&self) -> Option<(u64, u64)> {
        let Ring::Packed(_) = &self.ring else { return None };
        let len = 16 * u64::from(self.size);
        Some((self.physical(self.config.desc.0, len)?, len))
    }

    /// The guest-physical address of a part of the rings.
    fn physical(&self, addr: u64, len: u64) -> Option<u64> {
        let ram = self.arena.ram();
        let host = ram.directory().contiguous(addr, len, Access::Write)?;
        ram.physical().directory().guest_address(host)
    }

    /// The log or the memory has changed.
    pub(super) fn renew_log(&mut self) {
        let Some(said) = self.log.as_ref().and_then(|log| log.said) else { return };
        // 2.7, 2.8.10.1: the flags come first. Behind an IOMMU the ring is in one piece of the host.
        let behind = !self.arena.ram().same_as(self.arena.ram().physical());
        let device = if behind { self.physical(said, 4) } else { Some(said) };
        let desc = self.packed_ring();
        if let Some(log) = &mut self.log {
            (log.device, log.desc) = (device, desc);
        }
    }

    /// The device is done with the chain of this slot.
    pub(super) fn log_chain(&mut self, slot: u32) {
        if let (Some(log), Some(slot)) = (&mut self.log, self.arena.at(slot)) {
            log.chain(&self.arena, slot);
        }
    }

    /// Something in the rings changed.
    pub(super) fn log_rings(&mut self) {
        let Some(log) = &mut self.log else { return };
        let Some(device) = log.device else { return };
        // The lengths of 2.7 and 2.8.10.1.
        let len = if matches!(self.ring, Ring::Packed(_)) { 4 } else { 6 + 8 * u64::from(self.size) };
        log.log.mark(device, len);
        if let Some((desc, len)) = log.desc {
            log.log.mark(desc, len);
        }
        log.marked = true;
    }

    /// For the lane runtime, at the end of a turn: tells the front-end if something was marked.
    pub fn signal_log(&mut self) {
        if let Some(log) = &mut self.log
            && std::mem::take(&mut log.marked)
        {
            log.log.signal();
        }
    }

    /// Whether the log lost its file.
    pub(super) fn log_is_lost(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.log.is_poisoned())
    }
}
