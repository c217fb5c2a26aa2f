//! The conformance suite of `virtio-testkit` over the echo device: in memory, and hosted by a daemon.
mod support;

use support::{Echo, TestDaemon, echo::ask};
use virtio_testkit::conformance::{Request, Subject};

const ECHO: Subject = Subject {
    name: "echo",
    queue: 0,
    queues: 3,
    request: |n| Request { readable: (0..9).map(|i| b'a' + ((n + i) % 17) as u8).collect(), writable: 12 },
    check: |request, answer| match request.readable == answer {
        true => Ok(()),
        false => Err(format!("{answer:02x?} to {:02x?}", request.readable)),
    },
    configure: Some(|n| Request { readable: vec![ask::CONFIGURE, 100 + n as u8], writable: 12 }),
    read_only: Some(4),
};

virtio_testkit::conformance!(
    ECHO,
    device = || Echo::new(8).queues(3, 2),
    daemon = || {
        let daemon = TestDaemon::with(1, || Echo::new(8).queues(3, 2));
        let socket = daemon.socket(0);
        (daemon, socket)
    },
);
