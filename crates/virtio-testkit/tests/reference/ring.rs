//! Rings of both layouts, one buffer at a time.
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::{Backend, End, NEEDS_RESET, bit};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

#[derive(Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    /// Addresses of the front-end: descriptors, driver's area, device's area.
    pub(super) user: [u64; 3],
    pub(super) started: bool,
    pub(super) enabled: bool,
    pub(super) broken: bool,
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
    /// Split: free-running indices. Packed: slot, and the wrap counter beside it.
    avail: (u16, bool),
    used: (u16, bool),
}

fn write_event(file: &Option<OwnedFd>) {
    if let Some(file) = file {
        let _ = rustix::io::write(file, &1u64.to_ne_bytes());
    }
}

impl Ring {
    pub(super) fn signal(&self) {
        write_event(&self.call);
    }

    pub(super) fn set_base(&mut self, base: u32, packed: bool) {
        let half = |half: u16| (half & 0x7fff, half >> 15 == 1);
        if packed {
            (self.avail, self.used) = (half(base as u16), half((base >> 16) as u16));
        } else {
            (self.avail, self.used) = ((base as u16, true), (base as u16, true));
        }
    }

    pub(super) fn base(&self, packed: bool) -> u32 {
        let half = |(at, wrap): (u16, bool)| u32::from(at) | u32::from(wrap) << 15;
        if packed { half(self.avail) | half(self.used) << 16 } else { self.avail.0.into() }
    }

    fn ahead(&self, (at, wrap): (u16, bool), by: u16) -> (u16, bool) {
        let to = at + by;
        if to >= self.size { (to - self.size, !wrap) } else { (to, wrap) }
    }
}

#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    /// Split: flags and next. Packed: id and flags, swapped to the same order by the reader.
    flags: u16,
    other: u16,
}

struct Chain {
    id: u16,
    slots: u16,
    elements: Vec<Desc>,
}

impl Backend {
    fn packed(&self) -> bool {
        self.has(bit::PACKED)
    }

    /// Addresses of the areas: descriptors, driver's, device's.
    fn areas(&self, queue: usize) -> [u64; 3] {
        self.rings[queue].user.map(|user| self.memory.guest(user).unwrap_or(u64::MAX))
    }

    fn logging(&self) -> bool {
        self.has(bit::LOG_ALL) && !self.is("log-marks-writes")
    }

    fn desc(&self, table: u64, index: u16) -> Desc {
        let bytes = self.memory.read(table.saturating_add(16 * u64::from(index)), 16);
        let number = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let (third, fourth) = (number(12, 2) as u16, number(14, 2) as u16);
        let (flags, other) = if self.packed() { (fourth, third) } else { (third, fourth) };
        Desc { addr: number(0, 8), len: number(8, 4) as u32, flags, other }
    }

    /// Split: the used index is where the former device left it.
    pub(super) fn read_used_index(&mut self, queue: usize) {
        let used = self.areas(queue)[2];
        if !self.packed() && self.memory.has(used, 4) {
            self.rings[queue].used.0 = self.memory.load16(used + 2);
        }
    }

    pub(super) fn available(&self, queue: usize) -> bool {
        let ring = &self.rings[queue];
        let [table, driver, _] = self.areas(queue);
        if self.packed() {
            let flags = self.desc(table, ring.avail.0).flags;
            (flags & AVAIL != 0) == ring.avail.1 && (flags & USED != 0) != ring.avail.1
        } else {
            self.memory.load16(driver.wrapping_add(2)) != ring.avail.0
        }
    }

    /// Serves a ring until it is empty, then asks to be kicked.
    pub(super) fn work(&mut self, queue: usize) -> Result<(), End> {
        if !self.driver_ready() {
            return Ok(());
        }
        let usable = |ring: &Ring| ring.started && ring.enabled && !ring.broken && ring.size > 0;
        let mut served = 0;
        while usable(&self.rings[queue]) && self.areas(queue).iter().all(|area| *area != u64::MAX) {
            if self.is("full-ring") && served == 4 {
                return Ok(());
            }
            if let Some(page) = self.missing(queue) {
                self.miss(page);
                return Ok(());
            }
            let mut batch = Vec::new();
            while self.available(queue) {
                match self.pop(queue) {
                    Ok(chain) => batch.push(chain),
                    Err(_) if self.is("fault-random") => return Err(End::Everything),
                    // As if nothing was wrong: the broken chain is skipped.
                    Err(rule) if self.is(rule) => {
                        let id = self.rings[queue].avail.0;
                        self.skip(queue);
                        batch.push(Chain {
                            id: if self.packed() { 1 } else { id % 16 },
                            slots: 1,
                            elements: Vec::new(),
                        });
                    }
                    Err(_) => {
                        self.rings[queue].broken = true;
                        if self.is("fault-others-go-on") {
                            self.rings.iter_mut().for_each(|ring| ring.broken = true);
                        }
                        if self.is("fault-stays") {
                            self.rings[queue].broken = false;
                            self.skip(queue);
                        }
                        if !self.is("fault-needs-reset") {
                            self.status |= NEEDS_RESET;
                        }
                        write_event(&self.rings[queue].err);
                        break;
                    }
                }
                if !self.is("in-order") || !self.has(bit::IN_ORDER) {
                    break;
                }
            }
            if batch.is_empty() {
                if usable(&self.rings[queue]) {
                    self.arm(queue);
                    // What came in between was not kicked for.
                    if self.available(queue) {
                        continue;
                    }
                }
                break;
            }
            for chain in batch.into_iter().rev() {
                served += 1;
                self.serve_chain(queue, &chain);
            }
        }
        Ok(())
    }

    /// The first page that is needed for the next step and whose translation is not known.
    fn missing(&self, queue: usize) -> Option<u64> {
        self.memory.iotlb.as_ref()?;
        self.memory.missed.take();
        let (ring, [table, driver, device]) = (&self.rings[queue], self.areas(queue));
        let size = u64::from(ring.size);
        let lens = if self.packed() { [16 * size, 4, 4] } else { [16 * size, 6 + 2 * size, 6 + 8 * size] };
        for (area, len) in [table, driver, device].into_iter().zip(lens) {
            let _ = self.memory.has(area, len);
        }
        if self.memory.missed.get().is_none() && self.available(queue) {
            let at = ring.avail;
            if self.packed() {
                let _ = self.list(table, ring.size, at);
            } else {
                let head = self.memory.load16(driver + 4 + 2 * u64::from(at.0 % ring.size));
                let _ = self.walk(table, ring.size, head);
            }
        }
        self.memory.missed.take()
    }

    fn skip(&mut self, queue: usize) {
        let packed = self.packed();
        let ring = &mut self.rings[queue];
        ring.avail = if packed { ring.ahead(ring.avail, 1) } else { (ring.avail.0.wrapping_add(1), true) };
    }

    fn pop(&mut self, queue: usize) -> Result<Chain, &'static str> {
        let [table, driver, _] = self.areas(queue);
        let ring = &self.rings[queue];
        let (size, at) = (ring.size, ring.avail);
        if self.packed() {
            let chain = self.list(table, size, at)?;
            let ring = &mut self.rings[queue];
            ring.avail = ring.ahead(ring.avail, chain.slots);
            return Ok(chain);
        }
        if self.memory.load16(driver + 2).wrapping_sub(at.0) > size {
            return Err("fault-avail-index");
        }
        let head = self.memory.load16(driver + 4 + 2 * u64::from(at.0 % size));
        if head >= size {
            return Err("fault-head");
        }
        let elements = self.walk(table, size, head)?;
        if self.is("driver-areas-untouched") {
            self.memory.store16(driver + 4 + 2 * u64::from(at.0 % size), head ^ 1);
        }
        self.rings[queue].avail.0 = at.0.wrapping_add(1);
        Ok(Chain { id: head, slots: 1, elements })
    }

    /// An element, if it may follow the others.
    fn element(&self, desc: Desc, before: &[Desc]) -> Result<Desc, &'static str> {
        if desc.flags & WRITE == 0 && before.iter().any(|desc| desc.flags & WRITE != 0) {
            return Err("fault-order");
        }
        let len = u64::from(desc.len);
        if desc.addr.checked_add(len).is_none() {
            return Err("fault-address-wraps");
        }
        match self.memory.has(desc.addr, len) {
            true => Ok(desc),
            false if self.memory.begins_in(desc.addr) => Err("fault-beyond-region"),
            false => Err("fault-unmapped"),
        }
    }

    /// Checks a descriptor that refers to a table; how many descriptors that has.
    fn table(&self, desc: Desc, before: usize, size: u16) -> Result<u16, &'static str> {
        if !self.has(bit::INDIRECT) {
            return Err("fault-indirect-unasked");
        }
        if desc.flags & NEXT != 0 {
            return Err("fault-indirect-next");
        }
        if desc.len == 0 {
            return Err("fault-indirect-empty");
        }
        if !desc.len.is_multiple_of(16) {
            return Err("fault-indirect-odd");
        }
        if !self.memory.has(desc.addr, desc.len.into()) {
            return Err("fault-indirect-unmapped");
        }
        if before + desc.len as usize / 16 > usize::from(size) {
            return Err("fault-indirect-long");
        }
        Ok((desc.len / 16) as u16)
    }

    fn walk(&self, mut table: u64, size: u16, head: u16) -> Result<Vec<Desc>, &'static str> {
        let (mut elements, mut index, mut count, mut indirect): (Vec<Desc>, _, _, _) =
            (Vec::new(), head, size, false);
        loop {
            let desc = self.desc(table, index);
            let plain = self.is("indirect") || self.is("split-chain-ends-indirect") && !elements.is_empty();
            if desc.flags & INDIRECT != 0 && !plain {
                if indirect {
                    return Err("fault-indirect-nested");
                }
                count = self.table(desc, elements.len(), size)?;
                if desc.flags & WRITE != 0 && self.is("indirect-write-ignored") {
                    elements.push(desc);
                    return Ok(elements);
                }
                (table, index, indirect) = (desc.addr, 0, true);
                continue;
            }
            if elements.len() >= usize::from(size) {
                return Err(if indirect { "fault-indirect-loop" } else { "fault-loop" });
            }
            elements.push(self.element(desc, &elements)?);
            if desc.flags & NEXT == 0 {
                return Ok(elements);
            }
            if desc.other >= count {
                return Err(if indirect { "fault-indirect-range" } else { "fault-next" });
            }
            index = desc.other;
        }
    }

    fn list(&self, ring: u64, size: u16, start: (u16, bool)) -> Result<Chain, &'static str> {
        let mut elements = Vec::new();
        let mut slots = 0;
        let mut at = start;
        loop {
            let desc = self.desc(ring, at.0);
            let available = (desc.flags & AVAIL != 0) == at.1 && (desc.flags & USED != 0) != at.1;
            if !available {
                return Err("fault-list");
            }
            slots += 1;
            if desc.flags & INDIRECT != 0 && !self.is("indirect") {
                let count = self.table(desc, elements.len(), size)?;
                for index in 0..count {
                    let inner = self.desc(desc.addr, index);
                    elements.push(self.element(Desc { flags: inner.flags & WRITE, ..inner }, &elements)?);
                }
                return Ok(Chain { id: desc.other, slots, elements });
            }
            elements.push(self.element(desc, &elements)?);
            if desc.flags & NEXT == 0 {
                return Ok(Chain { id: desc.other, slots, elements });
            }
            if slots >= size {
                return Err("fault-loop");
            }
            at = if at.0 + 1 == size { (0, !at.1) } else { (at.0 + 1, at.1) };
        }
    }

    fn serve_chain(&mut self, queue: usize, chain: &Chain) {
        let readable: Vec<Desc> =
            chain.elements.iter().filter(|desc| desc.flags & WRITE == 0).copied().collect();
        let mut request = Vec::new();
        for (at, desc) in readable.iter().enumerate() {
            if at == 0 || !self.is("framing") {
                request.extend(self.memory.read(desc.addr, desc.len.min(4096) as usize));
            }
        }
        if let Some(first) = readable.first().filter(|_| self.is("readable-untouched")) {
            self.memory.write(first.addr, &[0xee], false);
        }
        let answer = self.answer(&request);
        let mut rest = answer.as_slice();
        let mut room = 0;
        for desc in chain.elements.iter().filter(|desc| desc.flags & WRITE != 0) {
            room += desc.len;
            let (piece, tail) = rest.split_at(rest.len().min(desc.len as usize));
            let piece = if self.is("length-written") { &piece[..piece.len() / 2] } else { piece };
            self.memory.write(desc.addr, piece, self.logging());
            if self.is("writes-within-buffers") {
                self.memory.write(desc.addr + u64::from(desc.len), &[0], false);
            }
            rest = tail;
        }
        let mut written = (answer.len() - rest.len()) as u32;
        if self.is("length-not-too-large") {
            written = room + 1;
        }
        self.push(queue, chain, written);
        if self.is("used-once") {
            self.push(queue, chain, written);
        }
    }

    fn push(&mut self, queue: usize, chain: &Chain, written: u32) {
        let [table, driver, device] = self.areas(queue);
        let late = self.is("entry-before-index");
        let pause = || std::thread::sleep(Duration::from_micros(500));
        let old = self.rings[queue].used;
        if self.packed() {
            let steps = if self.is("packed-lists") { 1 } else { chain.slots };
            let ring = &mut self.rings[queue];
            ring.used = ring.ahead(old, steps);
            let slot = table + 16 * u64::from(old.0);
            let flags = if old.1 { AVAIL | USED } else { 0 } | if written > 0 { WRITE } else { 0 };
            let entry: Vec<u8> = [&written.to_le_bytes()[..], &chain.id.to_le_bytes()].concat();
            if late {
                self.memory.store16(slot + 14, flags);
                pause();
            }
            self.memory.write(slot + 8, &entry, false);
            self.memory.store16(slot + 14, flags);
        } else {
            let ring = &mut self.rings[queue];
            ring.used.0 = old.0.wrapping_add(1);
            let (new, size) = (ring.used.0, ring.size);
            let entry: Vec<u8> = [u32::from(chain.id).to_le_bytes(), written.to_le_bytes()].concat();
            if late {
                self.memory.store16(device + 2, new);
                pause();
            }
            self.memory.write(device + 4 + 8 * u64::from(old.0 % size), &entry, false);
            self.memory.store16(device + 2, new);
        }
        if self.wants_interrupt(queue, driver, old) {
            self.rings[queue].signal();
        }
    }

    /// Whether the driver wants to hear of the buffers used since `old`.
    fn wants_interrupt(&self, queue: usize, driver: u64, old: (u16, bool)) -> bool {
        let ring = &self.rings[queue];
        let event_idx = self.has(bit::EVENT_IDX);
        match self.mutant {
            "notified" => return false,
            "not-notified" => return true,
            "not-notified-before-event" if event_idx => return true,
            _ => {}
        }
        let late = u16::from(self.is("notified-at-event"));
        if self.packed() {
            let (event, flags) = (self.memory.load16(driver), self.memory.load16(driver + 2));
            let double = 2 * u32::from(ring.size);
            let place = |at: u16, wrap: bool| u32::from(at) + if wrap { 0 } else { u32::from(ring.size) };
            return match flags {
                0 => true,
                2 => {
                    let (old, new) = (place(old.0, old.1), place(ring.used.0, ring.used.1));
                    let event = place(event & 0x7fff, event >> 15 == 1) + u32::from(late);
                    (event + double - old) % double < (new + double - old) % double
                }
                _ => false,
            };
        }
        let no_interrupt = self.memory.load16(driver) & 1 != 0;
        if event_idx || self.is("split-used-event-ignored") {
            let event = self.memory.load16(driver + 4 + 2 * u64::from(ring.size)).wrapping_add(late);
            let passed = event.wrapping_sub(old.0) < ring.used.0.wrapping_sub(old.0);
            return passed && !(no_interrupt && self.is("split-avail-flags-ignored"));
        }
        !no_interrupt
    }

    /// Asks for the next kick.
    fn arm(&mut self, queue: usize) {
        let [_, _, device] = self.areas(queue);
        let ring = &self.rings[queue];
        let event_idx = self.has(bit::EVENT_IDX);
        if self.is("kicks-wanted") {
            if !event_idx {
                self.memory.store16(device + if self.packed() { 2 } else { 0 }, 1);
            }
            return;
        }
        if self.packed() {
            let event = ring.avail.0 | u16::from(ring.avail.1) << 15;
            self.memory.store16(device, if event_idx { event } else { 0 });
            let flags = if event_idx { 2 } else { 0 };
            self.memory.store16(device + 2, if self.is("suppression-legal") { 3 } else { flags });
        } else if event_idx {
            self.memory.store16(device + 4 + 8 * u64::from(ring.size), ring.avail.0);
        }
        if self.is("suppression-legal") && !self.packed() {
            self.memory.store16(device, 2);
        }
    }
}
