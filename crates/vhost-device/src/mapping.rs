//! Mapping a front-end's files: guest memory and what else it shares. The `unsafe` of mapping is here and nowhere else.
//!
//! A [`Mapping`] may be wider than the region that it serves: offsets and lengths that are no multiple of the file's
//! page size (huge pages) are rounded outwards. The descriptor is closed as soon as the file is mapped, so that some
//! hundred memory slots cost no descriptors. Who holds a region of the mapping keeps it mapped. A file that is truncated
//! later poisons its mappings (`sigbus.rs`).
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::bitmap::{Bitmap, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};
use vm_virtio::memory::{Poison, SharedMemory};

use crate::sigbus::Guarded;

/// `f_type` of hugetlbfs (statfs(2)); its block size is the size of a huge page.
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// A memory file that cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MapError {
    /// Nothing to map, or more than there are addresses.
    #[error("{size:#x} bytes at offset {offset:#x} cannot be mapped")]
    Range { offset: u64, size: u64 },
    /// Touching the missing part would raise SIGBUS.
    #[error("the memory file has {actual:#x} bytes, the region needs {needed:#x}")]
    FileTooShort { actual: u64, needed: u64 },
    /// One guest would leave no addresses for the others, nor for the process itself.
    #[error("{0:#x} bytes more than one guest of this process may have mapped")]
    TooMuch(u64),
    /// A pipe, a socket, a directory.
    #[error("the descriptor of the region is no file that can be mapped")]
    NotMappable,
    /// `mmap` refused.
    #[error("cannot map the memory file: {0}")]
    System(#[from] Errno),
}

/// Addresses that all guests of a process together may have mapped: half of the least that a 64-bit machine has.
const ADDRESSES: u64 = 1 << 46;

/// How many bytes of addresses one guest may still map. Memory files are sparse and cost their owner nothing.
#[derive(Debug)]
pub(crate) struct Budget(AtomicU64);

impl Budget {
    /// An equal part for each of so many guests.
    pub(crate) fn share(guests: usize) -> Arc<Budget> {
        Arc::new(Budget(AtomicU64::new(ADDRESSES / u64::try_from(guests.max(1)).unwrap_or(u64::MAX))))
    }

    fn take(&self, len: usize) -> Result<(), MapError> {
        let len = len as u64;
        let take = |left: u64| left.checked_sub(len);
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.map(|_| ()).map_err(|left| MapError::TooMuch(len - left))
    }
}

/// An area of this process that shows a file; unmapped on drop.
#[derive(Debug)]
struct Mapping {
    base: NonNull<std::ffi::c_void>,
    len: usize,
    /// Always there but for the end.
    guarded: Option<Guarded>,
    budget: Arc<Budget>,
}

// SAFETY: the mapping is an address range; nothing in it is bound to a thread. What is in it is shared with other
// processes anyway and only accessed as vm-virtio's memory module argues.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives no access at all.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The addresses may be somebody else's as soon as they are free.
        self.guarded = None;
        // SAFETY: `base` and `len` are what `mmap` was called with, and nobody can reach the area any more: every
        // region over it owns a reference to this mapping (`KeepMapped`).
        let _ = unsafe { munmap(self.base.as_ptr(), self.len) };
        self.budget.0.fetch_add(self.len as u64, Ordering::Relaxed);
    }
}

/// What a region over a mapping carries to keep it. It is a `Bitmap` that records nothing, because that is the one
/// thing of the caller's that a `vm_memory` region owns; it is dropped with the region.
#[derive(Clone, Debug)]
pub(crate) struct KeepMapped(Arc<Mapping>);

/// What tells that the file behind a region was truncated.
pub(crate) fn poison(region: &MappedRegion) -> Option<Arc<Poison>> {
    region.bitmap().0.guarded.as_ref().map(|guarded| guarded.poison().clone())
}

impl WithBitmapSlice<'_> for KeepMapped {
    type S = ();
}

impl Bitmap for KeepMapped {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) {}
}

/// A region of guest memory that shows a part of a front-end's file.
pub(crate) type MappedRegion = GuestRegionMmap<KeepMapped>;

/// Maps `size` bytes of the file behind `fd` at `offset` as guest memory at `guest`. A file that was opened for
/// reading only becomes memory that devices can only read.
pub(crate) fn map(
    fd: BorrowedFd<'_>,
    offset: u64,
    size: u64,
    guest: GuestAddress,
    budget: &Arc<Budget>,
) -> Result<MappedRegion, MapError> {
    let bad_range = || MapError::Range { offset, size };
    let part = Part::of(fd, offset, size)?;
    let read_write = ProtFlags::READ | ProtFlags::WRITE;
    let (mapping, prot) = match map_shared(fd, &part, read_write, budget) {
        Err(MapError::System(Errno::ACCESS)) => {
            (map_shared(fd, &part, ProtFlags::READ, budget)?, ProtFlags::READ)
        }
        other => (other?, read_write),
    };
    let (pointer, size) = (part.within(&mapping).as_ptr(), part.size);
    let builder = MmapRegionBuilder::new_with_bitmap(size, KeepMapped(Arc::new(mapping)))
        .with_mmap_prot(prot.bits() as i32)
        .with_mmap_flags(MapFlags::SHARED.bits() as i32);
    // SAFETY: `size` bytes from `pointer` on are inside of the mapping (`lead + size <= len`), which the region keeps.
    let region = unsafe { builder.with_raw_mmap_pointer(pointer) }.build().map_err(|_| bad_range())?;
    GuestRegionMmap::new(region, guest).ok_or_else(bad_range)
}

/// Maps `size` bytes of the file behind `fd` at `offset`, for reading and writing: memory that is shared beside that of
/// the guest. It counts towards the same budget.
pub(crate) fn map_beside(
    fd: BorrowedFd<'_>,
    offset: u64,
    size: u64,
    budget: &Arc<Budget>,
) -> Result<SharedMemory, MapError> {
    let part = Part::of(fd, offset, size)?;
    let mapping = map_shared(fd, &part, ProtFlags::READ | ProtFlags::WRITE, budget)?;
    let base = part.within(&mapping);
    let poison = mapping.guarded.as_ref().map(|guarded| guarded.poison().clone()).unwrap_or_default();
    // SAFETY: `size` bytes from `base` on are inside of the mapping, which is dropped last.
    Ok(unsafe { SharedMemory::new(base, part.size, poison, Box::new(mapping)) })
}

/// What of a file is to be mapped, in the file's units.
struct Part {
    start: u64,
    len: usize,
    granule: usize,
    /// Where in this the bytes lie that were asked for: `lead + size <= len`.
    lead: usize,
    size: usize,
}

impl Part {
    fn of(fd: BorrowedFd<'_>, offset: u64, size: u64) -> Result<Part, MapError> {
        let bad_range = || MapError::Range { offset, size };
        let end = offset.checked_add(size).filter(|_| size > 0).ok_or_else(bad_range)?;
        let granule = check_file(fd, end)?;
        let start = offset - offset % granule;
        let len = end.checked_next_multiple_of(granule).map(|end| end - start).ok_or_else(bad_range)?;
        let within = |n: u64| usize::try_from(n).ok().filter(|n| *n <= isize::MAX as usize);
        let fit = |n: u64| within(n).ok_or_else(bad_range);
        Ok(Part {
            start,
            len: fit(len)?,
            granule: fit(granule)?,
            lead: fit(offset - start)?,
            size: fit(size)?,
        })
    }

    /// Where they are in memory.
    fn within(&self, mapping: &Mapping) -> NonNull<u8> {
        // SAFETY: `lead` is less than a granule and the length more than `lead`: inside of the mapping, so not null.
        unsafe { mapping.base.cast::<u8>().add(self.lead) }
    }
}

fn map_shared(
    fd: BorrowedFd<'_>,
    part: &Part,
    prot: ProtFlags,
    budget: &Arc<Budget>,
) -> Result<Mapping, MapError> {
    let (len, flags) = (part.len, MapFlags::SHARED | MapFlags::NORESERVE);
    budget.take(len)?;
    // SAFETY: without MAP_FIXED the kernel chooses addresses that are free.
    let base = unsafe { mmap(null_mut(), len, prot, flags, fd, part.start) };
    match base.map(NonNull::new) {
        Ok(Some(base)) => {
            let guarded = Some(Guarded::new(base.as_ptr(), len, part.granule));
            Ok(Mapping { base, len, guarded, budget: budget.clone() })
        }
        other => {
            budget.0.fetch_add(len as u64, Ordering::Relaxed);
            Err(other.err().unwrap_or(Errno::NOMEM).into())
        }
    }
}

/// Checks that the file has `end` bytes and returns the unit in which it can be mapped.
fn check_file(fd: BorrowedFd<'_>, end: u64) -> Result<u64, MapError> {
    let stat = rustix::fs::fstat(fd.as_fd())?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let actual = u64::try_from(stat.st_size).unwrap_or(0);
            if actual < end {
                return Err(MapError::FileTooShort { actual, needed: end });
            }
        }
        // Device memory has no size to compare with; the driver behind it decides in mmap.
        FileType::CharacterDevice => {}
        _ => return Err(MapError::NotMappable),
    }
    let filesystem = rustix::fs::fstatfs(fd)?;
    let huge = (filesystem.f_type as u32 == HUGETLBFS_MAGIC).then_some(filesystem.f_bsize);
    let page = rustix::param::page_size() as u64;
    Ok(huge.and_then(|size| u64::try_from(size).ok()).filter(|size| *size >= page).unwrap_or(page))
}

impl From<MapError> for io::Error {
    fn from(error: MapError) -> Self {
        io::Error::other(error)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::fs::MemfdFlags;
    use vm_virtio::{GuestRam, MemFault};

    use super::*;

    fn map(
        fd: BorrowedFd<'_>,
        offset: u64,
        size: u64,
        guest: GuestAddress,
    ) -> Result<MappedRegion, MapError> {
        super::map(fd, offset, size, guest, &Budget::share(1))
    }

    #[test]
    fn what_one_guest_maps_is_limited_and_comes_back() {
        let (fd, budget) = (file(1 << 50), Budget::share(4));
        let map = |size| super::map(fd.as_fd(), 0, size, GuestAddress(0), &budget);
        assert!(matches!(map((ADDRESSES >> 2) + 1), Err(MapError::TooMuch(_))));
        for _ in 0..2 {
            let half = map(ADDRESSES >> 3).unwrap();
            assert!(matches!(map((ADDRESSES >> 3) + 1), Err(MapError::TooMuch(_))));
            drop(half);
        }
    }

    fn file(size: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        fd
    }

    #[test]
    fn what_is_written_on_one_side_is_seen_on_the_other_and_the_file_is_closed() {
        let fd = file(0x4000);
        rustix::io::pwrite(&fd, b"hello", 0x2004).unwrap();
        let region = map(fd.as_fd(), 0x2000, 0x1000, GuestAddress(0x10_0000)).unwrap();
        let ram = GuestRam::from_regions([Arc::new(region)]).unwrap();
        let mut data = [0; 5];
        ram.read(GuestAddress(0x10_0004), &mut data).unwrap();
        assert_eq!(&data, b"hello");
        ram.write(GuestAddress(0x10_0fff), b"!").unwrap();
        let mut last = [0];
        rustix::io::pread(&fd, &mut last, 0x2fff).unwrap();
        assert_eq!(&last, b"!");
        assert!(ram.read(GuestAddress(0x10_1000), &mut last).is_err(), "not beyond the region");
    }

    #[test]
    fn a_length_that_is_no_whole_page_ends_where_it_says() {
        let fd = file(0x1000);
        let region = map(fd.as_fd(), 0, 0x800, GuestAddress(0)).unwrap();
        let ram = GuestRam::from_regions([Arc::new(region)]).unwrap();
        assert!(ram.write(GuestAddress(0x7ff), &[1]).is_ok());
        assert!(ram.write(GuestAddress(0x800), &[1]).is_err());
    }

    #[test]
    fn files_that_are_too_short_or_no_files_are_refused() {
        let fd = file(0x1000);
        let error = |fd: BorrowedFd<'_>, offset, size| map(fd, offset, size, GuestAddress(0)).unwrap_err();
        assert!(matches!(
            error(fd.as_fd(), 0, 0x1001),
            MapError::FileTooShort { actual: 0x1000, needed: 0x1001 }
        ));
        assert!(matches!(error(fd.as_fd(), 0x1000, 1), MapError::FileTooShort { .. }));
        assert!(matches!(error(fd.as_fd(), 0, 0), MapError::Range { .. }));
        assert!(matches!(error(fd.as_fd(), u64::MAX, 2), MapError::Range { .. }));
        let (reader, _writer) = io::pipe().unwrap();
        assert!(matches!(error(reader.as_fd(), 0, 1), MapError::NotMappable));
        let huge = file(1 << 50);
        assert!(matches!(error(huge.as_fd(), 0, 1 << 50), MapError::TooMuch(_)));
    }

    #[test]
    fn a_file_opened_for_reading_gives_memory_that_can_only_be_read() {
        let path = std::env::current_exe().unwrap();
        let own = std::fs::File::open(path).unwrap();
        let region = map(own.as_fd(), 0, 64, GuestAddress(0)).unwrap();
        let ram = GuestRam::from_regions([Arc::new(region)]).unwrap();
        let mut magic = [0; 4];
        ram.read(GuestAddress(0), &mut magic).unwrap();
        assert_eq!(&magic, b"\x7fELF");
        assert!(ram.write(GuestAddress(0), b"x").is_err());
    }

    #[test]
    fn policy_6_a_truncated_file_poisons_its_memory_and_no_other() {
        let (lost, kept) = (file(0x4000), file(0x2000));
        let ram = |regions: Vec<Arc<MappedRegion>>| {
            GuestRam::from_files(regions.into_iter().map(|region| {
                let poison = poison(&region);
                (region, poison)
            }))
            .unwrap()
        };
        let bad = Arc::new(map(lost.as_fd(), 0, 0x4000, GuestAddress(0x10_0000)).unwrap());
        let good = Arc::new(map(kept.as_fd(), 0, 0x2000, GuestAddress(0)).unwrap());
        let (both, one) = (ram(vec![bad, good.clone()]), ram(vec![good]));
        rustix::fs::ftruncate(&lost, 0x1000).unwrap();
        both.write(GuestAddress(0x10_0000), b"here").unwrap();
        assert!(!both.is_poisoned(), "nobody touched what is missing");
        assert_eq!(both.write(GuestAddress(0x10_0fff), b"half"), Err(MemFault::Poisoned));
        assert!(both.is_poisoned());
        assert_eq!(both.read(GuestAddress(0), &mut [0]), Err(MemFault::Poisoned));
        one.write(GuestAddress(0), b"fine").unwrap();
        assert!(!one.is_poisoned());
    }

    #[test]
    fn policy_6_shared_memory_beside_the_guests_is_poisoned_too() {
        let (fd, budget) = (file(0x3000), Budget::share(1));
        let shared = map_beside(fd.as_fd(), 0x1008, 0x1ff8, &budget).unwrap();
        assert_eq!(shared.len(), 0x1ff8);
        rustix::io::pwrite(&fd, b"z", 0x1008).unwrap();
        // SAFETY: within the area, here and below.
        assert_eq!(unsafe { shared.as_ptr().read_volatile() }, b'z');
        rustix::fs::ftruncate(&fd, 0x2000).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { shared.as_ptr().wrapping_add(0x1ff7).read_volatile() }, 0);
        assert!(shared.is_poisoned());
    }

    #[test]
    fn the_mapping_goes_with_the_last_holder() {
        let maps = |name: &str| std::fs::read_to_string("/proc/self/maps").unwrap().contains(name);
        let fd = rustix::fs::memfd_create("goes-with-the-last", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 0x1000).unwrap();
        let region = Arc::new(map(fd.as_fd(), 0, 0x1000, GuestAddress(0)).unwrap());
        let ram = GuestRam::from_regions([region.clone()]).unwrap();
        drop(region);
        assert!(maps("goes-with-the-last"));
        drop(ram);
        assert!(!maps("goes-with-the-last"));
    }
}
