//! Saved in one place, restored in another: the guest sees one device, and what is different there.
mod support;

use device_state::{SavedState, Section, Tag};
use support::{Guest, Place, SOON, connect, console, drain, pattern};
use virtio_console::Console;
use virtio_console::control::event;
use virtio_testkit::{MemoryHost, RingLayout};
use vm_virtio::{SnapshotError, StateError, WaitFor};

fn device(place: &Place, host: &str, names: &[&str]) -> Console {
    let ports: Vec<String> =
        names.iter().map(|name| format!("name={name},{}", place.unix(&format!("{name}.{host}")))).collect();
    console(&ports.iter().map(String::as_str).collect::<Vec<_>>())
}

fn save(host: &mut MemoryHost<Console>) -> Vec<u8> {
    let order = host.engine().suspend();
    host.finish(order).unwrap();
    let order = host.engine().save();
    host.finish(order).unwrap()
}

fn restore(first: MemoryHost<Console>, device: Console, state: &[u8]) -> Guest {
    let mut second = first.successor(device);
    let order = second.engine().memory(second.ram().ram(), WaitFor::NewRequests);
    second.finish(order);
    let order = second.engine().restore(state);
    let queues = second.finish(order).unwrap();
    second.start_restored(queues);
    Guest::of(second)
}

#[test]
fn output_that_is_under_way_arrives_once_and_whole() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = Guest::ready(device(&place, "old", &["a", "b"]), layout);
        guest.say(0, event::PORT_OPEN, 1);
        let mut client = connect(&place.path("a.old"));
        guest.wait_told(0, event::PORT_OPEN, 1);
        // Half of this is with the client; this is kept for one who is not there.
        let part = pattern(400_000);
        guest.write(0, &part);
        assert_eq!(guest.written(0), 0);
        guest.print(1, b"kept");
        let state = save(&mut guest.host);
        let (first, _) = drain(&mut client);
        let mut guest = restore(guest.host, device(&place, "new", &["a", "b"]), &state);
        let mut client = connect(&place.path("a.new"));
        let mut second = Vec::new();
        guest.host.run_until(SOON, |_| {
            second.extend(drain(&mut client).0);
            !second.is_empty() && part.ends_with(&second)
        });
        // Before the new client came the rest was kept for it, as far as that fits: but it came first.
        assert!(part.starts_with(&first), "{}", first.len());
        assert!(part.ends_with(&second) && !second.is_empty(), "{}", second.len());
        let mut other = connect(&place.path("b.new"));
        guest.look();
        assert_eq!(drain(&mut other).0, b"kept");
    }
}

#[test]
fn the_driver_is_told_what_is_different_there_and_nothing_else() {
    let place = Place::new();
    let mut guest = Guest::ready(device(&place, "old", &["a", "b"]), RingLayout::Split);
    guest.say(0, event::PORT_OPEN, 1);
    let _client = connect(&place.path("a.old"));
    guest.wait_told(0, event::PORT_OPEN, 1);
    let state = save(&mut guest.host);
    let mut second = guest.host.successor(device(&place, "new", &["a", "c"]));
    let order = second.engine().memory(second.ram().ram(), WaitFor::NewRequests);
    second.finish(order);
    let order = second.engine().restore(&state);
    let queues = second.finish(order).unwrap();
    second.start_restored(queues);
    // The driver's control buffers of before are in the ring.
    second.settle();
    let used = second.ring(2).drain();
    assert_eq!(used.len(), 3, "a's client is gone; b is, too; c is there");
}

/// If this fails, devices that were saved before cannot be restored any more: a new version is due.
#[test]
fn the_bytes_of_the_devices_part_are_what_they_have_always_been() {
    let mut guest = Guest::ready(console(&["name=ab,backend=null"]), RingLayout::Split);
    let section = SavedState::parse(&save(&mut guest.host)).unwrap().take(Tag(*b"devc")).unwrap();
    // Ready; one port: number, name, console, told (added, console, name, client 1, size, ready, open); one port: number,
    // skip, kept.
    let bytes = [1, 1, 0, 2, b'a', b'b', 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0];
    assert_eq!((section.version(), section.bytes()), (1, &bytes[..]));
}

#[test]
fn a_state_that_makes_no_sense_is_refused_and_the_device_is_as_new() {
    let mut guest = Guest::ready(console(&["name=ab,backend=null"]), RingLayout::Split);
    let state = save(&mut guest.host);
    let refused = |bytes: &[u8], version| {
        let mut parsed = SavedState::parse(&state).unwrap();
        parsed.put(Tag(*b"devc"), Section::from_bytes(version, bytes.to_vec()));
        let mut second = MemoryHost::builder(console(&["name=ab,backend=null"])).build();
        let order = second.engine().restore(&parsed.to_bytes().unwrap());
        let error = second.finish(order).expect_err("refused");
        second.initialise();
        let mut guest = Guest::of(second);
        guest.shake_hands();
        assert_eq!(guest.heard[0], (0, event::DEVICE_ADD, 0, vec![]));
        guest.print(0, b"x");
        error
    };
    let newer = StateError::SectionVersion { found: 2, known: 1 };
    assert_eq!(refused(&[0, 0, 0], 2), SnapshotError::State(newer));
    assert_eq!(refused(&[], 1), SnapshotError::State(StateError::Malformed));
    assert_eq!(refused(&[0, 0, 0, 0], 1), SnapshotError::State(StateError::Trailing));
    // A port that there cannot be.
    let beyond = [1, 1, 9, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    assert!(matches!(refused(&beyond, 1), SnapshotError::State(StateError::Refused(_))));
    // So many ports that they would not fit memory.
    assert_eq!(refused(&[1, 0xff, 0xff, 0xff, 0xff, 0x0f], 1), SnapshotError::State(StateError::Malformed));
}
