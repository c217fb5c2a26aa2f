//! The packed ring, line by line of its contract.
use std::sync::Arc;

use super::driver::{AVAIL, BORDER, DATA, DESC, TABLES, USED};
use super::*;

fn packed(size: u16, features: Features) -> Driver {
    driver(true, size, features)
}

#[test]
fn packed_2_8_any_size_up_to_32768() {
    let map = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
    let ram = GuestRam::new(&map);
    let config = |size| QueueConfig {
        size,
        desc: GuestAddress(0x10_0000),
        driver: GuestAddress(0x20_0000),
        device: GuestAddress(0x30_0000),
    };
    for size in [1, 2, 3, 5, 7, 100, 255, 256, 257, 32767, 32768] {
        assert!(Queue::new(config(size), &ram, Features::RING_PACKED, None).is_ok());
    }
    for size in [0, 32769, 65535] {
        let error = Queue::new(config(size), &ram, Features::RING_PACKED, None).unwrap_err();
        assert_eq!(error, QueueError::Size(size));
    }
}

#[test]
fn packed_2_8_10_1_areas_are_aligned_to_16_4_4() {
    let driver = packed(5, Features::empty());
    let new = |desc, avail, used| {
        let config = QueueConfig {
            size: 5,
            desc: GuestAddress(desc),
            driver: GuestAddress(avail),
            device: GuestAddress(used),
        };
        Queue::new(config, &driver.ram, Features::RING_PACKED, None).map(|_| ())
    };
    assert_eq!(new(0x10, 0x204, 0x304), Ok(()));
    let error = new(0x18, 0x204, 0x304);
    assert_eq!(error, Err(QueueError::Misaligned { area: QueueArea::Descriptor, addr: 0x18 }));
    let error = new(0x10, 0x202, 0x304);
    assert_eq!(error, Err(QueueError::Misaligned { area: QueueArea::Driver, addr: 0x202 }));
    let error = new(0x10, 0x204, 0x302);
    assert_eq!(error, Err(QueueError::Misaligned { area: QueueArea::Device, addr: 0x302 }));
    assert!(matches!(new(!15, 0x204, 0x304), Err(QueueError::AreaUnmapped { .. })));
}

#[test]
fn packed_2_8_1_wrap_counters_for_every_small_size() {
    for size in 1..=9u16 {
        for len in 1..=size.min(3) {
            let mut driver = packed(size, Features::empty());
            let mut queue = driver.queue();
            let elems: Vec<Elem> = (0..len).map(|i| w(DATA + 8 * u64::from(i), 8)).collect();
            for _ in 0..size * 5 {
                assert!(queue.pop().is_none());
                let id = driver.add(&elems, &[]).unwrap();
                let chain = queue.pop().unwrap();
                assert_eq!(queue.writable(&chain).len(), usize::from(len));
                queue.add_used(chain, 3);
                assert!(driver.used().is_empty(), "not before it is published");
                queue.publish();
                assert_eq!(driver.used(), [(id, 3)]);
            }
            assert_eq!(queue.fault(), None);
        }
    }
}

#[test]
fn packed_2_8_3_write_flag_says_whether_something_was_written() {
    let mut driver = packed(4, Features::empty());
    let mut queue = driver.queue();
    for (written, write) in [(0, false), (5, true)] {
        driver.add(&[w(DATA, 8)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        queue.add_used(chain, written);
        queue.publish();
        let flags = driver.u16_at(DESC + 16 * u64::from(driver.next_used) + 14);
        assert_eq!(flags & WRITE != 0, write);
        assert_eq!(flags & 0x8080, 0x8080);
        driver.used();
    }
}

#[test]
fn packed_2_8_6_one_used_descriptor_for_a_list_and_the_rest_is_skipped() {
    let mut driver = packed(7, Features::empty());
    let mut queue = driver.queue();
    let a = driver.add(&[r(DATA, 1), r(DATA + 1, 1), w(DATA + 2, 1)], &[]).unwrap();
    let b = driver.add(&[r(DATA, 1), w(DATA + 2, 1)], &[]).unwrap();
    let before = driver.read(DESC, 7 * 16);
    for chain in queue.iter().collect::<Vec<_>>() {
        queue.add_used(chain, 1);
    }
    queue.publish();
    let after = driver.read(DESC, 7 * 16);
    for i in [1usize, 2, 4, 5, 6] {
        assert_eq!(before[i * 16..][..16], after[i * 16..][..16], "descriptor {i} is not ours");
    }
    assert_eq!(driver.used(), [(a, 1), (b, 1)]);
}

#[test]
fn packed_2_8_6_the_id_is_that_of_the_last_descriptor_and_goes_back_unchanged() {
    for id in [0u16, 3, 4, 0x1234, 0xffff] {
        let driver = packed(4, Features::empty());
        let mut queue = driver.queue();
        driver.packed_desc(1, DATA + 8, 8, id, WRITE | 0x80);
        driver.packed_desc(0, DATA, 8, !id, NEXT | 0x80);
        let chain = queue.pop().unwrap();
        assert_eq!(queue.id(&chain), Some(ChainId(id)));
        queue.add_used(chain, 8);
        queue.publish();
        assert_eq!(driver.u16_at(DESC + 12), id);
        assert_eq!(queue.fault(), None);
    }
}

#[test]
fn packed_2_8_7_in_tables_only_the_write_flag_counts() {
    // In one piece of the host's memory, and in two.
    for table in [driver::TABLES, BORDER - 16, BORDER - 5] {
        let driver = packed(4, Features::INDIRECT_DESC);
        let mut queue = driver.queue();
        driver.desc_at(table, DATA, 8, 77, !WRITE);
        driver.desc_at(table + 16, DATA + 8, 16, 78, 0xffff);
        driver.packed_desc(0, table, 32, 2, INDIRECT | WRITE | 0x80);
        let chain = queue.pop().unwrap();
        assert_eq!(queue.id(&chain), Some(ChainId(2)));
        assert_eq!((queue.reader(&chain).remaining(), queue.writer(&chain).remaining()), (8, 16));
        queue.add_used(chain, 16);
    }
}

#[test]
fn packed_2_8_4_length_and_data_are_there_when_the_descriptor_is_used() {
    super::split::length_and_data_are_there(packed(16, Features::empty()));
}

#[test]
fn packed_2_8_5_direct_and_indirect_lists_mix_in_a_ring() {
    let mut driver = packed(5, Features::INDIRECT_DESC);
    let mut queue = driver.queue();
    for _ in 0..20 {
        let a = driver.add(&[], &[r(DATA, 4), r(DATA + 4, 4), w(DATA + 8, 4)]).unwrap();
        let b = driver.add(&[r(DATA, 4), w(DATA + 8, 4)], &[]).unwrap();
        let chains: Vec<Chain> = queue.iter().collect();
        assert_eq!(queue.readable(&chains[0]).len(), 2);
        assert_eq!(queue.readable(&chains[1]).len(), 1);
        for chain in chains {
            queue.add_used(chain, 2);
        }
        queue.publish();
        assert_eq!(driver.used(), [(a, 2), (b, 2)]);
    }
}

#[test]
fn packed_2_8_8_in_order_one_descriptor_stands_for_a_batch() {
    let mut driver = packed(8, Features::IN_ORDER);
    let mut queue = driver.queue();
    let ids: Vec<u16> =
        (0..3).map(|i| driver.add(&[r(DATA, 4), w(DATA + 16 * i, 4)], &[]).unwrap()).collect();
    let before = driver.read(DESC + 16, 7 * 16);
    for chain in queue.iter().collect::<Vec<_>>() {
        queue.add_used(chain, 4);
    }
    queue.publish();
    assert_eq!(driver.u16_at(DESC + 12), ids[2]);
    assert_eq!(driver.read(DESC + 16, 7 * 16), before, "one descriptor was written");
    assert_eq!(driver.used(), ids.iter().map(|id| (*id, 4)).collect::<Vec<_>>());
    assert_eq!(queue.state().used, RingPos { index: 6, wrap: true });
}

/// A device that uses several buffers for one request completes and publishes them together: its driver, which begins
/// with the first, finds all of them or none.
#[test]
fn packed_2_8_9_the_first_buffer_of_a_batch_is_marked_used_last() {
    for features in [Features::empty(), Features::INDIRECT_DESC] {
        let mut driver = packed(7, features);
        let mut queue = driver.queue();
        // Also over the end of the ring.
        for _ in 0..7 {
            let elems = [w(DATA, 4), w(DATA + 4, 4)];
            let ids: Vec<u16> = (0..3)
                .map(|_| {
                    let direct = features.is_empty();
                    let (list, table): (&[_], &[_]) = if direct { (&elems, &[]) } else { (&[], &elems) };
                    driver.add(list, table).unwrap()
                })
                .collect();
            let step = if features.is_empty() { 2 } else { 1 };
            let (first, wrap) = (driver.next_used, driver.used_wrap);
            for chain in queue.iter().collect::<Vec<_>>() {
                queue.add_used(chain, 8);
            }
            let is_used = |driver: &Driver, at: u16| {
                let (at, wrap) = if at < 7 { (at, wrap) } else { (at - 7, !wrap) };
                let flags = driver.u16_at(DESC + 16 * u64::from(at) + 14) & 0x8080;
                flags == if wrap { 0x8080 } else { 0 }
            };
            let others = [first + step, first + 2 * step];
            assert!(!is_used(&driver, first) && others.iter().all(|at| is_used(&driver, *at)));
            assert!(driver.used().is_empty());
            queue.publish();
            assert!(is_used(&driver, first));
            assert_eq!(driver.used(), ids.iter().map(|id| (*id, 8)).collect::<Vec<_>>());
        }
    }
}

#[test]
fn packed_2_8_10_notification_follows_the_event_structure() {
    let size = 6u16;
    for event_idx in [false, true] {
        for start in 0..size {
            for wrap in [false, true] {
                for batch in 1..=size {
                    check_notifications(size, event_idx, start, wrap, batch);
                }
            }
        }
    }
}

fn check_notifications(size: u16, event_idx: bool, start: u16, wrap: bool, batch: u16) {
    let features = if event_idx { Features::EVENT_IDX } else { Features::empty() };
    for flags in 0..4u16 {
        for event in (0..size).flat_map(|off| [off, off | 0x8000]) {
            let mut driver = packed(size, features);
            (driver.next_avail, driver.avail_wrap) = (start, wrap);
            (driver.next_used, driver.used_wrap) = (start, wrap);
            // What a ring looks like that has come here: everything used in the lap before.
            for i in 0..size {
                let lap = if i < start { wrap } else { !wrap };
                driver.packed_desc(i, 0, 0, 0, if lap { 0x8080 } else { 0 });
            }
            let at = RingPos { index: start, wrap };
            let state = QueueState { avail: at, used: at, held: Vec::new() };
            let mut queue = driver.queue_from(Some(state)).unwrap();
            driver.put_u16(AVAIL, event);
            driver.put_u16(AVAIL + 2, flags);
            for _ in 0..batch {
                driver.add(&[r(DATA, 4)], &[]).unwrap();
                let chain = queue.pop().unwrap();
                queue.add_used(chain, 0);
            }
            let mut positions = (0..batch).map(|i| {
                let beyond = start + i >= size;
                let offset = if beyond { start + i - size } else { start + i };
                offset | if wrap != beyond { 0x8000 } else { 0 }
            });
            let wanted = match flags {
                0 => true,
                1 => false,
                2 if event_idx => positions.any(|position| position == event),
                // 3 is reserved, and 2 is without the feature: no interrupt may be lost.
                _ => true,
            };
            assert_eq!(queue.publish(), wanted, "{event_idx} {start} {wrap} {batch} {flags} {event:#x}");
            assert_eq!(driver.used().len(), usize::from(batch));
        }
    }
}

#[test]
fn packed_2_8_10_own_event_structure_has_no_reserved_bits() {
    for event_idx in [false, true] {
        let features = if event_idx { Features::EVENT_IDX } else { Features::empty() };
        let mut driver = packed(3, features);
        let mut queue = driver.queue();
        for i in 0..10u16 {
            queue.disarm();
            assert_eq!(driver.u16_at(USED + 2), 1);
            driver.add(&[r(DATA, 4)], &[]).unwrap();
            let chain = queue.pop().unwrap();
            queue.add_used(chain, 0);
            queue.publish();
            driver.used();
            assert!(!queue.arm());
            assert_eq!(driver.u16_at(USED + 2), if event_idx { 2 } else { 0 });
            if event_idx {
                let (index, lap) = ((i + 1) % 3, (i + 1) / 3);
                assert_eq!(driver.u16_at(USED), index | if lap % 2 == 0 { 0x8000 } else { 0 });
            }
        }
    }
}

#[test]
fn packed_2_8_12_processing_starts_in_ring_order_and_uses_in_completion_order() {
    let mut driver = packed(8, Features::empty());
    let mut queue = driver.queue();
    let ids: Vec<u16> = (0..4).map(|_| driver.add(&[r(DATA, 4), r(DATA, 4)], &[]).unwrap()).collect();
    let mut chains: Vec<Chain> = queue.iter().collect();
    let popped: Vec<u16> = chains.iter().map(|chain| queue.id(chain).unwrap().0).collect();
    assert_eq!(popped, ids);
    for at in [2, 0, 1, 0] {
        let chain = chains.remove(at);
        queue.add_used(chain, 0);
    }
    queue.publish();
    let used: Vec<u16> = driver.used().into_iter().map(|(id, _)| id).collect();
    assert_eq!(used, [ids[2], ids[0], ids[3], ids[1]]);
}

#[test]
fn packed_2_8_15_a_descriptor_is_not_used_before_its_avail_flag_changes() {
    let driver = packed(4, Features::empty());
    let mut queue = driver.queue();
    for flags in [0, 0x8080, 0x8000] {
        driver.packed_desc(0, DATA, 8, 0, flags);
        assert!(!queue.has_available());
        assert!(queue.pop().is_none());
        assert_eq!(queue.fault(), None);
    }
    driver.packed_desc(0, DATA, 8, 0, 0x80);
    assert!(queue.has_available());
    assert!(queue.pop().is_some());
}

#[test]
fn packed_2_8_15_readable_buffers_and_tables_are_never_written() {
    let mut driver = packed(8, Features::INDIRECT_DESC);
    let mut queue = driver.queue();
    driver.write(DATA, &[7; 64]);
    driver.add(&[r(DATA, 64), w(DATA + 64, 64)], &[]).unwrap();
    driver.add(&[], &[r(DATA, 64), w(DATA + 128, 64)]).unwrap();
    let tables = driver.read(TABLES, 0x8000);
    while let Some(chain) = queue.pop() {
        queue.writer(&chain).write_all(&[9; 64]).unwrap();
        queue.add_used(chain, 64);
        queue.publish();
        queue.arm();
    }
    assert_eq!(driver.read(TABLES, 0x8000), tables);
    assert_eq!(driver.read(DATA, 64), [7; 64]);
    assert_eq!(driver.read(DATA + 64, 128), [9; 128]);
}

#[test]
fn packed_2_8_15_a_used_descriptor_is_not_changed_any_more() {
    for (features, tracked) in [
        (Features::empty(), false),
        (Features::empty(), true),
        (Features::IN_ORDER, false),
        (Features::IN_ORDER, true),
    ] {
        let mut driver = packed(7, features | Features::EVENT_IDX);
        let memory = Arc::new(crate::memory::SharedMemory::private(InflightRegion::bytes_for(7)));
        let region = InflightRegion::new(memory.clone(), 0, memory.len()).unwrap();
        let mut queue =
            Queue::tracked(driver.config, &driver.ram, driver.features, None, tracked.then_some(&region))
                .unwrap();
        // By their place in the ring: those that the driver may have read.
        let mut settled: [Option<Vec<u8>>; 7] = Default::default();
        for round in 0..40usize {
            let elems: Vec<Elem> = (0..1 + round as u64 % 2).map(|i| w(DATA + 8 * i, 8)).collect();
            for _ in 0..3 {
                let first = driver.next_avail;
                driver.add(&elems, &[]).unwrap();
                // The driver's again.
                for i in 0..elems.len() as u16 {
                    settled[usize::from((first + i) % 7)] = None;
                }
            }
            let mut chains: Vec<Chain> = queue.iter().collect();
            if round % 4 == 1 {
                queue.unpop(chains.pop().unwrap()).unwrap();
                chains.extend(queue.pop());
            }
            assert_eq!(chains.len(), 3);
            // Not in their order; one is dropped.
            let last = chains.swap_remove(round % 3);
            for chain in chains {
                queue.add_used(chain, 5);
                if round % 5 == 0 {
                    queue.publish();
                }
            }
            if round % 3 == 0 {
                drop(last)
            } else {
                queue.add_used(last, 8)
            }
            queue.publish();
            queue.arm();
            queue.disarm();
            driver.used();
            for (i, then) in settled.iter_mut().enumerate() {
                let now = driver.read(DESC + 16 * i as u64, 16);
                assert_eq!(*then.get_or_insert_with(|| now.clone()), now, "descriptor {i} in round {round}");
            }
        }
        let before = driver.read(DESC, 7 * 16);
        drop(queue.into_state());
        assert_eq!(driver.read(DESC, 7 * 16), before);
    }
}

#[test]
fn packed_2_8_18_a_list_is_used_in_the_order_of_its_descriptors() {
    let mut driver = packed(7, Features::INDIRECT_DESC);
    let mut queue = driver.queue();
    // At every place of the ring, and over its end.
    for round in 0..21 {
        let table = round % 4 == 3;
        // Nowhere in the order of their addresses.
        let at = [48, 0, 32, 16].map(|offset| DATA + offset);
        for (i, at) in at.into_iter().enumerate() {
            driver.write(at, &[i as u8 + 1; 3]);
        }
        let elems = [r(at[0], 3), r(at[1], 3), w(at[2], 3), w(at[3], 3)];
        let (list, indirect): (&[_], &[_]) = if table { (&[], &elems) } else { (&elems, &[]) };
        let id = driver.add(list, indirect).unwrap();
        let chain = queue.pop().unwrap();
        let (mut reader, mut writer) = queue.split(&chain);
        let mut bytes = [0; 6];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [1, 1, 1, 2, 2, 2]);
        writer.write_all(&[5, 5, 5, 6, 6, 6]).unwrap();
        queue.add_used(chain, 6);
        queue.publish();
        assert_eq!(driver.used(), [(id, 6)]);
        assert_eq!((driver.read(at[2], 3), driver.read(at[3], 3)), (vec![5; 3], vec![6; 3]));
    }
}

#[test]
fn packed_2_8_21_3_arming_looks_once_more() {
    for features in [Features::empty(), Features::EVENT_IDX] {
        let mut driver = packed(3, features);
        let mut queue = driver.queue();
        assert!(queue.pop().is_none());
        driver.add(&[r(DATA, 4)], &[]).unwrap();
        assert!(queue.arm());
        assert!(queue.pop().is_some());
    }
}

#[test]
fn packed_reset_puts_counters_to_0_and_wrap_to_1() {
    let driver = packed(3, Features::empty());
    let state = driver.queue().state();
    assert_eq!(state.avail, RingPos { index: 0, wrap: true });
    assert_eq!(state.used, RingPos { index: 0, wrap: true });
}

#[test]
fn packed_vring_base_has_avail_low_and_used_high() {
    let at = |index, wrap| RingPos { index, wrap };
    let state = QueueState { avail: at(0x123, true), used: at(0x7f, false), held: Vec::new() };
    assert_eq!(state.to_vring_base(true), 0x007f_8123);
    assert_eq!(QueueState::from_vring_base(0x007f_8123, true).unwrap(), state);
    let state = QueueState { avail: at(9, true), used: at(9, true), held: Vec::new() };
    assert_eq!(state.to_vring_base(false), 9);
    assert_eq!(QueueState::from_vring_base(9, false).unwrap(), state);
    assert!(QueueState::from_vring_base(0x1_0000, false).is_err());
}
