//! The split format (2.7): descriptor table, available ring, used ring.
//!
//! Descriptors are handed out in a scattered order, and the elements of an indirect table are linked in a scattered
//! order too, unless `IN_ORDER` demands otherwise: a device that assumes neighbours is found out.
use std::sync::atomic::{Ordering, fence};

use vm_memory::GuestAddress;
use vm_virtio::{Features, QueueConfig, RingPos};

use super::{DESC_NEXT, Entry, Interrupts, Layout, Placed, UsedEntry};
use crate::{TestRam, Violation};

/// A descriptor of the table (2.7.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SplitDesc {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// `NEXT`, `WRITE`, `INDIRECT`.
    pub flags: u16,
    /// Index of the next descriptor, if `NEXT`.
    pub next: u16,
}

impl SplitDesc {
    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A split ring in memory. The public methods read and write its fields as they are, without any check.
pub struct SplitRing {
    ram: TestRam,
    size: u16,
    features: Features,
    desc: GuestAddress,
    avail: GuestAddress,
    used: GuestAddress,
    /// What the driver wrote to the table and to the available ring: nobody else may.
    table_shadow: Vec<[u8; 16]>,
    avail_shadow: Vec<u16>,
    flags_shadow: u16,
    event_shadow: u16,
    free: Vec<u16>,
    /// With `IN_ORDER`: the descriptor that comes next, and how many are free.
    in_order: Option<(u16, usize)>,
    /// Where the next chain goes in the available ring, and what `avail.idx` says.
    next_avail: u16,
    avail_idx: u16,
    /// `avail.idx` at the last decision about a kick.
    kick_mark: u16,
    last_used: u16,
}

impl SplitRing {
    pub(super) fn new(ram: &TestRam, size: u16, features: Features, start: u16) -> SplitRing {
        assert!(size.is_power_of_two() && size <= 32768, "2.7: a power of two up to 32768");
        let n = u64::from(size);
        // The least alignment that 2.7 asks for, not more.
        let desc = ram.alloc(16 + 16 * n, 16).0 + 16;
        let avail = ram.alloc(2 + 6 + 2 * n, 2).0 + 2;
        let used = ram.alloc(4 + 6 + 8 * n, 4).0 + 4;
        let mut ring = SplitRing {
            ram: ram.clone(),
            size,
            features,
            desc: GuestAddress(desc),
            avail: GuestAddress(avail),
            used: GuestAddress(used),
            table_shadow: Vec::new(),
            avail_shadow: Vec::new(),
            flags_shadow: 0,
            event_shadow: 0,
            free: Vec::new(),
            in_order: None,
            next_avail: start,
            avail_idx: start,
            kick_mark: start,
            last_used: start,
        };
        ring.restart(start);
        ring
    }

    pub(super) fn restart(&mut self, start: u16) {
        let n = usize::from(self.size);
        self.ram.write(self.desc, &vec![0; 16 * n]);
        self.ram.write(self.avail, &vec![0; 6 + 2 * n]);
        self.ram.write(self.used, &vec![0; 6 + 8 * n]);
        self.table_shadow = vec![[0; 16]; n];
        self.avail_shadow = vec![0; n];
        (self.flags_shadow, self.event_shadow) = (0, 0);
        // An odd factor permutes the indices of a table whose size is a power of two.
        self.free = (0..self.size).map(|i| i.wrapping_mul(5).wrapping_add(3) & (self.size - 1)).collect();
        self.in_order = self.features.contains(Features::IN_ORDER).then_some((0, n));
        (self.next_avail, self.avail_idx, self.kick_mark, self.last_used) = (start, start, start, start);
        self.set_avail_idx(start);
        self.set_used_idx(start);
    }

    pub(super) fn config(&self) -> QueueConfig {
        QueueConfig { size: self.size, desc: self.desc, driver: self.avail, device: self.used }
    }

    fn event_idx(&self) -> bool {
        self.features.contains(Features::EVENT_IDX)
    }

    fn in_avail(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.avail.0 + offset)
    }

    fn in_used(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.used.0 + offset)
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index % self.size)
    }

    /// Reads a descriptor of the table.
    pub fn desc(&self, index: u16) -> SplitDesc {
        let mut bytes = [0; 16];
        self.ram.read(GuestAddress(self.desc.0 + 16 * self.slot(index)), &mut bytes);
        let field = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        SplitDesc {
            addr: field(0, 8),
            len: field(8, 4) as u32,
            flags: field(12, 2) as u16,
            next: field(14, 2) as u16,
        }
    }

    /// Writes a descriptor of the table.
    pub fn set_desc(&mut self, index: u16, desc: SplitDesc) {
        let slot = self.slot(index);
        self.table_shadow[slot as usize] = desc.to_bytes();
        self.ram.write(GuestAddress(self.desc.0 + 16 * slot), &desc.to_bytes());
    }

    /// Writes `avail.flags` (1: `NO_INTERRUPT`).
    pub fn set_avail_flags(&mut self, flags: u16) {
        self.flags_shadow = flags;
        self.ram.store_u16(self.in_avail(0), flags);
    }

    /// Writes `avail.idx`.
    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        self.next_avail = idx;
        self.ram.store_u16(self.in_avail(2), idx);
    }

    /// What the driver last wrote to `avail.idx`.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Writes the entry of the available ring for a free-running index.
    pub fn set_avail_entry(&mut self, index: u16, head: u16) {
        let slot = self.slot(index);
        self.avail_shadow[slot as usize] = head;
        self.ram.store_u16(self.in_avail(4 + 2 * slot), head);
    }

    /// Writes `used_event`.
    pub fn set_used_event(&mut self, index: u16) {
        self.event_shadow = index;
        self.ram.store_u16(self.in_avail(4 + 2 * u64::from(self.size)), index);
    }

    /// Reads `used.flags` (1: `NO_NOTIFY`).
    pub fn used_flags(&self) -> u16 {
        self.ram.load_u16(self.in_used(0))
    }

    /// Reads `used.idx`.
    pub fn used_idx(&self) -> u16 {
        self.ram.load_u16(self.in_used(2))
    }

    /// Writes `used.idx`, which only a device may.
    pub fn set_used_idx(&mut self, idx: u16) {
        self.ram.store_u16(self.in_used(2), idx);
    }

    /// Reads `(id, len)` of the used ring at a free-running index.
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = 4 + 8 * self.slot(index);
        (self.ram.load_u32(self.in_used(at)), self.ram.load_u32(self.in_used(at + 4)))
    }

    /// Reads `avail_event`.
    pub fn avail_event(&self) -> u16 {
        self.ram.load_u16(self.in_used(4 + 8 * u64::from(self.size)))
    }

    pub(super) fn glance(&self) -> Option<(u32, u32)> {
        (self.used_idx() != self.last_used).then(|| self.used_entry(self.last_used))
    }

    fn check_used_flags(&self) -> Result<u16, Violation> {
        let flags = self.used_flags();
        let (legal, rule) = if self.event_idx() {
            (flags == 0, "with EVENT_IDX used.flags is 0 (2.7.10.2)")
        } else {
            (flags <= 1, "without EVENT_IDX used.flags is 0 or 1 (2.7.10.2)")
        };
        if legal { Ok(flags) } else { Err(Violation::new(rule, format!("{flags:#x}"))) }
    }

    fn next_descriptor(&mut self) -> u16 {
        match &mut self.in_order {
            Some((next, free)) => {
                let index = *next;
                *next = (index + 1) % self.size;
                *free -= 1;
                index
            }
            None => self.free.pop().expect("room was checked"),
        }
    }
}

/// Whether `event` is one of the indices `old..new` of a ring whose index counts modulo 65536.
fn passes(event: u16, old: u16, new: u16) -> bool {
    event.wrapping_sub(old) < new.wrapping_sub(old)
}

impl Layout for SplitRing {
    fn free_slots(&self) -> usize {
        self.in_order.map_or(self.free.len(), |(_, free)| free)
    }

    fn place(&mut self, entries: &[Entry]) -> Placed {
        let slots: Vec<u16> = entries.iter().map(|_| self.next_descriptor()).collect();
        for (i, entry) in entries.iter().enumerate() {
            let (flags, next) = match slots.get(i + 1) {
                Some(next) => (entry.flags | DESC_NEXT, *next),
                None => (entry.flags, 0),
            };
            self.set_desc(slots[i], SplitDesc { addr: entry.addr, len: entry.len, flags, next });
        }
        let id = slots[0];
        let at = self.next_avail;
        self.set_avail_entry(at, id);
        self.next_avail = at.wrapping_add(1);
        Placed { id, slots }
    }

    fn table(&self, entries: &[Entry]) -> Vec<u8> {
        let n = entries.len();
        // Where element i lies: the first at 0; the others backwards, unless IN_ORDER wants them in sequence.
        let place = |i: usize| if i == 0 || self.in_order.is_some() { i } else { n - i };
        let mut bytes = vec![0; 16 * n];
        for (i, entry) in entries.iter().enumerate() {
            let (flags, next) =
                if i + 1 < n { (entry.flags | DESC_NEXT, place(i + 1) as u16) } else { (entry.flags, 0) };
            let desc = SplitDesc { addr: entry.addr, len: entry.len, flags, next };
            bytes[16 * place(i)..][..16].copy_from_slice(&desc.to_bytes());
        }
        bytes
    }

    fn publish(&mut self) {
        // The store releases: descriptors and entries are visible before the index (2.7.13.3.1).
        self.set_avail_idx(self.next_avail);
    }

    fn kick_wanted(&mut self) -> Result<bool, Violation> {
        // The index is visible before suppression is read (2.7.13.4.1).
        fence(Ordering::SeqCst);
        let flags = self.check_used_flags()?;
        let (old, new) = (std::mem::replace(&mut self.kick_mark, self.avail_idx), self.avail_idx);
        Ok(old != new && if self.event_idx() { passes(self.avail_event(), old, new) } else { flags == 0 })
    }

    fn peek_used(&self, in_flight: usize) -> Result<Option<UsedEntry>, Violation> {
        fence(Ordering::SeqCst);
        self.check_used_flags()?;
        let published = self.used_idx().wrapping_sub(self.last_used);
        if usize::from(published) > in_flight {
            return Err(Violation::new(
                "used.idx advances by the buffers that were used (2.7.8)",
                format!("{published} entries for {in_flight} buffers in flight"),
            ));
        }
        if published == 0 {
            return Ok(None);
        }
        let (id, len) = self.used_entry(self.last_used);
        Ok(Some(UsedEntry { id, len, published: Some(published) }))
    }

    fn pass_used(&mut self, chains: &[Placed]) -> Result<bool, Violation> {
        let old = self.last_used;
        self.last_used = old.wrapping_add(chains.len() as u16);
        for slot in chains.iter().flat_map(|chain| &chain.slots) {
            if self.desc(*slot).to_bytes() != self.table_shadow[usize::from(*slot)] {
                return Err(table_changed(*slot));
            }
        }
        Ok(if self.event_idx() {
            passes(self.event_shadow, old, self.last_used)
        } else {
            self.flags_shadow == 0
        })
    }

    fn release(&mut self, placed: &Placed) {
        match &mut self.in_order {
            Some((_, free)) => *free += placed.slots.len(),
            None => self.free.extend(&placed.slots),
        }
    }

    fn set_interrupts(&mut self, wanted: Interrupts) {
        if self.event_idx() {
            // "Never" is half of the index's range away: moved on with every call, it is not reached.
            let ahead = match wanted {
                Interrupts::Always => 0,
                Interrupts::Never => 0x8000,
                Interrupts::After(n) => n.saturating_sub(1),
            };
            self.set_used_event(self.last_used.wrapping_add(ahead));
        } else {
            self.set_avail_flags(u16::from(wanted == Interrupts::Never));
        }
        // Whoever looks at the used ring now has told the device before (2.7.14).
        fence(Ordering::SeqCst);
    }

    fn check_untouched(&self) -> Result<(), Violation> {
        for index in 0..self.size {
            if self.desc(index).to_bytes() != self.table_shadow[usize::from(index)] {
                return Err(table_changed(index));
            }
        }
        let ring = (0..self.size).map(|i| self.ram.load_u16(self.in_avail(4 + 2 * u64::from(i))));
        let event = self.ram.load_u16(self.in_avail(4 + 2 * u64::from(self.size)));
        let same = ring.eq(self.avail_shadow.iter().copied())
            && event == self.event_shadow
            && self.ram.load_u16(self.in_avail(0)) == self.flags_shadow
            && self.ram.load_u16(self.in_avail(2)) == self.avail_idx;
        if same {
            Ok(())
        } else {
            Err(Violation::new("the available ring is written by the driver only (2.7.6)", "it changed"))
        }
    }

    fn first_unused(&self) -> RingPos {
        RingPos { index: self.last_used, wrap: true }
    }
}

fn table_changed(index: u16) -> Violation {
    Violation::new(
        "a device does not write the descriptor table (2.7.5.1)",
        format!("descriptor {index} changed"),
    )
}
