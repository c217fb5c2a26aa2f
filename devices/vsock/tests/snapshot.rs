//! Saved in one place, restored in another: the guest is told that its connections are gone (5.10.6.7).
mod support;

use std::io::Read;

use device_state::{SavedState, Section, Tag};
use support::*;
use virtio_testkit::{MemoryHost, RingLayout};
use virtio_vsock::packet::Op;
use virtio_vsock::{Exchange, HostSide, Settings, Vsock};
use vm_virtio::{SnapshotError, StateError, WaitFor};

fn save(host: &mut MemoryHost<Vsock>) -> Vec<u8> {
    let order = host.engine().suspend();
    host.finish(order).unwrap();
    let order = host.engine().save();
    host.finish(order).unwrap()
}

#[test]
fn c5_10_6_7_a_restored_device_sends_transport_reset() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        let mut stream = guest.connect(end);
        let state = save(&mut guest.host);
        assert!(state.len() < 256, "{} bytes", state.len());
        let Guest { host, dir, .. } = guest;
        // Moved elsewhere: another host, with sockets of its own.
        let elsewhere = virtio_testkit::daemon::TempDir::new();
        let device = Vsock::new(settings(&elsewhere), &Exchange::new()).unwrap();
        let mut host = host.successor(device);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "what was left behind closes");
        assert!(!dir.join("vm").exists() && elsewhere.join("vm").exists());
        let order = host.engine().memory(host.ram().ram(), WaitFor::NewRequests);
        host.finish(order);
        let order = host.engine().restore(&state);
        let queues = host.finish(order).unwrap();
        host.start_restored(queues);
        // Buffers that are too small go back, the event waits for one that is not.
        host.settle();
        let small = host.ram().writable(3);
        host.ring(EVENT).add(&[small]);
        let buf = host.ram().writable(8);
        host.ring(EVENT).add(&[buf]);
        host.kick(EVENT);
        host.settle();
        assert_eq!(host.ring(EVENT).used().unwrap().len, 0);
        assert_eq!(host.ring(EVENT).used().unwrap().len, 4);
        assert_eq!(host.ram().written(&[buf])[..4], [0; 4], "TRANSPORT_RESET");
        told_once(&mut host);
        // Connections of the former host are nobody's; new ones work.
        let mut cid = [0; 8];
        host.config().read(0, &mut cid);
        assert_eq!(cid, u64::from(CID).to_le_bytes());
    }
}

/// The driver has heard of it, and does not hear again.
#[track_caller]
fn told_once(host: &mut MemoryHost<Vsock>) {
    let another = host.ram().writable(8);
    host.ring(EVENT).add(&[another]);
    host.kick(EVENT);
    host.settle();
    assert_eq!(host.ring(EVENT).used(), None, "told once");
}

/// A daemon that was killed, and its successor: the driver has connections that nobody knows any more.
#[test]
fn c5_10_6_7_a_successor_of_a_killed_daemon_sends_transport_reset() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let _stream = guest.connect(to_host(1, 2));
        let buf = guest.host.ram().writable(8);
        guest.host.ring(EVENT).add(&[buf]);
        let Guest { host, .. } = guest;
        let elsewhere = virtio_testkit::daemon::TempDir::new();
        let mut host = host.take_over(Vsock::new(settings(&elsewhere), &Exchange::new()).unwrap());
        assert_eq!(host.ring(EVENT).used().map(|used| used.len), Some(4));
        assert_eq!(host.ram().written(&[buf])[..4], [0; 4], "TRANSPORT_RESET");
        told_once(&mut host);
    }
}

/// Nor does one whose driver has received nothing so far, or whose queues are stopped and started as for a pause.
#[test]
fn a_successor_of_nothing_and_a_pause_send_no_event() {
    for layout in RingLayout::ALL {
        let event = |host: &mut MemoryHost<Vsock>| {
            let buf = host.ram().writable(8);
            host.ring(EVENT).add(&[buf]);
            host.kick(EVENT);
            host.settle();
            host.ring(EVENT).used()
        };
        let elsewhere = virtio_testkit::daemon::TempDir::new();
        let device = Vsock::new(settings(&elsewhere), &Exchange::new()).unwrap();
        assert_eq!(event(&mut Guest::new(layout).host.take_over(device)), None);
        let mut guest = Guest::new(layout);
        let _stream = guest.connect(to_host(1, 2));
        let state = guest.host.stop_queue(RX, vm_virtio::Stop::Drain).unwrap();
        guest.host.start_queue(RX, Some(state));
        guest.settle();
        assert_eq!(event(&mut guest.host), None);
    }
}

#[test]
fn a_device_that_is_not_restored_sends_no_event() {
    let mut guest = Guest::new(RingLayout::Split);
    let buf = guest.host.ram().writable(8);
    guest.host.ring(EVENT).add(&[buf]);
    guest.host.kick(EVENT);
    guest.settle();
    assert_eq!(guest.host.ring(EVENT).used(), None);
}

/// A front-end that keeps the event queue to itself, as QEMU does, has two queues with us.
#[test]
fn two_of_three_queues_are_enough() {
    let mut guest = Guest::new(RingLayout::Split);
    guest.host.stop_queue(EVENT, vm_virtio::Stop::Drain).unwrap();
    let _stream = guest.connect(to_host(1, 2));
    guest.quiet();
}

#[test]
fn a_saved_device_goes_on_and_keeps_its_connections() {
    let mut guest = Guest::new(RingLayout::Packed);
    let end = to_host(1, 2);
    let mut stream = guest.connect(end);
    save(&mut guest.host);
    std::io::Write::write_all(&mut stream, b"meanwhile").unwrap();
    let order = guest.host.engine().resume();
    guest.host.finish(order);
    assert_eq!(guest.next().data, b"meanwhile");
    guest.send(end.packet(Op::CreditRequest), &[]);
    assert!(guest.next().is(Op::CreditUpdate));
}

#[test]
fn states_that_are_not_this_devices_are_refused() {
    let mut guest = Guest::new(RingLayout::Split);
    let state = save(&mut guest.host);
    let refused = |state: &[u8], cid: u64| {
        let device = Vsock::new(Settings::new(cid, HostSide::Nobody), &Exchange::new()).unwrap();
        let mut host = MemoryHost::builder(device).build();
        let order = host.engine().restore(state);
        let error = host.finish(order).expect_err("refused");
        host.initialise();
        error
    };
    // 5.10.4: the context ID identifies the guest.
    assert!(matches!(refused(&state, 9), SnapshotError::Config(_)));
    let mut parsed = SavedState::parse(&state).unwrap();
    parsed.put(Tag(*b"devc"), Section::from_bytes(1, vec![1]));
    let error = refused(&parsed.to_bytes().unwrap(), 3);
    assert!(
        matches!(error, SnapshotError::State(StateError::Trailing | StateError::SectionVersion { .. })),
        "{error}"
    );
}
