//! Runs the daemon for wire tests: a directory of its own, readiness, signals, the end.
#![allow(dead_code, reason = "each test binary uses what it needs")]
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use virtio_testkit::daemon::DaemonProcess;
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};

/// Longer than anything takes.
pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-rng");

/// Runs the daemon to its end, which has to come by itself.
pub(crate) fn run(args: &[&str]) -> Output {
    DaemonProcess::run(DAEMON, args)
}

/// Starts the daemon on a socket and waits for its word that it is ready.
#[track_caller]
pub(crate) fn start(socket: &Path, args: &[&str]) -> DaemonProcess {
    DaemonProcess::listening(DAEMON, socket, args)
}

/// A driver with everything that the daemon offers.
pub(crate) fn connect(socket: &Path, layout: RingLayout) -> VhostUserDriver {
    connect_with(socket, VhostUserOptions::new(layout))
}

/// A driver that wants something else.
pub(crate) fn connect_with(socket: &Path, options: VhostUserOptions) -> VhostUserDriver {
    VhostUserDriver::connect(socket, options).expect("a device that works")
}

/// One request and its answer.
pub(crate) fn ask(driver: &mut VhostUserDriver, len: u32) -> Vec<u8> {
    let buf = driver.ram().writable(len);
    let id = driver.ring(0).add(&[buf]);
    driver.kick(0);
    let used = driver.wait_used(0, SOON).expect("an answer");
    assert_eq!(used.id, id);
    let mut bytes = driver.ram().contents(&buf);
    assert!(used.len >= 1 && used.len <= len);
    bytes.truncate(used.len as usize);
    driver.ram().free(buf.addr);
    bytes
}
