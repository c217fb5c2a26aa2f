//! Runs the daemon for wire tests.
#![allow(dead_code, reason = "each test binary uses what it needs")]
use std::path::Path;
use std::process::Output;

use virtio_testkit::daemon::DaemonProcess;

pub(crate) const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-console");

/// Runs the daemon to its end, which has to come by itself.
pub(crate) fn run(args: &[&str]) -> Output {
    DaemonProcess::run(DAEMON, args)
}

/// Starts the daemon on a socket and waits for its word that it is ready.
#[track_caller]
pub(crate) fn start(socket: &Path, args: &[&str]) -> DaemonProcess {
    DaemonProcess::listening(DAEMON, socket, args)
}
