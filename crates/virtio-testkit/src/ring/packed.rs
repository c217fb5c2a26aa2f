//! The packed format (2.8): one ring of descriptors that both sides write, and an event suppression structure each.
//!
//! Positions are counted modulo twice the ring: below the size the wrap counter is 1, above it 0. Buffer ids are
//! scattered, so that none equals its slot by chance.
use std::sync::atomic::{Ordering, fence};

use vm_memory::GuestAddress;
use vm_virtio::{Features, QueueConfig, RingPos};

use super::{DESC_NEXT, DESC_WRITE, Entry, Interrupts, Layout, Placed, UsedEntry};
use crate::{TestRam, Violation};

/// `AVAIL` (2.8.1).
pub const PACKED_AVAIL: u16 = 1 << 7;
/// `USED` (2.8.1).
pub const PACKED_USED: u16 = 1 << 15;

const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;
/// What an indirect table holds where a device must not look: id and reserved flags (2.8.7).
const IGNORED_ID: u16 = 0xdead;

/// A descriptor of the ring (2.8.13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PackedDesc {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Buffer id.
    pub id: u16,
    /// `NEXT`, `WRITE`, `INDIRECT`, `AVAIL`, `USED`.
    pub flags: u16,
}

impl PackedDesc {
    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.id.to_le_bytes());
        bytes[14..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; 16]) -> PackedDesc {
        let field = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        PackedDesc {
            addr: field(0, 8),
            len: field(8, 4) as u32,
            id: field(12, 2) as u16,
            flags: field(14, 2) as u16,
        }
    }
}

/// A packed ring in memory. The public methods read and write its fields as they are, without any check.
pub struct PackedRing {
    ram: TestRam,
    size: u16,
    features: Features,
    desc: GuestAddress,
    driver: GuestAddress,
    device: GuestAddress,
    /// What the ring has to look like: what the driver wrote, and the used descriptors that were taken.
    shadow: Vec<[u8; 16]>,
    driver_shadow: u32,
    ids: Vec<u16>,
    free: usize,
    /// First descriptors whose flags are held back until [`Layout::publish`].
    staged: Vec<(u16, u16)>,
    /// Positions, modulo twice the ring.
    next_avail: u32,
    kick_mark: u32,
    next_used: u32,
}

impl PackedRing {
    pub(super) fn new(ram: &TestRam, size: u16, features: Features, start: RingPos) -> PackedRing {
        assert!((1..=32768).contains(&size), "2.8: 1 to 32768 entries");
        let desc = ram.alloc(16 + 16 * u64::from(size), 16).0 + 16;
        let mut ring = PackedRing {
            ram: ram.clone(),
            size,
            features,
            desc: GuestAddress(desc),
            driver: GuestAddress(ram.alloc(8, 4).0 + 4),
            device: GuestAddress(ram.alloc(8, 4).0 + 4),
            shadow: Vec::new(),
            driver_shadow: 0,
            ids: Vec::new(),
            free: 0,
            staged: Vec::new(),
            next_avail: 0,
            kick_mark: 0,
            next_used: 0,
        };
        ring.restart(start);
        ring
    }

    pub(super) fn restart(&mut self, start: RingPos) {
        // A ring that was used up to `start`: slots in front of it carry the current wrap as used, the others the
        // former one. For the start of a fresh ring that is all zero (2.8.13).
        let used = |wrap: bool| if wrap { PACKED_AVAIL | PACKED_USED } else { 0 };
        self.shadow = vec![[0; 16]; usize::from(self.size)];
        for slot in 0..self.size {
            let wrap = (slot < start.index) == start.wrap;
            self.set_desc(slot, PackedDesc { flags: used(wrap), ..PackedDesc::default() });
        }
        self.set_driver_event(0, EVENT_ENABLE);
        self.ram.store_u32(self.device, 0);
        self.ids = (0..self.size).map(|id| (id + self.size / 2) % self.size).collect();
        self.free = usize::from(self.size);
        self.staged.clear();
        let at = u32::from(start.index) + if start.wrap { 0 } else { u32::from(self.size) };
        (self.next_avail, self.kick_mark, self.next_used) = (at, at, at);
    }

    pub(super) fn config(&self) -> QueueConfig {
        QueueConfig { size: self.size, desc: self.desc, driver: self.driver, device: self.device }
    }

    fn event_idx(&self) -> bool {
        self.features.contains(Features::EVENT_IDX)
    }

    fn ahead(&self, at: u32, by: u32) -> u32 {
        (at + by) % (2 * u32::from(self.size))
    }

    /// Slot and wrap counter of a position.
    fn pos(&self, at: u32) -> RingPos {
        let size = u32::from(self.size);
        RingPos { index: (at % size) as u16, wrap: at < size }
    }

    /// Whether a descriptor event (offset, wrap) lies in the positions `old..new`.
    fn passes(&self, off_wrap: u16, old: u32, new: u32) -> bool {
        let (double, size) = (2 * u32::from(self.size), u32::from(self.size));
        let event = u32::from(off_wrap & 0x7fff) + if off_wrap >> 15 == 1 { 0 } else { size };
        (event + double - old) % double < (new + double - old) % double
    }

    /// Reads a descriptor of the ring.
    pub fn desc(&self, slot: u16) -> PackedDesc {
        PackedDesc::from_bytes(self.bytes(slot))
    }

    fn bytes(&self, slot: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        self.ram.read(self.at(slot), &mut bytes);
        bytes
    }

    fn at(&self, slot: u16) -> GuestAddress {
        GuestAddress(self.desc.0 + 16 * u64::from(slot))
    }

    /// Reads the flags of a descriptor; what the device wrote before them is visible afterwards.
    fn flags(&self, slot: u16) -> u16 {
        self.ram.load_u16(GuestAddress(self.at(slot).0 + 14))
    }

    /// Writes a descriptor of the ring, its flags last.
    pub fn set_desc(&mut self, slot: u16, desc: PackedDesc) {
        let bytes = desc.to_bytes();
        self.ram.write(self.at(slot), &bytes[..14]);
        self.set_flags(slot, desc.flags);
        self.shadow[usize::from(slot)] = bytes;
    }

    /// Writes only the flags of a descriptor.
    pub fn set_flags(&mut self, slot: u16, flags: u16) {
        self.ram.store_u16(GuestAddress(self.at(slot).0 + 14), flags);
        self.shadow[usize::from(slot)][14..].copy_from_slice(&flags.to_le_bytes());
    }

    /// Slot and wrap counter of the next chain that the driver adds.
    pub fn next_avail(&self) -> RingPos {
        self.pos(self.next_avail)
    }

    /// Slot and wrap counter where the driver looks for the next used descriptor.
    pub fn next_used(&self) -> RingPos {
        self.pos(self.next_used)
    }

    /// The `AVAIL` and `USED` bits that make a descriptor available under this wrap counter.
    pub fn avail_flags(wrap: bool) -> u16 {
        if wrap { PACKED_AVAIL } else { PACKED_USED }
    }

    /// Writes the driver event suppression structure: offset and wrap, then flags.
    pub fn set_driver_event(&mut self, off_wrap: u16, flags: u16) {
        self.driver_shadow = u32::from(off_wrap) | u32::from(flags) << 16;
        self.ram.store_u32(self.driver, self.driver_shadow);
    }

    /// Reads the device event suppression structure: offset and wrap, and flags.
    pub fn device_event(&self) -> (u16, u16) {
        let both = self.ram.load_u32(self.device);
        (both as u16, (both >> 16) as u16)
    }

    /// More flags for a chain that is not available yet.
    pub(super) fn add_staged_flags(&mut self, slot: u16, more: u16) {
        for (_, flags) in self.staged.iter_mut().filter(|(staged, _)| *staged == slot) {
            *flags |= more;
        }
    }

    pub(super) fn glance(&self) -> Option<(u32, u32)> {
        let RingPos { index, wrap } = self.pos(self.next_used);
        let used = if wrap { PACKED_AVAIL | PACKED_USED } else { 0 };
        let flags = self.flags(index);
        if flags & (PACKED_AVAIL | PACKED_USED) != used {
            return None;
        }
        let desc = self.desc(index);
        Some((u32::from(desc.id), desc.len))
    }

    fn check_device_event(&self) -> Result<(u16, u16), Violation> {
        let (off_wrap, flags) = self.device_event();
        let rule = match flags {
            EVENT_ENABLE | EVENT_DISABLE => return Ok((off_wrap, flags)),
            EVENT_DESC if !self.event_idx() => "event flag DESC needs EVENT_IDX (2.8.10)",
            EVENT_DESC if off_wrap & 0x7fff >= self.size => "an event offset lies within the ring (2.8.10)",
            EVENT_DESC => return Ok((off_wrap, flags)),
            3 => "event flag 3 is reserved (2.8.10)",
            _ => "reserved bits of the event structure are 0 (2.8.14)",
        };
        Err(Violation::new(rule, format!("offset and wrap {off_wrap:#06x}, flags {flags:#06x}")))
    }
}

impl Layout for PackedRing {
    fn free_slots(&self) -> usize {
        self.free
    }

    fn place(&mut self, entries: &[Entry]) -> Placed {
        let id = self.ids.pop().expect("as many ids as slots");
        let mut slots = Vec::with_capacity(entries.len());
        for (i, entry) in entries.iter().enumerate() {
            let RingPos { index, wrap } = self.pos(self.next_avail);
            self.next_avail = self.ahead(self.next_avail, 1);
            let last = i + 1 == entries.len();
            let link = if last { 0 } else { DESC_NEXT };
            let flags = entry.flags | link | PackedRing::avail_flags(wrap);
            // Only the last descriptor's id counts (2.8.6); in the others a device must not care.
            let id = if last { id } else { IGNORED_ID };
            let desc = PackedDesc { addr: entry.addr, len: entry.len, id, flags };
            if i == 0 {
                // Everything but the flags: they would make it available.
                let old = self.flags(index);
                self.set_desc(index, PackedDesc { flags: old, ..desc });
                self.staged.push((index, flags));
            } else {
                self.set_desc(index, desc);
            }
            slots.push(index);
        }
        self.free -= slots.len();
        Placed { id, slots }
    }

    fn table(&self, entries: &[Entry]) -> Vec<u8> {
        let desc = |entry: &Entry| PackedDesc {
            addr: entry.addr,
            len: entry.len,
            id: IGNORED_ID,
            flags: entry.flags & DESC_WRITE,
        };
        entries.iter().flat_map(|entry| desc(entry).to_bytes()).collect()
    }

    fn publish(&mut self) {
        // Backwards: the device, which looks at the first, sees all or nothing. The stores release (2.8.21.1.1).
        for (slot, flags) in std::mem::take(&mut self.staged).into_iter().rev() {
            self.set_flags(slot, flags);
        }
    }

    fn kick_wanted(&mut self) -> Result<bool, Violation> {
        // The flags are visible before suppression is read (2.8.21.3.1).
        fence(Ordering::SeqCst);
        let (off_wrap, flags) = self.check_device_event()?;
        let (old, new) = (std::mem::replace(&mut self.kick_mark, self.next_avail), self.next_avail);
        // A full ring between two decisions leaves the position where it was, one turn on: never equal modulo 2 * size.
        Ok(old != new
            && match flags {
                EVENT_ENABLE => true,
                EVENT_DESC => self.passes(off_wrap, old, new),
                _ => false,
            })
    }

    fn peek_used(&self, in_flight: usize) -> Result<Option<UsedEntry>, Violation> {
        fence(Ordering::SeqCst);
        self.check_device_event()?;
        let RingPos { index, wrap } = self.pos(self.next_used);
        let flags = self.flags(index);
        let used = if wrap { PACKED_AVAIL | PACKED_USED } else { 0 };
        if flags & (PACKED_AVAIL | PACKED_USED) != used {
            return Ok(None);
        }
        let desc = self.desc(index);
        if in_flight == 0 {
            return Err(Violation::new(
                "a device uses a descriptor after it was made available (2.8.15)",
                format!("slot {index} is marked used (id {}) while nothing is in flight", desc.id),
            ));
        }
        // Without WRITE the length is reserved (2.8.4).
        let len = if desc.flags & DESC_WRITE == 0 { 0 } else { desc.len };
        Ok(Some(UsedEntry { id: u32::from(desc.id), len, published: None }))
    }

    fn pass_used(&mut self, chains: &[Placed]) -> Result<bool, Violation> {
        let old = self.next_used;
        let passed: usize = chains.iter().map(|chain| chain.slots.len()).sum();
        self.next_used = self.ahead(old, passed as u32);
        let written = self.pos(old).index;
        self.shadow[usize::from(written)] = self.bytes(written);
        for step in 1..passed as u32 {
            let slot = self.pos(self.ahead(old, step)).index;
            if self.bytes(slot) != self.shadow[usize::from(slot)] {
                return Err(ring_changed(slot));
            }
        }
        let (off_wrap, flags) = (self.driver_shadow as u16, (self.driver_shadow >> 16) as u16);
        Ok(match flags {
            EVENT_ENABLE => true,
            EVENT_DESC => self.passes(off_wrap, old, self.next_used),
            _ => false,
        })
    }

    fn release(&mut self, placed: &Placed) {
        self.free += placed.slots.len();
        self.ids.push(placed.id);
    }

    fn set_interrupts(&mut self, wanted: Interrupts) {
        let ahead = match wanted {
            Interrupts::After(n) => u32::from(n.saturating_sub(1)),
            _ => 0,
        };
        let RingPos { index, wrap } = self.pos(self.ahead(self.next_used, ahead));
        match wanted {
            Interrupts::Never => self.set_driver_event(0, EVENT_DISABLE),
            _ if self.event_idx() => self.set_driver_event(index | u16::from(wrap) << 15, EVENT_DESC),
            _ => self.set_driver_event(0, EVENT_ENABLE),
        }
        // Whoever looks at the ring now has told the device before (2.8.22).
        fence(Ordering::SeqCst);
    }

    fn check_untouched(&self) -> Result<(), Violation> {
        if let Some(slot) = (0..self.size).find(|slot| self.bytes(*slot) != self.shadow[usize::from(*slot)]) {
            return Err(ring_changed(slot));
        }
        if self.ram.load_u32(self.driver) != self.driver_shadow {
            return Err(Violation::new(
                "the driver event structure is read-only for the device (2.8.10)",
                "it changed",
            ));
        }
        Ok(())
    }

    fn first_unused(&self) -> RingPos {
        self.pos(self.next_used)
    }
}

fn ring_changed(slot: u16) -> Violation {
    Violation::new(
        "a device writes one used descriptor for a list, where the next one belongs, once (2.8.6, 2.8.15)",
        format!("slot {slot} changed"),
    )
}
