//! What a driver must not do: each is a fault of its own, latched, and the queue still takes completions (failure policy
//! 1). Nothing of it is read or written, or kept without bound (8).
use std::sync::Arc;

use super::driver::{AVAIL, DATA, END, FAR, FAR_LEN, TABLES};
use super::*;
use crate::memory::Poison;

/// Pops until the fault, which it must be; then nothing is popped any more, whatever the ring has.
#[track_caller]
fn faults(driver: &Driver, queue: &mut Queue, error: QueueError) {
    let before = queue.state();
    assert!(queue.pop().is_none());
    assert_eq!(queue.fault(), Some(&error));
    assert_eq!(queue.state(), before, "nothing moves on a fault");
    // The first one stays, even if the driver mends its ring.
    for index in 0..driver.size {
        if driver.packed {
            driver.packed_desc(index, DATA, 8, 0, driver.avail_flags());
        } else {
            driver.split_desc(index, DATA, 8, 0, 0);
            driver.put_u16(AVAIL + 4 + 2 * u64::from(index), 0);
        }
    }
    if !driver.packed {
        driver.put_u16(AVAIL + 2, before.avail.index.wrapping_add(1));
    }
    queue.set_budget(7);
    queue.open();
    assert!(queue.pop().is_none());
    assert!(!queue.has_available());
    assert!(!queue.arm());
    assert!(!queue.budget_spent());
    assert_eq!(queue.fault(), Some(&error));
}

/// A queue with one good chain out, and what the driver does next: on the quick and on the careful way.
#[track_caller]
fn case(packed: bool, features: Features, error: QueueError, bad: impl Fn(&mut Driver)) {
    case_in(driver(packed, 8, features), error, &bad);
    let mut crowded = driver(packed, 8, features);
    crowded.ram = GuestRam::new(&driver::crowded_memory());
    case_in(crowded, error, bad);
}

#[track_caller]
fn case_in(mut driver: Driver, error: QueueError, bad: impl Fn(&mut Driver)) {
    let mut queue = driver.queue();
    let id = driver.add(&[w(DATA, 8)], &[]).unwrap();
    let chain = queue.pop().unwrap();
    bad(&mut driver);
    faults(&driver, &mut queue, error);
    // May not pop is not may not complete.
    queue.add_used(chain, 8);
    queue.publish();
    assert_eq!(driver.used(), [(id, 8)]);
}

const NONE: Features = Features::empty();
const INDIRECT_DESC: Features = Features::INDIRECT_DESC;

/// Puts a list of descriptors of either layout at the next position: `(addr, len, flags)`; split ones are 4, 5, 6 ...
fn list(driver: &mut Driver, descs: &[(u64, u32, u16)]) {
    let first = if driver.packed { driver.next_avail } else { 4 };
    for (i, (addr, len, flags)) in (first..).zip(descs) {
        if driver.packed {
            let flags = flags | driver.avail_flags();
            driver.packed_desc(i, *addr, *len, 1, flags);
        } else {
            driver.split_desc(i, *addr, *len, *flags, i + 1);
        }
    }
    if !driver.packed {
        driver.expose(4);
    }
}

#[test]
fn malformed_split_available_index_jumps() {
    for idx in [10u16, 100, 0x8000, 0xffff, 0] {
        let error = QueueError::AvailIndex { idx, next: 1 };
        case(false, NONE, error, |driver| driver.put_u16(AVAIL + 2, idx));
    }
}

#[test]
fn malformed_split_head_out_of_the_table() {
    for head in [8u16, 9, 0x7fff, 0xffff] {
        case(false, NONE, QueueError::Head(head), |driver| driver.expose(head));
    }
}

#[test]
fn malformed_split_next_out_of_the_table() {
    for next in [8u16, 0xffff] {
        case(false, NONE, QueueError::Next(next), |driver| {
            driver.split_desc(4, DATA, 8, NEXT, next);
            driver.expose(4);
        });
    }
}

#[test]
fn malformed_split_loops() {
    case(false, NONE, QueueError::ChainTooLong, |driver| {
        driver.split_desc(4, DATA, 8, NEXT, 4);
        driver.expose(4);
    });
    case(false, NONE, QueueError::ChainTooLong, |driver| {
        driver.split_desc(4, DATA, 0, NEXT, 5);
        driver.split_desc(5, DATA, 0, NEXT, 4);
        driver.expose(4);
    });
    case(false, INDIRECT_DESC, QueueError::ChainTooLong, |driver| {
        driver.desc_at(TABLES, DATA, 8, NEXT, 1);
        driver.desc_at(TABLES + 16, DATA, 8, NEXT, 0);
        list(driver, &[(TABLES, 32, INDIRECT)]);
    });
}

#[test]
fn malformed_packed_list_without_an_end() {
    // Seven more descriptors, each with NEXT, end at the one that is out: not available in this lap.
    case(true, NONE, QueueError::NotAvailable(0), |driver| list(driver, &[(DATA, 8, NEXT); 7]));
    let driver = driver(true, 4, NONE);
    let mut queue = driver.queue();
    for i in 0..4 {
        driver.packed_desc(i, DATA, 8, 0, NEXT | 0x80);
    }
    faults(&driver, &mut queue, QueueError::NotAvailable(0));
}

#[test]
fn malformed_packed_list_goes_on_with_what_is_not_available() {
    for flags in [0, 0x8080, 0x8000] {
        for kind in [0, WRITE] {
            case(true, NONE, QueueError::NotAvailable(2), |driver| {
                driver.packed_desc(2, DATA, 8, 0, flags | kind);
                driver.packed_desc(1, DATA, 8, 0, NEXT | kind | 0x80);
            });
        }
    }
}

/// 2.7.5.2, 2.8.17; and the limit that 2.7.4.1 and 2.8.18 allow is no lower.
#[test]
fn malformed_chain_longer_than_the_queue() {
    let long: Vec<Elem> = (0..9).map(|i| r(DATA + i, 1)).collect();
    for packed in LAYOUTS {
        case(packed, INDIRECT_DESC, QueueError::ChainTooLong, |driver| {
            driver.add(&[], &long).unwrap();
        });
    }
    // Direct and indirect elements count together.
    case(false, INDIRECT_DESC, QueueError::ChainTooLong, |driver| {
        driver.add(&long[..2], &long[2..]).unwrap();
    });
    // As many as the queue has entries are fine.
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, INDIRECT_DESC);
        let mut queue = driver.queue();
        driver.add(&[], &long[1..]).unwrap();
        let chain = queue.pop().unwrap();
        assert_eq!(queue.readable(&chain).len(), 8);
    }
}

#[test]
fn malformed_readable_behind_writable() {
    for packed in LAYOUTS {
        case(packed, NONE, QueueError::ReadableAfterWritable, |driver| {
            list(driver, &[(DATA, 8, WRITE | NEXT), (DATA, 8, 0)]);
        });
        case(packed, INDIRECT_DESC, QueueError::ReadableAfterWritable, |driver| {
            driver.add(&[], &[r(DATA, 8), w(DATA, 8), r(DATA, 8)]).unwrap();
        });
    }
}

#[test]
fn malformed_indirect_not_negotiated() {
    for packed in LAYOUTS {
        case(packed, NONE, QueueError::IndirectNotNegotiated, |driver| {
            driver.add(&[], &[r(DATA, 8)]).unwrap();
        });
    }
}

#[test]
fn malformed_split_indirect_within_indirect() {
    for flags in [INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE] {
        case(false, INDIRECT_DESC, QueueError::NestedIndirect, |driver| {
            driver.desc_at(TABLES, DATA, 8, NEXT, 1);
            driver.desc_at(TABLES + 16, TABLES, 16, flags, 0);
            list(driver, &[(TABLES, 32, INDIRECT)]);
        });
    }
}

#[test]
fn malformed_indirect_with_next() {
    for packed in LAYOUTS {
        case(packed, INDIRECT_DESC, QueueError::IndirectInList, |driver| {
            driver.table(0, &[r(DATA, 8)]);
            list(driver, &[(TABLES, 16, INDIRECT | NEXT), (DATA, 8, 0)]);
        });
    }
}

#[test]
fn malformed_packed_indirect_in_a_direct_list() {
    case(true, INDIRECT_DESC, QueueError::IndirectInList, |driver| {
        driver.table(0, &[r(DATA, 8)]);
        list(driver, &[(DATA, 8, NEXT), (TABLES, 16, INDIRECT)]);
    });
}

#[test]
fn malformed_indirect_table_length() {
    for packed in LAYOUTS {
        for len in [0u32, 1, 15, 17, 24, 0xffff_ffff] {
            case(packed, INDIRECT_DESC, QueueError::IndirectLength(len), |driver| {
                driver.table(0, &[r(DATA, 8); 4]);
                list(driver, &[(TABLES, len, INDIRECT)]);
            });
        }
    }
}

#[test]
fn malformed_split_next_out_of_the_indirect_table() {
    for next in [2u16, 0xffff] {
        case(false, INDIRECT_DESC, QueueError::Next(next), |driver| {
            driver.desc_at(TABLES, DATA, 8, NEXT, next);
            list(driver, &[(TABLES, 32, INDIRECT)]);
        });
    }
}

#[test]
fn malformed_addresses_outside_of_memory() {
    let outside = [
        (END, 1),
        (END - 1, 2),
        (FAR - 1, 2),
        (FAR + FAR_LEN as u64 - 8, 9),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (u64::MAX - 7, 16),
        (0, u32::MAX),
        (1 << 63, 4096),
    ];
    for packed in LAYOUTS {
        for (addr, len) in outside {
            let error = QueueError::Unmapped { addr, len: u64::from(len) };
            for flags in [0, WRITE] {
                case(packed, NONE, error, |driver| list(driver, &[(addr, len, flags)]));
                case(packed, NONE, error, |driver| list(driver, &[(DATA, 8, NEXT), (addr, len, flags)]));
            }
            case(packed, INDIRECT_DESC, error, |driver| {
                driver.add(&[], &[r(DATA, 8), r(addr, len)]).unwrap();
            });
        }
    }
}

#[test]
fn malformed_indirect_table_outside_of_memory() {
    for packed in LAYOUTS {
        for addr in [END - 16, END, FAR - 16, u64::MAX - 31, u64::MAX - 15] {
            let error = QueueError::Unmapped { addr, len: 32 };
            case(packed, INDIRECT_DESC, error, |driver| list(driver, &[(addr, 32, INDIRECT)]));
        }
    }
}

#[test]
fn malformed_split_same_head_in_flight_more_often_than_there_are_entries() {
    let mut driver = driver(false, 4, NONE);
    let mut queue = driver.queue();
    driver.split_desc(0, DATA, 8, WRITE, 0);
    let mut chains = Vec::new();
    for _ in 0..4 {
        driver.expose(0);
        chains.push(queue.pop().unwrap());
    }
    assert!(queue.pop().is_none());
    assert_eq!(queue.fault(), None, "an empty ring is no violation");
    driver.expose(0);
    faults(&driver, &mut queue, QueueError::TooManyOutstanding);
    for chain in chains {
        queue.add_used(chain, 8);
    }
    queue.publish();
    assert_eq!(queue.outstanding(), 0);
}

#[test]
fn malformed_packed_more_descriptors_than_the_ring_has() {
    let driver = driver(true, 4, NONE);
    let mut queue = driver.queue();
    for i in 0..4 {
        driver.packed_desc(i, DATA, 8, i, WRITE | 0x80);
    }
    let mut chains: Vec<Chain> = queue.iter().collect();
    assert_eq!(chains.len(), 4);
    // The driver takes its descriptors back before they are used, and makes them available in the next lap.
    driver.packed_desc(0, DATA, 8, 0, WRITE | 0x8000);
    let mut faulty = driver.queue();
    assert!(faulty.pop().is_none());
    assert!(queue.pop().is_none());
    assert_eq!(queue.fault(), Some(&QueueError::TooManyOutstanding));
    queue.add_used(chains.remove(0), 8);
    assert!(queue.pop().is_none());
}

#[test]
fn malformed_packed_list_reaches_into_what_is_in_flight() {
    let driver = driver(true, 4, NONE);
    let mut queue = driver.queue();
    for i in 0..3 {
        driver.packed_desc(i, DATA, 8, i, WRITE | 0x80);
    }
    let _chains: Vec<Chain> = queue.iter().collect();
    driver.packed_desc(3, DATA, 8, 3, NEXT | 0x80);
    driver.packed_desc(0, DATA, 8, 3, 0x8000);
    assert!(queue.pop().is_none());
    assert_eq!(queue.fault(), Some(&QueueError::TooManyOutstanding));
}

#[test]
fn malformed_packed_the_largest_ring_twice_in_flight() {
    let map = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
    let mut driver = driver(true, 32768, NONE);
    driver.ram = GuestRam::new(&map);
    driver.config.driver = GuestAddress(0);
    driver.config.device = GuestAddress(4);
    let mut queue = driver.queue();
    let fill = |avail| {
        for i in 0..32768u16 {
            driver.packed_desc(i, DATA, 8, 0, avail | if i < 32767 { NEXT } else { 0 });
        }
    };
    fill(0x80);
    let chain = queue.pop().unwrap();
    assert_eq!(queue.readable(&chain).len(), 32768);
    fill(0x8000);
    assert!(queue.pop().is_none());
    assert_eq!(queue.fault(), Some(&QueueError::TooManyOutstanding));
    queue.add_used(chain, 0);
    queue.publish();
    assert_eq!(queue.state().used, RingPos { index: 0, wrap: false });
}

#[test]
fn malformed_more_than_4_gib_in_a_chain() {
    let map = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 32)]).unwrap();
    for packed in LAYOUTS {
        for (second, ok) in [(1, true), (2, false), (u32::MAX, false)] {
            let mut driver = driver(packed, 8, NONE);
            driver.ram = GuestRam::new(&map);
            let mut queue = driver.queue();
            driver.add(&[r(0, u32::MAX), w(0, second)], &[]).unwrap();
            let chain = queue.pop();
            assert_eq!(chain.is_some(), ok);
            let total = u64::from(u32::MAX) + u64::from(second);
            assert_eq!(queue.fault().copied(), (!ok).then_some(QueueError::ChainTooLarge(total)));
        }
        // A writable part of 2^32 bytes cannot be told to the driver: one less is.
        let mut driver = driver(packed, 8, NONE);
        driver.ram = GuestRam::new(&map);
        let mut queue = driver.queue();
        let id = driver.add(&[w(0, u32::MAX), w(0, 1)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        queue.add_used(chain, u32::MAX);
        queue.publish();
        assert_eq!(driver.used(), [(id, u32::MAX)]);
        assert_eq!(queue.counters().clamped, 0);
    }
}

#[test]
fn zero_length_descriptors_are_empty_wherever_they_point() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, INDIRECT_DESC);
        let mut queue = driver.queue();
        let ids = [
            driver.add(&[r(u64::MAX, 0), r(DATA, 4), w(END, 0), w(DATA, 4), w(0, 0)], &[]).unwrap(),
            driver.add(&[], &[r(1 << 50, 0)]).unwrap(),
            driver.add(&[w(0, 0)], &[]).unwrap(),
        ];
        let chains: Vec<Chain> = queue.iter().collect();
        let shapes: Vec<_> =
            chains.iter().map(|c| (queue.readable(c).len(), queue.writable(c).len())).collect();
        assert_eq!(shapes, [(1, 1), (0, 0), (0, 0)]);
        for chain in chains {
            queue.add_used(chain, 0);
        }
        queue.publish();
        assert_eq!(driver.used(), ids.map(|id| (id, 0)));
    }
}

#[test]
fn peers_virtio_queue_a_broken_chain_is_not_the_end_of_a_chain() {
    for packed in LAYOUTS {
        let error = QueueError::Unmapped { addr: END, len: 8 };
        case(packed, NONE, error, |driver| list(driver, &[(DATA, 8, NEXT), (END, 8, WRITE)]));
    }
}

#[test]
fn peers_virtio_queue_indirect_is_refused_unless_negotiated() {
    malformed_indirect_not_negotiated();
}

/// Each chain has no more elements than the queue has entries, and all of them together no more than a queue keeps: a guest
/// cannot make us allocate without bound.
#[test]
fn policy_8_the_elements_of_all_chains_that_are_out_are_bounded() {
    let size = 2048;
    for packed in LAYOUTS {
        let driver = driver(packed, size, INDIRECT_DESC);
        let mut queue = driver.queue();
        // One table for all.
        let (table, len) = driver.table(0, &vec![w(DATA, 8); usize::from(size)]);
        for i in 0..size {
            if packed {
                driver.packed_desc(i, table, len, i, INDIRECT | 0x80);
            } else {
                driver.split_desc(i, table, len, INDIRECT, 0);
                driver.put_u16(AVAIL + 4 + 2 * u64::from(i), i);
            }
        }
        driver.put_u16(AVAIL + 2, if packed { 0 } else { size });
        let mut chains: Vec<Chain> = queue.iter().collect();
        assert_eq!(queue.fault(), Some(&QueueError::OutOfSegments));
        let out: usize = chains.iter().map(|chain| queue.writable(chain).len()).sum();
        // There is room for a mebi of them, in blocks up to four times as large as what is in them.
        assert!((1 << 18..=1 << 20).contains(&out), "{out} elements");
        // What is out is whole, and may be completed.
        let last = chains.pop().unwrap();
        assert_eq!(queue.writer(&last).write(&vec![5; 8 * usize::from(size)]), 8 * usize::from(size));
        queue.add_used(last, 8);
        for chain in chains {
            queue.add_used(chain, 8);
        }
        queue.publish();
        assert_eq!(queue.outstanding(), 0);
    }
}

/// The ring's memory, or that of its buffers, lost the file behind it.
#[test]
fn policy_6_memory_that_was_lost_faults_the_queue_which_still_takes_completions() {
    for packed in LAYOUTS {
        let poison = Arc::new(Poison::new());
        let mut driver = driver(packed, 8, NONE);
        let region = Arc::new(driver::region(0, END as usize));
        driver.ram = GuestRam::from_files([(region, Some(poison.clone()))]).unwrap();
        let mut queue = driver.queue();
        driver.add(&[w(DATA, 8)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        assert!(queue.check_memory());
        // Of somebody else's memory.
        Poison::new().set();
        assert!(queue.check_memory());
        driver.add(&[w(DATA, 8)], &[]).unwrap();
        let before = queue.state();
        poison.set();
        assert!(!queue.check_memory());
        assert_eq!(queue.fault(), Some(&QueueError::Poisoned));
        assert!(queue.pop().is_none() && !queue.has_available() && !queue.arm());
        assert_eq!(queue.state(), before);
        queue.add_used(chain, 8);
        queue.publish();
        assert_eq!((queue.outstanding(), queue.counters().completed), (0, 1));
        // No queue is made of it.
        assert_eq!(
            Queue::new(driver.config, &driver.ram, driver.features, None).unwrap_err(),
            QueueError::Poisoned
        );
    }
}
