//! Shared memory regions (virtio 1.4, 2.10): which ones a device has, and what is mapped where in them.
//!
//! A region is address space of the guest, as large as the device says and empty. Where it is, the host decides. What is
//! in it, the device does: its workers ask the host to map files ([`Upcall::map`](crate::device::Upcall::map)). Mappings
//! do not overlap, are unmapped as a whole only, and end with a reset.
use crate::upcall::UpcallError;
use std::collections::BTreeMap;

/// Mappings that a device may have at a time: a window of 32 GiB in pieces of 2 MiB.
pub const MAX_MAPPINGS: usize = 16 << 10;

/// A region of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShmRegion {
    /// Its `shmid`; what it means is the device type's to say.
    pub id: u8,
    /// Its size in bytes: a multiple of the page size, not zero.
    pub size: u64,
}

/// A part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ShmRange {
    /// The region's id.
    pub region: u8,
    /// First byte within the region.
    pub offset: u64,
    /// Size in bytes.
    pub len: u64,
}

impl ShmRange {
    /// Whether something can be mapped there: whole pages of a region that exists.
    pub(crate) fn fits(&self, regions: &[ShmRegion]) -> bool {
        let Some(region) = regions.iter().find(|region| region.id == self.region) else { return false };
        let end = self.offset.checked_add(self.len);
        self.len > 0
            && end.is_some_and(|end| end <= region.size)
            && (self.offset | self.len).is_multiple_of(page_size())
    }
}

/// The size of a page, which is what mappings are made of.
pub(crate) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// What is mapped in the regions of a device, for hosts: the rules of mapping and unmapping in one place.
#[derive(Debug, Default)]
pub struct Mappings {
    /// Lengths, by region and offset. No two overlap.
    lens: BTreeMap<(u8, u64), u64>,
}

impl Mappings {
    /// Notes a mapping.
    ///
    /// # Errors
    /// [`UpcallError::Overlap`], or [`UpcallError::Busy`] beyond [`MAX_MAPPINGS`]; nothing has changed then.
    pub fn map(&mut self, range: ShmRange) -> Result<(), UpcallError> {
        let ShmRange { region, offset, len } = range;
        let end = offset.saturating_add(len);
        // Of those that begin before its end the last is the only one that can reach into it.
        let before = self.lens.range((region, 0)..(region, end)).next_back();
        if before.is_some_and(|((_, start), len)| start.saturating_add(*len) > offset) {
            return Err(UpcallError::Overlap);
        }
        if self.lens.len() >= MAX_MAPPINGS {
            return Err(UpcallError::Busy);
        }
        self.lens.insert((region, offset), len);
        Ok(())
    }

    /// Whether this is a mapping, all of it.
    pub fn contains(&self, range: ShmRange) -> bool {
        self.lens.get(&(range.region, range.offset)) == Some(&range.len)
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.lens.is_empty()
    }

    /// Forgets a mapping.
    ///
    /// # Errors
    /// [`UpcallError::NotMapped`] unless it is one, all of it.
    pub fn unmap(&mut self, range: ShmRange) -> Result<(), UpcallError> {
        if !self.contains(range) {
            return Err(UpcallError::NotMapped);
        }
        self.lens.remove(&(range.region, range.offset));
        Ok(())
    }

    /// Forgets all of them and says what they were.
    pub fn take_all(&mut self) -> impl Iterator<Item = ShmRange> + use<> {
        let lens = std::mem::take(&mut self.lens);
        lens.into_iter().map(|((region, offset), len)| ShmRange { region, offset, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, len: u64) -> ShmRange {
        ShmRange { region: 1, offset, len }
    }

    #[test]
    fn mappings_do_not_overlap_and_go_as_a_whole() {
        let mut mappings = Mappings::default();
        mappings.map(range(0x4000, 0x2000)).unwrap();
        mappings.map(range(0x8000, 0x1000)).unwrap();
        for (offset, len) in
            [(0x4000, 0x2000), (0x5000, 0x1000), (0x3000, 0x2000), (0, 0x10_0000), (0x5fff, 1)]
        {
            assert_eq!(mappings.map(range(offset, len)), Err(UpcallError::Overlap), "{offset:#x} {len:#x}");
        }
        for fine in [range(0x6000, 0x2000), range(0x3000, 0x1000), ShmRange { region: 0, ..range(0x4000, 1) }]
        {
            mappings.map(fine).unwrap();
        }
        for (offset, len) in [(0x4000, 0x1000), (0x5000, 0x1000), (0x4000, 0x4000), (0, 1)] {
            assert_eq!(mappings.unmap(range(offset, len)), Err(UpcallError::NotMapped));
        }
        mappings.unmap(range(0x4000, 0x2000)).unwrap();
        mappings.map(range(0x5000, 0x1000)).unwrap();
        assert_eq!(mappings.take_all().count(), 5);
        assert_eq!(mappings.take_all().count(), 0);
    }

    #[test]
    fn policy_8_there_is_an_end_to_mappings() {
        let mut mappings = Mappings::default();
        for n in 0..MAX_MAPPINGS as u64 {
            mappings.map(range(n * 2, 1)).unwrap();
        }
        assert_eq!(mappings.map(range(u64::MAX, 1)), Err(UpcallError::Busy));
        mappings.unmap(range(0, 1)).unwrap();
        mappings.map(range(u64::MAX, 1)).unwrap();
    }

    #[test]
    fn virtio_2_10_a_range_is_whole_pages_of_a_region() {
        let page = page_size();
        let regions = [ShmRegion { id: 1, size: 4 * page }];
        assert!(range(0, 4 * page).fits(&regions) && range(3 * page, page).fits(&regions));
        let wrong = [
            range(0, 0),
            range(0, 5 * page),
            range(4 * page, page),
            range(1, page),
            range(0, page - 1),
            range(u64::MAX - page + 1, page),
            ShmRange { region: 0, ..range(0, page) },
        ];
        wrong.into_iter().for_each(|range| assert!(!range.fits(&regions), "{range:?}"));
    }
}
