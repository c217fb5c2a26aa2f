//! The floor: what a device must do at the least, written down with raw pointers and nothing around it.
//!
//! It makes the same checks as a queue has to make of an untrusted ring - indices, flags, order of elements, length of
//! the chain, number of bytes, address of each element - looks regions up in a table, leaves (pointer, length) pairs in
//! one array, and publishes with the same barriers. It keeps no chain: the array is that of the last one popped. It has
//! no state, no counters, no budget, no fault, no snapshot, no handle.
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::guest::{DESC, DEVICE, DRIVER, Guest, INDIRECT, NEXT, SIZE, WRITE};
use crate::rows::Device;

#[derive(Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    host: *mut u8,
}

/// Regions by a fixed number of address bits.
struct Map {
    shift: u32,
    table: Vec<Region>,
}

impl Map {
    fn new(guest: &Guest) -> Map {
        let regions = guest.regions();
        let shift = regions[0].1.trailing_zeros();
        let table = regions.into_iter().map(|(start, len, host)| Region { start, len, host }).collect();
        Map { shift, table }
    }

    #[inline(always)]
    fn find(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let region = self.table.get((addr >> self.shift) as usize)?;
        let offset = addr.wrapping_sub(region.start);
        (offset < region.len && len <= region.len - offset).then(|| region.host.wrapping_add(offset as usize))
    }
}

/// The chain that was walked last.
struct Walked {
    segs: [(*mut u8, usize); SIZE as usize],
    count: usize,
    readable: usize,
    bytes: u64,
}

impl Walked {
    fn new() -> Walked {
        Walked { segs: [(std::ptr::null_mut(), 0); SIZE as usize], count: 0, readable: 0, bytes: 0 }
    }

    #[inline(always)]
    fn add(&mut self, map: &Map, addr: u64, word: u64, write: bool) -> Option<()> {
        let len = u64::from(word as u32);
        if !write {
            if self.readable != self.count {
                return None;
            }
            self.readable += 1;
        }
        self.bytes += len;
        let host = map.find(addr, len)?;
        // The bound is the limit of the chain, too.
        *self.segs.get_mut(self.count)? = (host, len as usize);
        self.count += 1;
        Some(())
    }

    #[inline(always)]
    fn start(&mut self) {
        (self.count, self.readable, self.bytes) = (0, 0, 0);
    }

    #[inline(always)]
    fn end(&self) -> Option<()> {
        (self.bytes <= 1 << 32).then_some(())
    }

    #[inline(always)]
    fn lengths(&self) -> u64 {
        self.segs[..self.count].iter().map(|(host, len)| *host as u64 ^ *len as u64).sum()
    }

    #[inline(always)]
    fn read(&self) -> u64 {
        let mut bytes = [0u64; 8];
        let (host, len) = self.segs[0];
        assert!(len >= 64);
        for (i, word) in bytes.iter_mut().enumerate() {
            // SAFETY: the element has 64 bytes, aligned to 64.
            *word = unsafe { host.cast::<u64>().add(i).read_volatile() };
        }
        std::hint::black_box(&bytes)[0]
    }
}

/// Reads a word of the ring or table.
///
/// # Safety
/// `at` must be mapped and aligned.
#[inline(always)]
unsafe fn word(at: *mut u8, order: Ordering) -> u64 {
    // SAFETY: the caller's.
    unsafe { (*at.cast::<AtomicU64>()).load(order) }
}

pub struct BareSplit {
    desc: *mut u8,
    avail: *mut u8,
    used: *mut u8,
    map: Map,
    walked: Walked,
    next_avail: u16,
    avail_idx: u16,
    next_used: u16,
    published: u16,
}

impl BareSplit {
    pub fn new(guest: &Guest) -> BareSplit {
        BareSplit {
            desc: guest.host(DESC),
            avail: guest.host(DRIVER),
            used: guest.host(DEVICE),
            map: Map::new(guest),
            walked: Walked::new(),
            next_avail: 0,
            avail_idx: 0,
            next_used: 0,
            published: 0,
        }
    }

    #[inline(always)]
    fn half(base: *mut u8, at: usize) -> &'static AtomicU16 {
        // SAFETY: within the rings, which are mapped as long as the benchmark runs.
        unsafe { &*base.add(at).cast() }
    }

    #[inline(always)]
    fn walk(&mut self, mut table: *mut u8, mut size: u16, mut index: u16) -> Option<()> {
        let mut indirect = false;
        loop {
            if index >= size {
                return None;
            }
            // SAFETY: the index is within the table.
            let (addr, word) = unsafe {
                let at = table.add(16 * usize::from(index));
                (word(at, Ordering::Relaxed), word(at.add(8), Ordering::Relaxed))
            };
            let flags = (word >> 32) as u16;
            if flags & INDIRECT != 0 {
                let len = word as u32;
                if indirect || flags & NEXT != 0 || len == 0 || !len.is_multiple_of(16) {
                    return None;
                }
                indirect = true;
                table = self.map.find(addr, u64::from(len))?;
                (size, index) = (u16::try_from(len / 16).unwrap_or(u16::MAX), 0);
                continue;
            }
            self.walked.add(&self.map, addr, word, flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                return self.walked.end();
            }
            index = (word >> 48) as u16;
        }
    }
}

impl Device for BareSplit {
    type Chain = u16;

    #[inline(always)]
    fn pop(&mut self) -> Option<u16> {
        if self.next_avail == self.avail_idx {
            self.avail_idx = Self::half(self.avail, 2).load(Ordering::Acquire);
            let ahead = self.avail_idx.wrapping_sub(self.next_avail);
            if ahead == 0 || ahead > SIZE {
                return None;
            }
        }
        let slot = usize::from(self.next_avail % SIZE);
        let head = Self::half(self.avail, 4 + 2 * slot).load(Ordering::Relaxed);
        self.walked.start();
        self.walk(self.desc, SIZE, head)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(head)
    }

    #[inline(always)]
    fn translated(&self, _: &u16) -> u64 {
        self.walked.lengths()
    }

    #[inline(always)]
    fn read(&self, _: &u16) -> u64 {
        self.walked.read()
    }

    #[inline(always)]
    fn add_used(&mut self, head: u16, written: u32) {
        let entry = 4 + 8 * usize::from(self.next_used % SIZE);
        // SAFETY: the entry is within the used ring.
        unsafe {
            (*self.used.add(entry).cast::<AtomicU32>()).store(u32::from(head), Ordering::Relaxed);
            (*self.used.add(entry + 4).cast::<AtomicU32>()).store(written, Ordering::Relaxed);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        Self::half(self.used, 2).swap(new, Ordering::SeqCst);
        self.published = new;
        let event = Self::half(self.avail, 4 + 2 * usize::from(SIZE)).load(Ordering::SeqCst);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }
}

pub struct BarePacked {
    ring: *mut u8,
    event: *mut u8,
    map: Map,
    walked: Walked,
    next_avail: u16,
    avail_pattern: u16,
    next_used: u16,
    used_flags: u16,
    /// Position and flags of the first used descriptor of the batch, its word, and how many the batch passes over.
    first: (u16, u16, u64),
    batch: u16,
}

const BOTH: u16 = 0x8080;

impl BarePacked {
    pub fn new(guest: &Guest) -> BarePacked {
        BarePacked {
            ring: guest.host(DESC),
            event: guest.host(DRIVER),
            map: Map::new(guest),
            walked: Walked::new(),
            next_avail: 0,
            avail_pattern: 0x80,
            next_used: 0,
            used_flags: BOTH,
            first: (0, 0, 0),
            batch: 0,
        }
    }

    #[inline(always)]
    fn store(&self, index: u16) -> &AtomicU64 {
        // SAFETY: positions are within the ring.
        unsafe { &*self.ring.add(16 * usize::from(index) + 8).cast() }
    }
}

impl Device for BarePacked {
    /// Buffer id and number of descriptors.
    type Chain = (u16, u16);

    #[inline(always)]
    fn pop(&mut self) -> Option<(u16, u16)> {
        let (mut index, mut pattern) = (self.next_avail, self.avail_pattern);
        let mut descs = 0;
        self.walked.start();
        loop {
            // SAFETY: positions are within the ring.
            let at = unsafe { self.ring.add(16 * usize::from(index)) };
            // SAFETY: as above.
            let second = unsafe { word(at.add(8), Ordering::Acquire) };
            let flags = (second >> 48) as u16;
            if flags & BOTH != pattern {
                return None;
            }
            // SAFETY: as above.
            let addr = unsafe { word(at, Ordering::Relaxed) };
            index += 1;
            descs += 1;
            if index == SIZE {
                index = 0;
                pattern ^= BOTH;
            }
            if flags & INDIRECT != 0 {
                let len = second as u32;
                if descs > 1 || flags & NEXT != 0 || len == 0 || !len.is_multiple_of(16) {
                    return None;
                }
                let table = self.map.find(addr, u64::from(len))?;
                for i in 0..len / 16 {
                    // SAFETY: within the table, which was found to be mapped.
                    let (addr, word) = unsafe {
                        let at = table.add(16 * i as usize);
                        (word(at, Ordering::Relaxed), word(at.add(8), Ordering::Relaxed))
                    };
                    self.walked.add(&self.map, addr, word, (word >> 48) as u16 & WRITE != 0)?;
                }
            } else {
                self.walked.add(&self.map, addr, second, flags & WRITE != 0)?;
            }
            if flags & NEXT == 0 {
                self.walked.end()?;
                (self.next_avail, self.avail_pattern) = (index, pattern);
                return Some(((second >> 32) as u16, descs));
            }
        }
    }

    #[inline(always)]
    fn translated(&self, _: &(u16, u16)) -> u64 {
        self.walked.lengths()
    }

    #[inline(always)]
    fn read(&self, _: &(u16, u16)) -> u64 {
        self.walked.read()
    }

    #[inline(always)]
    fn add_used(&mut self, (id, descs): (u16, u16), written: u32) {
        let flags = self.used_flags | if written > 0 { WRITE } else { 0 };
        let word = u64::from(written) | u64::from(id) << 32 | u64::from(flags) << 48;
        if self.batch == 0 {
            self.first = (self.next_used, self.used_flags, word);
        } else {
            self.store(self.next_used).store(word, Ordering::Relaxed);
        }
        self.batch += descs;
        self.next_used += descs;
        if self.next_used >= SIZE {
            self.next_used -= SIZE;
            self.used_flags ^= BOTH;
        }
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        let (index, used_flags, word) = self.first;
        let batch = u32::from(std::mem::take(&mut self.batch));
        self.store(index).swap(word, Ordering::SeqCst);
        // SAFETY: the event structure is mapped and aligned.
        let event = unsafe { (*self.event.cast::<AtomicU32>()).load(Ordering::SeqCst) };
        match event >> 16 & 3 {
            1 => false,
            2 => {
                let lap = if (event & 0x8000 != 0) == (used_flags != 0) { 0 } else { u32::from(SIZE) };
                ((event & 0x7fff) + lap).wrapping_sub(u32::from(index)) < batch
            }
            _ => true,
        }
    }
}
