//! The packed virtqueue (2.8): positions, popping, used descriptors, notifications.
//!
//! Memory ordering. A descriptor's flags, length and id are one aligned word, read and written as such, so that each
//! is seen with the flags that make it valid; the word of a list's head is read with acquire and so orders all that
//! follows (2.8.21.1.1). Of a batch of used descriptors, the first is the one that the driver polls (2.8.2): the
//! others are written as they come, and it last, by a swap with sequential consistency, after which the driver's event
//! structure is read. The driver does the reverse (2.8.22), so that one of both sees the other.
//!
//! Speed. Elements cost what they cost in a split ring: the place is an offset in bytes, so that stepping is an addition and
//! one compare, which also is the bounds check, with a branch that is hardly ever taken; a descriptor is read with the lap's
//! flags taken out, so that one test tells whether it is ours and of the usual kind. What a buffer costs beyond the
//! benchmark's bare loop is instructions for the chain's record, which is written at the pop and read at the
//! completion. With many chains out the records do not fit the first-level cache; so a completion reads one line of
//! them, the first. Publishing one buffer at a time is dearer by what is stored before it, which the full barrier waits for,
//! and by what is read behind it, which waits for the barrier: whether the chain is the queue's, as usual, and has room
//! for what was written; whether any were dropped; what notes and orders there are; counters; the list of free slots.
//! Batches pay it once. Without all of these checks a completion with its publication alone would still cost 1.6 times the bare
//! loop's, with them 1.8. By itself, none of the rest is to blame: an id and a number of descriptors that are in the handle, so
//! that no record is read; free slots on an array instead of a list, two stores less; one question for the ring and what is beside
//! it: each of these was tried, and changed nothing. The position where a batch begins is a field of its own, and its end
//! is computed: the barrier's address depends on nothing that was just written.
use super::arena::{Arena, Slot};
use super::chain::Chain;
use super::config::{Areas, QueueConfig};
use super::error::QueueError;
use super::gather::{Gather, Walked, quick, undo};
use super::indirect;
use super::inflight::packed::PackedInflight;
use super::ring_mem::{Cursor, Desc, EventArea, FOREIGN, PackedRing};
use super::state::{QueueState, RingPos};
use super::{INDIRECT, NEXT, Negotiated, Queue, Ring, WRITE, Way, Why};

/// `RING_EVENT_FLAGS_ENABLE` (2.8.10), in the structure's high half.
const EVENT_ENABLE: u32 = 0;
/// `RING_EVENT_FLAGS_DISABLE`.
const EVENT_DISABLE: u32 = 1;
/// `RING_EVENT_FLAGS_DESC`.
const EVENT_DESC: u32 = 2;

pub(super) struct Packed {
    ring: PackedRing,
    driver_event: EventArea,
    device_event: EventArea,
    size: u16,
    negotiated: Negotiated,
    next_avail: Cursor,
    /// Where the batch begins: used descriptors that are published together.
    next_used: Cursor,
    /// How many descriptors the batch passes over. Not above the size of the ring: its lists are in flight until it is
    /// published.
    batch: u16,
    /// The word that the driver is going to find where it looks, at the batch's start.
    first: u64,
    /// How many descriptors more the driver can make available: those of the ring that are neither popped nor in a batch
    /// that is not published.
    room: u16,
    /// Whether the driver may still believe that kicks are wanted.
    armed: bool,
    /// Elsewhere: a queue without it has all that it needs in few cache lines.
    pub(super) inflight: Option<Box<PackedInflight>>,
}

impl Packed {
    pub(super) fn new(
        config: &QueueConfig,
        areas: &Areas,
        negotiated: Negotiated,
        state: &QueueState,
    ) -> Result<Packed, QueueError> {
        let (avail, used, size) = (state.avail, state.used, config.size);
        if avail.index >= size || used.index >= size {
            return Err(QueueError::State("a position is outside of the ring"));
        }
        // From used to available is at most one lap, and as long as the chains that are held.
        let ahead = if avail.wrap == used.wrap {
            avail.index.checked_sub(used.index)
        } else {
            avail.index.checked_add(size - used.index).filter(|ahead| *ahead <= size)
        };
        let Some(in_flight) = ahead else {
            return Err(QueueError::State("the available position is behind the used one"));
        };
        let held = state.held.iter().map(|chain| u64::from(chain.descs)).sum::<u64>();
        // Fewer may be held than lie between: see `Split::new`.
        if held > u64::from(in_flight) || state.held.iter().any(|chain| chain.descs == 0) {
            return Err(QueueError::State(
                "more descriptors are held than lie between the used and the available position",
            ));
        }
        Ok(Packed {
            ring: PackedRing::new(&areas.desc),
            driver_event: EventArea::new(&areas.driver),
            device_event: EventArea::new(&areas.device),
            size,
            negotiated,
            next_avail: Cursor::available(avail),
            next_used: Cursor::used(used),
            batch: 0,
            first: 0,
            room: size - in_flight,
            armed: true,
            inflight: None,
        })
    }

    /// The same rings, mapped elsewhere.
    pub(super) fn set_areas(&mut self, areas: &Areas) {
        self.ring = PackedRing::new(&areas.desc);
        self.driver_event = EventArea::new(&areas.driver);
        self.device_event = EventArea::new(&areas.device);
    }

    /// Notes the next list in the in-flight region.
    #[inline(always)]
    fn note_popped(&mut self, arena: &Arena, slot: &Slot) {
        if let Some(inflight) = &mut self.inflight {
            inflight.pop(arena, slot, self.next_avail.index());
        }
    }

    /// Takes what was popped, if there is room for it.
    #[inline(always)]
    fn take(&mut self, arena: &Arena, slot: &Slot, id: u16, descs: u16) -> Result<Chain, QueueError> {
        self.room = self.room.checked_sub(descs).ok_or(QueueError::TooManyOutstanding)?;
        self.note_popped(arena, slot);
        self.ring.advance(&mut self.next_avail, descs);
        Ok(arena.take(slot, id, descs))
    }

    /// Pops a list that was popped before, and whose descriptors these were: see [`Queue::pop_packed`].
    pub(super) fn pop_list(&self, arena: &Arena, descs: &[Desc]) -> Option<Chain> {
        let slot = arena.settle(arena.make())??;
        let (id, descs) = arena.settle(self.gather_list(Gather::new(arena, slot), descs))?;
        Some(arena.take(slot, id, descs))
    }

    fn gather_list(&self, chain: Gather<'_>, descs: &[Desc]) -> Result<(u16, u16), QueueError> {
        const LENGTH: QueueError = QueueError::State("a list in flight has another length than it says");
        let [first, others @ ..] = descs else { return Err(LENGTH) };
        if others.is_empty() && first.packed_flags() & INDIRECT != 0 {
            self.check_table(*first)?;
            return indirect::packed(chain, first.addr, first.len()).map(|()| (first.packed_id(), 1));
        }
        let mut others = others.iter();
        let walked = rest(chain, *first, 0, || others.next().copied().ok_or(LENGTH))?;
        if others.next().is_some() { Err(LENGTH) } else { Ok(walked) }
    }

    /// A list that is one descriptor and refers to a table. WRITE means nothing on it (2.8.7).
    #[inline(always)]
    fn check_table(&self, desc: Desc) -> Result<(), QueueError> {
        if desc.packed_flags() & NEXT != 0 {
            return Err(QueueError::IndirectInList);
        }
        if !self.negotiated.indirect {
            return Err(QueueError::IndirectNotNegotiated);
        }
        Ok(())
    }

    /// Where the next used descriptor goes.
    #[inline(always)]
    fn batch_end(&self) -> Cursor {
        let mut at = self.next_used;
        if self.batch > 0 {
            self.ring.advance(&mut at, self.batch);
        }
        at
    }

    /// Writes a used descriptor for one list, and notes it. Calls nothing but at its end, as all that is done for each
    /// chain.
    #[inline(always)]
    pub(super) fn put(&mut self, arena: &Arena, slot: &Slot, written: u32) {
        let at = self.batch_end();
        let keep = if self.batch > 0 { self.ring.word(at) } else { None };
        if let Some(inflight) = &mut self.inflight
            && !inflight.put_in_order(slot, keep, at.index())
        {
            return self.put_elsewhere(arena, slot, written);
        }
        self.put_at(at, slot.id(), written, slot.descs());
    }

    #[cold]
    #[inline(never)]
    fn put_elsewhere(&mut self, arena: &Arena, slot: &Slot, written: u32) {
        self.note_used(arena, slot);
        self.put_kept(slot.id(), written, slot.descs());
    }

    /// Notes that the list is part of the batch that is published next. Its used descriptor comes later, or is that of
    /// another one (2.8.8).
    pub(super) fn note_used(&mut self, arena: &Arena, slot: &Slot) {
        if let Some(inflight) = &mut self.inflight {
            inflight.put(arena, slot, &self.ring);
        }
    }

    /// A list is going to leave the arena without being used.
    pub(super) fn leaves(&mut self, arena: &Arena) {
        if let Some(inflight) = &mut self.inflight {
            inflight.know(arena);
        }
    }

    /// Steps back over the list that was popped last.
    pub(super) fn unpop(&mut self, slot: &Slot) {
        if let Some(inflight) = &mut self.inflight {
            inflight.leave(slot);
        }
        let descs = slot.descs();
        self.room = self.room.saturating_add(descs);
        self.next_avail = self.ring.back(self.next_avail, descs);
    }

    /// Writes a used descriptor, and keeps what was there.
    pub(super) fn put_kept(&mut self, id: u16, written: u32, descs: u16) {
        if let (Some(inflight), 1..) = (&self.inflight, self.batch) {
            inflight.keep(&self.ring, self.batch_end());
        }
        self.put_run(id, written, descs);
    }

    /// Writes a used descriptor that passes over `descs` descriptors: of one list, or of a batch whose last has this
    /// id (2.8.8).
    #[inline(always)]
    pub(super) fn put_run(&mut self, id: u16, written: u32, descs: u16) {
        self.put_at(self.batch_end(), id, written, descs);
    }

    #[inline(always)]
    fn put_at(&mut self, at: Cursor, id: u16, written: u32, descs: u16) {
        // WRITE says whether something was written, and only then the length means something (2.8.3, 2.8.4).
        let write = if written > 0 { u64::from(WRITE) << 48 } else { 0 };
        let word = u64::from(written) | (u64::from(id) << 32) | write | at.bits();
        if self.batch == 0 {
            self.first = word;
        } else {
            self.ring.store(at, word);
        }
        self.batch = self.batch.wrapping_add(descs);
    }

    /// Makes the batch visible, and notes that; whether the driver wants an interrupt for it (2.8.10).
    #[inline(always)]
    pub(super) fn publish(&mut self) -> bool {
        if let (Some(inflight), 1..) = (&mut self.inflight, self.batch) {
            inflight.publishing();
            if inflight.has_saved() {
                return self.publish_saved();
            }
        }
        self.publish_batch()
    }

    #[cold]
    #[inline(never)]
    fn publish_saved(&mut self) -> bool {
        let wanted = self.publish_batch();
        if let Some(inflight) = &mut self.inflight {
            inflight.free_batch();
        }
        wanted
    }

    /// Makes the batch visible; whether the driver wants an interrupt for it.
    #[inline(always)]
    pub(super) fn publish_batch(&mut self) -> bool {
        let (start, batch) = (self.next_used, self.batch);
        if batch == 0 {
            return false;
        }
        self.ring.publish(start, self.first);
        self.ring.advance(&mut self.next_used, batch);
        self.batch = 0;
        self.room = self.room.wrapping_add(batch);
        let event = self.driver_event.load();
        match (event >> 16) & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.negotiated.event_idx => {
                // How far from the batch's start to the descriptor that the driver waits for: within the batch? One lap
                // more if the wrap counters differ.
                let laps = u32::from(start.wrap()) ^ ((event >> 15) & 1);
                let lap = laps.wrapping_neg() & u32::from(self.size);
                let distance = ((event & 0x7fff) + lap).wrapping_sub(u32::from(start.index()));
                distance < u32::from(batch)
            }
            // ENABLE; and what means nothing here (the reserved 3, DESC without the feature) loses no interrupt.
            _ => true,
        }
    }

    #[inline(always)]
    pub(super) fn has_available(&self) -> bool {
        self.ring.is(self.next_avail)
    }

    /// Asks for a kick at the next descriptor; whether it is there already.
    pub(super) fn arm(&mut self) -> bool {
        self.armed = true;
        let at = self.next_avail;
        let event = if self.negotiated.event_idx {
            (EVENT_DESC << 16) | u32::from(at.index()) | (u32::from(at.wrap()) << 15)
        } else {
            EVENT_ENABLE << 16
        };
        self.device_event.store(event);
        self.has_available()
    }

    /// Asks for no kicks.
    #[inline(always)]
    pub(super) fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            self.device_event.store(EVENT_DISABLE << 16);
        }
    }

    pub(super) fn positions(&self) -> (RingPos, RingPos) {
        (self.next_avail.position(), self.next_used.position())
    }
}

/// Popping: see the split ring's.
impl Queue {
    /// See [`Queue::pop`]. If there is nothing, or what there is breaks a rule, nothing moves. Part of the caller, with all that
    /// usual chains need: see there.
    #[inline(always)]
    pub(super) fn pop_packed(&mut self) -> Option<Chain> {
        if self.arena.popped() >= self.limit {
            return self.pop_otherwise(Why::Limit);
        }
        let Ring::Packed(ring) = &mut self.ring else { return None };
        let Some(slot) = self.arena.peek() else { return self.pop_otherwise(Why::Slot) };
        let mut at = ring.next_avail;
        let Some(first) = ring.ring.read(at) else { return self.pop_otherwise(Why::Empty) };
        if first.packed_flags() & FOREIGN != 0 {
            return self.pop_otherwise(Why::Empty);
        }
        if first.packed_flags() & INDIRECT != 0 {
            return self.pop_packed_indirect(first);
        }
        let next = |_| {
            ring.ring.step(&mut at);
            ring.ring.read(at)
        };
        let (walked, last) = quick::<FOREIGN>(&self.arena, slot, first, Desc::packed_flags, next);
        // Nothing is missing: there is always a next one in the ring.
        let Walked::Whole(count) = walked else { return self.pop_packed_carefully(last) };
        // As many as there are elements: no more than the ring has.
        let descs = count as u16;
        let (room, too_many) = ring.room.overflowing_sub(descs);
        ring.room = room;
        if too_many {
            ring.room = room.wrapping_add(descs);
            return self.pop_too_many(last);
        }
        let way = self.way;
        if way != Way::Short {
            std::hint::cold_path();
            ring.note_popped(&self.arena, slot);
        }
        ring.ring.step(&mut at);
        ring.next_avail = at;
        // The id is in the last descriptor (2.8.6). It is the driver's to choose, and goes back as it is.
        let chain = self.arena.take(slot, last.packed_id(), descs);
        if way == Way::Long { self.popped(chain) } else { Some(chain) }
    }

    /// Pops a list that is a table.
    #[inline(never)]
    fn pop_packed_indirect(&mut self, desc: Desc) -> Option<Chain> {
        let Ring::Packed(ring) = &mut self.ring else { return None };
        let slot = self.arena.peek()?;
        let chain = Gather::new(&self.arena, slot);
        let checked = ring.check_table(desc);
        let walked = checked.and_then(|()| indirect::packed(chain, desc.addr, desc.len()));
        match walked.and_then(|()| ring.take(&self.arena, slot, desc.packed_id(), 1)) {
            Err(error) => self.stumbled(error),
            Ok(chain) if self.way == Way::Long => self.popped(chain),
            Ok(chain) => Some(chain),
        }
    }

    /// Pops a list that the quick walk left, with this element.
    #[cold]
    #[inline(never)]
    fn pop_packed_carefully(&mut self, desc: Desc) -> Option<Chain> {
        let Ring::Packed(ring) = &mut self.ring else { return None };
        let slot = self.arena.peek()?;
        let (chain, before) = Gather::resume(&self.arena, slot);
        let mut at = ring.next_avail;
        // No more elements than the ring has descriptors.
        ring.ring.advance(&mut at, before as u16);
        if desc.packed_flags() & FOREIGN != 0 {
            return self.stumbled(QueueError::NotAvailable(at.index()));
        }
        let walked = rest(chain, desc, before as u16, || {
            ring.ring.step(&mut at);
            let next = ring.ring.read(at).filter(|desc| desc.packed_flags() & FOREIGN == 0);
            next.ok_or(QueueError::NotAvailable(at.index()))
        });
        match walked.and_then(|(id, descs)| ring.take(&self.arena, slot, id, descs)) {
            Err(error) => self.stumbled(error),
            Ok(chain) if self.way == Way::Long => self.popped(chain),
            Ok(chain) => Some(chain),
        }
    }

    /// Pops a list for which there is no room, whose last element this is.
    #[cold]
    #[inline(never)]
    fn pop_too_many(&mut self, last: Desc) -> Option<Chain> {
        undo(self.arena.peek()?, last.packed_flags() & WRITE != 0);
        self.pop_packed_carefully(last)
    }
}

/// The careful walk: adds an element, behind so many, and all that follow. The list's id and descriptors.
fn rest(
    mut chain: Gather<'_>,
    mut desc: Desc,
    before: u16,
    mut next: impl FnMut() -> Result<Desc, QueueError>,
) -> Result<(u16, u16), QueueError> {
    let mut descs = before;
    loop {
        let flags = desc.packed_flags();
        // A list is either direct or one indirect descriptor (2.8.5, 2.8.19).
        if flags & INDIRECT != 0 {
            return Err(QueueError::IndirectInList);
        }
        chain.add_any(desc, flags & WRITE != 0)?;
        // A chain does not take more elements than the queue has entries.
        descs += 1;
        if flags & NEXT == 0 {
            return chain.finish().map(|()| (desc.packed_id(), descs));
        }
        desc = next()?;
    }
}
