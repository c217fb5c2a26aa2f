//! The split ring, line by line of its contract.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::driver::{AVAIL, BORDER, DATA, DESC, USED};
use super::*;

fn split(size: u16, features: Features) -> Driver {
    driver(false, size, features)
}

#[test]
fn split_2_7_sizes_are_powers_of_two_up_to_32768() {
    let mut config = split(8, Features::empty()).config;
    // Three areas that hold the largest ring.
    let map = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
    let ram = GuestRam::new(&map);
    config.desc = GuestAddress(0x10_0000);
    config.driver = GuestAddress(0x20_0000);
    config.device = GuestAddress(0x30_0000);
    for bits in 0..=15 {
        config.size = 1 << bits;
        assert!(Queue::new(config, &ram, Features::empty(), None).is_ok());
    }
    for size in [0, 3, 6, 100, 255, 257, 32767, 32769, 65535] {
        config.size = size;
        assert_eq!(Queue::new(config, &ram, Features::empty(), None).unwrap_err(), QueueError::Size(size));
    }
}

#[test]
fn split_2_7_areas_are_aligned_to_16_2_4_and_in_memory() {
    let driver = split(8, Features::empty());
    let new = |desc, avail, used| {
        let config = QueueConfig {
            size: 8,
            desc: GuestAddress(desc),
            driver: GuestAddress(avail),
            device: GuestAddress(used),
        };
        Queue::new(config, &driver.ram, Features::empty(), None).map(|_| ())
    };
    assert_eq!(new(0x10, 0x202, 0x304), Ok(()));
    for wrong in [8, 4, 1] {
        let error = new(0x10 + wrong, 0x202, 0x304);
        assert_eq!(error, Err(QueueError::Misaligned { area: QueueArea::Descriptor, addr: 0x10 + wrong }));
    }
    let error = new(0x10, 0x203, 0x304);
    assert_eq!(error, Err(QueueError::Misaligned { area: QueueArea::Driver, addr: 0x203 }));
    let error = new(0x10, 0x202, 0x306);
    assert_eq!(error, Err(QueueError::Misaligned { area: QueueArea::Device, addr: 0x306 }));
    let hole = driver::END;
    let error = new(hole, 0x202, 0x304);
    assert_eq!(error, Err(QueueError::AreaUnmapped { area: QueueArea::Descriptor, addr: hole, len: 128 }));
    // The used ring with its event field ends one byte behind the memory.
    let addr = driver::END - 72;
    assert_eq!(new(0x10, 0x202, addr), Ok(()));
    let error = new(0x10, 0x202, addr + 4);
    assert!(matches!(error, Err(QueueError::AreaUnmapped { area: QueueArea::Device, .. })));
    // Across a border of regions that are no neighbours in the host a ring cannot be.
    let error = new(BORDER - 16, 0x202, 0x304);
    let one_piece = driver.ram.directory().contiguous(BORDER - 16, 128, crate::Access::Read).is_some();
    assert_eq!(error.is_ok(), one_piece);
}

#[test]
fn split_2_7_4_1_descriptors_may_be_arranged_in_any_way() {
    let message: Vec<u8> = (0..40).collect();
    let cuts: [&[u32]; 5] = [&[40], &[16, 24], &[1; 40], &[0, 8, 0, 31, 1, 0], &[39, 1]];
    for cut in cuts {
        for indirect in 0..=cut.len() {
            let mut driver = split(64, Features::INDIRECT_DESC);
            let mut queue = driver.queue();
            driver.write(DATA, &message);
            let mut at = DATA;
            let elems: Vec<Elem> = cut
                .iter()
                .map(|len| {
                    at += u64::from(*len);
                    r(at - u64::from(*len), *len)
                })
                .collect();
            let (direct, table) = elems.split_at(indirect);
            driver.add(direct, table).unwrap();
            let chain = queue.pop().unwrap();
            let mut bytes = [0; 40];
            let mut reader = queue.reader(&chain);
            assert_eq!(reader.remaining(), 40);
            reader.read_exact(&mut bytes).unwrap();
            assert_eq!(bytes[..], message);
            queue.add_used(chain, 0);
        }
    }
}

#[test]
fn split_2_7_5_1_descriptors_and_readable_buffers_are_never_written() {
    let mut driver = split(8, Features::INDIRECT_DESC);
    let mut queue = driver.queue();
    driver.write(DATA, &[7; 64]);
    driver.add(&[r(DATA, 64), w(DATA + 64, 64)], &[]).unwrap();
    driver.add(&[], &[r(DATA, 64), w(DATA + 128, 64)]).unwrap();
    let table = driver.read(DESC, 128);
    let indirect = driver.read(driver::TABLES, 0x8000);
    while let Some(chain) = queue.pop() {
        queue.writer(&chain).write_all(&[9; 64]).unwrap();
        queue.add_used(chain, 64);
        queue.publish();
        queue.arm();
    }
    assert_eq!(driver.read(DESC, 128), table);
    assert_eq!(driver.read(driver::TABLES, 0x8000), indirect);
    assert_eq!(driver.read(DATA, 64), [7; 64]);
    assert_eq!(driver.read(DATA + 64, 128), [9; 128]);
}

#[test]
fn split_2_7_5_3_2_write_flag_of_the_referring_descriptor_is_ignored() {
    let mut driver = split(8, Features::INDIRECT_DESC);
    let mut queue = driver.queue();
    let (addr, len) = driver.table(0, &[r(DATA, 8), w(DATA + 8, 8)]);
    driver.split_desc(3, addr, len, INDIRECT | WRITE, 0);
    driver.expose(3);
    let chain = queue.pop().unwrap();
    assert_eq!((queue.readable(&chain).len(), queue.writable(&chain).len()), (1, 1));
    // Nor does it count as a writable element before the readable one.
    assert_eq!(queue.fault(), None);
    queue.add_used(chain, 8);
    // Nor behind direct elements, of which the first in the table is one more of the same kind.
    for direct in [r(DATA, 4), w(DATA, 4)] {
        let mut driver = split(8, Features::INDIRECT_DESC);
        let mut queue = driver.queue();
        let (addr, len) = driver.table(0, &[Elem { addr: DATA + 4, ..direct }, w(DATA + 8, 8)]);
        driver.split_desc(3, direct.addr, direct.len, NEXT | if direct.write { WRITE } else { 0 }, 4);
        driver.split_desc(4, addr, len, INDIRECT | WRITE, 0);
        driver.expose(3);
        let chain = queue.pop().unwrap();
        let parts = (queue.readable(&chain).len(), queue.writable(&chain).len());
        assert_eq!(parts, if direct.write { (0, 3) } else { (2, 1) });
        queue.add_used(chain, 8);
    }
}

#[test]
fn split_2_7_5_3_2_normal_descriptors_then_indirect() {
    for normal in 0..4 {
        let mut driver = split(8, Features::INDIRECT_DESC);
        let mut queue = driver.queue();
        let elems = [r(DATA, 1), r(DATA + 1, 2), r(DATA + 3, 3), w(DATA + 6, 4), w(DATA + 10, 5)];
        let (direct, indirect) = elems.split_at(normal);
        let head = driver.add(direct, indirect).unwrap();
        let chain = queue.pop().unwrap();
        let lens = |segs: &[Segment]| segs.iter().map(Segment::len).collect::<Vec<_>>();
        assert_eq!(lens(queue.readable(&chain)), [1, 2, 3]);
        assert_eq!(lens(queue.writable(&chain)), [4, 5]);
        queue.add_used(chain, 9);
        queue.publish();
        assert_eq!(driver.used(), [(head, 9)]);
    }
}

#[test]
fn split_2_7_7_2_without_event_index_the_flag_decides_and_used_event_is_ignored() {
    for used_event in [0, 1, 2, 0xffff] {
        let mut driver = split(8, Features::empty());
        let mut queue = driver.queue();
        driver.want_interrupt_at(used_event);
        for flags in [0, 1, 0, 1, 1, 0] {
            driver.put_u16(AVAIL, flags);
            driver.add(&[r(DATA, 4)], &[]).unwrap();
            let chain = queue.pop().unwrap();
            queue.add_used(chain, 0);
            assert_eq!(queue.publish(), flags == 0);
            driver.used();
        }
    }
}

#[test]
fn split_2_7_7_2_event_index_ignores_the_flag_and_notifies_at_used_event() {
    for start in [0u16, 3, 0xfffe] {
        for batch in 1..=4u16 {
            for event in (-6..6).map(|d| start.wrapping_add_signed(d)) {
                let mut driver = split(8, Features::EVENT_IDX);
                driver.next_avail = start;
                driver.next_used = start;
                let at = RingPos { index: start, wrap: true };
                let state = QueueState { avail: at, used: at, held: Vec::new() };
                let mut queue = driver.queue_from(Some(state)).unwrap();
                driver.put_u16(AVAIL, event & 1);
                driver.want_interrupt_at(event);
                for _ in 0..batch {
                    driver.add(&[r(DATA, 4)], &[]).unwrap();
                    let chain = queue.pop().unwrap();
                    queue.add_used(chain, 0);
                }
                let written = (0..batch).map(|i| start.wrapping_add(i)).any(|slot| slot == event);
                assert_eq!(queue.publish(), written, "{start} {batch} {event}");
                assert!(!queue.publish(), "nothing new was published");
            }
        }
    }
}

#[test]
fn split_2_7_8_2_length_and_data_are_there_before_the_index() {
    length_and_data_are_there(split(16, Features::empty()));
}

/// A device in another thread, whose buffers the driver takes as they come: length and data are those of the buffer.
pub(super) fn length_and_data_are_there(mut driver: Driver) {
    const ROUNDS: u32 = 20_000;
    let mut queue = driver.queue();
    let stop = Arc::new(AtomicBool::new(false));
    let stop_device = Arc::clone(&stop);
    let device = thread::spawn(move || {
        let mut n = 0u32;
        while !stop_device.load(Ordering::Relaxed) {
            while let Some(chain) = queue.pop() {
                queue.writer(&chain).write_all(&n.to_le_bytes()).unwrap();
                queue.add_used(chain, 1 + n % 4);
                n += 1;
            }
            queue.publish();
            thread::yield_now();
        }
    });
    let (mut added, mut expected) = (0u32, 0);
    while expected < ROUNDS {
        while driver.out() < 16 {
            driver.add(&[w(DATA + 8 * u64::from(added % 16), 4)], &[]).unwrap();
            added += 1;
        }
        for (_, len) in driver.used() {
            assert_eq!(len, 1 + expected % 4);
            let data = driver.read(DATA + 8 * u64::from(expected % 16), 4);
            assert_eq!(data, expected.to_le_bytes());
            expected += 1;
        }
        thread::yield_now();
    }
    stop.store(true, Ordering::Relaxed);
    device.join().unwrap();
}

#[test]
fn split_2_7_9_in_order_one_entry_stands_for_a_batch() {
    let mut driver = split(8, Features::IN_ORDER);
    let mut queue = driver.queue();
    driver.write(USED + 4, &[0xee; 64]);
    let ids: Vec<u16> =
        (0..4).map(|i| driver.add(&[r(DATA, 4), w(DATA + 16 * i, 4)], &[]).unwrap()).collect();
    let chains: Vec<Chain> = queue.iter().collect();
    for chain in chains {
        queue.add_used(chain, 4);
    }
    assert!(queue.publish());
    // idx moved by the batch; the id of the last, in the slot of the first.
    assert_eq!(driver.u16_at(USED + 2), 4);
    assert_eq!(driver.u16_at(USED + 4), ids[3]);
    assert_eq!(driver.read(USED + 12, 24), [0xee; 24]);
    assert_eq!(driver.used(), ids.iter().map(|id| (*id, 4)).collect::<Vec<_>>());
}

#[test]
fn split_2_7_10_2_flags_are_0_or_1_without_event_index() {
    let driver = split(8, Features::empty());
    let mut queue = driver.queue();
    driver.put_u16(USED + 4 + 64, 0xabcd);
    for _ in 0..2 {
        queue.disarm();
        assert_eq!(driver.u16_at(USED), 1);
        queue.arm();
        assert_eq!(driver.u16_at(USED), 0);
    }
    assert_eq!(driver.u16_at(USED + 4 + 64), 0xabcd, "the event field is not ours to write");
}

#[test]
fn split_2_7_10_2_flags_stay_0_with_event_index() {
    let mut driver = split(8, Features::EVENT_IDX);
    let mut queue = driver.queue();
    for i in 1..20 {
        queue.disarm();
        assert_eq!(driver.u16_at(USED), 0);
        driver.add(&[r(DATA, 4)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        queue.add_used(chain, 0);
        queue.publish();
        driver.used();
        queue.arm();
        assert_eq!(driver.u16_at(USED), 0);
        assert_eq!(driver.u16_at(USED + 4 + 64), i, "a kick is wanted at the next buffer");
    }
}

#[test]
fn split_2_7_10_2_spurious_kicks_do_nothing() {
    let mut driver = split(8, Features::EVENT_IDX);
    let mut queue = driver.queue();
    for _ in 0..3 {
        assert!(queue.pop().is_none());
        assert!(!queue.publish());
        assert!(!queue.arm());
    }
    let id = driver.add(&[r(DATA, 4)], &[]).unwrap();
    let chain = queue.pop().unwrap();
    assert!(queue.pop().is_none());
    queue.add_used(chain, 0);
    queue.publish();
    assert_eq!(driver.used(), [(id, 0)]);
    assert_eq!(queue.fault(), None);
}

#[test]
fn split_2_7_13_4_1_arming_looks_once_more() {
    for features in [Features::empty(), Features::EVENT_IDX] {
        let mut driver = split(8, features);
        let mut queue = driver.queue();
        assert!(queue.pop().is_none());
        driver.add(&[r(DATA, 4)], &[]).unwrap();
        assert!(queue.arm(), "the buffer came between the last look and arming");
        assert!(queue.pop().is_some());
    }
}

#[test]
fn split_kicks_are_asked_for_beyond_the_wrap_of_the_index() {
    let mut driver = split(2, Features::EVENT_IDX);
    let mut queue = driver.queue();
    for i in 0..70_000u32 {
        assert!(!queue.arm());
        assert_eq!(driver.u16_at(USED + 4 + 16), i as u16);
        driver.add(&[r(DATA, 4)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        queue.add_used(chain, 0);
        queue.publish();
        assert_eq!(driver.used().len(), 1);
    }
}

#[test]
fn split_reset_puts_indices_back_to_0() {
    let mut driver = split(4, Features::empty());
    let mut queue = driver.queue();
    for _ in 0..3 {
        driver.add(&[r(DATA, 4)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        queue.add_used(chain, 0);
        queue.publish();
        driver.used();
    }
    drop(queue);
    assert_eq!(driver.queue().state(), QueueState::new());
}

#[test]
fn split_buffers_made_available_before_the_queue_are_found() {
    let mut driver = split(8, Features::EVENT_IDX);
    driver.add(&[r(DATA, 4)], &[]).unwrap();
    driver.add(&[r(DATA, 4)], &[]).unwrap();
    let mut queue = driver.queue();
    assert!(queue.has_available());
    assert_eq!(queue.iter().count(), 2);
}
