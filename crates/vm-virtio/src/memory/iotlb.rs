//! Guest memory behind an IOMMU: translations of I/O virtual addresses (IOVAs), and the snapshot that a device sees
//! through them.
//!
//! The [`Iotlb`] is a bounded cache of what the host was told. Each change of it makes a new snapshot
//! ([`GuestRam::translated`]) whose directory is by IOVA, so a device behind an IOMMU reads its rings and buffers by the
//! same code and at the same price as any other; what is not in the cache is a [`MemFault::Miss`](super::MemFault) that
//! the host asks for.
use std::collections::BTreeMap;

use super::{Access, Directory, GuestAddress, GuestRam, RamError, Region};

/// Most translations of a cache: as many as the Linux kernel's vhost keeps.
pub const MAX_TRANSLATIONS: usize = 2048;

/// What a device may do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// It may read.
    pub read: bool,
    /// It may write.
    pub write: bool,
}

/// A translation that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IotlbError {
    /// No bytes, or more than there are addresses.
    #[error("a translation of {size:#x} bytes at {iova:#x} for {target:#x}")]
    Range {
        /// First IOVA.
        iova: u64,
        /// Bytes.
        size: u64,
        /// What the first of them is in the host's terms.
        target: u64,
    },
    /// It allows nothing.
    #[error("a translation of {0:#x} that allows nothing")]
    NoAccess(u64),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    last: u64,
    target: u64,
    rights: Rights,
    age: u64,
}

/// Translations that the host was told, by IOVA; none overlap. A target is an address in the host's terms.
#[derive(Clone, Debug, Default)]
pub struct Iotlb {
    entries: BTreeMap<u64, Entry>,
    next_age: u64,
}

/// A part of a cache that means guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// What the first of them is.
    pub addr: GuestAddress,
    /// What a device may do there.
    pub rights: Rights,
}

impl Iotlb {
    /// Adds a translation; those that it overlaps are forgotten, and so is the oldest if there are too many.
    pub fn update(&mut self, iova: u64, size: u64, target: u64, rights: Rights) -> Result<(), IotlbError> {
        let wraps = || IotlbError::Range { iova, size, target };
        let last = size.checked_sub(1).and_then(|len| iova.checked_add(len)).ok_or_else(wraps)?;
        target.checked_add(size - 1).ok_or_else(wraps)?;
        if !rights.read && !rights.write {
            return Err(IotlbError::NoAccess(iova));
        }
        self.invalidate(iova, size);
        if self.entries.len() >= MAX_TRANSLATIONS
            && let Some((&oldest, _)) = self.entries.iter().min_by_key(|(_, entry)| entry.age)
        {
            self.entries.remove(&oldest);
        }
        self.entries.insert(iova, Entry { last, target, rights, age: self.next_age });
        self.next_age += 1;
        Ok(())
    }

    /// Forgets every translation of which a part is in this range, which ends at the last address if it would pass it.
    /// A size of 0 means all that follows: it is what becomes of 2^64.
    pub fn invalidate(&mut self, iova: u64, size: u64) {
        let last = last_of(iova, size);
        let from = self.entries.range(..iova).next_back();
        let from = from.filter(|(_, entry)| entry.last >= iova).map_or(iova, |(start, _)| *start);
        let gone: Vec<u64> = self.entries.range(from..=last).map(|(start, _)| *start).collect();
        for start in gone {
            self.entries.remove(&start);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// How many translations there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What the translations mean: IOVA, bytes, target, rights.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, u64, Rights)> {
        // A cache with a translation of all 2^64 addresses has one of 2^64 - 1.
        self.entries
            .iter()
            .map(|(iova, entry)| (*iova, (entry.last - iova).saturating_add(1), entry.target, entry.rights))
    }
}

/// The last address of a range as [`Iotlb::invalidate`] takes it.
pub fn last_of(iova: u64, size: u64) -> u64 {
    size.checked_sub(1).map_or(u64::MAX, |len| iova.saturating_add(len))
}

impl GuestRam {
    /// This memory as a device sees it through an IOMMU: under IOVAs, as far as these translations go. One that is not
    /// entirely in this memory counts as missing. They must not overlap.
    pub fn translated(
        &self,
        translations: impl IntoIterator<Item = Translation>,
    ) -> Result<GuestRam, RamError> {
        let physical = self.physical();
        let mut regions = Vec::new();
        for Translation { iova, len, addr, rights } in translations {
            let mut own = Vec::new();
            let found = |access, own: &mut Vec<(*mut u8, usize)>| {
                own.clear();
                physical
                    .directory()
                    .pieces(addr.0, len, access, |host, len| {
                        own.push((host, len));
                        Ok::<(), super::MemFault>(())
                    })
                    .is_ok()
            };
            // A file that was opened for reading only stays so.
            let write = rights.write && found(Access::Write, &mut own);
            let read = rights.read && found(Access::Read, &mut own);
            if !(read || write) {
                continue;
            }
            let mut at = iova;
            for (host, part) in own {
                regions.extend(Region::new(at, part as u64, host, [read, write]));
                at = at.wrapping_add(part as u64);
            }
        }
        Ok(GuestRam::view(physical.clone(), Directory::translated(regions)?))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::super::MemFault;
    use super::*;

    const ALL: Rights = Rights { read: true, write: true };
    const READ: Rights = Rights { read: true, write: false };

    fn spans(iotlb: &Iotlb) -> Vec<(u64, u64, u64)> {
        iotlb.iter().map(|(iova, len, target, _)| (iova, len, target)).collect()
    }

    #[test]
    fn an_update_takes_the_place_of_what_it_overlaps() {
        let mut iotlb = Iotlb::default();
        for (iova, target) in [(0x1000, 1), (0x2000, 2), (0x3000, 3), (0x9000, 9)] {
            iotlb.update(iova, 0x1000, target, ALL).unwrap();
        }
        iotlb.update(0x1fff, 0x1002, 5, READ).unwrap();
        assert_eq!(spans(&iotlb), [(0x1fff, 0x1002, 5), (0x9000, 0x1000, 9)]);
        iotlb.invalidate(0x2000, 1);
        assert_eq!(spans(&iotlb), [(0x9000, 0x1000, 9)]);
        iotlb.invalidate(0xa000, 0x1000);
        iotlb.invalidate(0x8000, 0x1000);
        assert_eq!(iotlb.len(), 1);
        iotlb.invalidate(0x9fff, u64::MAX);
        assert!(iotlb.is_empty());
        iotlb.update(0x9000, 0x1000, 9, ALL).unwrap();
        iotlb.invalidate(0, 0);
        assert!(iotlb.is_empty(), "everything");
    }

    #[test]
    fn hostile_updates_are_refused_and_floods_push_out_the_oldest() {
        let mut iotlb = Iotlb::default();
        for (iova, size, target) in [(0, 0, 0), (u64::MAX, 2, 0), (0, 2, u64::MAX)] {
            assert_eq!(iotlb.update(iova, size, target, ALL), Err(IotlbError::Range { iova, size, target }));
        }
        let nothing = Rights { read: false, write: false };
        assert_eq!(iotlb.update(0x1000, 1, 0, nothing), Err(IotlbError::NoAccess(0x1000)));
        iotlb.update(u64::MAX, 1, u64::MAX, ALL).unwrap();
        for page in 0..3 * MAX_TRANSLATIONS as u64 {
            iotlb.update(page * 0x1000, 0x1000, page, ALL).unwrap();
            assert!(iotlb.len() <= MAX_TRANSLATIONS);
        }
        assert_eq!(iotlb.iter().next().unwrap().0, 2 * MAX_TRANSLATIONS as u64 * 0x1000);
    }

    fn ram() -> GuestRam {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x4000)];
        GuestRam::new(&GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap())
    }

    fn to(iova: u64, len: u64, addr: u64, rights: Rights) -> Translation {
        Translation { iova, len, addr: GuestAddress(addr), rights }
    }

    #[test]
    fn a_view_has_what_is_translated_and_misses_the_rest() {
        let ram = ram();
        let view = ram
            .translated([
                to(0x10_0000, 0x1000, 0x9000, ALL),
                to(0x10_1000, 0x1000, 0x1000, ALL),
                to(0x20_0000, 0x1000, 0x2000, READ),
                to(0x30_0000, 0x1000, 0x3800, ALL),
            ])
            .unwrap();
        view.write(GuestAddress(0x10_0ffc), b"hello world").unwrap();
        let mut data = [0; 7];
        ram.read(GuestAddress(0x1000), &mut data).unwrap();
        assert_eq!(&data, b"o world");
        view.read(GuestAddress(0x20_0000), &mut data).unwrap();
        let miss = |iova, access, denied| Err(MemFault::Miss { iova, access, denied });
        assert_eq!(view.write(GuestAddress(0x20_0000), b"x"), miss(0x20_0000, Access::Write, true));
        assert_eq!(view.read(GuestAddress(0x1000), &mut data), miss(0x1000, Access::Read, false));
        assert_eq!(view.read(GuestAddress(0x10_1ffc), &mut data), miss(0x10_2000, Access::Read, false));
        assert_eq!(view.write(GuestAddress(0x30_0000), b"x"), miss(0x30_0000, Access::Write, false));
        assert!(view.same_memory_as(&ram) && !view.same_as(&ram));
        let again = view.translated([to(0, 0x1000, 0x9000, ALL)]).unwrap();
        again.read(GuestAddress(0xffc), &mut data[..4]).unwrap();
        assert_eq!(&data[..4], b"hell", "translations are of physical addresses, whatever they are asked of");
    }

    #[test]
    fn what_overlaps_is_no_view() {
        let overlap = [to(0, 0x1000, 0, ALL), to(0xfff, 0x1000, 0x1000, ALL)];
        assert!(matches!(ram().translated(overlap), Err(RamError::Overlap { .. })));
    }
}
