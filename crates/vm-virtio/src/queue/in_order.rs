//! IN_ORDER (2.7.9, 2.8.8): buffers are used in the order in which they were made available. Completions that come
//! early are held back here; what is due goes out in as few used entries as possible.
//!
//! An entry may stand for several buffers, and then says nothing of the lengths of all but the last: the driver takes
//! them to be used completely. So a buffer that the device did not fill is always the last of its entry.
use std::collections::VecDeque;

/// Used entries that wait for more of their kind: `chains` chains, `descs` descriptors, the last with this id.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) id: u16,
    pub(super) written: u32,
    pub(super) chains: u16,
    pub(super) descs: u16,
}

/// The chains that are out or held back, by slot, in the order in which they were popped.
pub(super) struct InOrder {
    pub(super) order: VecDeque<u32>,
    run: Option<Run>,
}

impl InOrder {
    pub(super) fn new(size: u16) -> InOrder {
        InOrder { order: VecDeque::with_capacity(usize::from(size)), run: None }
    }

    /// A chain was popped, in this slot.
    #[inline(never)]
    pub(super) fn push(&mut self, slot: u32) {
        self.order.push_back(slot);
    }

    /// The next chain in order is used: returns the entry to write, if there is one now.
    pub(super) fn used(&mut self, id: u16, written: u32, descs: u16, filled: bool) -> Option<Run> {
        let (chains, before) = self.run.take().map_or((0, 0), |run| (run.chains, run.descs));
        // Neither passes the size of the queue: that many are out at most.
        let run = Run { id, written, chains: chains.saturating_add(1), descs: before.saturating_add(descs) };
        if filled {
            self.run = Some(run);
            return None;
        }
        Some(run)
    }

    /// The entry that waits: to be written before publishing.
    pub(super) fn flush(&mut self) -> Option<Run> {
        self.run.take()
    }
}
