//! Taking the state out of a queue, and putting the chains of one into it: a trust boundary.
use super::arena::Slot;
use super::chain::ChainId;
use super::error::QueueError;
use super::gather::Gather;
use super::ring_mem::Desc;
use super::state::{HeldChain, QueueState, RingPos};
use super::{Mark, Queue, Ring};
use crate::memory::{GuestAddress, GuestRam, Segment};

impl Queue {
    pub(super) fn positions(&self) -> (RingPos, RingPos) {
        match &self.ring {
            Ring::Split(ring) => ring.positions(),
            Ring::Packed(ring) => ring.positions(),
        }
    }

    /// The positions and the chains that are out. Publish first: completions that the driver has not been shown are
    /// in neither.
    pub fn state(&self) -> QueueState {
        let (avail, used) = self.positions();
        let mut slots: Vec<&Slot> =
            self.arena.taken().filter(|slot| slot.mark() != Mark::Discarded).collect();
        // Numbers wrap; no chain is 2^32 behind the latest.
        let latest = self.arena.latest();
        slots.sort_by_key(|slot| std::cmp::Reverse(latest.wrapping_sub(slot.seq())));
        let mut held: Vec<HeldChain> = slots.into_iter().map(|slot| self.held(slot)).collect();
        held.append(&mut self.held_again());
        QueueState { avail, used, held }
    }

    /// Ends the queue: publishes, and returns what a successor needs. Handles that are still out stay valid, with
    /// their memory; nobody sees their completion.
    pub fn into_state(mut self) -> QueueState {
        self.end_withholding();
        self.publish();
        self.state()
    }

    pub(super) fn held(&self, slot: &Slot) -> HeldChain {
        let ram = self.arena.ram_of(slot);
        let (readable, writable) = slot.segments();
        HeldChain {
            id: ChainId(slot.id()),
            descs: slot.descs(),
            readable: addresses(ram, readable),
            writable: addresses(ram, writable),
            completed: (slot.mark() == Mark::Done).then(|| slot.written()),
        }
    }

    /// Puts the chains of a state into slots. The ring has checked number and ids already.
    pub(super) fn restore_held(&mut self, held: Vec<HeldChain>) -> Result<(), QueueError> {
        for chain in held {
            let slot = self
                .arena
                .make()
                .ok()
                .flatten()
                .ok_or(QueueError::State("more chains are held than the queue has entries"))?;
            let mut gather = Gather::new(&self.arena, slot);
            for (addr, len) in &chain.readable {
                gather.add_any(Desc::new(addr.0, u64::from(*len)), false)?;
            }
            for (addr, len) in &chain.writable {
                gather.add_any(Desc::new(addr.0, u64::from(*len)), true)?;
            }
            gather.finish()?;
            let handle = self.arena.take(slot, chain.id.0, chain.descs);
            let room = slot.writable_len();
            let slot = self.arena.index_of(slot);
            if let Some(in_order) = &mut self.in_order {
                in_order.push(slot);
            }
            match chain.completed {
                None => self.unclaimed.push(handle),
                Some(_) if self.in_order.is_none() => {
                    return Err(QueueError::State("a held chain is completed, but order does not matter"));
                }
                Some(written) if written > room => {
                    return Err(QueueError::State(
                        "a held chain is completed with more than it has room for",
                    ));
                }
                Some(written) => {
                    if self.arena.end(handle).is_ok() {
                        self.complete_slowly(slot, written);
                    }
                }
            }
        }
        // The chain that was popped last may be long gone: none of these can be put back.
        self.arena.skip_seq();
        Ok(())
    }
}

/// Back from host pointers. A segment is never longer than the descriptor it is from.
fn addresses(ram: &GuestRam, segments: &[Segment]) -> Vec<(GuestAddress, u32)> {
    let address = |segment: &Segment| {
        let addr = ram.directory().guest_address(segment.as_ptr())?;
        Some((GuestAddress(addr), u32::try_from(segment.len()).ok()?))
    };
    segments.iter().filter_map(address).collect()
}
