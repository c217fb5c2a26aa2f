//! Migrating the device's state over the wire: SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE.
mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use device_state::{MAX_STATE, SavedState, Section, Tag};
use support::*;
use vhost_user::{Error, MigrationPhase, ProtocolFeatures, TransferDirection};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};

fn daemon(guests: usize) -> TestDaemon {
    TestDaemon::with(guests, || Echo::new(8).savable())
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::Refused { .. })), "{result:?}");
}

/// Begins a transfer and returns our end.
fn begin(driver: &mut VhostUserDriver, direction: TransferDirection) -> File {
    let (reader, writer) = std::io::pipe().unwrap();
    let given = match direction {
        TransferDirection::Save => writer.as_fd(),
        TransferDirection::Load => reader.as_fd(),
    };
    let better = driver.endpoint().set_device_state_fd(direction, MigrationPhase::Stopped, given).unwrap();
    File::from(better.expect("the back-end has a channel of its own"))
}

fn count(driver: &mut VhostUserDriver) -> u8 {
    ask(driver, 0, &[echo::ask::COUNT])[0]
}

/// A driver whose three requests are counted, stopped; and the state of its device.
fn saved(daemon: &TestDaemon, guest: usize) -> (VhostUserDriver, Vec<u8>) {
    let mut driver = daemon.driver(guest, RingLayout::Split);
    for expected in 1..=3 {
        assert_eq!(count(&mut driver), expected);
    }
    driver.stop().unwrap();
    let state = driver.save_state().unwrap();
    (driver, state)
}

/// A driver that is connected and has started nothing.
fn fresh(daemon: &TestDaemon, guest: usize) -> VhostUserDriver {
    let endpoint = vhost_user::FrontendEndpoint::connect(daemon.socket(guest)).unwrap();
    VhostUserDriver::attach(endpoint, options(RingLayout::Split)).unwrap()
}

#[test]
fn requests_go_on_on_another_daemon_where_they_were_in_both_layouts() {
    for layout in RingLayout::ALL {
        let (source, destination) = (daemon(1), daemon(1));
        let mut driver = source.driver(0, layout);
        for expected in 1..=20 {
            assert_eq!(count(&mut driver), expected);
        }
        // Byte 0 is the device's to change.
        ask(&mut driver, 0, &[echo::ask::CONFIGURE, 99]);
        driver.migrate(destination.socket(0)).unwrap();
        assert_eq!(count(&mut driver), 22);
        assert_eq!(driver.endpoint().get_config(0, 1, 0).unwrap(), [99]);
        // And back.
        driver.migrate(source.socket(0)).unwrap();
        assert_eq!(count(&mut driver), 23);
    }
}

#[test]
fn it_is_offered_by_devices_that_can_be_saved_and_no_others() {
    let savable = fresh(&daemon(1), 0).protocol_features();
    assert!(savable.contains(ProtocolFeatures::DEVICE_STATE));
    let plain = fresh(&TestDaemon::start(), 0).protocol_features();
    assert_eq!(plain | ProtocolFeatures::DEVICE_STATE, savable);
}

#[test]
fn a_source_may_go_on_after_all() {
    let daemon = daemon(1);
    let (mut driver, state) = saved(&daemon, 0);
    assert_eq!(driver.save_state().unwrap(), state, "as often as it likes");
    driver.start_ring(0).unwrap();
    driver.endpoint().set_vring_enable(0, true).unwrap();
    assert_eq!(count(&mut driver), 4);
}

#[test]
fn a_running_device_is_neither_saved_nor_loaded() {
    let daemon = daemon(1);
    let mut driver = daemon.driver(0, RingLayout::Split);
    let (_reader, writer) = std::io::pipe().unwrap();
    for direction in [TransferDirection::Save, TransferDirection::Load] {
        let phase = MigrationPhase::Stopped;
        refused(driver.endpoint().set_device_state_fd(direction, phase, writer.as_fd()));
    }
    refused(driver.endpoint().check_device_state());
    assert_eq!(count(&mut driver), 1);
    // Started in the middle of it.
    driver.stop().unwrap();
    let (_, state) = saved(&self::daemon(1), 0);
    let mut pipe = begin(&mut driver, TransferDirection::Load);
    pipe.write_all(&state).unwrap();
    driver.start_ring(0).unwrap();
    drop(pipe);
    refused(driver.endpoint().check_device_state());
    driver.endpoint().set_vring_enable(0, true).unwrap();
    assert_eq!(count(&mut driver), 2);
}

#[test]
fn policy_8_cut_and_damaged_streams_are_refused_and_the_device_is_as_new() {
    let daemon = daemon(1);
    let (driver, state) = saved(&daemon, 0);
    drop(driver);
    let mut driver = fresh(&daemon, 0);
    let damaged = |at: usize| {
        let mut damaged = state.clone();
        damaged[at] ^= 0x10;
        damaged
    };
    let mut streams: Vec<Vec<u8>> = (0..state.len()).map(|len| state[..len].to_vec()).collect();
    streams.extend((0..state.len()).map(damaged));
    streams.push([&state[..], &[0]].concat());
    streams.push(vec![0; 1 << 20]);
    let mut other = SavedState::new(2);
    other.put(Tag(*b"devc"), Section::empty());
    streams.push(other.to_bytes().unwrap());
    for stream in streams {
        let loaded = driver.load_state(&stream);
        assert!(loaded.is_err(), "{} bytes", stream.len());
    }
    driver.start().unwrap();
    assert_eq!(count(&mut driver), 1, "what was refused left nothing behind");
    driver.stop().unwrap();
    // The right one is still welcome.
    drop(driver);
    let mut driver = fresh(&daemon, 0);
    driver.load_state(&state).unwrap();
    driver.start().unwrap();
    assert_eq!(count(&mut driver), 4);
}

#[test]
fn features_that_the_connection_has_set_must_be_the_saved_ones() {
    let daemon = daemon(1);
    let (driver, state) = saved(&daemon, 0);
    drop(driver);
    let endpoint = vhost_user::FrontendEndpoint::connect(daemon.socket(0)).unwrap();
    let without = VhostUserOptions { without: echo::FEATURE, ..options(RingLayout::Split) };
    let mut driver = VhostUserDriver::attach(endpoint, without).unwrap();
    let bits = driver.features().low64() | vhost_user::F_PROTOCOL_FEATURES;
    driver.endpoint().set_features(bits).unwrap();
    assert!(driver.load_state(&state).is_err());
    driver.start().unwrap();
    assert_eq!(count(&mut driver), 1);
}

#[test]
fn policy_8_a_front_end_that_does_not_read_or_write_holds_up_nobody() {
    let daemon = daemon(3);
    let mut silent = daemon.driver(0, RingLayout::Split);
    ask(&mut silent, 0, &[echo::ask::GROW, 2]);
    silent.stop().unwrap();
    let reader = begin(&mut silent, TransferDirection::Save);
    let mut lazy = fresh(&daemon, 1);
    let writer = begin(&mut lazy, TransferDirection::Load);
    // Each waits for the other end, here in the middle of a message.
    let waiting = std::thread::spawn(move || silent.endpoint().check_device_state());
    let lazily = std::thread::spawn(move || lazy.endpoint().check_device_state());
    std::thread::sleep(NEVER);
    let mut other = daemon.driver(2, RingLayout::Split);
    for expected in 1..=10 {
        assert_eq!(count(&mut other), expected);
    }
    // Our ends are closed: both are over.
    drop((reader, writer));
    assert!(waiting.join().unwrap().is_err());
    assert!(lazily.join().unwrap().is_err());
}

#[test]
fn a_large_state_goes_through_and_one_beyond_all_measure_does_not() {
    let daemon = daemon(1);
    let mut driver = daemon.driver(0, RingLayout::Split);
    ask(&mut driver, 0, &[echo::ask::GROW, 6]);
    driver.stop().unwrap();
    let state = driver.save_state().unwrap();
    assert!(state.len() > 6 << 20);
    driver.start_ring(0).unwrap();
    driver.endpoint().set_vring_enable(0, true).unwrap();
    ask(&mut driver, 0, &[echo::ask::GROW, 16]);
    driver.stop().unwrap();
    assert!(driver.save_state().is_err(), "more than {MAX_STATE} bytes");
    drop(driver);
    let mut driver = fresh(&daemon, 0);
    driver.load_state(&state).unwrap();
    driver.start().unwrap();
    assert_eq!(count(&mut driver), 2);
}

#[test]
fn a_transfer_in_place_of_another_closes_it() {
    let daemon = daemon(1);
    let (mut driver, state) = saved(&daemon, 0);
    let mut first = begin(&mut driver, TransferDirection::Save);
    let mut second = begin(&mut driver, TransferDirection::Save);
    let mut bytes = Vec::new();
    first.read_to_end(&mut bytes).unwrap();
    bytes.clear();
    second.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, state);
    driver.endpoint().check_device_state().unwrap();
    refused(driver.endpoint().check_device_state());
}

#[test]
fn the_daemon_ends_in_the_middle_of_a_transfer() {
    let daemon = daemon(1);
    let (mut driver, _) = saved(&daemon, 0);
    let _writer: OwnedFd = begin(&mut driver, TransferDirection::Load).into();
    let waiting = std::thread::spawn(move || driver.endpoint().check_device_state());
    std::thread::sleep(Duration::from_millis(50));
    daemon.stop().unwrap();
    assert!(waiting.join().unwrap().is_err());
}
