//! The conformance suite of `virtio-testkit` over the echo device: in memory, and hosted by a daemon.
mod support;

use std::fs::File;
use std::sync::Arc;

use support::echo::{PAGE, ask};
use support::{Echo, TestDaemon};
use virtio_testkit::conformance::{
    Line, MemoryBench, PATIENCE, Place, Request, SocketBench, SocketOptions, Subject, check,
};
use vm_virtio::ShmRegion;

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

/// With everything that a device can have: what the suite finds nothing to look at in is what a daemon cannot offer.
#[test]
fn conformance_over_vhost_user() {
    let regions = [ShmRegion { id: 0, size: 2 * PAGE }, ShmRegion { id: 200, size: PAGE }];
    let daemon = TestDaemon::with(1, move || {
        Echo::new(8)
            .queues(3, 2)
            .savable()
            .shared_memory(&regions, Arc::new(File::open("/dev/zero").unwrap()))
    });
    let mut options = SocketOptions::new(daemon.socket(0));
    options.patience = PATIENCE;
    let report = check(&mut SocketBench::new(options), Some(&ECHO), PATIENCE);
    report.assert_passed();
    let pauses = ["suspend-rests", "suspend-early", "suspend-reset", "queue-reset", "queue-reset-alone"];
    assert_eq!(report.not_applicable(), pauses);
}

/// And over the engine alone it is what is about messages, and what can be seen from another thread only.
#[test]
fn conformance_in_memory() {
    let mut host = MemoryBench::new(|| Echo::new(8).queues(3, 2));
    let report = check(&mut host, Some(&ECHO), PATIENCE);
    report.assert_passed();
    let wire = Line::all().into_iter().filter(|line| line.place == Place::Wire);
    let mut left_out: Vec<_> = wire.map(|line| line.id).chain(["entry-before-index"]).collect();
    let mut not_applicable = report.not_applicable();
    left_out.sort_unstable();
    not_applicable.sort_unstable();
    assert_eq!(not_applicable, left_out);
}
