//! Front-ends that use what they share with the daemon - files and addresses - against it and its other guests.
mod support;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use support::*;
use vhost_user::{FrontendEndpoint, MemoryRegion, ProtocolFeatures};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};
use vm_virtio::Status;

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// The file is written by the guest's own lane: on the control thread it would stop everybody.
#[test]
fn policy_4_an_error_file_that_blocks_stops_no_other_guest() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut bad = daemon.driver(0, RingLayout::Split);
    let mut other = daemon.driver(1, RingLayout::Split);
    let err = event();
    bad.endpoint().set_vring_err(0, Some(err.as_fd())).unwrap();
    // The open file is the front-end's, too: it blocks again, and is full.
    let flags = rustix::fs::fcntl_getfl(&err).unwrap();
    rustix::fs::fcntl_setfl(&err, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    rustix::io::write(&err, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    // A broken ring.
    bad.ring(0).split().set_avail_idx(0x4000);
    bad.kick_anyway(0);
    std::thread::sleep(Duration::from_millis(300));
    other.endpoint().set_timeout(SOON);
    let status = other.endpoint().get_status();
    // Let it go, so that the test can end.
    rustix::io::read(&err, &mut [0; 8]).unwrap();
    assert!(status.is_ok(), "{status:?}");
}

/// Memory files are sparse: slots of petabytes cost their owner nothing.
#[test]
fn policy_8_one_front_end_cannot_take_all_addresses() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut bad = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
    let protocol = bad.get_protocol_features().unwrap();
    bad.set_protocol_features(protocol).unwrap();
    let other_options = options(RingLayout::Split);
    let fd = rustix::fs::memfd_create("huge", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 1 << 47).unwrap();
    let (mut at, mut size, mut total) = (0u64, 1u64 << 46, 0u64);
    let mut slots = 0;
    while size >= 1 << 20 && slots < 500 {
        let region = MemoryRegion { guest_addr: at, size, user_addr: at, mmap_offset: 0 };
        match bad.add_mem_reg(region, fd.as_fd()) {
            Ok(()) => {
                at += size;
                total += size;
                slots += 1
            }
            Err(_) => size /= 2,
        }
    }
    assert!(slots > 0 && total > 0);
    let other = VhostUserDriver::connect(daemon.socket(1), other_options);
    assert!(other.is_ok(), "{:?}", other.err());
}

/// A reset forgets the features; the connection's own still hold.
#[test]
fn a_ring_started_between_reset_and_features_ok_has_the_layout_of_its_driver() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Packed);
    assert_eq!(ask(&mut driver, 0, b"one"), b"one");
    driver.reset().unwrap();
    // As `start`, but the features of this connection are still those that were set.
    let ram = driver.ram().clone();
    for r in ram.regions() {
        let region = MemoryRegion {
            guest_addr: r.guest_addr,
            size: r.size,
            user_addr: r.user_addr,
            mmap_offset: r.mmap_offset,
        };
        driver.endpoint().add_mem_reg(region, ram.fd()).unwrap();
    }
    driver.endpoint().set_status((Status::ACKNOWLEDGE | Status::DRIVER).bits()).unwrap();
    driver.start_ring(0).unwrap();
    driver.endpoint().set_vring_enable(0, true).unwrap();
    let e = driver.endpoint();
    e.set_status((Status::ACKNOWLEDGE | Status::DRIVER).bits()).unwrap();
    e.set_status((Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK).bits()).unwrap();
    e.set_status((Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK).bits())
        .unwrap();
    assert!(driver.status().unwrap().contains(Status::DRIVER_OK | Status::FEATURES_OK));
    assert_eq!(ask(&mut driver, 0, b"two"), b"two");
}

/// A driver that begins from scratch, whose first ring was idle before.
#[test]
fn a_driver_that_begins_from_scratch_is_noticed_by_any_ring() {
    let daemon = TestDaemon::with(1, || Echo::new(8).queues(2, 1));
    let opts = || VhostUserOptions {
        protocol: ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK,
        ..options(RingLayout::Split)
    };
    let mut first = VhostUserDriver::connect(daemon.socket(0), opts()).unwrap();
    ask(&mut first, 1, b"x");
    ask(&mut first, 1, b"x");
    drop(first);
    let mut second = VhostUserDriver::connect(daemon.socket(0), opts()).unwrap();
    assert_eq!(ask(&mut second, 1, b"N"), [1], "requests since the reset");
}

/// A call file that blocks holds its own lane, and must not keep the daemon from ending.
#[test]
fn policy_7_a_call_file_that_blocks_does_not_keep_the_daemon_from_ending() {
    let daemon = TestDaemon::start();
    let mut bad = daemon.driver(0, RingLayout::Split);
    let call = event();
    bad.endpoint().set_vring_call(0, Some(call.as_fd())).unwrap();
    let flags = rustix::fs::fcntl_getfl(&call).unwrap();
    rustix::fs::fcntl_setfl(&call, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    let _ = rustix::io::read(&call, &mut [0; 8]);
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    submit(&mut bad, 0, b"x");
    std::thread::sleep(Duration::from_millis(200));
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = daemon.stop();
        let _ = tx.send(());
    });
    let ended = rx.recv_timeout(SOON);
    let _ = rustix::io::read(&call, &mut [0; 8]);
    assert!(ended.is_ok(), "it was asked to end");
}

/// A VMM that reconnects as soon as its connection is closed gets in.
#[test]
fn who_reconnects_at_once_is_not_turned_away() {
    let daemon = TestDaemon::start();
    let path = daemon.socket(0);
    let mut away = 0;
    for _ in 0..20000 {
        let mut endpoint = FrontendEndpoint::connect(&path).unwrap();
        if endpoint.get_features().is_err() {
            away += 1
        }
    }
    assert_eq!(away, 0, "of 20000");
}

/// A process that the front-end forked holds its socket a moment longer.
#[test]
fn who_reconnects_while_the_old_connection_still_looks_alive_gets_in() {
    let daemon = TestDaemon::start();
    // A machine that lets this thread sleep for longer than the daemon's patience proves nothing.
    let gets_in = || {
        let mut first = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
        first.get_features().unwrap();
        let held = first.stream().try_clone().unwrap();
        drop(first);
        let mut second = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
        let waits = std::thread::spawn(move || second.get_features());
        std::thread::sleep(Duration::from_millis(50));
        drop(held);
        waits.join().unwrap().is_ok()
    };
    eventually("one gets in", gets_in);
}

/// Kicks are read out of a pipe. Whoever made it can take O_NONBLOCK away, and the kick that was to be read.
#[test]
fn policy_8_a_kick_pipe_that_somebody_else_empties_does_not_hold_its_lane() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    let (kicked, mut kick) = std::io::pipe().unwrap();
    driver.endpoint().set_vring_kick(0, Some(kicked.as_fd())).unwrap();
    let mut kicks = [0; 4096];
    // Each time a little later: between the moment in which the lane hears of a kick and that in which it reads it.
    for n in 0..4000 {
        kick.write_all(&1u64.to_ne_bytes()).unwrap();
        rustix::fs::fcntl_setfl(&kicked, OFlags::empty()).unwrap();
        (0..n % 500 * 4).for_each(|_| std::hint::spin_loop());
        let pieces = &mut [IoSliceMut::new(&mut kicks)];
        let _ = rustix::io::preadv2(&kicked, pieces, u64::MAX, ReadWriteFlags::NOWAIT);
        // The lane does this.
        driver.endpoint().set_vring_enable(0, true).unwrap();
    }
    let chain = [driver.ram().readable(b"alive"), driver.ram().writable(64)];
    driver.ring(0).add(&chain);
    kick.write_all(&1u64.to_ne_bytes()).unwrap();
    assert_eq!(answer(&mut driver, 0), 5);
}
