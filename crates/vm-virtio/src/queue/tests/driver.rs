//! The driver's side of both rings in guest memory, plain and without any cleverness.
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

use super::*;

/// An element of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Elem {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) write: bool,
}

/// A device-readable element.
pub(super) fn r(addr: u64, len: u32) -> Elem {
    Elem { addr, len, write: false }
}

/// A device-writable element.
pub(super) fn w(addr: u64, len: u32) -> Elem {
    Elem { addr, len, write: true }
}

/// Rings are here.
pub(super) const DESC: u64 = 0x1_0000;
/// Up to 4096 entries fit before the next area.
pub(super) const AVAIL: u64 = 0x2_0000;
pub(super) const USED: u64 = 0x3_0000;
/// Buffers: the border between two regions, neighbours in the guest only, is at `BORDER`.
pub(super) const DATA: u64 = 0x10_0000;
pub(super) const BORDER: u64 = 0x20_0000;
/// End of the second of them.
pub(super) const END: u64 = 0x40_0000;
/// Indirect tables, each 4 KiB.
pub(super) const TABLES: u64 = 0x30_0000;
/// A region beyond a hole. Not so far that regions share buckets in the memory's table: then no element would be found
/// there, and none of the tests would see the quick walk that nearly all chains of nearly all guests take.
pub(super) const FAR: u64 = 0x80_0000;
pub(super) const FAR_LEN: usize = 0x1_0000;

/// The memory of the tests.
pub(super) fn memory() -> GuestMemoryMmap {
    let ranges = [(0, BORDER as usize), (BORDER, (END - BORDER) as usize), (FAR, FAR_LEN)];
    GuestMemoryMmap::from_ranges(&ranges.map(|(addr, len)| (GuestAddress(addr), len))).unwrap()
}

/// The same with another region so far away that the table knows nothing of most of them, so that chains are walked the
/// careful way from their first element on.
pub(super) fn crowded_memory() -> GuestMemoryMmap {
    memory().insert_region(Arc::new(region(1 << 40, 0x1000))).unwrap()
}

/// One region of that many bytes at an address.
pub(super) fn region(addr: u64, len: usize) -> GuestRegionMmap {
    GuestRegionMmap::from_range(GuestAddress(addr), len, None).unwrap()
}

pub(super) struct Driver {
    pub(super) ram: GuestRam,
    pub(super) features: Features,
    pub(super) packed: bool,
    pub(super) size: u16,
    pub(super) config: QueueConfig,
    /// Split: the available index. Packed: the offset of the next descriptor.
    pub(super) next_avail: u16,
    pub(super) avail_wrap: bool,
    pub(super) next_used: u16,
    pub(super) used_wrap: bool,
    /// Split: free descriptors. Packed: free ids.
    free: Vec<u16>,
    /// Packed: descriptors of the ring that are ours.
    free_descs: u16,
    /// By id: the ring's descriptors and the room of the buffer.
    out: HashMap<u16, (Vec<u16>, u16, u32)>,
    order: VecDeque<u16>,
}

impl Driver {
    pub(super) fn new(size: u16, features: Features) -> Driver {
        let packed = features.contains(Features::RING_PACKED);
        Driver {
            ram: GuestRam::new(&memory()),
            features,
            packed,
            size,
            config: QueueConfig {
                size,
                desc: GuestAddress(DESC),
                driver: GuestAddress(AVAIL),
                device: GuestAddress(USED),
            },
            next_avail: 0,
            avail_wrap: true,
            next_used: 0,
            used_wrap: true,
            free: (0..size).rev().collect(),
            free_descs: size,
            out: HashMap::new(),
            order: VecDeque::new(),
        }
    }

    pub(super) fn queue(&self) -> Queue {
        self.queue_from(None).unwrap()
    }

    pub(super) fn queue_from(&self, state: Option<QueueState>) -> Result<Queue, QueueError> {
        Queue::new(self.config, &self.ram, self.features, state)
    }

    pub(super) fn write(&self, addr: u64, data: &[u8]) {
        self.ram.write(GuestAddress(addr), data).unwrap();
    }

    pub(super) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.ram.read(GuestAddress(addr), &mut data).unwrap();
        data
    }

    pub(super) fn u16_at(&self, addr: u64) -> u16 {
        let mut data = [0; 2];
        self.ram.read(GuestAddress(addr), &mut data).unwrap();
        u16::from_le_bytes(data)
    }

    pub(super) fn put_u16(&self, addr: u64, value: u16) {
        self.write(addr, &value.to_le_bytes());
    }

    fn u32_at(&self, addr: u64) -> u32 {
        let mut data = [0; 4];
        self.ram.read(GuestAddress(addr), &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    /// Any descriptor: the last two are `flags, next` (split) or `id, flags` (packed).
    pub(super) fn desc_at(&self, addr: u64, buffer: u64, len: u32, third: u16, fourth: u16) {
        self.write(addr, &buffer.to_le_bytes());
        self.write(addr + 8, &len.to_le_bytes());
        self.put_u16(addr + 12, third);
        self.put_u16(addr + 14, fourth);
    }

    /// A descriptor of the split table.
    pub(super) fn split_desc(&self, index: u16, buffer: u64, len: u32, flags: u16, next: u16) {
        self.desc_at(DESC + 16 * u64::from(index), buffer, len, flags, next);
    }

    /// A descriptor of the packed ring, AVAIL and USED as given.
    pub(super) fn packed_desc(&self, index: u16, buffer: u64, len: u32, id: u16, flags: u16) {
        self.desc_at(DESC + 16 * u64::from(index), buffer, len, id, flags);
    }

    /// AVAIL and USED for the next descriptor.
    pub(super) fn avail_flags(&self) -> u16 {
        if self.avail_wrap { 0x80 } else { 0x8000 }
    }

    /// Makes a split head available.
    pub(super) fn expose(&mut self, head: u16) {
        self.put_u16(AVAIL + 4 + 2 * u64::from(self.next_avail % self.size), head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.put_u16(AVAIL + 2, self.next_avail);
    }

    /// Writes an indirect table and returns its address and length.
    pub(super) fn table(&self, number: u16, elems: &[Elem]) -> (u64, u32) {
        let at = TABLES + 0x1000 * u64::from(number);
        for (i, elem) in (0..).zip(elems) {
            let last = usize::from(i) + 1 == elems.len();
            let mut flags = if elem.write { WRITE } else { 0 };
            let slot = at + 16 * u64::from(i);
            if self.packed {
                self.desc_at(slot, elem.addr, elem.len, 0xdead, flags);
            } else {
                flags |= if last { 0 } else { NEXT };
                self.desc_at(slot, elem.addr, elem.len, flags, i + 1);
            }
        }
        (at, elems.len() as u32 * 16)
    }

    /// Makes a buffer available: `direct` in the ring, then, if there are any, `indirect` in a table. `None` if there
    /// is no room. Packed lists are one or the other.
    pub(super) fn add(&mut self, direct: &[Elem], indirect: &[Elem]) -> Option<u16> {
        let writable = direct.iter().chain(indirect).filter(|elem| elem.write);
        let room = writable.fold(0u32, |room, elem| room.saturating_add(elem.len));
        let count = direct.len() + usize::from(!indirect.is_empty());
        let id = if self.packed {
            assert!(direct.is_empty() || indirect.is_empty());
            self.add_packed(direct, indirect, count, room)?
        } else {
            self.add_split(direct, indirect, count, room)?
        };
        self.order.push_back(id);
        Some(id)
    }

    fn add_split(&mut self, direct: &[Elem], indirect: &[Elem], count: usize, room: u32) -> Option<u16> {
        if self.free.len() < count {
            return None;
        }
        let descs = self.free.split_off(self.free.len() - count);
        let mut next = descs.iter().skip(1);
        for (at, elem) in descs.iter().zip(direct) {
            let flags = if elem.write { WRITE } else { 0 };
            let (flags, next) = next.next().map_or((flags, 0), |next| (flags | NEXT, *next));
            self.split_desc(*at, elem.addr, elem.len, flags, next);
        }
        let head = descs[0];
        if !indirect.is_empty() {
            let (addr, len) = self.table(head, indirect);
            self.split_desc(descs[count - 1], addr, len, INDIRECT, 0);
        }
        self.out.insert(head, (descs, 1, room));
        self.expose(head);
        Some(head)
    }

    fn add_packed(&mut self, direct: &[Elem], indirect: &[Elem], count: usize, room: u32) -> Option<u16> {
        if usize::from(self.free_descs) < count {
            return None;
        }
        // Ids come back out of order, so that there may be none although there are descriptors.
        let id = self.free.pop()?;
        let mut descs = Vec::new();
        if indirect.is_empty() {
            for (i, elem) in direct.iter().enumerate() {
                let flags = if elem.write { WRITE } else { 0 } | if i + 1 < count { NEXT } else { 0 };
                descs.push((elem.addr, elem.len, flags));
            }
        } else {
            let (addr, len) = self.table(id, indirect);
            descs.push((addr, len, INDIRECT));
        }
        // The first one's flags last (2.8.6).
        let mut flags_of_first = None;
        for (addr, len, flags) in descs {
            let flags = flags | self.avail_flags();
            let at = DESC + 16 * u64::from(self.next_avail);
            self.write(at, &addr.to_le_bytes());
            self.write(at + 8, &len.to_le_bytes());
            self.put_u16(at + 12, id);
            if flags_of_first.is_none() {
                flags_of_first = Some((at + 14, flags));
            } else {
                self.put_u16(at + 14, flags);
            }
            self.next_avail += 1;
            if self.next_avail == self.size {
                self.next_avail = 0;
                self.avail_wrap = !self.avail_wrap;
            }
        }
        let (at, flags) = flags_of_first.unwrap();
        self.put_u16(at, flags);
        self.free_descs -= count as u16;
        self.out.insert(id, (Vec::new(), count as u16, room));
        Some(id)
    }

    /// Takes what the device has used: ids and lengths, skipped ones of a batch included.
    pub(super) fn used(&mut self) -> Vec<(u16, u32)> {
        let mut all = Vec::new();
        while let Some((id, len)) = self.peek_used() {
            let mut batch = vec![(id, len)];
            if self.features.contains(Features::IN_ORDER) {
                // 2.7.9, 2.8.8: all before it are used, completely.
                batch.clear();
                loop {
                    let next = self.order.pop_front().expect("the device used what it was never given");
                    if next == id {
                        batch.push((id, len));
                        break;
                    }
                    batch.push((next, self.out[&next].2));
                }
            }
            for (id, len) in batch {
                let (descs, count, _) = self.out.remove(&id).expect("the device used what is not out");
                if self.packed {
                    self.free.push(id);
                    self.free_descs += count;
                    self.next_used += count;
                    if self.next_used >= self.size {
                        self.next_used -= self.size;
                        self.used_wrap = !self.used_wrap;
                    }
                } else {
                    self.free.extend(descs);
                    self.next_used = self.next_used.wrapping_add(1);
                }
                all.push((id, len));
            }
        }
        all
    }

    fn peek_used(&self) -> Option<(u16, u32)> {
        if self.packed {
            let at = DESC + 16 * u64::from(self.next_used);
            let flags = self.u16_at(at + 14);
            if (flags & 0x80 != 0) != self.used_wrap || (flags & 0x8000 != 0) != self.used_wrap {
                return None;
            }
            let len = self.u32_at(at + 8);
            // 2.8.4: without WRITE the length is reserved.
            Some((self.u16_at(at + 12), if flags & WRITE != 0 { len } else { 0 }))
        } else {
            (self.u16_at(USED + 2) != self.next_used).then(|| {
                let at = USED + 4 + 8 * u64::from(self.next_used % self.size);
                (u16::try_from(self.u32_at(at)).unwrap(), self.u32_at(at + 4))
            })
        }
    }

    /// Asks for an interrupt at a position: split, a used index; packed, an offset with the wrap counter in bit 15.
    pub(super) fn want_interrupt_at(&self, position: u16) {
        if self.packed {
            self.put_u16(AVAIL, position);
            self.put_u16(AVAIL + 2, 2);
        } else {
            self.put_u16(AVAIL + 4 + 2 * u64::from(self.size), position);
        }
    }

    /// Buffers that are out.
    pub(super) fn out(&self) -> usize {
        self.out.len()
    }
}
