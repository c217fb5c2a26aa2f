//! Runs the daemon for wire tests.
#![allow(dead_code, reason = "each test binary uses what it needs")]
use std::path::Path;
use std::process::{Command, Output, Stdio};

use virtio_testkit::daemon::{DaemonProcess, announcing};

pub(crate) const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-console");

/// Runs the daemon to its end, which has to come by itself.
pub(crate) fn run(args: &[&str]) -> Output {
    Command::new(DAEMON).args(args).stdin(Stdio::null()).output().expect("the daemon starts")
}

/// Starts the daemon on a socket and waits for its word that it is ready.
#[track_caller]
pub(crate) fn start(socket: &Path, args: &[&str]) -> DaemonProcess {
    let mut command = announcing(Path::new(DAEMON));
    command.args(["--log-level", "warn", "--socket-path"]).arg(socket);
    DaemonProcess::ready(command.args(args))
}
