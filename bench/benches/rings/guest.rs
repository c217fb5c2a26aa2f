//! The guest: memory in one or eight regions, and a driver that makes a whole ring of chains available at once.
//!
//! Making available is not measured. The ring is filled from its start to its end each time, so that the packed ring
//! has its flags turned over; nothing else changes from lap to lap.
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Entries of the rings.
pub const SIZE: u16 = 512;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
const MEMORY: u64 = 64 << 20;
pub const DESC: u64 = 0x1_0000;
pub const DRIVER: u64 = 0x2_0000;
pub const DEVICE: u64 = 0x3_0000;
const TABLES: u64 = 0x4_0000;
const BUFFERS: u64 = 0x10_0000;
/// Length of each buffer element in bytes.
pub const LEN: u32 = 512;

/// What the chains of a ring look like.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Elements of a chain.
    pub elements: u16,
    /// How many of them the device reads; it writes the others.
    pub readable: u16,
    /// In a table, one descriptor of the ring each.
    pub indirect: bool,
}

impl Shape {
    /// Descriptors of the ring that a chain takes.
    fn descs(self) -> u16 {
        if self.indirect { 1 } else { self.elements }
    }

    /// Chains in a full ring.
    pub fn chains(self) -> u16 {
        SIZE / self.descs()
    }
}

pub struct Guest {
    pub memory: GuestMemoryMmap,
    pub shape: Shape,
    pub packed: bool,
    /// By descriptor of the packed ring: all but the flags' AVAIL and USED.
    descs: Vec<(u64, u32, u16, u16)>,
    avail_idx: u16,
    wrap: bool,
}

impl Guest {
    pub fn new(regions: u64, shape: Shape, packed: bool) -> Guest {
        let each = MEMORY / regions;
        let ranges: Vec<_> = (0..regions).map(|i| (GuestAddress(i * each), each as usize)).collect();
        let mut guest = Guest {
            memory: GuestMemoryMmap::from_ranges(&ranges).expect("memory for the benchmark"),
            shape,
            packed,
            descs: Vec::new(),
            avail_idx: 0,
            wrap: true,
        };
        guest.fill();
        guest
    }

    fn put<T: vm_memory::ByteValued>(&self, addr: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(addr)).expect("within the benchmark's memory");
    }

    fn desc(&self, at: u64, addr: u64, len: u32, third: u16, fourth: u16) {
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, third);
        self.put(at + 14, fourth);
    }

    fn fill(&mut self) {
        // Buffers lie all over the regions, in no order that a CPU could foresee.
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut buffer = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            BUFFERS + seed % (MEMORY - BUFFERS - 4096) / 64 * 64
        };
        let shape = self.shape;
        for chain in 0..shape.chains() {
            let head = chain * shape.descs();
            let table = TABLES + u64::from(chain) * 256;
            for i in 0..shape.elements {
                let mut flags = if i >= shape.readable { WRITE } else { 0 };
                let last = i + 1 == shape.elements;
                // A buffer does not cross regions here: that costs the same in all variants, and is rare.
                let mut addr = buffer();
                while addr % (8 << 20) > (8 << 20) - u64::from(LEN) {
                    addr = buffer();
                }
                let next = if last { 0 } else { NEXT };
                match (self.packed, shape.indirect) {
                    (true, true) => self.desc(table + 16 * u64::from(i), addr, LEN, 0, flags),
                    (true, false) => self.descs.push((addr, LEN, chain, flags | next)),
                    (false, indirect) => {
                        flags |= next;
                        let at = if indirect { table } else { DESC + 16 * u64::from(head) };
                        let base = if indirect { 0 } else { head };
                        self.desc(at + 16 * u64::from(i), addr, LEN, flags, base + i + 1);
                    }
                }
            }
            let table_len = u32::from(shape.elements) * 16;
            if shape.indirect && self.packed {
                self.descs.push((table, table_len, chain, INDIRECT));
            } else if shape.indirect {
                self.desc(DESC + 16 * u64::from(head), table, table_len, INDIRECT, 0);
            }
            if !self.packed {
                for lap in 0..SIZE / shape.chains() {
                    self.put(DRIVER + 4 + 2 * u64::from(lap * shape.chains() + chain), head);
                }
            }
        }
        if self.packed {
            // Interrupts for a descriptor that is never used: the decision is made, and is no.
            self.put(DRIVER, SIZE - 1);
            self.put(DRIVER + 2, 2u16);
        }
    }

    /// Makes a whole ring of chains available.
    pub fn refill(&mut self) {
        if self.packed {
            let wrap = if self.wrap { 0x80 } else { 0x8000 };
            let ring = self.host(DESC);
            for (i, (addr, len, id, flags)) in self.descs.iter().enumerate() {
                // SAFETY: the ring of SIZE descriptors is mapped and aligned, and nobody else uses it now.
                unsafe {
                    let at = ring.add(16 * i);
                    at.cast::<u64>().write_volatile(*addr);
                    at.add(8).cast::<u32>().write_volatile(*len);
                    at.add(12).cast::<u16>().write_volatile(*id);
                    at.add(14).cast::<u16>().write_volatile(*flags | wrap);
                }
            }
            self.wrap = !self.wrap;
            // Half a ring away, in the other lap.
            let event = (SIZE / 2) | if self.wrap { 0x8000 } else { 0 };
            self.put(DRIVER, event);
        } else {
            self.avail_idx = self.avail_idx.wrapping_add(self.shape.chains());
            self.put(DRIVER + 2, self.avail_idx);
            // Behind everything that is going to be used in this lap.
            self.put(DRIVER + 4 + 2 * u64::from(SIZE), self.avail_idx.wrapping_add(SIZE));
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    /// The host's address of a guest address.
    pub fn host(&self, addr: u64) -> *mut u8 {
        self.memory.get_host_address(GuestAddress(addr)).expect("within the benchmark's memory")
    }

    /// Start, length and host address of each region.
    pub fn regions(&self) -> Vec<(u64, u64, *mut u8)> {
        self.memory.iter().map(|region| (region.start_addr().0, region.len(), region.as_ptr())).collect()
    }
}
