//! The memory table of a connection: which file shows which guest addresses, and under which addresses the front-end
//! itself knows them (vhost-user, "Memory access").
//!
//! A table is changed by making the next one and taking it only if every step of that worked, so a refused message
//! leaves the old table as it was. Regions that stay are not mapped again.
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vhost_user::MemoryRegion;
use vm_virtio::memory::iotlb::{Iotlb, IotlbError, Rights, Translation};
use vm_virtio::{GuestAddress, GuestRam};

use crate::mapping::{self, Budget, MapError, MappedRegion};

/// Memory slots that a front-end may use: what the Linux kernel gives a VM, less its own three.
pub const MEMORY_SLOTS: usize = 509;

/// A memory table that is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// More than were promised.
    #[error("more than {MEMORY_SLOTS} memory regions")]
    TooMany,
    /// Addresses wrap around.
    #[error(
        "the memory region of {size:#x} bytes at guest {guest:#x}, user {user:#x} passes the last address"
    )]
    PastTheEnd { guest: u64, user: u64, size: u64 },
    /// Two regions claim an address: a bug of the front-end ("Memory region description").
    #[error("the memory region at guest {guest:#x}, user {user:#x} overlaps another")]
    Overlap { guest: u64, user: u64 },
    /// Asked to remove what is not there.
    #[error("there is no memory region of {size:#x} bytes at guest {guest:#x}, user {user:#x}")]
    Unknown { guest: u64, user: u64, size: u64 },
    /// No translation of an IOMMU.
    #[error(transparent)]
    Translation(#[from] IotlbError),
    /// A translation leads nowhere ("IOMMU support").
    #[error(
        "a translation of {iova:#x} leads to {size:#x} bytes at user {user:#x}, which are in no memory region"
    )]
    Nowhere { iova: u64, user: u64, size: u64 },
    /// The device is behind no IOMMU.
    #[error("an IOTLB message, but VIRTIO_F_ACCESS_PLATFORM was not negotiated")]
    NoIommu,
    /// The file cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The core refuses the regions.
    #[error("the memory regions are no memory map: {0}")]
    Ram(#[from] vm_virtio::memory::RamError),
}

#[derive(Clone)]
struct Region {
    guest: u64,
    user: u64,
    size: u64,
    mapped: Arc<MappedRegion>,
}

fn overlap(a: u64, b: u64, a_size: u64, b_size: u64) -> bool {
    // Neither range wraps: that is checked when a region is added.
    a < b + b_size && b < a + a_size
}

/// The regions of a connection and the snapshot that devices see.
#[derive(Clone)]
pub(crate) struct MemoryTable {
    /// By user address, for translation.
    regions: Vec<Region>,
    /// What devices see: all of it, or what the IOMMU shows them.
    ram: GuestRam,
    /// Translations to user addresses, if the device is behind an IOMMU.
    iotlb: Option<Iotlb>,
    budget: Arc<Budget>,
}

impl MemoryTable {
    /// No memory at all; what comes is mapped within this budget.
    pub(crate) fn new(budget: Arc<Budget>) -> MemoryTable {
        MemoryTable { regions: Vec::new(), ram: GuestRam::empty(), iotlb: None, budget }
    }

    /// What devices see.
    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// How many memory slots are taken.
    pub(crate) fn slots(&self) -> usize {
        self.regions.len()
    }

    /// SET_MEM_TABLE: these regions instead of all others.
    pub(crate) fn replaced(&self, table: Vec<(MemoryRegion, OwnedFd)>) -> Result<MemoryTable, MemoryError> {
        let mut regions = Vec::with_capacity(table.len());
        for (region, fd) in &table {
            insert(&mut regions, region, fd, &self.budget)?;
        }
        self.of(regions)
    }

    /// ADD_MEM_REG.
    pub(crate) fn with(&self, region: &MemoryRegion, fd: &OwnedFd) -> Result<MemoryTable, MemoryError> {
        let mut regions = self.regions.clone();
        insert(&mut regions, region, fd, &self.budget)?;
        self.of(regions)
    }

    /// REM_MEM_REG: the region is named by both addresses and its size; the offset does not matter.
    pub(crate) fn without(&self, region: &MemoryRegion) -> Result<MemoryTable, MemoryError> {
        let (guest, user, size) = (region.guest_addr, region.user_addr, region.size);
        let mut regions = self.regions.clone();
        let same = |known: &Region| known.guest == guest && known.user == user && known.size == size;
        let at = regions.iter().position(same).ok_or(MemoryError::Unknown { guest, user, size })?;
        regions.remove(at);
        self.of(regions)
    }

    fn of(&self, regions: Vec<Region>) -> Result<MemoryTable, MemoryError> {
        let ram = GuestRam::from_files(
            regions.iter().map(|region| (region.mapped.clone(), mapping::poison(&region.mapped))),
        )?;
        MemoryTable { regions, ram, iotlb: self.iotlb.clone(), budget: self.budget.clone() }.seen()
    }

    /// The same with what the device sees of it, its memory being there. A translation that leads out of the regions
    /// is as good as none.
    fn seen(mut self) -> Result<MemoryTable, MemoryError> {
        if let Some(iotlb) = &self.iotlb {
            let translations = iotlb.iter().filter_map(|(iova, len, user, rights)| {
                let addr = self.translate(user, len)?;
                Some(Translation { iova, len, addr, rights })
            });
            self.ram = self.ram.translated(translations)?;
        }
        Ok(self)
    }

    /// Whether the device is behind an IOMMU: its addresses are IOVAs.
    pub(crate) fn is_translated(&self) -> bool {
        self.iotlb.is_some()
    }

    /// The same behind an IOMMU of which nothing is known yet, or behind none.
    pub(crate) fn behind_iommu(&self, on: bool) -> Result<MemoryTable, MemoryError> {
        let iotlb = on.then(Iotlb::default);
        MemoryTable { iotlb, budget: self.budget.clone(), ..self.clone() }.of(self.regions.clone())
    }

    /// IOTLB update.
    pub(crate) fn updated(
        &self,
        iova: u64,
        size: u64,
        user: u64,
        rights: Rights,
    ) -> Result<MemoryTable, MemoryError> {
        let mut next = self.clone();
        let iotlb = next.iotlb.as_mut().ok_or(MemoryError::NoIommu)?;
        iotlb.update(iova, size, user, rights)?;
        self.translate(user, size).ok_or(MemoryError::Nowhere { iova, user, size })?;
        next.seen()
    }

    /// IOTLB invalidate.
    pub(crate) fn invalidated(&self, iova: u64, size: u64) -> Result<MemoryTable, MemoryError> {
        let mut next = self.clone();
        next.iotlb.as_mut().ok_or(MemoryError::NoIommu)?.invalidate(iova, size);
        next.seen()
    }

    /// The guest address of `len` bytes that the front-end knows at `user`, all in one region.
    pub(crate) fn translate(&self, user: u64, len: u64) -> Option<GuestAddress> {
        let after = self.regions.partition_point(|region| region.user <= user);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let offset = user - region.user;
        let fits = offset.checked_add(len).is_some_and(|end| end <= region.size);
        fits.then(|| GuestAddress(region.guest + offset))
    }
}

/// Checks and maps one region and puts it at its place.
fn insert(
    regions: &mut Vec<Region>,
    new: &MemoryRegion,
    fd: &OwnedFd,
    budget: &Arc<Budget>,
) -> Result<(), MemoryError> {
    let (guest, user, size) = (new.guest_addr, new.user_addr, new.size);
    if regions.len() >= MEMORY_SLOTS {
        return Err(MemoryError::TooMany);
    }
    if guest.checked_add(size).is_none() || user.checked_add(size).is_none() {
        return Err(MemoryError::PastTheEnd { guest, user, size });
    }
    let taken = |known: &Region| {
        overlap(known.guest, guest, known.size, size) || overlap(known.user, user, known.size, size)
    };
    if regions.iter().any(taken) {
        return Err(MemoryError::Overlap { guest, user });
    }
    let mapped = Arc::new(mapping::map(fd.as_fd(), new.mmap_offset, size, GuestAddress(guest), budget)?);
    let at = regions.partition_point(|known| known.user < user);
    regions.insert(at, Region { guest, user, size, mapped });
    Ok(())
}

#[cfg(test)]
impl MemoryTable {
    pub(crate) fn empty() -> MemoryTable {
        MemoryTable::new(Budget::share(1))
    }

    pub(crate) fn replace(table: Vec<(MemoryRegion, OwnedFd)>) -> Result<MemoryTable, MemoryError> {
        MemoryTable::empty().replaced(table)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    fn file() -> OwnedFd {
        let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 1 << 20).unwrap();
        fd
    }

    fn region(guest_addr: u64, user_addr: u64, size: u64, mmap_offset: u64) -> MemoryRegion {
        MemoryRegion { guest_addr, size, user_addr, mmap_offset }
    }

    #[test]
    fn user_addresses_translate_within_one_region() {
        let table = MemoryTable::replace(vec![
            (region(0x10_0000, 0x7000_0000, 0x2000, 0x2000), file()),
            (region(0, 0x5000_0000, 0x1000, 0), file()),
        ])
        .unwrap();
        assert_eq!(table.translate(0x5000_0000, 0x1000), Some(GuestAddress(0)));
        assert_eq!(table.translate(0x5000_0010, 0x10), Some(GuestAddress(0x10)));
        assert_eq!(table.translate(0x7000_1fff, 1), Some(GuestAddress(0x10_1fff)));
        for (user, len) in [(0x5000_0000, 0x1001), (0x4fff_ffff, 1), (0x7000_2000, 1), (u64::MAX, 2), (0, 1)]
        {
            assert_eq!(table.translate(user, len), None, "{user:#x}");
        }
        assert_eq!(MemoryTable::empty().translate(0, 0), None);
    }

    #[test]
    fn overlapping_regions_are_refused_and_the_old_table_stays() {
        let table = MemoryTable::replace(vec![(region(0x1000, 0x9000, 0x1000, 0), file())]).unwrap();
        for bad in [
            region(0x1fff, 0x1_0000, 0x1000, 0),
            region(0x8000, 0x9fff, 0x1000, 0),
            region(0, 0x1_0000, 0x1001, 0),
            region(0x1000, 0x9000, 0x1000, 0),
        ] {
            assert!(matches!(table.with(&bad, &file()), Err(MemoryError::Overlap { .. })), "{bad:?}");
        }
        assert_eq!(table.translate(0x9000, 1), Some(GuestAddress(0x1000)));
        let next = table.with(&region(0x2000, 0xa000, 0x1000, 0), &file()).unwrap();
        assert_eq!(next.ram().region_count(), 2);
        assert_eq!(table.ram().region_count(), 1);
    }

    #[test]
    fn regions_that_pass_the_last_address_or_their_file_are_refused() {
        let table = MemoryTable::empty();
        let past = |region| matches!(table.with(&region, &file()), Err(MemoryError::PastTheEnd { .. }));
        assert!(past(region(u64::MAX, 0, 2, 0)));
        assert!(past(region(0, u64::MAX - 1, 2, 0)));
        for bad in [region(0, 0, 0, 0), region(0, 0, (1 << 20) + 1, 0), region(0, 0, 0x1000, 1 << 20)] {
            assert!(matches!(table.with(&bad, &file()), Err(MemoryError::Map(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_region_is_removed_by_addresses_and_size() {
        let table = MemoryTable::replace(vec![(region(0x1000, 0x9000, 0x1000, 0x3000), file())]).unwrap();
        for wrong in
            [region(0, 0x9000, 0x1000, 0x3000), region(0x1000, 0, 0x1000, 0), region(0x1000, 0x9000, 1, 0)]
        {
            assert!(matches!(table.without(&wrong), Err(MemoryError::Unknown { .. })));
        }
        let empty = table.without(&region(0x1000, 0x9000, 0x1000, 0)).unwrap();
        assert_eq!(empty.ram().region_count(), 0);
    }

    #[test]
    fn peers_all_daemons_more_than_eight_memory_regions() {
        let fd = file();
        let mut table = MemoryTable::empty();
        let slot = |i: u64| region(i * 0x1_0000, 0x7f00_0000_0000 + i * 0x1_0000, 0x1000, i % 256 * 0x1000);
        for i in 0..MEMORY_SLOTS as u64 {
            table = table.with(&slot(i), &fd).unwrap();
        }
        assert!(matches!(table.with(&slot(509), &fd), Err(MemoryError::TooMany)));
        assert_eq!(
            table.translate(0x7f00_0000_0000 + 508 * 0x1_0000 + 8, 8),
            Some(GuestAddress(508 * 0x1_0000 + 8))
        );
        assert_eq!(table.ram().region_count(), MEMORY_SLOTS);
    }
}
