//! Chains of a killed predecessor: popped again, in the order in which it popped them, before anything new.
use std::collections::VecDeque;

use super::super::chain::Chain;
use super::super::ring_mem::Desc;
use super::super::state::HeldChain;
use super::super::{Queue, Ring};

/// Where to find a chain that was in flight.
pub(in super::super) enum Pending {
    /// Its head is in the descriptor table, where the driver has left it.
    Split(u16),
    /// Its descriptors, as they were when it was popped: their places in the ring may hold others by now. And its entry
    /// in the region.
    Packed(u16, Vec<Desc>),
}

/// The chains that are still to be popped, and those that were, in case they are put back.
pub(in super::super) struct Again {
    pending: VecDeque<Pending>,
    /// With the number that each had among all that were popped.
    popped: Vec<(u64, Pending)>,
}

impl Again {
    pub(in super::super) fn new(pending: Vec<Pending>) -> Again {
        Again { pending: pending.into(), popped: Vec::new() }
    }

    /// Takes back the chain that was popped last, as this one; whether it is one of these.
    pub(in super::super) fn put_back(&mut self, number: u64) -> bool {
        match self.popped.pop_if(|(of, _)| *of == number) {
            Some((_, pending)) => {
                self.pending.push_front(pending);
                true
            }
            None => false,
        }
    }
}

impl Queue {
    /// Chains that are to be popped once more.
    pub(crate) fn resubmits(&self) -> bool {
        self.again.as_ref().is_some_and(|again| !again.pending.is_empty())
    }

    /// For the lane runtime, before it drains a queue: pops those, and nothing new, until the queue is closed.
    pub(crate) fn finish_again(&mut self) {
        let pending = self.again.as_ref().map_or(0, |again| again.pending.len());
        self.allowed = self.arena.popped() + pending as u64;
        self.limit = 0;
    }

    /// A pop beyond the limit: of a chain that was in flight before, if there is one and the true limit allows it.
    #[cold]
    #[inline(never)]
    pub(in super::super) fn pop_again(&mut self) -> Option<Chain> {
        if self.arena.popped() >= self.allowed {
            return None;
        }
        let pending = self.again.as_ref()?.pending.front()?;
        let chain = self.gather_again(pending);
        let Some(slot) = chain.as_ref().and_then(|chain| self.arena.slot(chain)) else {
            if let Some(error) = self.arena.violation() {
                self.stumble(error);
            }
            return None;
        };
        if let Pending::Packed(entry, _) = pending {
            slot.set_entry(*entry);
        }
        if let Some(in_order) = &mut self.in_order {
            in_order.push(self.arena.index_of(slot));
        }
        let number = self.arena.popped();
        if let Some(again) = &mut self.again
            && let Some(pending) = again.pending.pop_front()
        {
            again.popped.push((number, pending));
        }
        self.choose_limit();
        chain
    }

    fn gather_again(&self, pending: &Pending) -> Option<Chain> {
        match (&self.ring, pending) {
            (Ring::Split(ring), Pending::Split(head)) => ring.pop_head(&self.arena, *head),
            (Ring::Packed(ring), Pending::Packed(_, descs)) => ring.pop_list(&self.arena, descs),
            // The region was read for this very ring.
            _ => None,
        }
    }

    /// What is to be popped again, for a state that is taken before that was done. What breaks a rule is left out: it
    /// would fault the queue.
    pub(in super::super) fn held_again(&self) -> Vec<HeldChain> {
        let pending = self.again.as_ref().map(|again| &again.pending);
        let held = |pending| {
            let chain = self.gather_again(pending);
            let slot = chain.and_then(|chain| self.arena.end_latest(chain).ok());
            let Some(slot) = slot else {
                self.arena.violation();
                return None;
            };
            let held = self.held(slot);
            self.arena.release(slot);
            Some(held)
        };
        pending.into_iter().flatten().filter_map(held).collect()
    }
}
