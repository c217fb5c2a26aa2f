//! Requests through a daemon: layouts, queues and lanes, several guests, a VMM that is paused.
mod support;

use support::*;
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};
use vm_virtio::Features;

#[test]
fn a_request_is_answered_over_split_and_packed_rings() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let mut driver = daemon.driver(0, layout);
        for i in 0..40u8 {
            assert_eq!(ask(&mut driver, 0, &[b'x', i]), [b'x', i]);
        }
        driver.stop().unwrap();
    }
}

#[test]
fn every_set_of_ring_features_works() {
    let daemon = TestDaemon::start();
    let optional = [Features::EVENT_IDX, Features::INDIRECT_DESC, Features::IN_ORDER];
    for layout in RingLayout::ALL {
        for set in 0..8 {
            let (mut with, mut without) = (Features::empty(), Features::empty());
            for (bit, feature) in optional.into_iter().enumerate() {
                if set >> bit & 1 == 1 { with |= feature } else { without |= feature }
            }
            let options = VhostUserOptions { with, without, ..options(layout) };
            let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
            for i in 0..40u8 {
                assert_eq!(ask(&mut driver, 0, &[b'x', i]), [b'x', i], "{layout:?} {with:?}");
            }
            driver.reset().unwrap();
        }
    }
}

#[test]
fn a_full_ring_is_served_in_one_go() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let mut driver = daemon.driver(0, layout);
        for round in 0..50u8 {
            let ram = driver.ram().clone();
            for i in 0..8u8 {
                driver.ring(0).add(&[ram.readable(&[b'x', round, i]), ram.writable(8)]);
            }
            driver.kick(0);
            for _ in 0..8 {
                assert_eq!(answer(&mut driver, 0), 3);
            }
        }
        driver.reset().unwrap();
    }
}

#[test]
fn queues_in_one_lane_and_in_several() {
    for lanes in [1, 2, 4] {
        let daemon = TestDaemon::with(1, move || Echo::new(8).queues(4, lanes));
        let mut driver = daemon.driver(0, RingLayout::Split);
        for i in 0..40u8 {
            let queue = usize::from(i) % 4;
            assert_eq!(ask(&mut driver, queue, &[b'x', i]), [b'x', i]);
        }
        driver.reboot().unwrap();
        assert_eq!(ask(&mut driver, 3, b"again"), b"again");
    }
}

#[test]
fn guests_of_one_daemon_share_nothing() {
    let daemon = TestDaemon::with(4, || Echo::new(8));
    let mut drivers: Vec<_> = (0..4).map(|guest| daemon.driver(guest, RingLayout::ALL[guest % 2])).collect();
    for round in 1..=10u8 {
        for driver in &mut drivers {
            assert_eq!(ask(driver, 0, b"N"), [round]);
        }
    }
    drivers.remove(1).reset().unwrap();
    assert_eq!(ask(&mut drivers[0], 0, b"N"), [11]);
}

#[test]
fn a_paused_vm_goes_on_where_it_was() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let mut driver = daemon.driver(0, layout);
        for i in 1..=20u8 {
            assert_eq!(ask(&mut driver, 0, b"N"), [i]);
            driver.stop().unwrap();
            driver.start_ring(0).unwrap();
            driver.endpoint().set_vring_enable(0, true).unwrap();
        }
        driver.reset().unwrap();
    }
}

/// The order of QEMU's start with everything it does not need left out, and twice what it repeats.
#[test]
fn front_ends_without_protocol_features_are_served() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        for _ in 0..3 {
            let options = VhostUserOptions { negotiate_protocol: false, queues: Some(1), ..options(layout) };
            let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
            assert_eq!(ask(&mut driver, 0, b"N"), [1]);
            driver.stop().unwrap();
            driver.start().map_err(|error| error.to_string()).unwrap();
            assert_eq!(ask(&mut driver, 0, b"N"), [2]);
        }
    }
}
