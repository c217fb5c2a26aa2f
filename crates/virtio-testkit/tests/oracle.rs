//! The checks of the ring driver themselves: each rule, broken by hand, is found. A check that nothing can fail is
//! worth nothing.
use virtio_testkit::ring::{DESC_NEXT, DESC_WRITE, PACKED_AVAIL, PACKED_USED, PackedDesc, SplitDesc};
use virtio_testkit::{Buf, RingDriver, RingLayout, Shape, TestRam};
use vm_memory::GuestAddress;
use vm_virtio::Features;

fn ram() -> TestRam {
    TestRam::spread(2, 1 << 20)
}

fn driver(ram: &TestRam, layout: RingLayout, extra: Features) -> RingDriver {
    RingDriver::new(ram, layout, 8, (layout.features() - Features::EVENT_IDX) | extra)
}

fn split(ram: &TestRam) -> RingDriver {
    driver(ram, RingLayout::Split, Features::empty())
}

fn packed(ram: &TestRam) -> RingDriver {
    driver(ram, RingLayout::Packed, Features::empty())
}

/// Writes a used entry as a device would, right or wrong.
fn split_used(ram: &TestRam, ring: &mut RingDriver, id: u32, len: u32, idx: u16) {
    let used = ring.queue_config().device.0;
    let slot = u64::from((idx - 1) % ring.size());
    ram.store_u32(GuestAddress(used + 4 + 8 * slot), id);
    ram.store_u32(GuestAddress(used + 8 + 8 * slot), len);
    ram.store_u16(GuestAddress(used + 2), idx);
}

fn packed_used(ram: &TestRam, ring: &mut RingDriver, slot: u16, id: u16, len: u32) {
    let at = ring.queue_config().desc.0 + 16 * u64::from(slot);
    let flags = PACKED_AVAIL | PACKED_USED | DESC_WRITE;
    ram.write(GuestAddress(at), &PackedDesc { addr: 0, len, id, flags }.to_bytes());
}

#[track_caller]
fn found(result: Result<Option<virtio_testkit::Used>, virtio_testkit::Violation>, rule: &str) {
    let violation = result.expect_err("the violation is found");
    assert!(violation.rule.contains(rule), "{violation}");
}

#[test]
fn split_used_ids_are_in_flight_and_used_once() {
    let ram = ram();
    let mut ring = split(&ram);
    let id = u32::from(ring.add(&[ram.writable(8)]));
    ring.add(&[ram.writable(8)]);
    split_used(&ram, &mut ring, id, 8, 1);
    assert_eq!(ring.used().unwrap().len, 8);
    split_used(&ram, &mut ring, id, 8, 2);
    found(ring.try_used(), "used once");

    let mut ring = split(&ram);
    ring.add(&[ram.writable(8)]);
    split_used(&ram, &mut ring, 0x1_0000, 8, 1);
    found(ring.try_used(), "in flight");
}

#[test]
fn split_used_idx_does_not_run_ahead() {
    let ram = ram();
    let mut ring = split(&ram);
    let id = u32::from(ring.add(&[ram.writable(8)]));
    split_used(&ram, &mut ring, id, 8, 1);
    split_used(&ram, &mut ring, id, 8, 2);
    found(ring.try_used(), "used.idx");
    // Staged is not available.
    let mut ring = split(&ram);
    let id = ring.stage(&[ram.writable(8)], Shape::Direct).unwrap();
    split_used(&ram, &mut ring, u32::from(id), 8, 1);
    found(ring.try_used(), "used.idx");
}

#[test]
fn lengths_fit_the_writable_part() {
    let ram = ram();
    let mut ring = split(&ram);
    let id = ring.add(&[ram.readable(&[1; 100]), ram.writable(8)]);
    split_used(&ram, &mut ring, u32::from(id), 9, 1);
    found(ring.try_used(), "len counts");

    let mut ring = packed(&ram);
    let id = ring.add(&[ram.readable(&[1; 100]), ram.writable(8)]);
    packed_used(&ram, &mut ring, 0, id, 9);
    found(ring.try_used(), "len counts");
}

#[test]
fn split_flags_are_those_that_there_are() {
    let ram = ram();
    for (extra, flags) in [(Features::empty(), 2), (Features::EVENT_IDX, 1)] {
        let mut ring = driver(&ram, RingLayout::Split, extra);
        ram.store_u16(ring.queue_config().device, flags);
        found(ring.try_used(), "used.flags");
    }
}

#[test]
fn the_drivers_memory_is_the_drivers() {
    type Change = fn(&mut RingDriver, &TestRam, Buf);
    let changes: [Change; 5] = [
        |_, ram, buf| ram.write(buf.addr, &[9]),
        |_, ram, buf| ram.write(GuestAddress(buf.addr.0 + u64::from(buf.len)), &[9]),
        |ring, ram, _| ram.write(GuestAddress(ring.queue_config().desc.0 + 8 * 16 - 1), &[9]),
        |ring, ram, _| ram.write(ring.queue_config().driver, &[9]),
        |ring, ram, _| {
            let used = if ring.features().contains(Features::RING_PACKED) { 4 } else { 6 + 8 * 8 };
            ram.write(GuestAddress(ring.queue_config().device.0 + used), &[9]);
        },
    ];
    for layout in RingLayout::ALL {
        for (i, change) in changes.iter().enumerate() {
            let ram = ram();
            let mut ring = driver(&ram, layout, Features::empty());
            let buf = ram.readable(&[1, 2, 3]);
            ring.add_as(&[buf, ram.writable(3)], Shape::Indirect);
            ring.check_untouched().unwrap();
            change(&mut ring, &ram, buf);
            assert!(ring.check_untouched().is_err(), "{layout:?}: change {i} is not found");
        }
    }
}

#[test]
fn an_indirect_table_is_the_drivers() {
    for layout in RingLayout::ALL {
        let ram = ram();
        let mut ring = driver(&ram, layout, Features::empty());
        let id = ring.add_as(&[ram.writable(3), ram.writable(4)], Shape::Indirect);
        let table = match layout {
            RingLayout::Split => ring.split().desc(id).addr,
            RingLayout::Packed => ring.packed().desc(0).addr,
        };
        ram.write(GuestAddress(table + 31), &[0xff]);
        match layout {
            RingLayout::Split => split_used(&ram, &mut ring, u32::from(id), 7, 1),
            RingLayout::Packed => packed_used(&ram, &mut ring, 0, id, 7),
        }
        found(ring.try_used(), "indirect tables");
    }
}

#[test]
fn packed_used_ids_are_in_flight_and_used_once() {
    let ram = ram();
    let mut ring = packed(&ram);
    let id = ring.add(&[ram.writable(8)]);
    ring.add(&[ram.writable(8)]);
    packed_used(&ram, &mut ring, 0, id, 8);
    assert_eq!(ring.used().unwrap().id, id);
    packed_used(&ram, &mut ring, 1, id, 8);
    found(ring.try_used(), "used once");
}

#[test]
fn packed_used_descriptors_go_where_the_next_one_belongs() {
    let ram = ram();
    // Two used descriptors for a list of two.
    let mut ring = packed(&ram);
    let id = ring.add(&[ram.writable(8), ram.writable(8)]);
    packed_used(&ram, &mut ring, 1, id, 8);
    packed_used(&ram, &mut ring, 0, id, 8);
    found(ring.try_used(), "one used descriptor for a list");
    // Used while nothing is available.
    let mut ring = packed(&ram);
    packed_used(&ram, &mut ring, 0, 3, 8);
    found(ring.try_used(), "after it was made available");
    // Changed after it was used.
    let mut ring = packed(&ram);
    let id = ring.add(&[ram.writable(8)]);
    packed_used(&ram, &mut ring, 0, id, 8);
    ring.used().unwrap();
    packed_used(&ram, &mut ring, 0, id, 7);
    ring.check_untouched().expect_err("a change after use is found");
}

#[test]
fn packed_event_structure_is_legal() {
    let ram = ram();
    let cases = [
        (Features::empty(), 2 << 16, "needs EVENT_IDX"),
        (Features::EVENT_IDX, 3 << 16, "reserved"),
        (Features::EVENT_IDX, 4 << 16, "reserved bits"),
        (Features::EVENT_IDX, 2 << 16 | 8, "within the ring"),
    ];
    for (extra, value, rule) in cases {
        let mut ring = driver(&ram, RingLayout::Packed, extra);
        ram.store_u32(ring.queue_config().device, value);
        found(ring.try_used(), rule);
    }
}

#[test]
fn in_order_batches_come_in_order() {
    let ram = ram();
    let mut ring = driver(&ram, RingLayout::Split, Features::IN_ORDER);
    let ids: Vec<u32> = (0..3).map(|_| u32::from(ring.add(&[ram.writable(8)]))).collect();
    // One entry for the last of three.
    split_used(&ram, &mut ring, ids[2], 5, 1);
    ram.store_u16(GuestAddress(ring.queue_config().device.0 + 2), 3);
    let used = ring.drain();
    assert_eq!(
        used.iter().map(|u| (u.len, u.skipped)).collect::<Vec<_>>(),
        [(8, true), (8, true), (5, false)]
    );

    // The second before the first: not a batch of two, since used.idx says one.
    let mut ring = driver(&ram, RingLayout::Split, Features::IN_ORDER);
    ring.add(&[ram.writable(8)]);
    let second = ring.add(&[ram.writable(8)]);
    split_used(&ram, &mut ring, u32::from(second), 8, 1);
    found(ring.try_used(), "IN_ORDER");
}

#[test]
fn chains_are_described_as_they_were_asked_for() {
    let ram = ram();
    let mut ring = split(&ram);
    let chain = [ram.readable(&[1]), ram.readable(&[2]), ram.writable(3), ram.writable(4)];
    let head = ring.add_as(&chain, Shape::Mixed(1));
    let first = ring.split().desc(head);
    assert_eq!((first.addr, first.len, first.flags), (chain[0].addr.0, 1, DESC_NEXT));
    let table = ring.split().desc(first.next);
    assert_eq!((table.len, table.flags), (48, 4));
    // The table's second element lies last: a device has to follow `next`.
    let mut bytes = [0; 16];
    ram.read(GuestAddress(table.addr + 32), &mut bytes);
    let second = SplitDesc { addr: chain[2].addr.0, len: 3, flags: DESC_NEXT | DESC_WRITE, next: 1 };
    assert_eq!(bytes, second.to_bytes());
}
