//! Saved in one place, restored in another: the guest sees one device.
use std::time::Duration;

use device_state::{SavedState, Section, Tag};
use virtio_rng::{Entropy, RateLimit, Rng};
use virtio_testkit::{MemoryHost, RingLayout};
use vm_virtio::{SnapshotError, StateError, WaitFor};

fn device(seed: u64, limit: Option<RateLimit>) -> Rng {
    Rng::new(&Entropy::insecure_seeded(seed), 0, limit).unwrap()
}

fn ask_for(host: &mut MemoryHost<Rng>, len: u32) -> Vec<u8> {
    let buf = host.ram().writable(len);
    host.ring(0).add(&[buf]);
    host.kick(0);
    host.settle();
    let used = host.ring(0).used().expect("an answer at once");
    let mut bytes = host.ram().written(&[buf]);
    bytes.truncate(used.len as usize);
    bytes
}

fn save(host: &mut MemoryHost<Rng>) -> Vec<u8> {
    let order = host.engine().suspend();
    host.finish(order).unwrap();
    let order = host.engine().save();
    host.finish(order).unwrap()
}

#[test]
fn the_stream_goes_on_where_it_was_in_both_layouts() {
    for layout in RingLayout::ALL {
        let mut whole = MemoryHost::builder(device(7, None)).layout(layout).start();
        let expected = ask_for(&mut whole, 1000);
        for cut in [0, 1, 255, 256, 257, 700] {
            let mut first = MemoryHost::builder(device(7, None)).layout(layout).start();
            let mut bytes = Vec::new();
            if cut > 0 {
                bytes = ask_for(&mut first, cut);
            }
            let state = save(&mut first);
            assert!(state.len() < 256, "{} bytes", state.len());
            let mut second = first.successor(device(7, None));
            let order = second.engine().memory(second.ram().ram(), WaitFor::NewRequests);
            second.finish(order);
            let order = second.engine().restore(&state);
            let queues = second.finish(order).unwrap();
            second.start_restored(queues);
            bytes.extend(ask_for(&mut second, 1000 - cut));
            assert_eq!(bytes, expected, "cut at {cut}");
        }
    }
}

#[test]
fn a_snapshot_is_no_way_around_the_rate_limit() {
    let limit = RateLimit::new(10, Duration::from_secs(3600)).unwrap();
    let mut first = MemoryHost::builder(device(1, Some(limit))).start();
    assert_eq!(ask_for(&mut first, 4).len(), 4);
    let state = save(&mut first);
    let mut second = first.successor(device(1, Some(limit)));
    let order = second.engine().memory(second.ram().ram(), WaitFor::NewRequests);
    second.finish(order);
    let order = second.engine().restore(&state);
    let queues = second.finish(order).unwrap();
    second.start_restored(queues);
    assert_eq!(ask_for(&mut second, 100).len(), 6);
}

/// If this fails, devices that were saved before cannot be restored any more: a new version is due.
#[test]
fn the_bytes_of_the_devices_part_are_what_they_have_always_been() {
    let mut host = MemoryHost::builder(device(1, None)).start();
    ask_for(&mut host, 300);
    let section = SavedState::parse(&save(&mut host)).unwrap().take(Tag(*b"devc")).unwrap();
    // No limit; seeded: seed, guest, position.
    assert_eq!((section.version(), section.bytes()), (1, &[0, 1, 1, 0, 0xac, 2][..]));
}

#[test]
fn a_state_that_is_another_devices_is_refused_and_the_device_is_as_new() {
    let mut first = MemoryHost::builder(device(1, None)).start();
    let state = save(&mut first);
    let refused = |state: &[u8]| {
        let mut second = MemoryHost::builder(device(2, None)).build();
        let order = second.engine().restore(state);
        let error = second.finish(order).expect_err("refused");
        second.initialise();
        assert_eq!(ask_for(&mut second, 5).len(), 5);
        error
    };
    assert!(matches!(refused(&state), SnapshotError::State(StateError::Refused(_))), "another seed");
    let swap = |section: Section| {
        let mut parsed = SavedState::parse(&state).unwrap();
        parsed.put(Tag(*b"devc"), section);
        parsed.to_bytes().unwrap()
    };
    let newer = StateError::SectionVersion { found: 2, known: 1 };
    assert_eq!(refused(&swap(Section::from_bytes(2, vec![0, 0]))), SnapshotError::State(newer));
    assert_eq!(refused(&swap(Section::from_bytes(1, vec![2]))), SnapshotError::State(StateError::Malformed));
    assert_eq!(
        refused(&swap(Section::from_bytes(1, vec![0, 0, 0]))),
        SnapshotError::State(StateError::Trailing)
    );
    // The state of a device whose bytes are the kernel's.
    let kernel = refused(&swap(Section::from_bytes(1, vec![0, 0])));
    assert!(matches!(kernel, SnapshotError::State(StateError::Refused(_))));
}
