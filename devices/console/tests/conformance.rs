//! The conformance suite of `virtio-testkit`, over the library, its transports, and the daemon.
#![cfg(feature = "daemon")]
mod daemon;
mod support;

use virtio_testkit::conformance::Subject;

virtio_testkit::conformance!(
    Subject::CONSOLE,
    device = support::null,
    daemon = || {
        let directory = virtio_testkit::daemon::TempDir::new();
        let socket = directory.join("console.sock");
        ((daemon::start(&socket, &["--port", "backend=null"]), directory), socket)
    },
);
