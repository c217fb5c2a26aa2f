//! The handle of a popped chain.
use std::fmt;
use std::mem;
use std::ptr::NonNull;

use super::arena::Slot;

/// What identifies a chain across a restart: the head's index (split) or the buffer id (packed).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainId(pub u16);

/// A buffer that the driver made available and the device has not given back yet.
///
/// A handle of eight bytes into the queue's arena: it can be parked, and sent to another thread. Completing takes it,
/// so that it cannot happen twice:
///
/// ```compile_fail,E0382
/// fn twice(queue: &mut vm_virtio::Queue, chain: vm_virtio::Chain) {
///     queue.add_used(chain, 0);
///     queue.add_used(chain, 0);
/// }
/// ```
///
/// A chain that is dropped is given back with a length of 0 when the queue publishes next. The memory of its segments
/// stays mapped, and the segments stay where they are, until it is completed or dropped: even if the queue is gone.
#[must_use = "a chain that is dropped goes back to the driver with length 0"]
pub struct Chain(NonNull<Slot>);

// SAFETY: the slot stays allocated while the handle lives. From another thread the handle touches its atomic fields
// only, and fields that do not change while the chain is out (see the invariants of the arena).
unsafe impl Send for Chain {}
// SAFETY: nothing can be done through a shared handle but reading such fields.
unsafe impl Sync for Chain {}

impl Chain {
    /// Made by the arena, once for each time that the slot is taken.
    #[inline(always)]
    pub(super) fn new(slot: NonNull<Slot>) -> Chain {
        Chain(slot)
    }

    #[inline(always)]
    pub(super) fn slot(&self) -> NonNull<Slot> {
        self.0
    }

    /// Ends the handle without dropping the chain.
    #[inline(always)]
    pub(super) fn into_slot(self) -> NonNull<Slot> {
        let slot = self.0;
        mem::forget(self);
        slot
    }
}

impl Drop for Chain {
    #[cold]
    fn drop(&mut self) {
        Slot::abandon(self.0);
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chain({:p})", self.0)
    }
}
