//! Guest memory, as devices and rings see it: an immutable snapshot of the map.
//!
//! [`GuestRam`] takes over the regions of a `vm_memory` map, keeps them mapped and looks addresses up in a directory
//! of its own; a change of the map makes a new snapshot. Nothing here hands out `&[u8]` into guest memory: the guest
//! changes it at any time, so it is touched by volatile copies only, through [`Segment`]s.
//!
//! | file | what for |
//! |---|---|
//! | `directory.rs` | from a guest address to a host pointer in one table look-up |
//! | `iotlb.rs` | guest memory behind an IOMMU |
//! | `segment.rs` | a contiguous piece of guest memory, and lists of them |
//! | `buf.rs` | memory that a payload names: owns its snapshot |
//! | `copy.rs` | the volatile copies |
//! | `poison.rs` | memory whose file was truncated |
//! | `dirty_log.rs` | which pages a device has written |
//! | `files.rs` | which regions another process can map |
//! | `shared.rs` | memory that is shared beside the guest's |
mod buf;
mod copy;
mod directory;
mod dirty_log;
mod files;
pub mod iotlb;
mod poison;
mod segment;
mod shared;

use std::any::Any;
use std::fmt;
use std::sync::Arc;

pub use vm_memory::GuestAddress;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, bitmap::Bitmap};

pub use buf::GuestBuf;
pub(crate) use copy::{copy, load_u64};
pub(crate) use directory::Directory;
use directory::Region;
pub use dirty_log::{DirtyLog, LOG_PAGE};
pub use files::FileRegion;
pub use poison::Poison;
pub use segment::{Segment, Segs, iovecs};
pub use shared::SharedMemory;

/// What an access is going to do with the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads.
    Read = 0,
    /// The device writes.
    Write = 1,
}

/// An access to guest memory that cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemFault {
    /// No region, or none that allows this access, has the whole range.
    #[error("no guest memory for {len} bytes at {addr:#x}")]
    Unmapped {
        /// First guest address of the range.
        addr: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// The IOMMU's translations, as far as they are known, do not have it: ask for them ([`iotlb`]).
    #[error("no translation of {iova:#x} for {access:?}")]
    Miss {
        /// First address that is missing.
        iova: u64,
        /// What it is needed for.
        access: Access,
        /// There is a translation, but it does not allow that.
        denied: bool,
    },
    /// A file behind the memory was truncated: what is in this snapshot is void (failure policy 6).
    #[error("guest memory was lost: a file behind it was truncated")]
    Poisoned,
}

/// A set of regions that is no memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// Two regions claim the same address.
    #[error("two memory regions claim guest address {addr:#x}")]
    Overlap {
        /// The first address that both have.
        addr: u64,
    },
    /// A region goes beyond the last address.
    #[error("the memory region of {len} bytes at {addr:#x} goes beyond the last address")]
    PastTheEnd {
        /// First guest address of the region.
        addr: u64,
        /// Length of the region in bytes.
        len: u64,
    },
}

struct Ram {
    directory: Directory,
    /// The memory that this is a view of, through an IOMMU.
    physical: Option<GuestRam>,
    /// One for each mapping that can lose memory.
    poisons: Vec<Arc<Poison>>,
    watch: poison::Watch,
    files: Vec<FileRegion>,
    /// What unmaps the regions when it is dropped.
    _keep: Vec<Box<dyn Any + Send + Sync>>,
}

/// A snapshot of guest memory. Cloning is one reference count; the regions stay mapped as long as any clone, any
/// [`GuestBuf`] of it and any chain that was popped under it.
#[derive(Clone)]
pub struct GuestRam(Arc<Ram>);

impl GuestRam {
    /// A snapshot of a `vm_memory` map, as it is now.
    pub fn new<B: Bitmap + Send + Sync + 'static>(memory: &GuestMemoryMmap<B>) -> GuestRam {
        let regions = memory.iter().filter_map(region_of).collect();
        let files = memory.iter().filter_map(FileRegion::of).collect();
        let keep: Vec<Box<dyn Any + Send + Sync>> = vec![Box::new(memory.clone())];
        // The map has been through the same checks when it was made; were it otherwise, an empty snapshot faults
        // every access.
        Directory::new(regions)
            .map_or_else(|_| GuestRam::empty(), |directory| GuestRam::of(directory, Vec::new(), files, keep))
    }

    /// A snapshot without any memory: each access faults.
    pub fn empty() -> GuestRam {
        GuestRam::of(Directory::empty(), Vec::new(), Vec::new(), Vec::new())
    }

    fn of(
        directory: Directory,
        poisons: Vec<Arc<Poison>>,
        mut files: Vec<FileRegion>,
        keep: Vec<Box<dyn Any + Send + Sync>>,
    ) -> GuestRam {
        files.sort_by_key(|region| region.addr);
        let watch = poison::Watch::default();
        GuestRam(Arc::new(Ram { directory, physical: None, poisons, watch, files, _keep: keep }))
    }

    /// Memory under other addresses.
    fn view(physical: GuestRam, directory: Directory) -> GuestRam {
        let (poisons, files, watch) = (Vec::new(), Vec::new(), poison::Watch::default());
        let physical = Some(physical);
        GuestRam(Arc::new(Ram { directory, physical, poisons, watch, files, _keep: Vec::new() }))
    }

    /// The memory under its guest-physical addresses: itself, unless it is [a view](Self::translated).
    pub(crate) fn physical(&self) -> &GuestRam {
        self.0.physical.as_ref().unwrap_or(self)
    }

    /// Whether both show the same memory, under whatever addresses.
    pub fn same_memory_as(&self, other: &GuestRam) -> bool {
        self.physical().same_as(other.physical())
    }

    /// A snapshot of these regions, in any order; regions without bytes are left out.
    pub fn from_regions<B: Bitmap + Send + Sync + 'static>(
        regions: impl IntoIterator<Item = Arc<GuestRegionMmap<B>>>,
    ) -> Result<GuestRam, RamError> {
        GuestRam::from_files(regions.into_iter().map(|region| (region, None)))
    }

    /// The same, of regions whose files may be truncated: with what tells of it.
    pub fn from_files<B: Bitmap + Send + Sync + 'static>(
        regions: impl IntoIterator<Item = (Arc<GuestRegionMmap<B>>, Option<Arc<Poison>>)>,
    ) -> Result<GuestRam, RamError> {
        let (keep, poisons): (Vec<_>, Vec<_>) = regions.into_iter().unzip();
        let directory = Directory::new(keep.iter().filter_map(|region| region_of(region)).collect())?;
        let files = keep.iter().filter_map(|region| FileRegion::of(region)).collect();
        let keep = keep.into_iter().map(|region| Box::new(region) as Box<dyn Any + Send + Sync>).collect();
        Ok(GuestRam::of(directory, poisons.into_iter().flatten().collect(), files, keep))
    }

    /// The regions that another process can map, sorted by their addresses: those with a file behind them. Of memory
    /// behind an IOMMU: under their guest-physical addresses.
    pub fn files(&self) -> &[FileRegion] {
        &self.physical().0.files
    }

    /// Whether a file behind the memory was truncated. What was read or written since it happened is void, so look
    /// after an access, not before. One load as long as nothing is lost in this process.
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        let ram = self.physical();
        ram.0.watch.any(ram.0.poisons.iter().map(|poison| &**poison))
    }

    fn intact(&self) -> Result<(), MemFault> {
        if self.is_poisoned() { Err(MemFault::Poisoned) } else { Ok(()) }
    }

    /// Whether both are the very same snapshot.
    pub fn same_as(&self, other: &GuestRam) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Number of regions.
    pub fn region_count(&self) -> usize {
        self.0.directory.regions().len()
    }

    #[inline(always)]
    pub(crate) fn directory(&self) -> &Directory {
        &self.0.directory
    }

    /// Appends the pieces of host memory that make up the range, in order; nothing is appended on a fault. A range
    /// of no bytes has no pieces, wherever it is.
    pub fn slices<'a>(
        &'a self,
        addr: GuestAddress,
        len: u32,
        access: Access,
        out: &mut Segs<'a>,
    ) -> Result<(), MemFault> {
        self.intact()?;
        out.append(self.directory(), addr.0, u64::from(len), access)
    }

    /// Memory named in a payload: the pieces together with the snapshot that keeps them mapped.
    pub fn pin(&self, addr: GuestAddress, len: u64, access: Access) -> Result<GuestBuf, MemFault> {
        self.intact()?;
        GuestBuf::new(self.clone(), addr.0, len, access)
    }

    /// Copies out of guest memory. A naturally aligned value of 2, 4 or 8 bytes is read in one access.
    pub fn read(&self, addr: GuestAddress, data: &mut [u8]) -> Result<(), MemFault> {
        let mut segs = Segs::new();
        segs.append(self.directory(), addr.0, data.len() as u64, Access::Read)?;
        let mut data = data;
        for segment in segs.iter() {
            let (now, later) = data.split_at_mut(segment.len().min(data.len()));
            segment.read(0, now);
            data = later;
        }
        self.intact()
    }

    /// Copies into guest memory. A naturally aligned value of 2, 4 or 8 bytes is written in one access.
    pub fn write(&self, addr: GuestAddress, data: &[u8]) -> Result<(), MemFault> {
        let mut segs = Segs::new();
        segs.append(self.directory(), addr.0, data.len() as u64, Access::Write)?;
        let mut data = data;
        for segment in segs.iter() {
            let (now, later) = data.split_at(segment.len().min(data.len()));
            segment.write(0, now);
            data = later;
        }
        self.intact()
    }
}

impl fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.directory.regions()).finish()
    }
}

fn region_of<B: Bitmap>(region: &GuestRegionMmap<B>) -> Option<Region> {
    let readable = region.prot() & libc::PROT_READ != 0;
    let writable = region.prot() & libc::PROT_WRITE != 0;
    Region::new(region.start_addr().0, region.len(), region.as_ptr(), [readable, writable])
}

#[cfg(test)]
mod tests;
