//! What users of other daemons live with, row by row: each is a test that this host passes.
mod support;

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use support::echo::ask;
use support::*;
use vhost_user::{
    BackendRequest, Error, FrontendCode, FrontendEndpoint, MemoryRegion, ProtocolFeatures, flags,
};
use virtio_testkit::{RingLayout, TestRam, VhostUserDriver, VhostUserOptions};
use vm_virtio::Status;

/// "One malformed request, or an error or panic in a handler, ends the queue's thread: the device hangs until the VMM
/// reconnects, nothing is logged."
#[test]
fn peers_all_daemons_a_panic_or_error_in_a_handler_is_told_and_a_reset_heals() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut other = daemon.driver(1, RingLayout::Split);
    for layout in RingLayout::ALL {
        for fatal in [ask::PANIC, ask::FAIL] {
            let mut driver = daemon.driver(0, layout);
            submit(&mut driver, 0, &[fatal]);
            eventually("the error file", || driver.ring_failed(0));
            assert!(driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
            driver.endpoint().get_vring_base(0).unwrap();
            driver.reset().unwrap();
            driver.start().unwrap();
            assert_eq!(ask(&mut driver, 0, b"well"), b"well");
            assert_eq!(ask(&mut other, 0, b"unharmed"), b"unharmed");
            driver.reset().unwrap();
        }
    }
}

/// The same with a front-end that can neither reset nor ask for the status, and one that goes away instead.
#[test]
fn peers_all_daemons_a_failed_device_serves_the_next_front_end() {
    let daemon = TestDaemon::start();
    for protocol in [ProtocolFeatures::all(), ProtocolFeatures::REPLY_ACK, ProtocolFeatures::empty()] {
        let options = || VhostUserOptions { protocol, queues: Some(1), ..options(RingLayout::Split) };
        let mut driver = VhostUserDriver::connect(daemon.socket(0), options()).unwrap();
        submit(&mut driver, 0, &[ask::PANIC]);
        eventually("the error file", || driver.ring_failed(0));
        drop(driver);
        let mut driver = VhostUserDriver::connect(daemon.socket(0), options()).unwrap();
        assert_eq!(ask(&mut driver, 0, b"well"), b"well", "{protocol:?}");
    }
}

#[test]
fn peers_all_daemons_a_malformed_ring_does_not_hang_the_device() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    let config = driver.ring(0).queue_config();
    let ram = driver.ram().clone();
    // A descriptor that points at no memory.
    let chain = [ram.readable(b"x"), ram.writable(8)];
    let head = u64::from(driver.ring(0).add(&chain));
    ram.write(vm_virtio::GuestAddress(config.desc.0 + 16 * head), &u64::MAX.to_le_bytes());
    driver.kick_anyway(0);
    eventually("the error file", || driver.ring_failed(0));
    driver.endpoint().get_vring_base(0).unwrap();
    driver.reset().unwrap();
    driver.start().unwrap();
    assert_eq!(ask(&mut driver, 0, b"well"), b"well");
}

/// "The socket is unlinked and bound again per connection (a window with no socket)."
#[test]
fn peers_all_daemons_the_socket_stays_and_can_be_connected_to_at_every_moment() {
    let daemon = TestDaemon::start();
    let path = daemon.socket(0);
    let inode = || std::fs::symlink_metadata(&path).unwrap().ino();
    let first = inode();
    let asker = {
        let path = path.clone();
        std::thread::spawn(move || {
            for _ in 0..2000 {
                drop(UnixStream::connect(&path).expect("there is always a socket"));
            }
        })
    };
    while !asker.is_finished() {
        // In between all those who only knock; some of these are turned away as the second one.
        let Ok(mut endpoint) = FrontendEndpoint::connect(&path) else { panic!("no socket") };
        let _ = endpoint.get_features();
        assert_eq!(inode(), first);
    }
    asker.join().unwrap();
    eventually("service", || VhostUserDriver::connect(&path, options(RingLayout::Split)).is_ok());
    assert_eq!(inode(), first);
}

/// "Some daemons exit after the first disconnect." "The same daemon cannot serve a second front-end."
#[test]
fn peers_all_daemons_the_daemon_outlives_its_front_ends() {
    let daemon = TestDaemon::start();
    for i in 0..20u8 {
        let layout = RingLayout::ALL[usize::from(i) % 2];
        let mut driver = daemon.driver(0, layout);
        assert_eq!(ask(&mut driver, 0, &[b'x', i]), [b'x', i]);
        if i % 3 == 0 {
            driver.stop().unwrap();
        }
        // Otherwise: gone in the middle of everything.
    }
    assert!(daemon.stop().is_ok());
}

#[test]
fn peers_vhost_crate_the_same_daemon_serves_a_second_front_end_which_goes_on_with_the_rings() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let mut driver = daemon.driver(0, layout);
        assert_eq!(ask(&mut driver, 0, b"N"), [1]);
        assert_eq!(ask(&mut driver, 0, b"N"), [2]);
        driver.reconnect(daemon.socket(0)).unwrap();
        assert_eq!(ask(&mut driver, 0, b"N"), [3], "the device kept its state");
        driver.reset().unwrap();
    }
}

/// A VMM that reconnects faster than its disconnect is noticed is not taken for a second one.
#[test]
fn peers_vhost_crate_a_front_end_that_reconnects_at_once_is_let_in() {
    let daemon = TestDaemon::start();
    for i in 0..3000 {
        let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
        if i % 3 == 0 {
            endpoint.set_owner().unwrap();
        }
        endpoint.get_features().unwrap_or_else(|error| panic!("connection {i}: {error}"));
        if i % 2 == 0 {
            endpoint.set_owner().unwrap();
        }
    }
}

#[test]
fn peers_vhost_crate_one_front_end_at_a_time_and_the_second_is_turned_away() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    for _ in 0..3 {
        let mut second = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
        let error = second.get_features().unwrap_err();
        assert!(matches!(error, Error::Disconnected | Error::Io(_)), "{error:?}");
    }
    assert_eq!(ask(&mut driver, 0, b"not disturbed"), b"not disturbed");
    drop(driver);
    daemon.driver(0, RingLayout::Split);
}

/// "One VMM's protocol error ends the process for all guests."
#[test]
fn peers_all_daemons_a_protocol_error_ends_its_own_connection_only() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut other = daemon.driver(1, RingLayout::Split);
    let nonsense: [&[u8]; 5] = [
        &[0xff; 12],
        // Version 2; a reply; a payload of 4 GiB; half a header and the end.
        &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        &[1, 0, 0],
    ];
    for bytes in nonsense {
        let mut driver = daemon.driver(0, RingLayout::Packed);
        assert_eq!(ask(&mut driver, 0, b"x"), b"x");
        driver.endpoint().send_raw(bytes, &[]).unwrap();
        if bytes.len() >= 12 {
            assert!(driver.endpoint().receive_reply().is_err(), "closed");
        }
        drop(driver);
        assert_eq!(ask(&mut other, 0, b"unharmed"), b"unharmed");
    }
    let mut driver = daemon.driver(0, RingLayout::Packed);
    assert_eq!(ask(&mut driver, 0, b"served again"), b"served again");
}

/// A guest whose device does not finish holds up nobody else, also not through the main thread.
#[test]
fn peers_all_daemons_a_guest_that_hangs_holds_up_no_other() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut hanging = daemon.driver(0, RingLayout::Split);
    submit(&mut hanging, 0, &[ask::CLING]);
    assert_eq!(ask(&mut hanging, 0, b"N"), [2], "it is taken");
    let waiting = std::thread::spawn(move || {
        let base = hanging.endpoint().get_vring_base(0).unwrap();
        (std::time::Instant::now(), base)
    });
    std::thread::sleep(Duration::from_millis(50));
    let started = std::time::Instant::now();
    let mut other = daemon.driver(1, RingLayout::Split);
    assert_eq!(ask(&mut other, 0, b"quick"), b"quick");
    other.stop().unwrap();
    let done = std::time::Instant::now();
    let (drained, base) = waiting.join().unwrap();
    assert_eq!(base, 2);
    assert!(done < drained && started < drained, "meanwhile");
}

/// "At most 8 memory regions."
#[test]
fn peers_all_daemons_five_hundred_memory_slots() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let options = VhostUserOptions { ram: TestRam::spread(500, 0x2000), ..options(layout) };
        let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
        for i in 0..100u8 {
            assert_eq!(ask(&mut driver, 0, &[b'x', i]), [b'x', i]);
        }
        driver.reset().unwrap();
    }
}

#[test]
fn peers_all_daemons_the_510th_memory_slot_is_refused() {
    let daemon = TestDaemon::start();
    let ram = TestRam::new(&[(0, 0x1000)]);
    let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
    let offered = endpoint.get_protocol_features().unwrap();
    endpoint.set_protocol_features(offered).unwrap();
    let slots = endpoint.get_max_mem_slots().unwrap();
    let slot =
        |i: u64| MemoryRegion { guest_addr: i << 16, size: 0x1000, user_addr: i << 16, mmap_offset: 0 };
    for i in 0..slots {
        endpoint.add_mem_reg(slot(i), ram.fd()).unwrap();
    }
    assert!(matches!(endpoint.add_mem_reg(slot(slots), ram.fd()), Err(Error::Refused { .. })));
    for i in 0..slots {
        endpoint.rem_mem_reg(slot(i)).unwrap();
    }
    endpoint.add_mem_reg(slot(slots), ram.fd()).unwrap();
}

/// "No packed rings."
#[test]
fn peers_all_daemons_packed_rings_of_any_size() {
    let daemon = TestDaemon::start();
    for queue_size in [3, 5, 100, 256] {
        let options = VhostUserOptions { queue_size, ..options(RingLayout::Packed) };
        let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
        for i in 0..250u8 {
            assert_eq!(ask(&mut driver, 0, &[b'x', i]), [b'x', i]);
        }
        driver.stop().unwrap();
        driver.reset().unwrap();
    }
}

/// "GET_CONFIG past the end reads foreign heap memory."
#[test]
fn peers_all_daemons_get_config_past_the_end_reads_zeros() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    let config = driver.endpoint().get_config(0, 256, 0).unwrap();
    assert_eq!(config.len(), 256);
    assert!(config[8..].iter().all(|byte| *byte == 0));
    assert_eq!(driver.endpoint().get_config(0xffff_fff0, 64, 0).unwrap(), [0; 64]);
}

/// "State survives a guest reboot."
#[test]
fn peers_all_daemons_state_does_not_survive_a_guest_reboot() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let all = ProtocolFeatures::all();
        // Resets through the status, through RESET_DEVICE, and through nothing but rings that begin again.
        for protocol in
            [all, all - ProtocolFeatures::STATUS, ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK]
        {
            let options = VhostUserOptions { protocol, ..options(layout) };
            let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
            assert_eq!(ask(&mut driver, 0, b"N"), [1], "{layout:?} {protocol:?}");
            assert_eq!(ask(&mut driver, 0, b"N"), [2]);
            driver.reboot().unwrap();
            assert_eq!(ask(&mut driver, 0, b"N"), [1], "{layout:?} {protocol:?}");
            driver.stop().unwrap();
        }
    }
}

/// "A message whose body arrives in two pieces is refused."
#[test]
fn peers_vhost_crate_a_message_may_come_in_pieces() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    let mut message = Vec::new();
    for word in [FrontendCode::SetVringEnable.code(), 1 | flags::NEED_REPLY, 8, 0, 1] {
        message.extend_from_slice(&u32::to_ne_bytes(word));
    }
    for piece in message.chunks(3) {
        driver.endpoint().send_raw(piece, &[]).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    driver.endpoint().receive_ack(FrontendCode::SetVringEnable).unwrap();
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
}

/// "SET_STATUS/GET_STATUS ... are refused."
#[test]
fn peers_vhost_crate_status_is_served() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    assert!(driver.protocol_features().contains(ProtocolFeatures::STATUS));
    assert_eq!(driver.status().unwrap(), Status::from_bits_retain(15));
    driver.reset().unwrap();
    assert_eq!(driver.status().unwrap(), Status::empty());
}

/// "A configuration change cannot be sent to the VMM."
#[test]
fn peers_vhost_crate_a_configuration_change_reaches_the_vmm() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Packed);
    for value in [42, 43] {
        ask(&mut driver, 0, &[ask::CONFIGURE, value]);
        let told = driver.backend_requests().unwrap().wait(SOON).unwrap().expect("a message");
        assert!(matches!(told.request, BackendRequest::ConfigChange));
        assert_eq!(driver.endpoint().get_config(0, 1, 0).unwrap(), [value]);
    }
}

/// Nor, with other daemons, that the device needs a reset (2.1.2).
#[test]
fn peers_vhost_crate_a_configuration_change_follows_needs_reset() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    driver.ring(0).split().set_avail_idx(0x4000);
    driver.kick_anyway(0);
    let told = driver.backend_requests().unwrap().wait(SOON).unwrap().expect("a message");
    assert!(matches!(told.request, BackendRequest::ConfigChange));
    assert!(driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
}

/// "A ring size that is not a power of two is acknowledged and ignored."
#[test]
fn peers_vhost_crate_a_split_ring_of_odd_size_is_refused_and_does_not_run() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    driver.endpoint().get_vring_base(0).unwrap();
    assert!(matches!(driver.endpoint().set_vring_num(0, 15), Err(Error::Refused { .. })));
    // Also for a front-end that does not ask: the ring does not run with the former size.
    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let started = driver.endpoint().set_vring_kick(0, Some(std::os::fd::AsFd::as_fd(&kick)));
    assert!(matches!(started, Err(Error::Refused { .. })));
    assert!(driver.ring_failed(0));
    submit(&mut driver, 0, b"x");
    assert_eq!(driver.wait_used(0, NEVER), None);
}

/// "No signal handling": the same through the interface that the signals use; `tests/process.rs` has the signals.
#[test]
fn peers_all_daemons_requests_are_finished_and_no_socket_stays_at_the_end() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut driver = daemon.driver(0, RingLayout::Split);
    submit(&mut driver, 0, &[ask::HOLD]);
    assert_eq!(ask(&mut driver, 0, b"N"), [2]);
    let sockets = [daemon.socket(0), daemon.socket(1)];
    daemon.stop().unwrap();
    assert_eq!(driver.ring(0).used().map(|used| used.len), Some(4), "what was taken is finished");
    assert!(sockets.iter().all(|socket| !socket.exists()));
    assert!(matches!(driver.endpoint().get_features(), Err(Error::Disconnected | Error::Io(_))));
}
