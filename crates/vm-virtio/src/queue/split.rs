//! The split virtqueue (2.7): positions, popping, used entries, notifications.
//!
//! Memory ordering. Popping: the available index is read with acquire, so that entries and descriptors the driver
//! wrote before it (2.7.13.3.1) are seen. Publishing: the used index is swapped in with sequential consistency: the
//! entries are visible before it (2.7.8.2), and the look at `used_event` or the flags comes after it. The driver does
//! the reverse - stores its event, full barrier, looks at the index (2.7.14) - so one of both sees the other: no
//! interrupt is lost. Arming is the same with `avail_event` and the available index (2.7.13.4.1).
use super::arena::{Arena, Shape, Slot};
use super::chain::Chain;
use super::config::{Areas, QueueConfig};
use super::error::QueueError;
use super::gather::{Gather, walk};
use super::indirect;
use super::inflight::split::SplitInflight;
use super::ring_mem::{AvailRing, Desc, Descs, UsedRing};
use super::state::{QueueState, RingPos};
use super::{INDIRECT, NEXT, Negotiated};

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
    /// The next buffer to pop: free-running.
    next_avail: u16,
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
            next_avail: avail,
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

    /// Pops the next chain. `None`: there is none, or what there is breaks a rule: then a violation is parked in the arena.
    /// Nothing moves in either case.
    #[inline(never)]
    pub(super) fn pop(&mut self, arena: &Arena) -> Option<Chain> {
        match self.try_pop(arena) {
            Ok(chain) => chain,
            Err(error) => {
                arena.park(error);
                None
            }
        }
    }

    #[inline(always)]
    fn try_pop(&mut self, arena: &Arena) -> Result<Option<Chain>, QueueError> {
        if self.next_avail == self.avail_idx && !self.refresh()? {
            return Ok(None);
        }
        let Some(slot) = arena.peek() else { return arena.exhausted() };
        let head = self.avail.head(self.next_avail);
        let shape = self.gather(arena, slot, head)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(arena.take(slot, &shape)))
    }

    /// Pops a chain that was popped before, by its head: see [`Self::pop`].
    pub(super) fn pop_head(&self, arena: &Arena, head: u16) -> Option<Chain> {
        let popped = match arena.peek() {
            None => arena.exhausted(),
            Some(slot) => self.gather(arena, slot, head).map(|shape| Some(arena.take(slot, &shape))),
        };
        popped.unwrap_or_else(|error| {
            arena.park(error);
            None
        })
    }

    #[inline(always)]
    fn gather(&self, arena: &Arena, slot: &Slot, head: u16) -> Result<Shape, QueueError> {
        let Some(desc) = self.desc.split(head) else { return Err(QueueError::Head(head)) };
        if desc.split_flags() & INDIRECT == 0 {
            let mut chain = Gather::new(arena, slot);
            match walk(&mut chain, desc, |next| self.desc.split(next))? {
                None => chain.finish(head, 1),
                Some(table) => {
                    // Zero or more direct ones may come before it (2.7.5.3.2).
                    self.check_table(table)?;
                    indirect::split_behind(chain, table.addr, table.len(), head)
                }
            }
        } else {
            self.check_table(desc)?;
            indirect::split(Gather::new(arena, slot), desc.addr, desc.len(), head)
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

    /// Reads the available index; whether there is something to pop.
    #[inline(always)]
    fn refresh(&mut self) -> Result<bool, QueueError> {
        let idx = self.avail.idx();
        let ahead = idx.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(QueueError::AvailIndex { idx, next: self.next_avail });
        }
        self.avail_idx = idx;
        Ok(ahead != 0)
    }

    /// Steps back over the chain that was popped last.
    pub(super) fn unpop(&mut self, head: u16) {
        if let Some(inflight) = &mut self.inflight {
            inflight.unpop(head);
        }
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Writes a used entry for `chains` chains, of which this is the last (more than one: 2.7.9).
    #[inline(always)]
    pub(super) fn put(&mut self, id: u16, written: u32, chains: u16) {
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

    /// The same, with what is in flight.
    #[inline(always)]
    pub(super) fn publish_tracked(&mut self) -> bool {
        let wanted = self.publish();
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.published);
        }
        wanted
    }

    #[inline(always)]
    pub(super) fn has_available(&self) -> bool {
        self.next_avail != self.avail_idx || self.avail.idx() != self.next_avail
    }

    /// Asks for a kick at the next buffer; whether there is one already.
    pub(super) fn arm(&mut self) -> bool {
        self.armed = true;
        if self.negotiated.event_idx {
            self.used.set_avail_event(self.next_avail);
        } else {
            self.used.set_flags(0);
        }
        self.avail.idx_after_barrier() != self.next_avail
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
        (position(self.next_avail), position(self.published))
    }
}
