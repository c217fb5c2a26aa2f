//! Handles of chains: what becomes of them, of their memory, and of completions out of the ordinary.
use std::sync::Arc;
use std::thread;

use super::driver::{AVAIL, BORDER, DATA, DESC, END, TABLES, USED, region};
use super::*;

fn assert_send<T: Send>(_: &T) {}

#[test]
fn a_chain_is_an_8_byte_handle_that_can_be_sent() {
    assert_eq!(size_of::<Chain>(), 8);
    assert_eq!(size_of::<Option<Chain>>(), 8);
    let mut driver = driver(false, 8, Features::empty());
    let mut queue = driver.queue();
    let id = driver.add(&[w(DATA, 8)], &[]).unwrap();
    let chain = queue.pop().unwrap();
    assert_send(&chain);
    assert_send(&queue);
    let chain = thread::spawn(move || chain).join().unwrap();
    queue.add_used(chain, 3);
    queue.publish();
    assert_eq!(driver.used(), [(id, 3)]);
}

#[test]
fn policy_2_a_dropped_chain_goes_back_with_length_0_and_is_counted() {
    for packed in LAYOUTS {
        for features in [Features::empty(), Features::IN_ORDER] {
            let mut driver = driver(packed, 8, features);
            let mut queue = driver.queue();
            let ids: Vec<u16> = (0..4).map(|_| driver.add(&[w(DATA, 8)], &[]).unwrap()).collect();
            let mut chains: Vec<Chain> = queue.iter().collect();
            drop(chains.remove(1));
            let elsewhere = chains.remove(1);
            thread::spawn(move || drop(elsewhere)).join().unwrap();
            assert_eq!(queue.outstanding(), 2);
            for chain in chains {
                queue.add_used(chain, 8);
            }
            queue.publish();
            let mut used = driver.used();
            used.sort_unstable();
            let mut expected = vec![(ids[0], 8), (ids[1], 0), (ids[2], 0), (ids[3], 8)];
            expected.sort_unstable();
            assert_eq!(used, expected);
            let counters = queue.counters();
            assert_eq!((counters.popped, counters.completed, counters.swept), (4, 4, 2));
            assert_eq!(queue.outstanding(), 0);
        }
    }
}

#[test]
fn dropping_races_with_the_queue() {
    let mut driver = driver(false, 256, Features::empty());
    let mut queue = driver.queue();
    let (send, receive) = std::sync::mpsc::channel::<Chain>();
    let dropper = thread::spawn(move || receive.into_iter().for_each(drop));
    let mut used = 0;
    let mut added = 0;
    while used < 20_000 {
        while added < 20_000 && driver.add(&[w(DATA, 8)], &[]).is_some() {
            added += 1;
        }
        for chain in queue.iter() {
            send.send(chain).unwrap();
        }
        queue.publish();
        used += driver.used().len();
        assert_eq!(queue.fault(), None);
    }
    // The queue goes first: the last handles free what they share.
    driver.add(&[w(DATA, 8)], &[]).unwrap();
    driver.add(&[w(DATA, 8)], &[]).unwrap();
    for chain in queue.iter() {
        send.send(chain).unwrap();
    }
    drop(queue);
    drop(send);
    dropper.join().unwrap();
}

#[test]
fn a_foreign_chain_is_refused_counted_and_goes_back_to_its_own_queue() {
    for packed in LAYOUTS {
        let (mut ours, mut theirs) =
            (driver(packed, 8, Features::empty()), driver(packed, 8, Features::empty()));
        let (mut queue, mut other) = (ours.queue(), theirs.queue());
        let id = theirs.add(&[w(DATA, 8)], &[]).unwrap();
        ours.add(&[w(DATA, 8)], &[]).unwrap();
        let mine = queue.pop().unwrap();
        let foreign = other.pop().unwrap();
        assert!(queue.readable(&foreign).is_empty());
        assert!(queue.writable(&foreign).is_empty());
        assert_eq!(queue.id(&foreign), None);
        let foreign = queue.unpop(foreign).unwrap_err();
        queue.add_used(foreign, 8);
        assert_eq!(queue.counters().foreign, 1);
        assert!(!queue.publish());
        assert!(ours.used().is_empty());
        assert_eq!(queue.outstanding(), 1);
        other.publish();
        assert_eq!(theirs.used(), [(id, 0)]);
        theirs.add(&[w(DATA, 8)], &[]).unwrap();
        let foreign = other.pop().unwrap();
        queue.discard(foreign);
        assert_eq!(queue.counters().foreign, 2);
        queue.add_used(mine, 8);
    }
}

/// 2.7.8.2, 2.8.4: more would tell the driver that it may read what nobody wrote.
#[test]
fn the_used_length_is_never_more_than_the_room() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::empty());
        let mut queue = driver.queue();
        let a = driver.add(&[r(DATA, 100), w(DATA, 8), w(DATA, 2)], &[]).unwrap();
        let b = driver.add(&[r(DATA, 100)], &[]).unwrap();
        for chain in queue.iter().collect::<Vec<_>>() {
            queue.add_used(chain, 11);
        }
        queue.publish();
        assert_eq!(driver.used(), [(a, 10), (b, 0)]);
        assert_eq!(queue.counters().clamped, 2);
    }
}

#[test]
fn only_the_latest_chain_can_be_put_back() {
    for packed in LAYOUTS {
        for features in [Features::empty(), Features::IN_ORDER] {
            let mut driver = driver(packed, 5, Features::INDIRECT_DESC | features);
            if !packed {
                driver = super::driver(packed, 8, Features::INDIRECT_DESC | features);
            }
            let mut queue = driver.queue();
            for _ in 0..20 {
                let a = driver.add(&[r(DATA, 1), w(DATA, 1)], &[]).unwrap();
                let b = driver.add(&[r(DATA, 2), w(DATA, 2)], &[]).unwrap();
                let first = queue.pop().unwrap();
                let second = queue.pop().unwrap();
                let first = queue.unpop(first).unwrap_err();
                queue.unpop(second).unwrap();
                queue.unpop(first).unwrap();
                assert_eq!(queue.outstanding(), 0);
                let chains: Vec<Chain> = queue.iter().collect();
                assert_eq!(chains.len(), 2);
                assert_eq!(queue.writable(&chains[1])[0].len(), 2);
                for chain in chains {
                    queue.add_used(chain, 1);
                }
                queue.publish();
                assert_eq!(driver.used(), [(a, 1), (b, 1)]);
            }
            assert_eq!(queue.counters().popped, 40);
        }
    }
}

#[test]
fn budget_and_closing_stop_pops_and_not_completions() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::empty());
        let mut queue = driver.queue();
        for _ in 0..6 {
            driver.add(&[w(DATA, 8)], &[]).unwrap();
        }
        queue.set_budget(2);
        let mut chains: Vec<Chain> = queue.iter().collect();
        assert_eq!(chains.len(), 2);
        assert!(queue.budget_spent() && queue.has_available() && !queue.drained());
        // Putting one back gives its share back.
        queue.unpop(chains.pop().unwrap()).unwrap();
        assert!(!queue.budget_spent());
        chains.extend(queue.pop());
        assert!(queue.budget_spent());
        queue.close();
        assert!(!queue.budget_spent() && !queue.has_available() && !queue.arm());
        queue.set_budget(10);
        assert!(queue.pop().is_none());
        for chain in chains {
            queue.add_used(chain, 8);
        }
        queue.publish();
        assert_eq!(driver.used().len(), 2);
        queue.open();
        assert_eq!(queue.iter().count(), 4);
        assert!(queue.drained() && !queue.budget_spent());
    }
}

#[test]
fn a_chain_keeps_its_memory_when_the_map_changes_and_when_the_queue_goes() {
    for packed in LAYOUTS {
        let rings = Arc::new(region(0, BORDER as usize));
        let data = Arc::new(region(BORDER, 0x1000));
        let mut driver = driver(packed, 8, Features::empty());
        let both = || GuestRam::from_regions([rings.clone(), data.clone()]).unwrap();
        driver.ram = both();
        let mut queue = driver.queue();
        driver.ram = GuestRam::from_regions([rings.clone()]).unwrap();
        let snapshots = || Arc::strong_count(&data) - 1;
        assert_eq!(snapshots(), 1);
        driver.add(&[w(BORDER, 8)], &[]).unwrap();
        driver.add(&[w(BORDER, 8)], &[]).unwrap();
        let (a, b) = (queue.pop().unwrap(), queue.pop().unwrap());
        queue.set_ram(&driver.ram).unwrap();
        queue.set_ram(&driver.ram).unwrap();
        assert_eq!((snapshots(), queue.old_snapshots()), (1, 1));
        // A second snapshot that chains are out of.
        driver.add(&[w(DATA, 8)], &[]).unwrap();
        let c = queue.pop().unwrap();
        queue.set_ram(&both()).unwrap();
        assert_eq!((snapshots(), queue.old_snapshots()), (2, 2));
        assert_eq!(queue.writer(&a).write(&[1; 8]), 8);
        queue.add_used(a, 8);
        assert_eq!((snapshots(), queue.old_snapshots()), (2, 2));
        drop(b);
        queue.publish();
        assert_eq!((snapshots(), queue.old_snapshots()), (1, 1));
        queue.discard(c);
        assert_eq!((snapshots(), queue.old_snapshots()), (1, 0));
        assert_eq!(driver.used().len(), 2);
        // The queue goes; the last of its handles takes the memory along.
        driver.add(&[w(DATA, 8)], &[]).unwrap();
        driver.add(&[w(DATA, 8)], &[]).unwrap();
        let last: Vec<Chain> = queue.iter().collect();
        assert_eq!(last.len(), 2);
        drop(queue);
        assert_eq!(snapshots(), 1);
        thread::spawn(move || drop(last)).join().unwrap();
        assert_eq!(snapshots(), 0);
    }
}

#[test]
fn a_map_without_the_rings_is_a_fault_and_the_queue_keeps_what_it_has() {
    let mut driver = driver(false, 8, Features::empty());
    let mut queue = driver.queue();
    let id = driver.add(&[w(DATA, 8)], &[]).unwrap();
    let chain = queue.pop().unwrap();
    let other = GuestRam::from_regions([Arc::new(region(BORDER, 0x1000))]).unwrap();
    let error = queue.set_ram(&other).unwrap_err();
    assert!(matches!(error, QueueError::AreaUnmapped { area: QueueArea::Descriptor, .. }));
    assert_eq!(queue.fault(), Some(&error));
    queue.add_used(chain, 8);
    queue.publish();
    assert_eq!(driver.used(), [(id, 8)]);
}

#[test]
fn an_element_across_regions_is_several_segments() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::INDIRECT_DESC);
        let mut queue = driver.queue();
        driver.add(&[r(BORDER - 3, 8), w(BORDER - 1, 2)], &[]).unwrap();
        driver.add(&[], &[r(BORDER - 3, 8), w(BORDER - 1, 2)]).unwrap();
        driver.write(BORDER - 3, &[1, 2, 3, 4, 5, 6, 7, 8]);
        for chain in queue.iter().collect::<Vec<_>>() {
            let lens = |segs: &[Segment]| segs.iter().map(Segment::len).collect::<Vec<_>>();
            assert_eq!(lens(queue.readable(&chain)), [3, 5]);
            assert_eq!(lens(queue.writable(&chain)), [1, 1]);
            let mut bytes = [0; 8];
            queue.reader(&chain).read_exact(&mut bytes).unwrap();
            assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
            queue.add_used(chain, 2);
        }
    }
}

#[test]
fn an_indirect_table_across_regions_and_at_odd_addresses() {
    for packed in LAYOUTS {
        for at in [BORDER - 16, BORDER - 24, BORDER - 7, TABLES + 1, END - 48] {
            let driver = driver(packed, 8, Features::INDIRECT_DESC);
            let mut queue = driver.queue();
            for i in 0..3 {
                let flags = if packed { 0 } else { [NEXT, NEXT, 0][i as usize] };
                let (third, fourth) = if packed { (0, flags) } else { (flags, i + 1) };
                driver.desc_at(at + 16 * u64::from(i), DATA + u64::from(i), 1, third, fourth);
            }
            if packed {
                driver.packed_desc(0, at, 48, 0, INDIRECT | 0x80);
            } else {
                driver.split_desc(0, at, 48, INDIRECT, 0);
                driver.put_u16(AVAIL + 4, 0);
                driver.put_u16(AVAIL + 2, 1);
            }
            driver.write(DATA, &[1, 2, 3]);
            let chain = queue.pop().unwrap();
            let mut bytes = [0; 3];
            queue.reader(&chain).read_exact(&mut bytes).unwrap();
            assert_eq!(bytes, [1, 2, 3]);
            queue.add_used(chain, 0);
        }
    }
}

#[test]
fn segments_of_long_chains_stay_where_they_are() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 256, Features::INDIRECT_DESC);
        let mut queue = driver.queue();
        let elems: Vec<Elem> = (0..200).map(|i| r(DATA + 8 * i, 8)).collect();
        for _ in 0..4 {
            let mut parked = Vec::new();
            for len in [1, 4, 5, 16, 17, 64, 65, 200] {
                let id = driver.add(&[], &elems[..len]).unwrap();
                let chain = queue.pop().unwrap();
                let segments = queue.readable(&chain);
                assert_eq!(segments.len(), len);
                parked.push((id, len, segments.as_ptr(), chain));
            }
            let mut ids = Vec::new();
            for (id, len, at, chain) in parked {
                assert_eq!(queue.readable(&chain).as_ptr(), at);
                assert_eq!(crate::memory::iovecs(queue.readable(&chain)).len(), len);
                assert_eq!(queue.reader(&chain).remaining(), 8 * len as u64);
                queue.add_used(chain, 0);
                ids.push((id, 0));
            }
            queue.publish();
            assert_eq!(driver.used(), ids);
        }
    }
}

#[test]
fn in_order_completions_that_come_early_are_held_back() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::IN_ORDER);
        let mut queue = driver.queue();
        let ids: Vec<u16> = (0..4).map(|_| driver.add(&[w(DATA, 8)], &[]).unwrap()).collect();
        let mut chains: Vec<Chain> = queue.iter().collect();
        queue.add_used(chains.remove(3), 8);
        queue.add_used(chains.remove(1), 3);
        assert!(!queue.publish());
        assert!(driver.used().is_empty());
        assert_eq!(queue.outstanding(), 2);
        queue.add_used(chains.remove(0), 8);
        assert!(queue.publish());
        assert_eq!(driver.used(), [(ids[0], 8), (ids[1], 3)]);
        queue.add_used(chains.remove(0), 8);
        queue.publish();
        assert_eq!(driver.used(), [(ids[2], 8), (ids[3], 8)]);
    }
}

#[test]
fn in_order_lengths_that_are_not_the_whole_buffer_are_told() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::IN_ORDER);
        let mut queue = driver.queue();
        let ids: Vec<u16> =
            (0..6).map(|_| driver.add(&[r(DATA, 4), w(DATA, 8)], &[]).unwrap_or(99)).collect();
        let lens = [8, 3, 0, 8, 8, 7];
        for (chain, len) in queue.iter().collect::<Vec<_>>().into_iter().zip(lens) {
            queue.add_used(chain, len);
        }
        queue.publish();
        let expected: Vec<_> = ids.into_iter().filter(|id| *id != 99).zip(lens).collect();
        assert_eq!(driver.used(), expected);
    }
}

#[test]
fn in_order_nothing_is_used_behind_a_discarded_chain() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::IN_ORDER);
        let mut queue = driver.queue();
        for _ in 0..3 {
            driver.add(&[w(DATA, 8)], &[]).unwrap();
        }
        let mut chains = queue.iter().collect::<Vec<_>>().into_iter();
        queue.discard(chains.next().unwrap());
        queue.add_used(chains.next().unwrap(), 8);
        queue.discard(chains.next().unwrap());
        assert!(!queue.publish());
        assert!(driver.used().is_empty());
        assert_eq!((queue.outstanding(), queue.counters().discarded), (0, 2));
    }
}

#[test]
fn discarded_chains_have_no_used_entry() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::empty());
        let mut queue = driver.queue();
        driver.add(&[w(DATA, 8)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        queue.close();
        queue.discard(chain);
        assert!(!queue.publish());
        assert!(driver.used().is_empty());
        assert_eq!(queue.outstanding(), 0);
    }
}

#[test]
fn peers_virtio_queue_no_interrupt_flag_is_honoured() {
    let mut driver = driver(false, 8, Features::empty());
    let mut queue = driver.queue();
    driver.put_u16(AVAIL, 1);
    driver.add(&[w(DATA, 8)], &[]).unwrap();
    let chain = queue.pop().unwrap();
    queue.add_used(chain, 0);
    assert!(!queue.publish());
}

#[test]
fn peers_virtio_queue_size_and_addresses_are_frozen_while_the_queue_runs() {
    let driver = driver(false, 8, Features::empty());
    let mut config = driver.config;
    let queue = Queue::new(config, &driver.ram, Features::empty(), None).unwrap();
    config.size = 4;
    config.desc = GuestAddress(0);
    assert_ne!(config, driver.config);
    // There is no method that changes them, either.
    assert_eq!((queue.size(), *queue.config()), (8, driver.config));
}

#[test]
fn peers_virtio_queue_reader_and_writer_do_not_fetch_descriptors_again() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::INDIRECT_DESC);
        let mut queue = driver.queue();
        driver.write(DATA, &[5; 16]);
        driver.add(&[r(DATA, 8), w(DATA + 16, 8)], &[]).unwrap();
        driver.add(&[], &[r(DATA, 8), w(DATA + 32, 8)]).unwrap();
        let chains: Vec<Chain> = queue.iter().collect();
        driver.write(DESC, &[0xff; 8 * 16]);
        driver.write(TABLES, &[0xff; 0x8000]);
        for chain in chains {
            let (mut reader, mut writer) = queue.split(&chain);
            assert_eq!(reader.read_obj::<u64>().unwrap(), u64::from_ne_bytes([5; 8]));
            assert_eq!(reader.remaining(), 0);
            writer.write_obj(&7u64.to_le()).unwrap();
            assert_eq!((writer.remaining(), writer.written()), (0, 8));
            queue.add_used(chain, 8);
        }
        assert_eq!(driver.read(DATA + 16, 1), [7]);
        assert_eq!(driver.read(DATA + 32, 1), [7]);
        assert_eq!(queue.fault(), None);
    }
}

#[test]
fn peers_virtio_queue_a_batch_is_published_at_once() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::empty());
        let mut queue = driver.queue();
        let ids: Vec<u16> = (0..6).map(|_| driver.add(&[w(DATA, 8)], &[]).unwrap()).collect();
        for chain in queue.iter().collect::<Vec<_>>() {
            queue.add_used(chain, 8);
            if !packed {
                assert_eq!(driver.u16_at(USED + 2), 0);
            }
            assert!(driver.used().is_empty());
        }
        queue.publish();
        assert_eq!(driver.used(), ids.iter().map(|id| (*id, 8)).collect::<Vec<_>>());
    }
}

#[test]
fn peers_virtio_queue_the_rings_of_the_test_driver_do_not_overlap() {
    let size = 4096;
    assert!(DESC + 16 * size <= AVAIL);
    assert!(AVAIL + 6 + 2 * size <= USED);
    assert!(USED + 6 + 8 * size <= DATA);
}

#[test]
fn readers_and_writers_across_segments() {
    let mut driver = driver(false, 8, Features::empty());
    let mut queue = driver.queue();
    driver.write(DATA, &(0..30).collect::<Vec<u8>>());
    driver.add(&[r(DATA, 3), r(DATA + 3, 20), w(DATA + 100, 2), w(DATA + 102, 5)], &[]).unwrap();
    let chain = queue.pop().unwrap();
    let mut reader = queue.reader(&chain);
    assert_eq!(reader.read_obj::<[u8; 5]>().unwrap(), [0, 1, 2, 3, 4]);
    assert_eq!(reader.iovecs().map(|v| v.iov_len).collect::<Vec<_>>(), [18]);
    assert_eq!(reader.skip(10), 10);
    assert_eq!(reader.read_exact(&mut [0; 9]).unwrap_err(), ShortChain { wanted: 9, left: 8 });
    assert_eq!(reader.remaining(), 8, "a short read takes nothing");
    let mut rest = [0; 9];
    assert_eq!(reader.read(&mut rest), 8);
    assert_eq!(rest, [15, 16, 17, 18, 19, 20, 21, 22, 0]);
    assert_eq!((reader.read(&mut rest), reader.skip(1)), (0, 0));
    let mut writer = queue.writer(&chain);
    assert_eq!(writer.write_all(&[1; 8]).unwrap_err(), ShortChain { wanted: 8, left: 7 });
    assert_eq!(writer.written(), 0);
    writer.write_all(&[1, 2, 3]).unwrap();
    assert_eq!(writer.iovecs().map(|v| v.iov_len).collect::<Vec<_>>(), [4]);
    assert_eq!(writer.skip(1), 1);
    assert_eq!(writer.write(&[5, 6, 7, 8]), 3);
    assert_eq!((writer.written(), writer.remaining()), (7, 0));
    assert_eq!(driver.read(DATA + 100, 7), [1, 2, 3, 0, 5, 6, 7]);
    queue.add_used(chain, 7);
}

/// What is not the usual element, and where a chain is walked in another way from there on: wherever it is, also over the end
/// of the ring, the chain has all its elements, each once, and knows how long its writable part is.
#[test]
fn an_unusual_element_may_be_anywhere_in_a_chain() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::empty());
        let mut queue = driver.queue();
        for (len, readable, unusual) in
            (1..8u64).flat_map(|len| (0..=len).flat_map(move |k| (0..len).map(move |i| (len, k, i))))
        {
            for (addr, bytes) in [(BORDER - 3, 8), (DATA, 0), (END, 0)] {
                let element = |i| match i {
                    _ if i == unusual => (addr, bytes),
                    _ => (DATA + 64 * i, 10 + i as u32),
                };
                let elems: Vec<_> = (0..len)
                    .map(|i| {
                        let (addr, bytes) = element(i);
                        if i < readable { r(addr, bytes) } else { w(addr, bytes) }
                    })
                    .collect();
                let id = driver.add(&elems, &[]).unwrap();
                let chain = queue.pop().unwrap();
                let total = |range: std::ops::Range<u64>| range.map(|i| element(i).1).sum::<u32>();
                let bytes = |part: &[Segment]| part.iter().map(Segment::len).sum::<usize>() as u32;
                assert_eq!(bytes(queue.readable(&chain)), total(0..readable));
                assert_eq!(bytes(queue.writable(&chain)), total(readable..len));
                let clamped = queue.counters().clamped;
                queue.add_used(chain, u32::MAX);
                queue.publish();
                assert_eq!(driver.used(), [(id, total(readable..len))]);
                assert_eq!(queue.counters().clamped, clamped + 1);
            }
        }
        assert_eq!(queue.fault(), None);
    }
}
