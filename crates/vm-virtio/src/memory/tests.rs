//! Guest memory snapshots: look-ups against a linear search, borders, protection, copies.
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

use super::*;
use crate::{Features, Queue, QueueConfig};

const PAGE: u64 = 4096;
/// Two regions are neighbours in the guest here, and not in the host.
const BORDER: u64 = 0x20_0000;
const END: u64 = 0x40_0000;
/// A region beyond a hole.
const FAR: u64 = 0x1_0000_0000;

fn memory() -> GuestMemoryMmap {
    let ranges = [(0, BORDER as usize), (BORDER, (END - BORDER) as usize), (FAR, 0x1_0000)];
    GuestMemoryMmap::from_ranges(&ranges.map(|(addr, len)| (GuestAddress(addr), len))).unwrap()
}

/// One region of that many bytes at an address.
fn region(addr: u64, len: usize) -> GuestRegionMmap {
    GuestRegionMmap::from_range(GuestAddress(addr), len, None).unwrap()
}

#[test]
fn overlapping_regions_are_refused() {
    let of = |starts: &[u64]| {
        GuestRam::from_regions(starts.iter().map(|start| Arc::new(region(start * PAGE, 2 * PAGE as usize))))
            .map(|ram| ram.region_count())
    };
    assert_eq!(of(&[]), Ok(0));
    assert_eq!(of(&[4, 0, 2]), Ok(3));
    assert_eq!(of(&[0, 1]), Err(RamError::Overlap { addr: PAGE }));
    assert_eq!(of(&[5, 5]), Err(RamError::Overlap { addr: 5 * PAGE }));
}

#[test]
fn nothing_is_mapped_in_an_empty_snapshot() {
    let ram = GuestRam::empty();
    for addr in [0, 1, PAGE, u64::MAX] {
        let fault = MemFault::Unmapped { addr, len: 1 };
        assert_eq!(ram.read(GuestAddress(addr), &mut [0]), Err(fault));
        assert_eq!(ram.pin(GuestAddress(addr), 1, Access::Read).map(|_| ()), Err(fault));
        assert_eq!(ram.pin(GuestAddress(addr), 0, Access::Read).unwrap().segments().len(), 0);
    }
}

#[test]
fn a_range_across_regions_is_several_segments_and_a_fault_appends_none() {
    let ram = GuestRam::new(&memory());
    let mut segs = Segs::new();
    ram.slices(GuestAddress(BORDER - 5), 10, Access::Write, &mut segs).unwrap();
    assert_eq!(segs.iter().map(Segment::len).collect::<Vec<_>>(), [5, 5]);
    let fault = ram.slices(GuestAddress(END - 5), 10, Access::Read, &mut segs).unwrap_err();
    assert_eq!(fault, MemFault::Unmapped { addr: END - 5, len: 10 });
    assert_eq!(segs.len(), 2);
    segs.clear();
    assert!(segs.is_empty());
}

#[test]
fn memory_without_permission_to_write_is_not_written() {
    let map = |prot| {
        let mapping = MmapRegionBuilder::<()>::new(4096)
            .with_mmap_prot(prot)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()
    };
    let ram = GuestRam::from_regions([Arc::new(map(libc::PROT_READ))]).unwrap();
    assert_eq!(ram.read(GuestAddress(0), &mut [1; 8]), Ok(()));
    assert_eq!(ram.write(GuestAddress(0), &[1; 8]), Err(MemFault::Unmapped { addr: 0, len: 8 }));
    let ram = GuestRam::from_regions([Arc::new(map(libc::PROT_NONE))]).unwrap();
    assert!(ram.read(GuestAddress(0), &mut [1; 8]).is_err());
    // A chain cannot be used to write it, either; a split table and an available ring may well be there.
    let (rom, rw) = (Arc::new(map(libc::PROT_READ)), Arc::new(region(PAGE, 4096)));
    let ram = GuestRam::from_regions([rom, rw]).unwrap();
    let config = |desc, device| QueueConfig {
        size: 4,
        desc: GuestAddress(desc),
        driver: GuestAddress(64),
        device: GuestAddress(device),
    };
    assert!(Queue::new(config(0, PAGE), &ram, Features::empty(), None).is_ok());
    assert!(Queue::new(config(0, 128), &ram, Features::empty(), None).is_err());
    assert!(Queue::new(config(0, PAGE), &ram, Features::RING_PACKED, None).is_err());
}

#[test]
fn a_buffer_of_a_payload_outlives_the_map() {
    let ram = GuestRam::new(&memory());
    ram.write(GuestAddress(BORDER - 2), &[1, 2, 3, 4]).unwrap();
    let buf = ram.pin(GuestAddress(BORDER - 2), 4, Access::Read).unwrap();
    drop(ram);
    let mut bytes = [0; 4];
    let (head, tail) = bytes.split_at_mut(2);
    assert_eq!((buf.segments()[0].read(0, head), buf.segments()[1].read(0, tail)), (2, 2));
    assert_eq!((bytes, buf.len(), buf.is_empty()), ([1, 2, 3, 4], 4, false));
}

#[test]
fn copies_of_every_length_and_alignment() {
    let ram = GuestRam::new(&memory());
    let data: Vec<u8> = (0..600u32).map(|i| (i * 7 + i / 256) as u8).collect();
    for len in (0..100).chain([127, 128, 191, 192, 193, 256, 300, 512]) {
        for at in [0, 1, 3, 7, 8] {
            ram.write(GuestAddress(0x1000), &[0xee; 600]).unwrap();
            ram.write(GuestAddress(0x1008 + at), &data[at as usize..][..len]).unwrap();
            let mut back = vec![0; len + 2];
            ram.read(GuestAddress(0x1007 + at), &mut back).unwrap();
            assert_eq!(back[1..=len], data[at as usize..][..len]);
            assert_eq!((back[0], back[len + 1]), (0xee, 0xee), "nothing beside it");
        }
    }
}

#[test]
fn a_segment_copies_no_more_than_it_has() {
    let ram = GuestRam::new(&memory());
    let mut segs = Segs::new();
    ram.slices(GuestAddress(FAR), 8, Access::Write, &mut segs).unwrap();
    assert_eq!(segs[0].write(6, &[1; 100]), 2);
    assert_eq!(segs[0].write(8, &[1; 100]), 0);
    assert_eq!(segs[0].write(usize::MAX, &[1; 100]), 0);
    let mut bytes = [9; 4];
    assert_eq!(segs[0].read(5, &mut bytes), 3);
    assert_eq!(bytes, [0, 1, 1, 9]);
    assert_eq!(segs[0].as_iovec().iov_len, 8);
}

/// Many regions of different sizes with holes between some of them.
fn maps() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let region = (0u64..4, 1u64..6);
    (0u64..1 << 40, prop::collection::vec(region, 1..80)).prop_map(|(start, list)| {
        let mut at = start / PAGE * PAGE;
        list.into_iter()
            .map(|(hole, pages)| {
                at += hole * hole * hole * PAGE;
                let region = (at, pages * PAGE);
                at += pages * PAGE;
                region
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_directory_agrees_with_a_linear_search(
        map in maps(),
        picks in prop::collection::vec((0usize..80, -20i64..20, 0u32..40, 0u64..6), 50),
    ) {
        let ranges: Vec<_> = map.iter().map(|(addr, len)| (GuestAddress(*addr), *len as usize)).collect();
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let ram = GuestRam::new(&memory);
        for (which, offset, len, page) in picks {
            let (start, size) = map[which % map.len()];
            let addr = (start + (page * PAGE).min(size)).saturating_add_signed(offset);
            let mapped = |addr: u64| map.iter().any(|(start, len)| (*start..start + len).contains(&addr));
            let whole = (addr..addr + u64::from(len)).all(mapped);
            let mut segs = Segs::new();
            let found = ram.slices(GuestAddress(addr), len, Access::Read, &mut segs).is_ok();
            prop_assert_eq!(found, whole);
            let total: usize = segs.iter().map(Segment::len).sum();
            prop_assert_eq!(total, if whole { len as usize } else { 0 });
            if let Some(host) = ram.directory().lookup(addr, len, Access::Read) {
                prop_assert!(whole && len > 0);
                prop_assert_eq!(host, segs[0].as_ptr());
                prop_assert_eq!(ram.directory().guest_address(host), Some(addr));
            }
        }
    }
}

#[test]
fn five_hundred_slots_are_found() {
    for size in [PAGE, 3 * PAGE] {
        let regions: Vec<_> =
            (0..500).map(|i| Arc::new(region(0x1_0000_0000 + i * 2 * size, size as usize))).collect();
        let ram = GuestRam::from_regions(regions).unwrap();
        for i in 0..500u64 {
            let start = 0x1_0000_0000 + i * 2 * size;
            ram.write(GuestAddress(start), &i.to_le_bytes()).unwrap();
            assert!(ram.write(GuestAddress(start + size), &[0]).is_err());
        }
        for i in 0..500u64 {
            let mut bytes = [0; 8];
            ram.read(GuestAddress(0x1_0000_0000 + i * 2 * size), &mut bytes).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), i);
        }
    }
}
