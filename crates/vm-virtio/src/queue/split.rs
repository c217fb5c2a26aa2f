//! The split virtqueue (2.7): positions, popping, used entries, notifications.
//!
//! Memory ordering. Popping: the available index is read with acquire, so that entries and descriptors the driver
//! wrote before it (2.7.13.3.1) are seen. Publishing: the used index is swapped in with sequential consistency: the
//! entries are visible before it (2.7.8.2), and the look at `used_event` or the flags comes after it. The driver does
//! the reverse - stores its event, full barrier, looks at the index (2.7.14) - so one of both sees the other: no
//! interrupt is lost. Arming is the same with `avail_event` and the available index (2.7.13.4.1).
use std::cell::Cell;

use super::arena::{Arena, Slot};
use super::chain::Chain;
use super::config::{Areas, QueueConfig};
use super::error::QueueError;
use super::gather::{Gather, Walked, quick};
use super::indirect;
use super::inflight::split::SplitInflight;
use super::ring_mem::{AvailRing, Desc, Descs, UsedRing};
use super::state::{QueueState, RingPos};
use super::{INDIRECT, NEXT, Negotiated, Queue, Ring, WRITE, Way, Why};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6).
const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY` (2.7.8).
const NO_NOTIFY: u16 = 1;

pub(super) struct Split {
    desc: Descs,
    avail: AvailRing,
    used: UsedRing,
    size: u16,
    negotiated: Negotiated,
    /// The next buffer to pop: free-running. A cell, so that it is read again where it is needed, not kept over a walk.
    next_avail: Cell<u16>,
    /// The available index when it was read last.
    avail_idx: u16,
    /// The next used entry to write: free-running.
    next_used: u16,
    /// The used index that the driver sees.
    published: u16,
    /// Whether the driver may still believe that kicks are wanted.
    armed: bool,
    pub(super) inflight: Option<SplitInflight>,
}

impl Split {
    pub(super) fn new(
        config: &QueueConfig,
        areas: &Areas,
        negotiated: Negotiated,
        state: &QueueState,
    ) -> Result<Split, QueueError> {
        let (avail, used) = (state.avail.index, state.used.index);
        // Between the two lie the chains that are out. Fewer may be held: what a back-end without in-flight tracking
        // had popped when it was killed is lost, and its driver waits (vhost-user takes `used` from guest memory).
        let between = avail.wrapping_sub(used);
        if between > config.size {
            return Err(QueueError::State(
                "used and available index are further apart than the queue is long",
            ));
        }
        if state.held.len() > usize::from(between) {
            return Err(QueueError::State(
                "more chains are held than lie between the used and the available index",
            ));
        }
        let mut ids: Vec<_> = state.held.iter().map(|chain| chain.id).collect();
        ids.sort_unstable();
        if ids.last().is_some_and(|id| id.0 >= config.size) {
            return Err(QueueError::State("a held chain's head is not in the descriptor table"));
        }
        if ids.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
            return Err(QueueError::State("two held chains have the same head"));
        }
        if state.held.iter().any(|chain| chain.descs != 1) {
            return Err(QueueError::State("a held chain of a split queue takes one entry"));
        }
        Ok(Split {
            desc: Descs::new(&areas.desc),
            avail: AvailRing::new(&areas.driver),
            used: UsedRing::new(&areas.device),
            size: config.size,
            negotiated,
            next_avail: Cell::new(avail),
            avail_idx: avail,
            next_used: used,
            published: used,
            armed: true,
            inflight: None,
        })
    }

    /// The same rings, mapped elsewhere.
    pub(super) fn set_areas(&mut self, areas: &Areas) {
        self.desc = Descs::new(&areas.desc);
        self.avail = AvailRing::new(&areas.driver);
        self.used = UsedRing::new(&areas.device);
    }

    #[inline(always)]
    fn advance(&self) {
        self.next_avail.set(self.next_avail.get().wrapping_add(1));
    }

    /// The chain with this head is taken.
    #[inline(always)]
    fn popped(&mut self, head: u16) {
        self.advance();
        if let Some(inflight) = &mut self.inflight {
            inflight.pop(head);
        }
    }

    /// Pops a chain that was popped before, by its head: see [`Queue::pop_split`].
    pub(super) fn pop_head(&self, arena: &Arena, head: u16) -> Option<Chain> {
        let slot = arena.settle(arena.make())??;
        let first = self.desc.split(head).ok_or(QueueError::Head(head));
        arena.settle(first.and_then(|desc| self.rest(Gather::new(arena, slot), desc)))?;
        Some(arena.take(slot, head, 1))
    }

    /// The careful walk: adds an element and all that follow.
    fn rest(&self, mut chain: Gather<'_>, mut desc: Desc) -> Result<(), QueueError> {
        loop {
            let flags = desc.split_flags();
            if flags & INDIRECT != 0 {
                // Zero or more direct ones may come before it (2.7.5.3.2).
                self.check_table(desc)?;
                return indirect::split_behind(chain, desc.addr, desc.len());
            }
            chain.add_any(desc, flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                return chain.finish();
            }
            let next = desc.split_next();
            desc = self.desc.split(next).ok_or(QueueError::Next(next))?;
        }
    }

    /// A descriptor that refers to a table is the last one. WRITE means nothing on it (2.7.5.3.2).
    #[inline(always)]
    fn check_table(&self, desc: Desc) -> Result<(), QueueError> {
        if desc.split_flags() & NEXT != 0 {
            return Err(QueueError::IndirectInList);
        }
        if !self.negotiated.indirect {
            return Err(QueueError::IndirectNotNegotiated);
        }
        Ok(())
    }

    /// Writes a used entry for one chain, and notes it.
    #[inline(always)]
    pub(super) fn put(&mut self, slot: &Slot, written: u32) {
        self.note_used(slot);
        self.put_run(slot.id(), written, 1);
    }

    /// Notes that the chain is part of the batch that is published next.
    #[inline(always)]
    pub(super) fn note_used(&mut self, slot: &Slot) {
        if let Some(inflight) = &mut self.inflight {
            inflight.put(slot.id());
        }
    }

    /// Steps back over the chain that was popped last.
    pub(super) fn unpop(&mut self, head: u16) {
        if let Some(inflight) = &mut self.inflight {
            inflight.unpop(head);
        }
        self.next_avail.set(self.next_avail.get().wrapping_sub(1));
    }

    /// Writes a used entry for `chains` chains, of which this is the last (more than one: 2.7.9).
    #[inline(always)]
    pub(super) fn put_run(&mut self, id: u16, written: u32, chains: u16) {
        self.used.put(self.next_used, id, written);
        self.next_used = self.next_used.wrapping_add(chains);
    }

    /// Makes the used entries visible; whether the driver wants an interrupt for them (2.7.7.2).
    #[inline(always)]
    pub(super) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        self.used.publish(new);
        self.published = new;
        if self.negotiated.event_idx {
            // "When an entry is written at used_event": its slot is one of old, old + 1 ... new - 1. Counted down from
            // new - 1, the slot's distance is less than the number of them.
            let event = self.avail.used_event();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.avail.flags() & NO_INTERRUPT == 0
        }
    }

    #[inline(always)]
    pub(super) fn has_available(&self) -> bool {
        self.next_avail.get() != self.avail_idx || self.avail.idx() != self.next_avail.get()
    }

    /// Asks for a kick at the next buffer; whether there is one already.
    pub(super) fn arm(&mut self) -> bool {
        self.armed = true;
        if self.negotiated.event_idx {
            self.used.set_avail_event(self.next_avail.get());
        } else {
            self.used.set_flags(0);
        }
        self.avail.idx_after_barrier() != self.next_avail.get()
    }

    /// Asks for no kicks. With the event index an event that lies behind is enough: flags must stay 0 (2.7.10.2).
    #[inline(always)]
    pub(super) fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            if !self.negotiated.event_idx {
                self.used.set_flags(NO_NOTIFY);
            }
        }
    }

    pub(super) fn positions(&self) -> (RingPos, RingPos) {
        let position = |index| RingPos { index, wrap: true };
        (position(self.next_avail.get()), position(self.published))
    }
}

/// Popping. All of it goes by the queue, and calls what it calls at its end: nothing but the walk itself has values to keep.
impl Queue {
    /// See [`Queue::pop`]. If there is nothing, or what there is breaks a rule, nothing moves. Part of the caller, with all that
    /// usual chains need: see there.
    #[inline(always)]
    pub(super) fn pop_split(&mut self) -> Option<Chain> {
        if self.arena.popped() >= self.limit {
            return self.pop_otherwise(Why::Limit);
        }
        let Ring::Split(ring) = &mut self.ring else { return None };
        if ring.next_avail.get() == ring.avail_idx {
            let idx = ring.avail.idx();
            let next = ring.next_avail.get();
            let ahead = idx.wrapping_sub(next);
            if ahead == 0 {
                return self.pop_otherwise(Why::Empty);
            }
            if ahead > ring.size {
                return self.pop_otherwise(Why::Index(idx, next));
            }
            ring.avail_idx = idx;
        }
        let Some(slot) = self.arena.peek() else { return self.pop_otherwise(Why::Slot) };
        let head = ring.avail.head(ring.next_avail.get());
        let Some(first) = ring.desc.split(head) else { return self.pop_otherwise(Why::Head(head)) };
        if first.split_flags() & INDIRECT != 0 {
            return self.pop_split_indirect(first, head);
        }
        // Now, so that the head need not be kept meanwhile.
        slot.set_name(head, 1, self.arena.latest().wrapping_add(1));
        let (walked, last) = quick::<0>(&self.arena, slot, first, Desc::split_flags, |desc| {
            ring.desc.split(desc.split_next())
        });
        match walked {
            Walked::Whole(_) => {}
            Walked::Unusual => return self.pop_split_carefully(last),
            Walked::Missing => return self.pop_otherwise(Why::Next(last.split_next())),
        }
        if self.way == Way::Short {
            ring.advance();
            return Some(self.arena.take_named(slot));
        }
        std::hint::cold_path();
        ring.popped(slot.id());
        let chain = self.arena.take_named(slot);
        if self.way == Way::Long { self.popped(chain) } else { Some(chain) }
    }

    /// Pops a chain that begins with a table.
    #[inline(never)]
    fn pop_split_indirect(&mut self, desc: Desc, head: u16) -> Option<Chain> {
        let Ring::Split(ring) = &mut self.ring else { return None };
        let slot = self.arena.peek()?;
        let chain = Gather::new(&self.arena, slot);
        let checked = ring.check_table(desc);
        if let Err(error) = checked.and_then(|()| indirect::split(chain, desc.addr, desc.len())) {
            return self.stumbled(error);
        }
        ring.popped(head);
        let chain = self.arena.take(slot, head, 1);
        if self.way == Way::Long { self.popped(chain) } else { Some(chain) }
    }

    /// Pops a chain that the quick walk left, with this element.
    #[cold]
    #[inline(never)]
    fn pop_split_carefully(&mut self, desc: Desc) -> Option<Chain> {
        let Ring::Split(ring) = &mut self.ring else { return None };
        let slot = self.arena.peek()?;
        let head = slot.id();
        let (chain, _) = Gather::resume(&self.arena, slot);
        if let Err(error) = ring.rest(chain, desc) {
            return self.stumbled(error);
        }
        ring.popped(head);
        let chain = self.arena.take(slot, head, 1);
        if self.way == Way::Long { self.popped(chain) } else { Some(chain) }
    }
}
