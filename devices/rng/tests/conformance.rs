//! The conformance suite of `virtio-testkit`, over the library, its transports, and the daemon.
mod support;

use virtio_rng::{Entropy, Rng};
use virtio_testkit::conformance::Subject;

virtio_testkit::conformance!(
    Subject::ENTROPY,
    device = || Rng::new(&Entropy::insecure_seeded(7), 0, None).expect("an entropy device"),
    daemon = || {
        let directory = virtio_testkit::daemon::TempDir::new();
        let socket = directory.join("rng.sock");
        ((support::start(&socket, &[]), directory), socket)
    },
);
