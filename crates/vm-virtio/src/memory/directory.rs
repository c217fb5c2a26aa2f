//! From a guest address to a host pointer in one table look-up.
//!
//! The address space is cut into buckets of one power of two; those from the first to the last region are in a table,
//! found by the low bits of their number, and each names the region that holds most of it. What a bucket says is
//! checked against the region, so that it does not matter which bucket an address outside of the table leads to. Where
//! all borders of regions are multiples of the bucket size - the usual case - the table alone answers; where they are
//! not, or a range spans regions, the sorted list does. Reading one bucket costs the same for one region and for five
//! hundred, and mispredicts no branch.
//!
//! Invariants: regions are sorted, not empty, do not overlap and do not pass the last address; `host` is valid for
//! `limit` bytes for the access that the limit belongs to, as long as the snapshot lives; there are `mask + 1` buckets.
//! No pointer into guest memory is read here.
use std::fmt;

use super::{Access, MemFault, RamError};

/// Most buckets of a table: 32 KiB of them.
const MAX_BUCKETS: u64 = 1024;
/// Smallest bucket, as a power of two: a page.
const MIN_SHIFT: u32 = 12;

/// A region of guest memory, mapped at `host`. Aligned so that none is in two cache lines.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub(crate) struct Region {
    start: u64,
    /// Bytes that may be read, and written: the length or 0, by [`Access`].
    limit: [u64; 2],
    host: *mut u8,
}

// SAFETY: the pointer is an address only; what it points at is shared with the guest anyway and is accessed through
// volatile or atomic operations, from any thread.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    const NONE: Region = Region { start: 0, limit: [0; 2], host: std::ptr::null_mut() };

    /// The region, unless it has no bytes. `allowed` is by [`Access`].
    pub(super) fn new(start: u64, len: u64, host: *mut u8, allowed: [bool; 2]) -> Option<Region> {
        let limit = allowed.map(|allowed| if allowed { len } else { 0 });
        (len > 0).then_some(Region { start, limit, host })
    }

    fn len(&self) -> u64 {
        self.limit[0].max(self.limit[1])
    }

    /// Takes the next region in, if the two are one in the guest and in the host, with the same rights.
    fn absorb(&mut self, next: &Region) -> bool {
        let len = self.len();
        let rights = |region: &Region| region.limit.map(|limit| limit > 0);
        let one = self.start.checked_add(len) == Some(next.start)
            && self.host.wrapping_add(len as usize) == next.host
            && rights(self) == rights(next);
        if one {
            let len = len + next.len();
            self.limit = rights(self).map(|allowed| if allowed { len } else { 0 });
        }
        one
    }

    /// Last address. Regions that pass the end of the address space do not get here.
    fn last(&self) -> u64 {
        self.start.saturating_add(self.len().saturating_sub(1))
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last())
    }
}

/// The regions of a snapshot and the table over them.
pub(crate) struct Directory {
    shift: u32,
    mask: usize,
    /// Addresses are an IOMMU's: what is missing may come.
    iommu: bool,
    buckets: Box<[Region]>,
    regions: Box<[Region]>,
}

impl Directory {
    pub(super) fn empty() -> Directory {
        Directory {
            shift: 0,
            mask: 0,
            iommu: false,
            buckets: Box::new([Region::NONE]),
            regions: Box::default(),
        }
    }

    pub(super) fn new(mut regions: Vec<Region>) -> Result<Directory, RamError> {
        // A region that allows nothing has no bytes for anybody.
        regions.retain(|region| region.len() > 0);
        regions.sort_by_key(|region| region.start);
        for region in &regions {
            if region.start.checked_add(region.len() - 1).is_none() {
                return Err(RamError::PastTheEnd { addr: region.start, len: region.len() });
            }
        }
        for pair in regions.windows(2) {
            if let [a, b] = pair
                && a.last() >= b.start
            {
                return Err(RamError::Overlap { addr: b.start });
            }
        }
        let (Some(first), Some(last)) = (regions.first(), regions.last()) else {
            return Ok(Directory::empty());
        };
        // The largest bucket that no border lies within. One region may share its buckets with nobody.
        let borders = regions.iter().fold(0, |bits, r| bits | r.start | r.last().wrapping_add(1));
        let mut shift = if regions.len() == 1 { u64::BITS } else { borders.trailing_zeros() };
        shift = shift.clamp(MIN_SHIFT, u64::BITS - 1);
        // Not too many of them.
        while (last.last() >> shift) - (first.start >> shift) >= MAX_BUCKETS {
            shift += 1;
        }
        let (first, last) = (first.start >> shift, last.last() >> shift);
        // At most `MAX_BUCKETS`, so that it fits, and each number between the two has a place of its own.
        let mask = (last - first + 1).next_power_of_two() as usize - 1;
        let mut buckets = vec![Region::NONE; mask + 1];
        for number in first..=last {
            if let Some(bucket) = buckets.get_mut(number as usize & mask) {
                *bucket = most_of(&regions, number << shift, (1 << shift) - 1);
            }
        }
        Ok(Directory { shift, mask, iommu: false, buckets: buckets.into(), regions: regions.into() })
    }

    /// The same by addresses of an IOMMU. Neighbours that are so in the host become one.
    pub(super) fn translated(mut regions: Vec<Region>) -> Result<Directory, RamError> {
        regions.sort_by_key(|region| region.start);
        regions.dedup_by(|next, region| region.absorb(next));
        Ok(Directory { iommu: true, ..Directory::new(regions)? })
    }

    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The host address of a range within one region, if the table alone can tell. `None` for a range that is not
    /// mapped, is empty, spans regions, or lies in a region that shares its bucket: ask [`Self::pieces`].
    #[inline(always)]
    pub(crate) fn lookup(&self, addr: u64, len: u32, access: Access) -> Option<*mut u8> {
        // Whatever this cuts off, the region below is checked.
        let bucket = (addr >> self.shift) as usize & self.mask;
        // SAFETY: there are `mask + 1` buckets.
        let region = unsafe { self.buckets.get_unchecked(bucket) };
        let offset = addr.wrapping_sub(region.start);
        let limit = region.limit[access as usize];
        // An empty range becomes a very long one by the subtraction and fails here.
        if offset < limit && u64::from(len).wrapping_sub(1) < limit - offset {
            // The offset is below the size of a mapping, so that it fits a usize.
            Some(region.host.wrapping_add(offset as usize))
        } else {
            None
        }
    }

    /// Calls `piece` for each contiguous part of the range, in order; checks the whole range first.
    pub(crate) fn pieces<E: From<MemFault>>(
        &self,
        addr: u64,
        len: u64,
        access: Access,
        mut piece: impl FnMut(*mut u8, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        // `at` is the first address that is missing.
        let fault = |at, denied| match self.iommu {
            true => MemFault::Miss { iova: at, access, denied },
            false => MemFault::Unmapped { addr, len },
        };
        let first = self.regions.partition_point(|region| region.last() < addr);
        let regions = self.regions.get(first..).unwrap_or(&[]);
        for check in [true, false] {
            let (mut at, mut left) = (addr, len);
            for region in regions {
                if left == 0 {
                    break;
                }
                let offset = at.checked_sub(region.start).ok_or_else(|| fault(at, false))?;
                let limit = region.limit[access as usize].checked_sub(offset);
                let part = limit.ok_or_else(|| fault(at, true))?.min(left);
                if part == 0 {
                    return Err(fault(at, true).into());
                }
                if !check {
                    // Offset and part are below the size of a mapping.
                    piece(region.host.wrapping_add(offset as usize), part as usize)?;
                }
                left -= part;
                // Wraps to 0 only at the end of the address space, where no region is left.
                at = at.wrapping_add(part);
            }
            if left > 0 {
                return Err(fault(at, false).into());
            }
        }
        Ok(())
    }

    /// The host address of a range that must be contiguous there, as rings must.
    pub(crate) fn contiguous(&self, addr: u64, len: u64, access: Access) -> Option<*mut u8> {
        let mut found = None;
        self.pieces(addr, len, access, |host, part| {
            // Regions that are neighbours may well be so in the host, too.
            match found {
                None => found = Some((host, part)),
                Some((start, so_far)) if host == start.wrapping_add(so_far) => {
                    found = Some((start, so_far + part));
                }
                Some(_) => return Err(MemFault::Unmapped { addr, len }),
            }
            Ok(())
        })
        .ok()?;
        found.map(|(host, _)| host)
    }

    /// The guest address of a host pointer that came from this directory.
    pub(crate) fn guest_address(&self, host: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = (host as u64).checked_sub(region.host as u64)?;
            (offset < region.len()).then(|| region.start + offset)
        })
    }
}

/// The region that holds most of the bucket that starts at `start` and ends `last` bytes behind it.
fn most_of(regions: &[Region], start: u64, last: u64) -> Region {
    let end = start.saturating_add(last);
    let first = regions.partition_point(|region| region.last() < start);
    let share = |r: &Region| r.last().min(end).saturating_sub(r.start.max(start));
    let inside = regions.get(first..).unwrap_or(&[]).iter().take_while(|region| region.start <= end);
    inside.max_by_key(|region| share(region)).copied().unwrap_or(Region::NONE)
}
