//! Guest memory: regions that the front-end named, and the log of pages written.
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

struct Region {
    guest: u64,
    size: u64,
    user: u64,
    map: MmapRegion<()>,
}

#[derive(Default)]
pub(super) struct Memory {
    regions: Vec<Region>,
    /// Behind an IOMMU: the front-end's address of each page that is known.
    pub(super) iotlb: Option<BTreeMap<u64, u64>>,
    /// The first page that was not.
    pub(super) missed: Cell<Option<u64>>,
    /// File, where in it the log begins, how long it is.
    pub(super) log: Option<(File, u64, u64)>,
}

fn words(bytes: &[u8]) -> Option<[u64; 4]> {
    let word = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
    Some([word(0)?, word(8)?, word(16)?, word(24)?])
}

impl Memory {
    /// Adds a region as a message describes it. Whether it was acceptable.
    pub(super) fn add(&mut self, description: &[u8], fd: &OwnedFd, anywhere: bool) -> bool {
        let Some([guest, size, user, offset]) = words(description) else { return false };
        let overlaps = |r: &Region| guest < r.guest + r.size && r.guest < guest.saturating_add(size);
        if !anywhere && self.regions.iter().any(overlaps) {
            return false;
        }
        let Ok(fd) = fd.as_fd().try_clone_to_owned() else { return false };
        match MmapRegion::from_file(FileOffset::new(File::from(fd), offset), size as usize) {
            Ok(map) => self.regions.push(Region { guest, size, user, map }),
            Err(_) => return false,
        }
        true
    }

    pub(super) fn remove(&mut self, description: &[u8]) -> bool {
        let Some([guest, size, user, _]) = words(description) else { return false };
        let before = self.regions.len();
        self.regions.retain(|r| (r.guest, r.size, r.user) != (guest, size, user));
        self.regions.len() < before
    }

    /// The guest's address of the front-end's, which the driver's is itself behind an IOMMU.
    pub(super) fn guest(&self, user: u64) -> Option<u64> {
        if self.iotlb.is_some() {
            return Some(user);
        }
        let region = self.regions.iter().find(|r| user >= r.user && user - r.user < r.size)?;
        Some(region.guest + (user - region.user))
    }

    fn find(&self, addr: u64, len: u64) -> Option<(&Region, usize)> {
        if let Some(iotlb) = &self.iotlb {
            // No range of the suite is in pages that are not neighbours of the front-end as well.
            let last = addr.checked_add(len.max(1) - 1)? / 0x1000 * 0x1000;
            let mut pages = (addr / 0x1000 * 0x1000..=last).step_by(0x1000);
            if let Some(page) = pages.find(|page| !iotlb.contains_key(page)) {
                self.missed.set(self.missed.get().or(Some(page)));
                return None;
            }
            let user = iotlb.get(&(addr / 0x1000 * 0x1000))? + addr % 0x1000;
            let region = self.regions.iter().find(|r| user >= r.user && user - r.user < r.size)?;
            return Some((region, (user - region.user) as usize));
        }
        let region = self.regions.iter().find(|r| addr >= r.guest && addr - r.guest < r.size)?;
        let offset = addr - region.guest;
        (offset.checked_add(len)? <= region.size).then_some((region, offset as usize))
    }

    /// Whether the address itself is memory.
    pub(super) fn begins_in(&self, addr: u64) -> bool {
        self.find(addr, 0).is_some()
    }

    pub(super) fn has(&self, addr: u64, len: u64) -> bool {
        self.find(addr, len).is_some()
    }

    /// Reads what is there; zeros where nothing is.
    pub(super) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        if let Some((region, offset)) = self.find(addr, len as u64) {
            let _ = region.map.as_volatile_slice().read_slice(&mut bytes, offset);
        }
        bytes
    }

    pub(super) fn write(&self, addr: u64, bytes: &[u8], logged: bool) {
        let Some((region, offset)) = self.find(addr, bytes.len() as u64) else { return };
        let _ = region.map.as_volatile_slice().write_slice(bytes, offset);
        if logged && !bytes.is_empty() {
            self.mark(addr, bytes.len() as u64);
        }
    }

    /// One writer, so that no bit is lost without an atomic access.
    fn mark(&self, addr: u64, len: u64) {
        let Some((file, begin, size)) = &self.log else { return };
        for page in addr / 4096..=(addr + len - 1) / 4096 {
            let mut byte = [0];
            if page / 8 < *size && file.read_exact_at(&mut byte, begin + page / 8).is_ok() {
                let _ = file.write_all_at(&[byte[0] | 1 << (page % 8)], begin + page / 8);
            }
        }
    }

    pub(super) fn load16(&self, addr: u64) -> u16 {
        let Some((region, offset)) = self.find(addr, 2) else { return 0 };
        region.map.as_volatile_slice().load(offset, Ordering::SeqCst).map_or(0, u16::from_le)
    }

    pub(super) fn store16(&self, addr: u64, value: u16) {
        let Some((region, offset)) = self.find(addr, 2) else { return };
        let _ = region.map.as_volatile_slice().store(value.to_le(), offset, Ordering::SeqCst);
    }
}
