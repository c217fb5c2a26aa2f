//! The daemon behind its socket, with the driver that plays QEMU and the guest.
#![cfg(feature = "daemon")]
mod support;

use std::time::{Duration, Instant};

use support::{SOON, ask, connect, connect_with, start};
use vhost_user::ProtocolFeatures;
use virtio_testkit::daemon::{DaemonProcess, TempDir};
use virtio_testkit::{Buf, Interrupts, RingLayout, Shape, TestRam, VhostUserDriver, VhostUserOptions};
use vm_virtio::{Features, GuestAddress, Status};

fn started(args: &[&str]) -> (TempDir, std::path::PathBuf, DaemonProcess) {
    let directory = TempDir::new();
    let socket = directory.join("rng.sock");
    let daemon = start(&socket, args);
    (directory, socket, daemon)
}

#[test]
fn every_ring_layout_that_a_driver_may_choose() {
    let (_directory, socket, _daemon) = started(&[]);
    for layout in RingLayout::ALL {
        for without in [
            Features::empty(),
            Features::INDIRECT_DESC,
            Features::EVENT_IDX,
            Features::INDIRECT_DESC | Features::EVENT_IDX,
        ] {
            for with in [Features::empty(), Features::IN_ORDER] {
                let options = VhostUserOptions { without, with, ..VhostUserOptions::new(layout) };
                let mut driver = connect_with(&socket, options);
                let platform = Features::ACCESS_PLATFORM;
                assert_eq!(driver.offered(), Features::RING | platform, "no features of its own");
                for len in [1, 64, 1000, 5000, 65536] {
                    assert_eq!(ask(&mut driver, len).len(), len as usize);
                }
                for _ in 0..300 {
                    ask(&mut driver, 64);
                }
                driver.ring(0).check_untouched().unwrap();
                driver.stop().unwrap();
            }
        }
    }
}

#[test]
fn features_that_the_daemon_withholds() {
    for name in ["ring_packed", "event_idx", "indirect_desc", "in_order"] {
        let (_directory, socket, _daemon) = started(&["--without", name]);
        let feature = Features::by_name(name).unwrap();
        let layout = if feature == Features::RING_PACKED { RingLayout::Split } else { RingLayout::Packed };
        let mut driver = connect(&socket, layout);
        assert_eq!(driver.offered(), (Features::RING | Features::ACCESS_PLATFORM) - feature);
        assert_eq!(ask(&mut driver, 64).len(), 64);
    }
}

#[test]
fn peers_rng_two_descriptors_do_not_end_the_device() {
    let (_directory, socket, _daemon) = started(&[]);
    for layout in RingLayout::ALL {
        let mut driver = connect(&socket, layout);
        for shape in [Shape::Direct, Shape::Indirect] {
            let chain = [driver.ram().writable(16), driver.ram().writable(48)];
            driver.ring(0).add_as(&chain, shape);
            driver.kick(0);
            assert_eq!(driver.wait_used(0, SOON).expect("an answer").len, 64);
            assert!(driver.ram().written(&chain).iter().any(|byte| *byte != 0x5a));
            assert_eq!(ask(&mut driver, 64).len(), 64);
        }
    }
}

#[test]
fn negotiation_that_older_front_ends_know() {
    let (_directory, socket, _daemon) = started(&[]);
    for layout in RingLayout::ALL {
        // No protocol features at all: rings are enabled from the start, memory comes as a table.
        let options = VhostUserOptions { negotiate_protocol: false, ..VhostUserOptions::new(layout) };
        let mut driver = connect_with(&socket, options);
        assert_eq!(ask(&mut driver, 64).len(), 64);
        driver.stop().unwrap();
        drop(driver);
        for without in [
            ProtocolFeatures::STATUS,
            ProtocolFeatures::REPLY_ACK,
            ProtocolFeatures::CONFIGURE_MEM_SLOTS,
            ProtocolFeatures::all(),
        ] {
            let all = VhostUserOptions::new(layout);
            let protocol = all.protocol - without;
            let mut driver = connect_with(&socket, VhostUserOptions { protocol, ..all });
            assert_eq!(ask(&mut driver, 64).len(), 64, "{layout:?} without {without:?}");
            driver.reboot().unwrap();
            assert_eq!(ask(&mut driver, 64).len(), 64);
        }
    }
}

#[test]
fn five_hundred_memory_slots() {
    let (_directory, socket, _daemon) = started(&[]);
    for layout in RingLayout::ALL {
        let options =
            VhostUserOptions { ram: TestRam::spread(500, 0x1_0000), ..VhostUserOptions::new(layout) };
        let mut driver = connect_with(&socket, options);
        // The allocator goes round the regions.
        for _ in 0..600 {
            assert_eq!(ask(&mut driver, 64).len(), 64);
        }
    }
}

#[test]
fn a_front_end_that_comes_back_goes_on_where_it_was() {
    let (_directory, socket, mut daemon) = started(&["--seed", "1"]);
    for layout in RingLayout::ALL {
        let mut driver = connect(&socket, layout);
        driver.reboot().unwrap();
        let first = ask(&mut driver, 64);
        for round in 0..10 {
            if round % 2 == 0 {
                driver.stop().unwrap();
            }
            // A request that nobody was told of: the daemon has to look at the ring when it starts.
            let buf = driver.ram().writable(64);
            driver.ring(0).add(&[buf]);
            driver.reconnect(&socket).unwrap();
            assert_eq!(driver.wait_used(0, SOON).expect("an answer").len, 64, "round {round}");
            assert_ne!(
                driver.ram().contents(&buf),
                first,
                "the generator goes on, the device kept its state"
            );
        }
    }
    assert!(daemon.is_running());
}

#[test]
fn killed_and_started_again_under_a_running_guest() {
    for layout in RingLayout::ALL {
        let (directory, socket, daemon) = started(&[]);
        let mut driver = connect(&socket, layout);
        for _ in 0..100 {
            ask(&mut driver, 64);
        }
        daemon.kill();
        // The guest goes on asking.
        let waiting: Vec<Buf> = (0..8).map(|_| driver.ram().writable(64)).collect();
        for buf in &waiting {
            driver.ring(0).add(&[*buf]);
        }
        assert_eq!(directory.names(), ["rng.sock"], "a killed daemon leaves its socket");
        let _daemon = start(&socket, &[]);
        driver.reconnect(&socket).unwrap();
        for _ in &waiting {
            assert_eq!(driver.wait_used(0, SOON).expect("an answer").len, 64);
        }
        for buf in &waiting {
            assert!(driver.ram().contents(buf).iter().any(|byte| *byte != 0x5a));
        }
        for _ in 0..100 {
            ask(&mut driver, 64);
        }
        driver.stop().unwrap();
    }
}

#[test]
fn a_reset_through_the_status_starts_over() {
    let (_directory, socket, _daemon) = started(&["--seed", "5"]);
    for layout in RingLayout::ALL {
        let mut driver = connect(&socket, layout);
        driver.reboot().unwrap();
        let first = ask(&mut driver, 64);
        assert_ne!(ask(&mut driver, 64), first);
        // With the ring still running, as a guest that resets its device by hand.
        driver.reset().unwrap();
        driver.start().unwrap();
        assert_eq!(ask(&mut driver, 64), first, "the seeded generator starts over");
        assert_eq!(
            driver.status().unwrap(),
            Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK
        );
    }
}

#[test]
fn two_guests_on_one_daemon() {
    let (directory, _socket, mut daemon) = started(&["--socket-count", "2", "--seed", "1"]);
    let sockets = [directory.join("rng.sock0"), directory.join("rng.sock1")];
    let mut one = connect(&sockets[0], RingLayout::Split);
    let mut two = connect(&sockets[1], RingLayout::Packed);
    assert_ne!(ask(&mut one, 64), ask(&mut two, 64), "guests do not get each other's bytes");

    // One breaks its ring: it needs a reset, the other does not notice.
    one.ring(0).add(&[Buf::writable(GuestAddress(1 << 40), 64)]);
    one.kick(0);
    let deadline = Instant::now() + SOON;
    while !one.ring_failed(0) {
        assert!(Instant::now() < deadline, "a broken ring is reported");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(one.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(ask(&mut two, 64).len(), 64);
    one.reset().unwrap();
    one.start().unwrap();
    assert_eq!(ask(&mut one, 64).len(), 64, "after the reset it works again");

    // One sends nonsense: its connection ends, and only that.
    one.endpoint().send_raw(&[0xff; 64], &[]).unwrap();
    assert_eq!(ask(&mut two, 64).len(), 64);
    one.reconnect(&sockets[0]).unwrap();
    assert_eq!(ask(&mut one, 64).len(), 64);
    assert!(daemon.is_running());
}

#[test]
fn peers_rng_rate_limit_does_not_sleep_in_the_queue_thread() {
    // So long a period that whatever waited for it would not be done in time.
    let args = ["--seed", "1", "--max-bytes", "200", "--period", "3600000", "--socket-count", "2"];
    let (directory, _socket, _daemon) = started(&args);
    let mut driver = connect(&directory.join("rng.sock0"), RingLayout::Split);
    let mut other = connect(&directory.join("rng.sock1"), RingLayout::Split);
    assert_eq!(ask(&mut driver, 64).len(), 64);
    assert_eq!(ask(&mut driver, 64).len(), 36, "half of the bytes are this guest's");
    let buf = driver.ram().writable(64);
    driver.ring(0).add(&[buf]);
    driver.kick(0);
    // While the request is held, everything else is answered at once: messages, the other guest, a stop.
    assert!(driver.status().unwrap().contains(Status::DRIVER_OK));
    assert_eq!(ask(&mut other, 64).len(), 64, "the other guest has its own half");
    driver.stop().unwrap();
    driver.reconnect(directory.join("rng.sock0")).unwrap();
    assert_eq!(driver.ring(0).used(), None, "the request waits");
}

/// What is beyond the limit is answered when the period is over.
#[test]
fn peers_rng_rate_limited_requests_are_answered_in_the_next_period() {
    let (_directory, socket, _daemon) = started(&["--max-bytes", "100", "--period", "400"]);
    let mut driver = connect(&socket, RingLayout::Split);
    let start = Instant::now();
    let mut bytes = 0;
    while bytes <= 100 {
        bytes += ask(&mut driver, 64).len();
    }
    assert!(start.elapsed() >= Duration::from_millis(400), "the last request did not wait");
}

/// As bytes are, requests are limited without a sleep: the one beyond the limit waits for the period.
#[test]
fn requests_are_limited_in_the_words_of_all_daemons() {
    let (_directory, socket, _daemon) = started(&["--rate-limit", "ops=2,period=400"]);
    let mut driver = connect(&socket, RingLayout::Packed);
    let start = Instant::now();
    for _ in 0..2 {
        assert_eq!(ask(&mut driver, 64).len(), 64);
    }
    assert_eq!(ask(&mut driver, 64).len(), 64);
    assert!(start.elapsed() >= Duration::from_millis(400), "the third request did not wait");
}

#[test]
fn interrupts_only_where_the_driver_asked() {
    let (_directory, socket, _daemon) = started(&[]);
    for layout in RingLayout::ALL {
        let mut driver = connect(&socket, layout);
        let bufs: Vec<Buf> = (0..32).map(|_| driver.ram().writable(64)).collect();
        let before = driver.interrupts(0);
        driver.ring(0).set_interrupts(Interrupts::Never);
        for _ in 0..200 {
            for buf in &bufs {
                driver.ring(0).stage(&[*buf], Shape::Direct).unwrap();
            }
            driver.ring(0).publish();
            driver.kick(0);
            let deadline = Instant::now() + SOON;
            let mut used = 0;
            while used < bufs.len() {
                used += driver.ring(0).drain().len();
                assert!(Instant::now() < deadline, "a request is not answered");
            }
        }
        assert_eq!(driver.interrupts(0), before, "{layout:?}");
    }
}

#[test]
fn nothing_happens_while_nothing_is_asked() {
    let (_directory, socket, daemon) = started(&["--max-bytes", "64", "--period", "20"]);
    let mut driver = connect(&socket, RingLayout::Split);
    ask(&mut driver, 64);
    daemon.rests(Duration::from_millis(300));
}

/// The kernel writes large requests into guest memory, and says EFAULT where a truncated file has none: that request's
/// error. Small ones are copied by us: there the memory is lost, and the device needs a reset.
#[test]
fn policy_6_system_calls_into_a_truncated_file_are_an_error_of_their_request() {
    const KEPT: u64 = 1 << 20;
    const LOST: u64 = 0x4000_0000;
    let (_directory, socket, mut daemon) = started(&[]);
    for layout in RingLayout::ALL {
        let ram = TestRam::new(&[(0, KEPT), (LOST, 0x4000)]);
        // No ring is there.
        while ram.alloc(0x2000 - 16, 16).0 < LOST {}
        while ram.alloc(0x2000 - 16, 16).0 < LOST {}
        let mut driver = connect_with(&socket, VhostUserOptions { ram, ..VhostUserOptions::new(layout) });
        let buffer = |len| [Buf::writable(GuestAddress(LOST + 0x2000), len)];
        driver.ring(0).add(&buffer(0x2000));
        rustix::fs::ftruncate(driver.ram().fd(), KEPT + 0x2000).unwrap();
        driver.kick(0);
        let needs_reset = |driver: &mut VhostUserDriver| {
            let status = driver.endpoint().get_status().unwrap();
            Status::from_bits_retain(status).contains(Status::DEVICE_NEEDS_RESET)
        };
        assert_eq!(driver.wait_used(0, SOON).unwrap().len, 0);
        assert!(!needs_reset(&mut driver));
        assert_eq!(ask(&mut driver, 64).len(), 64);
        rustix::fs::ftruncate(driver.ram().fd(), KEPT + 0x4000).unwrap();
        driver.ring(0).add(&buffer(16));
        rustix::fs::ftruncate(driver.ram().fd(), KEPT + 0x2000).unwrap();
        driver.kick(0);
        let deadline = Instant::now() + SOON;
        while !needs_reset(&mut driver) {
            assert!(Instant::now() < deadline, "memory was lost");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(daemon.is_running());
    }
}
