//! The packed virtqueue (2.8): positions, popping, used descriptors, notifications.
//!
//! Memory ordering. A descriptor's flags, length and id are one aligned word, read and written as such, so that each
//! is seen with the flags that make it valid; the word of a list's head is read with acquire and so orders all that
//! follows (2.8.21.1.1). Of a batch of used descriptors, the first is the one that the driver polls (2.8.2): the
//! others are written as they come, and it last, by a swap with sequential consistency, after which the driver's event
//! structure is read. The driver does the reverse (2.8.22), so that one of both sees the other.
//!
//! Speed. Elements cost what they cost in a split ring once stepping to the next descriptor is one compare that also
//! is the bounds check, and a branch that is hardly ever taken. Publishing one buffer at a time is dearer by what is
//! stored before it: the full barrier waits for all of that (a tenth of a nanosecond each, measured by adding stores to
//! the benchmark's bare loop; longer ways of the id through memory made no difference). Batches pay it once.
use super::arena::{Arena, Shape, Slot};
use super::chain::Chain;
use super::config::{Areas, QueueConfig};
use super::error::QueueError;
use super::gather::Gather;
use super::indirect;
use super::inflight::packed::PackedInflight;
use super::ring_mem::{Desc, Descs, EventArea};
use super::state::{QueueState, RingPos};
use super::{INDIRECT, NEXT, Negotiated, WRITE};

/// `VIRTQ_DESC_F_AVAIL` (2.8.1).
const AVAIL: u16 = 1 << 7;
/// `VIRTQ_DESC_F_USED` (2.8.1).
const USED: u16 = 1 << 15;
/// Both: what tells whose a descriptor is.
pub(super) const AVAIL_USED: u16 = AVAIL | USED;

/// `RING_EVENT_FLAGS_ENABLE` (2.8.10), in the structure's high half.
const EVENT_ENABLE: u32 = 0;
/// `RING_EVENT_FLAGS_DISABLE`.
const EVENT_DISABLE: u32 = 1;
/// `RING_EVENT_FLAGS_DESC`.
const EVENT_DESC: u32 = 2;

/// An offset in the ring and what flags descriptors have there in this lap.
#[derive(Clone, Copy)]
pub(super) struct Cursor {
    index: u16,
    /// AVAIL and USED of an available descriptor: AVAIL as the wrap counter, USED the inverse (2.8.1).
    pattern: u16,
}

impl Cursor {
    pub(super) fn new(position: RingPos) -> Cursor {
        Cursor { index: position.index, pattern: if position.wrap { AVAIL } else { USED } }
    }

    pub(super) fn position(self) -> RingPos {
        RingPos { index: self.index, wrap: self.wrap() }
    }

    #[inline(always)]
    fn wrap(self) -> bool {
        self.pattern == AVAIL
    }

    /// AVAIL and USED of a used descriptor, both as the wrap counter (2.8.1), where they are in its second word.
    fn used_bits(self) -> u64 {
        if self.wrap() { u64::from(AVAIL_USED) << 48 } else { 0 }
    }

    /// Whether the ring has an available descriptor here.
    pub(super) fn is_available(self, ring: &Descs) -> bool {
        ring.packed_is(self.index, self.pattern)
    }

    /// Takes the used flags from the descriptor here, if it has them, so that the driver does not take it for used.
    /// What else is in it means nothing any more.
    pub(super) fn make_available(self, ring: &Descs) {
        if ring.packed_is(self.index, self.pattern ^ USED) {
            ring.packed_store(self.index, u64::from(self.pattern) << 48);
        }
    }

    #[inline(always)]
    pub(super) fn step(&mut self, size: u16) {
        self.index += 1;
        if self.index >= size {
            self.index = 0;
            self.pattern ^= AVAIL_USED;
        }
    }

    /// So many descriptors before this one: at most `size`.
    #[inline(always)]
    fn back(self, count: u16, size: u16) -> Cursor {
        match self.index.checked_sub(count) {
            Some(index) => Cursor { index, pattern: self.pattern },
            None => Cursor {
                index: self.index.wrapping_add(size).wrapping_sub(count),
                pattern: self.pattern ^ AVAIL_USED,
            },
        }
    }

    /// `count` is at most `size`, which is at most 32768.
    #[inline(always)]
    fn advance(&mut self, count: u16, size: u16) {
        self.index += count;
        if self.index >= size {
            self.index -= size;
            self.pattern ^= AVAIL_USED;
        }
    }
}

pub(super) struct Packed {
    ring: Descs,
    driver_event: EventArea,
    device_event: EventArea,
    size: u16,
    negotiated: Negotiated,
    next_avail: Cursor,
    next_used: Cursor,
    /// Where the driver looks, and what it is going to find there: the first used descriptor of the batch.
    first: (Cursor, u64),
    /// AVAIL and USED of a used descriptor at `next_used`, where they are in its second word.
    used_bits: u64,
    /// Descriptors that the batch passes over; 0: there is none.
    batch: u16,
    /// Descriptors popped and not published as used: the driver cannot have more than the ring has.
    in_flight: u16,
    /// Whether the driver may still believe that kicks are wanted.
    armed: bool,
    pub(super) inflight: Option<PackedInflight>,
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
        let next_used = Cursor::new(used);
        Ok(Packed {
            ring: Descs::new(&areas.desc),
            driver_event: EventArea::new(&areas.driver),
            device_event: EventArea::new(&areas.device),
            size,
            negotiated,
            next_avail: Cursor::new(avail),
            next_used,
            first: (next_used, 0),
            used_bits: next_used.used_bits(),
            batch: 0,
            in_flight,
            armed: true,
            inflight: None,
        })
    }

    /// The same rings, mapped elsewhere.
    pub(super) fn set_areas(&mut self, areas: &Areas) {
        self.ring = Descs::new(&areas.desc);
        self.driver_event = EventArea::new(&areas.driver);
        self.device_event = EventArea::new(&areas.device);
    }

    /// Pops the next list. `None`: there is none, or what there is breaks a rule: then a violation is parked in the arena.
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
        let start = self.next_avail;
        let Some(Ok(desc)) = self.ring.packed(start.index, start.pattern) else { return Ok(None) };
        let Some(slot) = arena.peek() else { return arena.exhausted() };
        let mut at = start;
        // The id is in the last descriptor (2.8.6). It is the driver's to choose, and goes back as it is.
        let (shape, descs) = if desc.packed_flags() & INDIRECT == 0 {
            let mut chain = Gather::new(arena, slot);
            let last = self.walk(&mut chain, desc, &mut at)?;
            at.step(self.size);
            // From the start to where the list ends: a whole lap if they are the same, for there is one at least.
            let lap = if at.index > start.index { 0 } else { self.size };
            let descs = at.index + lap - start.index;
            (chain.finish(last.packed_id(), descs)?, descs)
        } else {
            self.check_table(desc)?;
            at.step(self.size);
            (indirect::packed(Gather::new(arena, slot), desc.addr, desc.len(), desc.packed_id())?, 1)
        };
        // Both can be the size of the largest ring: the sum does not fit 16 bits.
        if u32::from(self.in_flight) + u32::from(descs) > u32::from(self.size) {
            return Err(QueueError::TooManyOutstanding);
        }
        self.in_flight += descs;
        self.next_avail = at;
        Ok(Some(arena.take(slot, &shape)))
    }

    /// Pops a list that was popped before, and whose descriptors these were: see [`Self::pop`].
    pub(super) fn pop_list(&self, arena: &Arena, descs: &[Desc]) -> Option<Chain> {
        let popped = match arena.peek() {
            None => arena.exhausted(),
            Some(slot) => self.gather_list(arena, slot, descs).map(|shape| Some(arena.take(slot, &shape))),
        };
        popped.unwrap_or_else(|error| {
            arena.park(error);
            None
        })
    }

    fn gather_list(&self, arena: &Arena, slot: &Slot, descs: &[Desc]) -> Result<Shape, QueueError> {
        let mut chain = Gather::new(arena, slot);
        if let [desc] = descs
            && desc.packed_flags() & INDIRECT != 0
        {
            self.check_table(*desc)?;
            return indirect::packed(chain, desc.addr, desc.len(), desc.packed_id());
        }
        let (mut id, mut left) = (0, descs.len());
        for desc in descs {
            let flags = desc.packed_flags();
            left -= 1;
            if flags & INDIRECT != 0 {
                return Err(QueueError::IndirectInList);
            }
            if (flags & NEXT != 0) != (left > 0) {
                return Err(QueueError::State("a list in flight has another length than it says"));
            }
            chain.add_any(*desc, flags & WRITE != 0)?;
            id = desc.packed_id();
        }
        // Not more than there are entries.
        chain.finish(id, descs.len() as u16)
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

    /// Notes the list that was popped last in the in-flight region. Its descriptors are read once more: they do not
    /// change, or who changed them is told of it when it comes back.
    #[inline(always)]
    pub(super) fn note(&mut self, slot: &Slot) {
        let start = self.next_avail.back(slot.descs(), self.size).index;
        let (ring, size) = (&self.ring, self.size);
        if let Some(inflight) = &mut self.inflight {
            let desc = |i| {
                let at = start + i;
                ring.any(if at >= size { at - size } else { at })
            };
            slot.set_entry(inflight.pop(slot.descs(), desc));
        }
    }

    /// Walks a list of direct descriptors and returns the last one, which `at` is then at. It has no more descriptors
    /// than the ring: the chain takes no more elements.
    #[inline(always)]
    fn walk(&self, chain: &mut Gather<'_>, mut desc: Desc, at: &mut Cursor) -> Result<Desc, QueueError> {
        let next = |at: &mut Cursor| {
            let next = self.ring.packed_next(&mut at.index, &mut at.pattern);
            next.ok_or(QueueError::NotAvailable(at.index))
        };
        while desc.packed_flags() & (WRITE | INDIRECT) == 0 {
            chain.add_readable(desc)?;
            if desc.packed_flags() & NEXT == 0 {
                return Ok(desc);
            }
            desc = next(at)?;
        }
        if desc.packed_flags() & INDIRECT == 0 {
            chain.turn();
            loop {
                chain.add_writable(desc)?;
                if desc.packed_flags() & NEXT == 0 {
                    return Ok(desc);
                }
                desc = next(at)?;
                if desc.packed_flags() & (WRITE | INDIRECT) != WRITE {
                    break;
                }
            }
        }
        // A list is either direct or one indirect descriptor (2.8.5, 2.8.19).
        let indirect = desc.packed_flags() & INDIRECT != 0;
        Err(if indirect { QueueError::IndirectInList } else { QueueError::ReadableAfterWritable })
    }

    /// Steps back over the list that was popped last.
    pub(super) fn unpop(&mut self, slot: &Slot) {
        if let Some(inflight) = &mut self.inflight {
            inflight.unpop(slot.entry());
        }
        let descs = slot.descs();
        self.in_flight = self.in_flight.saturating_sub(descs);
        self.next_avail = self.next_avail.back(descs, self.size);
    }

    /// Writes a used descriptor that passes over `descs` descriptors: of one list, or of a batch whose last has this
    /// id (2.8.8).
    #[inline(always)]
    pub(super) fn put(&mut self, id: u16, written: u32, descs: u16) {
        let at = self.next_used;
        // WRITE says whether something was written, and only then the length means something (2.8.3, 2.8.4).
        let write = if written > 0 { u64::from(WRITE) << 48 } else { 0 };
        let word = u64::from(written) | (u64::from(id) << 32) | write | self.used_bits;
        if self.batch == 0 {
            self.first = (at, word);
        } else {
            self.ring.packed_store(at.index, word);
        }
        // Not above `size`: the lists of a batch are in flight until it is published.
        self.batch = self.batch.wrapping_add(descs);
        self.next_used.advance(descs, self.size);
        if self.next_used.pattern != at.pattern {
            self.used_bits = self.next_used.used_bits();
        }
    }

    /// Makes the batch visible; whether the driver wants an interrupt for it (2.8.10).
    #[inline(always)]
    pub(super) fn publish(&mut self) -> bool {
        let batch = self.batch;
        if batch == 0 {
            return false;
        }
        let (start, word) = self.first;
        self.ring.packed_publish(start.index, word);
        self.batch = 0;
        self.in_flight = self.in_flight.wrapping_sub(batch);
        let event = self.driver_event.load();
        match (event >> 16) & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.negotiated.event_idx => {
                // How far from the batch's start to the descriptor that the driver waits for: within the batch?
                let offset = event & 0x7fff;
                let lap = if (event & 0x8000 != 0) == start.wrap() { 0 } else { u32::from(self.size) };
                let distance = (offset + lap).wrapping_sub(u32::from(start.index));
                distance < u32::from(batch)
            }
            // ENABLE; and what means nothing here (the reserved 3, DESC without the feature) loses no interrupt.
            _ => true,
        }
    }

    /// The same, with what is in flight.
    #[inline(always)]
    pub(super) fn publish_tracked(&mut self) -> bool {
        if let Some(inflight) = &mut self.inflight {
            inflight.publishing(self.next_used.position());
        }
        self.publish()
    }

    #[inline(always)]
    pub(super) fn has_available(&self) -> bool {
        self.ring.packed_is(self.next_avail.index, self.next_avail.pattern)
    }

    /// Asks for a kick at the next descriptor; whether it is there already.
    pub(super) fn arm(&mut self) -> bool {
        self.armed = true;
        let at = self.next_avail;
        let event = if self.negotiated.event_idx {
            (EVENT_DESC << 16) | u32::from(at.index) | (u32::from(at.wrap()) << 15)
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
        let published = if self.batch > 0 { self.first.0 } else { self.next_used };
        (self.next_avail.position(), published.position())
    }
}
