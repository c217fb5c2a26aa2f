//! A thousand entropy devices in one process: what they cost while they are idle, and that each of them works.
mod support;

use std::time::Duration;

use support::{SOON, start};
use virtio_testkit::daemon::TempDir;
use virtio_testkit::{RingLayout, TestRam, VhostUserDriver, VhostUserOptions};

const GUESTS: usize = 1000;

fn driver(socket: &std::path::Path, layout: RingLayout) -> VhostUserDriver {
    let ram = TestRam::new(&[(0, 0x1_0000)]);
    let options = VhostUserOptions { queue_size: 16, ram, ..VhostUserOptions::new(layout) };
    VhostUserDriver::connect(socket, options).unwrap()
}

fn ask(driver: &mut VhostUserDriver) {
    let chain = [driver.ram().writable(16)];
    driver.ring(0).add(&chain);
    driver.kick(0);
    assert_eq!(driver.wait_used(0, SOON).expect("an answer").len, 16);
    driver.ram().free(chain[0].addr);
}

#[test]
fn a_thousand_idle_devices_take_few_threads_little_memory_and_no_wake_ups() {
    let directory = TempDir::new();
    let base = directory.join("s");
    // A device takes a dozen descriptors here, a connected driver some more there.
    let needed = 14 * GUESTS as u64;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    if limit.is_some_and(|limit| limit < needed) {
        println!("SKIP: a thousand devices need {needed} descriptors, the limit here is {limit:?}");
        return;
    }
    let daemon = start(&base, &["--socket-count", "1000", "--threads", "4"]);
    let socket = |guest: usize| directory.join(&format!("s{guest}"));
    // Some are connected, with a ring that waits for a kick; most are just there.
    let mut drivers: Vec<VhostUserDriver> = (0..GUESTS)
        .step_by(20)
        .map(|guest| {
            driver(&socket(guest), if guest % 40 == 0 { RingLayout::Split } else { RingLayout::Packed })
        })
        .collect();
    drivers.iter_mut().for_each(ask);
    let threads = daemon.status("Threads:");
    assert!(threads <= 16, "{threads} threads");
    let resident = daemon.status("VmRSS:");
    assert!(resident < 100 * 1024, "{resident} KiB resident");
    daemon.rests(Duration::from_millis(1500));
    println!("{GUESTS} idle devices: {threads} threads, {resident} KiB resident, no wake-ups");
    drivers.iter_mut().for_each(ask);
    drop(drivers);
    // Any of them works, the last as well as the first.
    for guest in [1, 7, GUESTS - 1] {
        ask(&mut driver(&socket(guest), RingLayout::Split));
    }
    assert_eq!(daemon.status("Threads:"), threads, "nothing starts a thread");
    assert_eq!(daemon.terminate().code(), Some(0));
}
