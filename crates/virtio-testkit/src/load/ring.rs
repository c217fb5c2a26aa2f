//! The rings of a driver in a hurry: split and packed, with event index and indirect tables where negotiated.
//!
//! Each request has a slot, and a slot its place: descriptors of the table (split) or the buffer id (packed), and an
//! indirect table. A chain of one element lies in the ring itself, a longer one in its table if the back-end has that:
//! as Linux does it.
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use vm_memory::{AtomicInteger, VolatileMemory, VolatileSlice};
use vm_virtio::{Features, QueueConfig};

use super::area;
use crate::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, PACKED_AVAIL, PACKED_USED};
use crate::{Buf, RingLayout, TestRam};

/// `NO_NOTIFY` and `NO_INTERRUPT` of a split ring (2.7.7, 2.7.10).
const SUPPRESS: u16 = 1;
// Flags of the event suppression structures (2.8.10).
const EVENTS_ON: u16 = 0;
const EVENTS_OFF: u16 = 1;
const EVENTS_AT: u16 = 2;

/// Descriptors of the ring that a chain takes.
pub(super) fn descriptors(chain: &[Buf], features: Features) -> usize {
    if features.contains(Features::INDIRECT_DESC) { 1 } else { chain.len() }
}

/// What a descriptor of the ring says, but for what the layouts say differently.
#[derive(Clone, Copy)]
struct Element {
    addr: u64,
    len: u32,
    flags: u16,
}

pub(super) fn field<'a, T: AtomicInteger>(area: &'a VolatileSlice<'_>, offset: usize) -> &'a T {
    area.get_atomic_ref(offset).expect("a field of the ring")
}

/// 2.7.10, 2.8.10: whether `event` was passed on the way from `old` to `new`.
pub(super) fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// 2.8.10: the same for a structure of a packed ring, whose other side has gone `by` descriptors and is at `now`.
pub(super) fn packed_passed(event: &AtomicU32, size: u16, (now, wrap): (u16, bool), by: u16) -> bool {
    let event = u32::from_le(event.load(Ordering::Relaxed));
    let (at, flags) = (event as u16, (event >> 16) as u16);
    if flags != EVENTS_AT {
        return flags != EVENTS_OFF;
    }
    let mut index = at & !(1 << 15);
    if (at >> 15 == 1) != wrap {
        index = index.wrapping_sub(size);
    }
    passed(index, now, now.wrapping_sub(by))
}

/// Bytes of a ring's areas: descriptors, driver's, device's (2.7, 2.8).
pub(super) fn lengths(layout: RingLayout, size: u16) -> [u64; 3] {
    let n = u64::from(size);
    match layout {
        RingLayout::Split => [16 * n, 6 + 2 * n, 6 + 8 * n],
        RingLayout::Packed => [16 * n, 4, 4],
    }
}

/// Second half of a descriptor in the split layout, and in both layouts' tables.
fn split_word(len: u32, flags: u16, next: u16) -> u64 {
    u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48
}

fn packed_word(len: u32, id: u16, flags: u16) -> u64 {
    u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48
}

pub(super) struct FastRing<'m> {
    layout: Layout<'m>,
    /// By slot: the element that stands for an indirect table.
    tables: Vec<Option<Element>>,
    /// Descriptors that each slot has to itself.
    each: u16,
    scratch: Vec<Element>,
}

enum Layout<'m> {
    Split(Split<'m>),
    Packed(Packed<'m>),
}

impl<'m> FastRing<'m> {
    /// A ring that is fresh in memory.
    pub(super) fn new(
        ram: &'m TestRam,
        layout: RingLayout,
        config: &QueueConfig,
        features: Features,
        chains: &[Vec<Buf>],
    ) -> FastRing<'m> {
        let each = chains.iter().map(|chain| descriptors(chain, features)).max().unwrap_or(1) as u16;
        let tables = chains
            .iter()
            .map(|chain| {
                let wanted = chain.len() > 1 && features.contains(Features::INDIRECT_DESC);
                wanted.then(|| table(ram, layout, chain))
            })
            .collect();
        let event_idx = features.contains(Features::EVENT_IDX);
        let layout = match layout {
            RingLayout::Split => Layout::Split(Split::new(ram, config, event_idx)),
            RingLayout::Packed => Layout::Packed(Packed::new(ram, config, event_idx, chains.len())),
        };
        FastRing { layout, tables, each, scratch: Vec::new() }
    }

    /// Puts the request of a slot into the ring.
    pub(super) fn push(&mut self, slot: usize, chain: &[Buf]) {
        self.scratch.clear();
        match self.tables.get(slot) {
            Some(Some(table)) => self.scratch.push(*table),
            _ => self.scratch.extend(chain.iter().map(element)),
        }
        let slot = slot as u16;
        match &mut self.layout {
            Layout::Split(ring) => ring.push(slot * self.each, &self.scratch),
            Layout::Packed(ring) => ring.push(slot, &self.scratch),
        }
    }

    /// Makes visible what was pushed.
    pub(super) fn publish(&mut self) {
        if let Layout::Split(ring) = &mut self.layout {
            field::<AtomicU16>(&ring.avail, 2).store(ring.next_avail.to_le(), Ordering::Release);
        }
    }

    /// Whether the back-end wants to hear of what was published since the last call.
    pub(super) fn kick_wanted(&mut self) -> bool {
        fence(Ordering::SeqCst);
        match &mut self.layout {
            Layout::Split(ring) => ring.kick_wanted(),
            Layout::Packed(ring) => ring.kick_wanted(),
        }
    }

    /// The slot of the next used request, and the bytes written.
    pub(super) fn next_used(&mut self) -> Result<Option<(usize, u32)>, String> {
        match &mut self.layout {
            Layout::Split(ring) => {
                let Some((head, len)) = ring.next_used() else { return Ok(None) };
                let slot = head / u32::from(self.each);
                if head % u32::from(self.each) != 0 {
                    return Err(format!("used entry names descriptor {head}, which begins no chain"));
                }
                Ok(Some((slot as usize, len)))
            }
            Layout::Packed(ring) => ring.next_used(),
        }
    }

    /// Asks for an interrupt. Whether something is used by now: then there is none to wait for.
    pub(super) fn arm(&mut self) -> bool {
        match &mut self.layout {
            Layout::Split(ring) => {
                match ring.event_idx {
                    true => ring.store_used_event(ring.last_used),
                    false => field::<AtomicU16>(&ring.avail, 0).store(0, Ordering::Relaxed),
                }
                fence(Ordering::SeqCst);
                ring.used_idx() != ring.last_used
            }
            Layout::Packed(ring) => {
                let at = ring.last_used | u16::from(ring.used_wrap) << 15;
                let flags = if ring.event_idx { EVENTS_AT } else { EVENTS_ON };
                ring.suppress(at, flags);
                fence(Ordering::SeqCst);
                ring.peek().is_some()
            }
        }
    }

    /// The interrupt came. An event index is passed only once; flags would ask for more.
    pub(super) fn woke(&mut self) {
        match &mut self.layout {
            Layout::Split(ring) if !ring.event_idx => {
                field::<AtomicU16>(&ring.avail, 0).store(SUPPRESS.to_le(), Ordering::Relaxed);
            }
            Layout::Packed(ring) if !ring.event_idx => ring.suppress(0, EVENTS_OFF),
            _ => {}
        }
    }
}

fn element(buf: &Buf) -> Element {
    Element { addr: buf.addr.0, len: buf.len, flags: if buf.writable { DESC_WRITE } else { 0 } }
}

/// Writes the indirect table of a chain.
fn table(ram: &TestRam, layout: RingLayout, chain: &[Buf]) -> Element {
    let len = 16 * chain.len() as u32;
    let addr = ram.alloc(u64::from(len), 16);
    let area = area(ram, addr, u64::from(len));
    for (at, buf) in (0u16..).zip(chain) {
        let Element { addr, len, flags } = element(buf);
        let last = usize::from(at) + 1 == chain.len();
        let word = match layout {
            RingLayout::Split if last => split_word(len, flags, 0),
            RingLayout::Split => split_word(len, flags | DESC_NEXT, at + 1),
            RingLayout::Packed => packed_word(len, 0, flags),
        };
        write_desc(&area, at, addr, word, Ordering::Relaxed);
    }
    Element { addr: addr.0, len, flags: DESC_INDIRECT }
}

fn write_desc(table: &VolatileSlice<'_>, at: u16, addr: u64, word: u64, order: Ordering) {
    field::<AtomicU64>(table, usize::from(at) * 16).store(addr.to_le(), Ordering::Relaxed);
    field::<AtomicU64>(table, usize::from(at) * 16 + 8).store(word.to_le(), order);
}

struct Split<'m> {
    desc: VolatileSlice<'m>,
    avail: VolatileSlice<'m>,
    used: VolatileSlice<'m>,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    /// `next_avail` at the last decision about a kick.
    kick_mark: u16,
    last_used: u16,
}

impl<'m> Split<'m> {
    fn new(ram: &'m TestRam, config: &QueueConfig, event_idx: bool) -> Split<'m> {
        let [desc, avail, used] = lengths(RingLayout::Split, config.size);
        Split {
            desc: area(ram, config.desc, desc),
            avail: area(ram, config.driver, avail),
            used: area(ram, config.device, used),
            size: config.size,
            event_idx,
            next_avail: 0,
            kick_mark: 0,
            last_used: 0,
        }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    fn push(&mut self, head: u16, elements: &[Element]) {
        for (at, element) in (head..).zip(elements) {
            let last = usize::from(at - head) + 1 == elements.len();
            let (flags, next) = if last { (0, 0) } else { (DESC_NEXT, at + 1) };
            let word = split_word(element.len, element.flags | flags, next);
            write_desc(&self.desc, at, element.addr, word, Ordering::Relaxed);
        }
        let at = 4 + 2 * self.slot(self.next_avail);
        field::<AtomicU16>(&self.avail, at).store(head.to_le(), Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    fn kick_wanted(&mut self) -> bool {
        let old = std::mem::replace(&mut self.kick_mark, self.next_avail);
        if old == self.next_avail {
            return false;
        }
        let load = |offset| u16::from_le(field::<AtomicU16>(&self.used, offset).load(Ordering::Relaxed));
        if self.event_idx {
            return passed(load(4 + 8 * usize::from(self.size)), self.next_avail, old);
        }
        load(0) & SUPPRESS == 0
    }

    fn used_idx(&self) -> u16 {
        u16::from_le(field::<AtomicU16>(&self.used, 2).load(Ordering::Acquire))
    }

    fn store_used_event(&self, event: u16) {
        let at = 4 + 2 * usize::from(self.size);
        field::<AtomicU16>(&self.avail, at).store(event.to_le(), Ordering::Relaxed);
    }

    fn next_used(&mut self) -> Option<(u32, u32)> {
        if self.used_idx() == self.last_used {
            return None;
        }
        let at = 4 + 8 * self.slot(self.last_used);
        let load = |offset| u32::from_le(field::<AtomicU32>(&self.used, offset).load(Ordering::Relaxed));
        self.last_used = self.last_used.wrapping_add(1);
        Some((load(at), load(at + 4)))
    }
}

struct Packed<'m> {
    desc: VolatileSlice<'m>,
    driver: VolatileSlice<'m>,
    device: VolatileSlice<'m>,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    avail_wrap: bool,
    /// Descriptors since the last decision about a kick.
    added: u16,
    last_used: u16,
    used_wrap: bool,
    /// By slot: the descriptors that its chain takes.
    lengths: Vec<u16>,
}

impl<'m> Packed<'m> {
    fn new(ram: &'m TestRam, config: &QueueConfig, event_idx: bool, slots: usize) -> Packed<'m> {
        let [desc, driver, device] = lengths(RingLayout::Packed, config.size);
        Packed {
            desc: area(ram, config.desc, desc),
            driver: area(ram, config.driver, driver),
            device: area(ram, config.device, device),
            size: config.size,
            event_idx,
            next_avail: 0,
            avail_wrap: true,
            added: 0,
            last_used: 0,
            used_wrap: true,
            lengths: vec![0; slots],
        }
    }

    fn push(&mut self, id: u16, elements: &[Element]) {
        let first = self.next_avail;
        let mut first_word = 0;
        for (n, element) in elements.iter().enumerate() {
            let next = if n + 1 == elements.len() { 0 } else { DESC_NEXT };
            let turn = if self.avail_wrap { PACKED_AVAIL } else { PACKED_USED };
            let word = packed_word(element.len, id, element.flags | next | turn);
            if n == 0 {
                first_word = word;
                field::<AtomicU64>(&self.desc, usize::from(first) * 16)
                    .store(element.addr.to_le(), Ordering::Relaxed);
            } else {
                write_desc(&self.desc, self.next_avail, element.addr, word, Ordering::Relaxed);
            }
            (self.next_avail, self.avail_wrap) = self.step(self.next_avail, self.avail_wrap, 1);
        }
        self.added += elements.len() as u16;
        if let Some(length) = self.lengths.get_mut(usize::from(id)) {
            *length = elements.len() as u16;
        }
        // 2.8.20: the first descriptor becomes available last.
        field::<AtomicU64>(&self.desc, usize::from(first) * 16 + 8)
            .store(first_word.to_le(), Ordering::Release);
    }

    fn step(&self, index: u16, wrap: bool, by: u16) -> (u16, bool) {
        if index + by >= self.size { (index + by - self.size, !wrap) } else { (index + by, wrap) }
    }

    fn kick_wanted(&mut self) -> bool {
        let added = std::mem::take(&mut self.added);
        if added == 0 {
            return false;
        }
        packed_passed(field(&self.device, 0), self.size, (self.next_avail, self.avail_wrap), added)
    }

    fn suppress(&self, at: u16, flags: u16) {
        let word = u32::from(at) | u32::from(flags) << 16;
        field::<AtomicU32>(&self.driver, 0).store(word.to_le(), Ordering::Relaxed);
    }

    fn peek(&self) -> Option<u64> {
        let word =
            field::<AtomicU64>(&self.desc, usize::from(self.last_used) * 16 + 8).load(Ordering::Acquire);
        let word = u64::from_le(word);
        let flags = (word >> 48) as u16;
        let bits = (flags & PACKED_AVAIL != 0, flags & PACKED_USED != 0);
        (bits == (self.used_wrap, self.used_wrap)).then_some(word)
    }

    fn next_used(&mut self) -> Result<Option<(usize, u32)>, String> {
        let Some(word) = self.peek() else { return Ok(None) };
        let id = usize::from((word >> 32) as u16);
        let length = self.lengths.get(id).copied().filter(|length| *length > 0);
        let length =
            length.ok_or_else(|| format!("used descriptor names buffer {id}, which there is not"))?;
        (self.last_used, self.used_wrap) = self.step(self.last_used, self.used_wrap, length);
        Ok(Some((id, word as u32)))
    }
}
