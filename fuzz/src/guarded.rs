//! Guest memory between pages that nobody may touch, with a record of what the device may change.
#![allow(unsafe_code)]
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vm_virtio::memory::SharedMemory;
use vm_virtio::{DirtyLog, GuestRam, Segment};

const PAGE: usize = 4096;
const LINE: usize = 64;
/// Guest address and size of each region: two that are neighbours for the guest only, one beyond a hole.
pub(crate) const REGIONS: [(u64, usize); 3] = [(0, 2 * PAGE), (0x2000, 2 * PAGE), (0x1_0000, PAGE)];

struct Region {
    guest: u64,
    host: *mut u8,
    len: usize,
}

struct Inner {
    regions: Vec<Region>,
    memory: GuestMemoryMmap,
    ram: GuestRam,
}

thread_local! {
    static MEMORY: Rc<Inner> = Rc::new(Inner::new());
}

impl Inner {
    fn new() -> Inner {
        let mut regions = Vec::new();
        let mut ranges = Vec::new();
        for (guest, len) in REGIONS {
            // SAFETY: a mapping of its own, which is never unmapped: all pages closed, then those in the middle opened.
            let host = unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let all = libc::mmap(std::ptr::null_mut(), len + 2 * PAGE, libc::PROT_NONE, flags, -1, 0);
                assert!(all != libc::MAP_FAILED, "memory");
                let host = all.cast::<u8>().add(PAGE);
                assert_eq!(libc::mprotect(host.cast(), len, libc::PROT_READ | libc::PROT_WRITE), 0);
                host
            };
            // SAFETY: the opened pages, which stay mapped for good.
            let builder = unsafe { MmapRegionBuilder::new(len).with_raw_mmap_pointer(host) };
            let region =
                builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build().expect("a region");
            ranges.push(GuestRegionMmap::new(region, GuestAddress(guest)).expect("an address"));
            regions.push(Region { guest, host, len });
        }
        let memory = GuestMemoryMmap::from_regions(ranges).expect("regions");
        let ram = GuestRam::new(&memory);
        Inner { regions, memory, ram }
    }
}

/// The memory, zeroed, and beside it what is in it if only the driver writes.
pub(crate) struct Guarded {
    inner: Rc<Inner>,
    shadow: RefCell<Vec<Vec<u8>>>,
    /// Bytes that the device was allowed to change.
    open: RefCell<Vec<Vec<bool>>>,
}

impl Guarded {
    pub(crate) fn new() -> Guarded {
        let inner = MEMORY.with(Rc::clone);
        for region in &inner.regions {
            // SAFETY: the whole of an open mapping that only this thread uses.
            unsafe { region.host.write_bytes(0, region.len) };
        }
        let shadow = inner.regions.iter().map(|region| vec![0; region.len]).collect();
        let open = inner.regions.iter().map(|region| vec![false; region.len]).collect();
        Guarded { inner, shadow: RefCell::new(shadow), open: RefCell::new(open) }
    }

    pub(crate) fn ram(&self) -> GuestRam {
        self.inner.ram.clone()
    }

    /// Another snapshot of the same.
    pub(crate) fn fresh_ram(&self) -> GuestRam {
        GuestRam::new(&self.inner.memory)
    }

    /// The driver writes what of it lies in memory.
    pub(crate) fn write(&self, addr: u64, data: &[u8]) {
        for (offset, byte) in data.iter().enumerate() {
            let Some((at, offset)) = self.find(addr.wrapping_add(offset as u64)) else { continue };
            // SAFETY: within the region.
            unsafe { self.inner.regions[at].host.add(offset).write_volatile(*byte) };
            self.shadow.borrow_mut()[at][offset] = *byte;
        }
    }

    pub(crate) fn read_u16(&self, addr: u64) -> u16 {
        let byte = |addr: u64| {
            let (at, offset) = self.find(addr).expect("memory");
            // SAFETY: within the region.
            unsafe { self.inner.regions[at].host.add(offset).read_volatile() }
        };
        u16::from_le_bytes([byte(addr), byte(addr + 1)])
    }

    fn find(&self, addr: u64) -> Option<(usize, usize)> {
        self.inner.regions.iter().enumerate().find_map(|(at, region)| {
            let offset = usize::try_from(addr.checked_sub(region.guest)?).ok()?;
            (offset < region.len).then_some((at, offset))
        })
    }

    /// The device may change this from now on.
    pub(crate) fn open(&self, addr: u64, len: usize) {
        for addr in addr..addr + len as u64 {
            if let Some((at, offset)) = self.find(addr) {
                self.open.borrow_mut()[at][offset] = true;
            }
        }
    }

    /// A segment lies in memory, in one region.
    pub(crate) fn check_segment(&self, segment: &Segment, writable: bool) {
        let (start, len) = (segment.as_ptr() as usize, segment.len());
        let home = self.inner.regions.iter().enumerate().find(|(_, region)| {
            let first = region.host as usize;
            start >= first && start - first <= region.len && len <= region.len - (start - first)
        });
        let (at, region) =
            home.unwrap_or_else(|| panic!("a segment of {len} bytes at {start:#x} is not memory"));
        if writable {
            let offset = start - region.host as usize;
            self.open.borrow_mut()[at][offset..offset + len].fill(true);
        }
    }

    /// Nothing else has changed; and what has, has its page in the log.
    pub(crate) fn check_untouched(&self, log: Option<&Shared>) {
        let (shadow, open) = (self.shadow.borrow(), self.open.borrow());
        for ((region, shadow), open) in self.inner.regions.iter().zip(shadow.iter()).zip(open.iter()) {
            let mut now = vec![0; region.len];
            // SAFETY: the whole of an open mapping that only this thread uses.
            unsafe { region.host.copy_to_nonoverlapping(now.as_mut_ptr(), region.len) };
            // Whole lines first: a fuzzer is as good as it is fast.
            for (at, (now, shadow)) in now.chunks(LINE).zip(shadow.chunks(LINE)).enumerate() {
                if now == shadow {
                    continue;
                }
                for (offset, (now, shadow)) in (at * LINE..).zip(now.iter().zip(shadow)) {
                    if now == shadow {
                        continue;
                    }
                    let addr = region.guest + offset as u64;
                    assert!(
                        open[offset],
                        "the byte at {addr:#x} became {now:#x}, and nobody was allowed to write there"
                    );
                    let page = addr as usize / PAGE;
                    let marked = log.is_none_or(|log| log.read(page / 8) & 1 << (page % 8) != 0);
                    assert!(marked, "the byte at {addr:#x} became {now:#x}, and its page is not in the log");
                }
            }
        }
    }
}

/// What a front-end shares beside guest memory.
pub(crate) struct Shared(Arc<SharedMemory>);

impl Shared {
    pub(crate) fn new(len: usize) -> Shared {
        Shared(Arc::new(SharedMemory::private(len)))
    }

    pub(crate) fn memory(&self) -> Arc<SharedMemory> {
        Arc::clone(&self.0)
    }

    pub(crate) fn log(&self) -> Arc<DirtyLog> {
        Arc::new(DirtyLog::new(self.memory(), None))
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        assert!(at < self.0.len());
        // SAFETY: within the memory, which lives as long as this; bytes are accessed atomically by everybody.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr().add(at)) }
    }

    pub(crate) fn read(&self, at: usize) -> u8 {
        self.byte(at).load(Ordering::Relaxed)
    }

    pub(crate) fn write(&self, at: usize, data: &[u8]) {
        for (at, byte) in (at..self.0.len()).zip(data) {
            self.byte(at).store(*byte, Ordering::Relaxed);
        }
    }
}
