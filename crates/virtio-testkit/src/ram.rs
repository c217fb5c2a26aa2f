//! Guest memory for tests: memfd-backed regions, an allocator with guard bytes, little-endian access.
//!
//! Invariants: every region is a window at its own offset into **one** memfd, so that a vhost-user back-end has to
//! honour offsets; allocations never overlap, rotate over the regions and are followed by guard bytes that nobody may
//! write ([`TestRam::check_guards`]); allocation size classes are powers of two, freed blocks are reused.
//!
//! All accesses are the driver's: they go through the mapping of this process with `vm-memory`'s volatile copies, and
//! fields that the other side reads concurrently are accessed atomically.
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};
use vm_virtio::GuestRam;

use crate::Violation;
use crate::ring::Buf;

/// Bytes behind each allocation that nobody may write.
const GUARD: u64 = 16;
const GUARD_BYTE: u8 = 0xa5;
/// Fresh device-writable buffers are filled with this, so that a test sees what the device did not write.
const FILL_BYTE: u8 = 0x5a;
const SMALLEST_CLASS: u64 = 64;

/// One region as a vhost-user front-end announces it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// First guest address.
    pub guest_addr: u64,
    /// Size in bytes.
    pub size: u64,
    /// Address of the first byte in this process: the "user address" of vhost-user.
    pub user_addr: u64,
    /// Where the region starts in the file of [`TestRam::fd`].
    pub mmap_offset: u64,
}

struct Block {
    len: u64,
    class: u64,
}

struct Arena {
    /// First unused address and end of each region.
    room: Vec<(u64, u64)>,
    /// The region whose turn it is.
    turn: usize,
    /// Freed blocks by size class.
    free: HashMap<u64, Vec<u64>>,
    live: BTreeMap<u64, Block>,
}

struct Inner {
    file: Arc<File>,
    memory: GuestMemoryMmap,
    regions: Vec<RamRegion>,
    arena: Mutex<Arena>,
    forbidden: OnceLock<RamRegion>,
}

/// Guest memory of one or more regions; a cheap handle, clones share the memory.
#[derive(Clone)]
pub struct TestRam(Arc<Inner>);

impl TestRam {
    /// Memory of these `(guest address, size)` regions, zeroed. Sizes are whole pages.
    ///
    /// # Panics
    /// If the regions overlap or the system has no memory for them.
    pub fn new(regions: &[(u64, u64)]) -> TestRam {
        let total: u64 = regions.iter().map(|(_, size)| size).sum();
        let fd = rustix::fs::memfd_create("testkit-ram", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&fd, total).expect("size of the memfd");
        let file = Arc::new(File::from(fd));
        let mut offset = 0;
        let mut ranges = Vec::new();
        for &(addr, size) in regions {
            let window = FileOffset::from_arc(Arc::clone(&file), offset);
            ranges.push((GuestAddress(addr), usize::try_from(size).expect("size of a region"), Some(window)));
            offset += size;
        }
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).expect("regions");
        let regions: Vec<RamRegion> = memory
            .iter()
            .map(|region: &GuestRegionMmap| RamRegion {
                guest_addr: region.start_addr().0,
                size: region.len(),
                user_addr: region.as_ptr() as u64,
                mmap_offset: region.file_offset().expect("a file behind the region").start(),
            })
            .collect();
        // Guest address 0 stays unused: a test that sees it looks at an uninitialised field.
        let room = regions.iter().map(|r| (r.guest_addr.max(64), r.guest_addr + r.size)).collect();
        let arena = Arena { room, turn: 0, free: HashMap::new(), live: BTreeMap::new() };
        let (arena, forbidden) = (Mutex::new(arena), OnceLock::new());
        TestRam(Arc::new(Inner { file, memory, regions, arena, forbidden }))
    }

    /// `count` regions of `size` bytes each, with holes of the same size between them, from address 0 on.
    pub fn spread(count: usize, size: u64) -> TestRam {
        let regions: Vec<_> = (0..count as u64).map(|i| (i * 2 * size, size)).collect();
        TestRam::new(&regions)
    }

    /// The snapshot that a device in this process gets.
    pub fn ram(&self) -> GuestRam {
        match self.0.forbidden.get() {
            None => GuestRam::new(&self.0.memory),
            Some(region) => {
                let rest = self.0.memory.remove_region(GuestAddress(region.guest_addr), region.size);
                GuestRam::new(&rest.expect("a region of this memory").0)
            }
        }
    }

    /// The mapping itself, for hosts that take `vm-memory`'s type.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.0.memory
    }

    /// The regions, in the order of their guest addresses; without the forbidden one.
    pub fn regions(&self) -> &[RamRegion] {
        let all = self.0.regions.as_slice();
        if self.0.forbidden.get().is_some() { all.split_last().map_or(all, |(_, rest)| rest) } else { all }
    }

    /// Keeps the last region from the device: nothing is allocated there, nobody is told of it, and whoever changes it
    /// is found out ([`TestRam::check_guards`]).
    ///
    /// # Panics
    /// If it is not the last region, or something was allocated already.
    pub fn forbid(&self, addr: GuestAddress) {
        let region = *self.0.regions.last().expect("a region");
        assert_eq!(region.guest_addr, addr.0, "the last region");
        self.write(addr, &vec![GUARD_BYTE; region.size as usize]);
        let mut arena = self.arena();
        assert!(arena.live.is_empty(), "fresh memory");
        arena.room.pop();
        self.0.forbidden.set(region).expect("once");
    }

    /// The region that the device is not given.
    ///
    /// # Panics
    /// If there is none: see [`TestRam::forbid`].
    pub fn forbidden(&self) -> RamRegion {
        *self.0.forbidden.get().expect("a forbidden region")
    }

    /// The memfd behind all regions.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }

    /// This process's address of a guest address, as vhost-user's `SET_VRING_ADDR` wants it.
    ///
    /// # Panics
    /// If no region holds the address.
    pub fn user_addr(&self, addr: GuestAddress) -> u64 {
        let region = self.0.regions.iter().find(|r| addr.0 >= r.guest_addr && addr.0 - r.guest_addr < r.size);
        let region = region.expect("an address in guest memory");
        region.user_addr + (addr.0 - region.guest_addr)
    }

    fn arena(&self) -> MutexGuard<'_, Arena> {
        self.0.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `len` bytes at a multiple of `align` (a power of two), in the next region that has room, with guard bytes
    /// behind. The contents are whatever was there before.
    ///
    /// # Panics
    /// If no region has room.
    pub fn alloc(&self, len: u64, align: u64) -> GuestAddress {
        assert!(align.is_power_of_two() && align <= 4096);
        let class = (len + GUARD).next_power_of_two().max(align).max(SMALLEST_CLASS);
        let mut arena = self.arena();
        let reused = arena.free.get_mut(&class).and_then(Vec::pop);
        let start = reused.unwrap_or_else(|| {
            let count = arena.room.len();
            for _ in 0..count {
                let turn = arena.turn;
                arena.turn = (turn + 1) % count;
                let (next, end) = &mut arena.room[turn];
                let at = next.next_multiple_of(class.min(4096));
                if at + class <= *end {
                    *next = at + class;
                    return at;
                }
            }
            panic!("no region has room for {len} bytes");
        });
        arena.live.insert(start, Block { len, class });
        drop(arena);
        self.write(GuestAddress(start + len), &[GUARD_BYTE; GUARD as usize]);
        GuestAddress(start)
    }

    /// Gives an allocation back.
    ///
    /// # Panics
    /// If `addr` is not one that [`TestRam::alloc`] gave.
    pub fn free(&self, addr: GuestAddress) {
        let mut arena = self.arena();
        let block = arena.live.remove(&addr.0).expect("a live allocation");
        arena.free.entry(block.class).or_default().push(addr.0);
    }

    /// Checks that nobody wrote behind an allocation.
    pub fn check_guards(&self) -> Result<(), Violation> {
        let live: Vec<_> = self.arena().live.iter().map(|(start, block)| (*start, block.len)).collect();
        for (start, len) in live {
            let mut guard = [0; GUARD as usize];
            self.read(GuestAddress(start + len), &mut guard);
            if guard != [GUARD_BYTE; GUARD as usize] {
                return Err(Violation::new(
                    "a device writes only into the device-writable elements it was given (2.7.5.1, 2.8.15)",
                    format!("bytes behind the {len} bytes at {start:#x} changed to {guard:02x?}"),
                ));
            }
        }
        self.check_forbidden()
    }

    /// Checks that nobody wrote to memory that the device was not given.
    pub fn check_forbidden(&self) -> Result<(), Violation> {
        let Some(region) = self.0.forbidden.get() else { return Ok(()) };
        let mut bytes = vec![0; region.size as usize];
        self.read(GuestAddress(region.guest_addr), &mut bytes);
        match bytes.iter().position(|byte| *byte != GUARD_BYTE) {
            None => Ok(()),
            Some(at) => Err(Violation::new(
                "a device touches no memory but what it was given",
                format!("byte {:#x} changed to {:#x}", region.guest_addr + at as u64, bytes[at]),
            )),
        }
    }

    /// A device-readable element with these contents.
    pub fn readable(&self, data: &[u8]) -> Buf {
        let addr = self.alloc(data.len() as u64, 1);
        self.write(addr, data);
        Buf::readable(addr, u32::try_from(data.len()).expect("an element of less than 4 GiB"))
    }

    /// A device-writable element of `len` bytes, filled with a pattern.
    pub fn writable(&self, len: u32) -> Buf {
        let addr = self.alloc(u64::from(len), 1);
        self.write(addr, &vec![FILL_BYTE; len as usize]);
        Buf::writable(addr, len)
    }

    /// The contents of an element.
    pub fn contents(&self, buf: &Buf) -> Vec<u8> {
        let mut data = vec![0; buf.len as usize];
        self.read(buf.addr, &mut data);
        data
    }

    /// The contents of the device-writable elements of a chain, in order.
    pub fn written(&self, chain: &[Buf]) -> Vec<u8> {
        chain.iter().filter(|buf| buf.writable).flat_map(|buf| self.contents(buf)).collect()
    }

    /// Writes bytes.
    ///
    /// # Panics
    /// Like all accesses here, if the range is not memory: tests that break rules name bad addresses in descriptors,
    /// they do not access them.
    pub fn write(&self, addr: GuestAddress, data: &[u8]) {
        self.0.memory.write_slice(data, addr).expect("a range in guest memory");
    }

    /// Reads bytes.
    pub fn read(&self, addr: GuestAddress, data: &mut [u8]) {
        self.0.memory.read_slice(data, addr).expect("a range in guest memory");
    }

    /// Reads a little-endian field that the device writes; what it wrote before is visible afterwards.
    pub fn load_u16(&self, addr: GuestAddress) -> u16 {
        u16::from_le(self.0.memory.load(addr, Ordering::Acquire).expect("a field in guest memory"))
    }

    /// Writes a little-endian field that the device reads; what was written before is visible to it.
    pub fn store_u16(&self, addr: GuestAddress, value: u16) {
        self.0.memory.store(value.to_le(), addr, Ordering::Release).expect("a field in guest memory");
    }

    /// Reads a little-endian field.
    pub fn load_u32(&self, addr: GuestAddress) -> u32 {
        u32::from_le(self.0.memory.load(addr, Ordering::Acquire).expect("a field in guest memory"))
    }

    /// Writes a little-endian field.
    pub fn store_u32(&self, addr: GuestAddress, value: u32) {
        self.0.memory.store(value.to_le(), addr, Ordering::Release).expect("a field in guest memory");
    }
}
