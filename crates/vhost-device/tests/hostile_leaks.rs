//! Ten thousand front-ends that come, do something or nothing, and go: the daemon has as many descriptors, mappings and
//! threads afterwards as before, and no more memory. Counted in a process of its own.
mod support;

use std::os::fd::{AsFd, BorrowedFd};

use support::process::ready;
use support::*;
use vhost_user::{FrontendEndpoint, flags};
use virtio_testkit::{RingLayout, TestRam, VhostUserDriver};

const CONNECTS: u32 = 10_000;

fn connect(path: &std::path::Path) -> FrontendEndpoint {
    let endpoint = FrontendEndpoint::connect(path).unwrap();
    // Nothing that this test sends is so much that the socket is full.
    endpoint.stream().set_nonblocking(false).unwrap();
    endpoint
}

/// One of them.
fn visit(path: &std::path::Path, n: u32, files: &[BorrowedFd<'_>]) {
    let mut endpoint = connect(path);
    endpoint.set_timeout(SOON);
    match n % 8 {
        // A whole conversation.
        0 => {
            let _ = endpoint.get_features();
        }
        1 => {
            let protocol = endpoint.get_protocol_features().unwrap_or_default();
            let _ = endpoint.set_protocol_features(protocol);
            let _ = endpoint.set_vring_call(0, Some(files[0]));
            let _ = endpoint.set_vring_err(0, Some(files[0]));
            let _ = endpoint.set_backend_req_fd(files[1]);
        }
        // Half a message, with descriptors; and one with more than it has; and noise.
        2 => drop(endpoint.send_raw(&[5, 0, 0, 0, 1], files)),
        3 => drop(endpoint.send(n % 46, flags::NEED_REPLY, &[&[0; 8]], files)),
        4 => drop(endpoint.send_raw(&[0xff; 64], files)),
        // Memory that is taken away by the end of the connection.
        5 => {
            let body = [1_u64, 0, 0x10_0000, 0x7000_0000, 0].map(u64::to_ne_bytes).concat();
            let _ = endpoint.send(5, 0, &[&body], &files[..1]);
            let _ = endpoint.get_features();
        }
        // Asks and does not wait for the answer.
        6 => drop(endpoint.send(1, 0, &[], &[])),
        _ => {}
    }
}

#[test]
fn ten_thousand_connections_leave_nothing_behind() {
    let dir = TempDir::new();
    let path = dir.path().join("socket");
    let daemon = ready(&["--socket-path", path.to_str().unwrap()]);
    let ram = TestRam::new(&[(0, 1 << 20)]);
    let (socket, _other_end) = std::os::unix::net::UnixStream::pair().unwrap();
    let files = [ram.fd(), socket.as_fd(), ram.fd()];
    let used = || {
        // The last front-end's end has been noticed when the next one is served.
        let mut driver = VhostUserDriver::connect(&path, options(RingLayout::Split)).unwrap();
        assert_eq!(ask(&mut driver, 0, b"well"), b"well");
        driver.reset().unwrap();
        drop(driver);
        eventually("the end of the connection", || daemon.mappings_of("memfd") == 0);
        // The connection's other files go a moment later.
        let (mut fds, mut same) = (daemon.count("fd"), 0);
        while same < 50 {
            std::thread::sleep(std::time::Duration::from_millis(4));
            let now = daemon.count("fd");
            same = if now == fds { same + 1 } else { 0 };
            fds = now;
        }
        (fds, daemon.count("task"), daemon.status("VmRSS:"))
    };
    // What is used lazily is used by now.
    (0..500).for_each(|n| visit(&path, n, &files));
    let (fds, threads, memory) = used();
    (0..CONNECTS).for_each(|n| visit(&path, n, &files));
    let after = used();
    assert_eq!((after.0, after.1), (fds, threads), "descriptors, threads");
    // In KiB. A byte of each connection would be 10, a kept message or descriptor table far more.
    assert!(after.2 < memory + 512, "{memory} KiB before, {} after", after.2);
}
