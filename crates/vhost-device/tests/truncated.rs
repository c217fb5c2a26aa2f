//! Failure policy 6: a front-end truncates its memory files while it is served. The daemon is a process of its own: if it
//! dies, the test sees it.
mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use support::process::{Process, ready};
use support::*;
use virtio_testkit::{Buf, RingLayout, TestRam, VhostUserDriver, VhostUserOptions};
use vm_virtio::{GuestAddress, Status};

const PAGE: u64 = 0x1000;
/// Two regions that stay, and behind them in the file a third that is truncated.
const KEPT: u64 = 1 << 20;
const LOST: u64 = 0x4000_0000;
const PAGES: u64 = 4;

/// No ring is in the third region: its pages are taken.
fn memory() -> TestRam {
    let ram = TestRam::new(&[(0, KEPT), (2 * KEPT, KEPT), (LOST, PAGES * PAGE)]);
    let mut taken = 0;
    while taken < PAGES {
        taken += u64::from(ram.alloc(PAGE - 16, 16).0 >= LOST);
    }
    ram
}

/// Keeps so many pages of the third region.
fn truncate(ram: &TestRam, pages: u64) {
    rustix::fs::ftruncate(ram.fd(), 2 * KEPT + pages * PAGE).unwrap();
}

fn needs_reset(driver: &mut VhostUserDriver) -> bool {
    let status = Status::from_bits_retain(driver.endpoint().get_status().unwrap());
    status.contains(Status::DEVICE_NEEDS_RESET)
}

struct Guests {
    process: Process,
    dir: TempDir,
    bad: VhostUserDriver,
    good: VhostUserDriver,
}

impl Guests {
    fn start(layout: RingLayout) -> Guests {
        let dir = TempDir::new();
        let base = dir.path().join("s");
        let control = dir.path().join("control");
        let arguments =
            ["-s", base.to_str().unwrap(), "-c", "2", "--control-socket", control.to_str().unwrap()];
        let process = ready(&arguments);
        let socket = |i: u32| dir.path().join(format!("s{i}"));
        let theirs = VhostUserOptions { ram: memory(), ..options(layout) };
        let mut bad = VhostUserDriver::connect(socket(0), theirs).unwrap();
        let mut good = VhostUserDriver::connect(socket(1), options(layout)).unwrap();
        assert_eq!(ask(&mut bad, 0, b"one"), b"one");
        assert_eq!(ask(&mut good, 0, b"two"), b"two");
        Guests { process, dir, bad, good }
    }

    /// How often each guest lost memory.
    fn lost(&self) -> [u64; 2] {
        let mut control = UnixStream::connect(self.dir.path().join("control")).unwrap();
        control.write_all(b"{\"request\":\"stats\"}\n").unwrap();
        let mut line = String::new();
        BufReader::new(control).read_line(&mut line).unwrap();
        let stats: serde_json::Value = serde_json::from_str(&line).unwrap();
        [0, 1].map(|guest: usize| stats["ok"]["guests"][guest]["failures"]["memory"].as_u64().unwrap())
    }

    /// The process lives and the other guest does not notice; the one that lost its memory does, resets, and works
    /// with new memory.
    #[track_caller]
    fn check_and_recover(&mut self) {
        eventually("the device needs a reset", || needs_reset(&mut self.bad));
        eventually("the front-end is told", || self.bad.ring_failed(0));
        assert!(matches!(self.lost(), [(1..), 0]), "counted with its guest: {:?}", self.lost());
        assert_eq!(ask(&mut self.good, 0, b"still"), b"still");
        assert!(!needs_reset(&mut self.good) && !self.good.ring_failed(0));
        self.bad.reset().unwrap();
        // The file has all its bytes again, and is mapped anew.
        truncate(self.bad.ram(), PAGES);
        self.bad.start().unwrap();
        assert_eq!(ask(&mut self.bad, 0, b"again"), b"again");
        assert!(!needs_reset(&mut self.bad));
        assert_eq!(ask(&mut self.good, 0, b"fine"), b"fine");
        assert!(self.process.is_running(), "the daemon lives");
    }
}

/// The buffers of a request are gone, its ring is not: the request is answered, and the device needs a reset.
#[test]
fn policy_6_buffers_in_a_truncated_file_fail_their_device_only() {
    for layout in RingLayout::ALL {
        for (readable, writable) in [(0, PAGE), (PAGE, 0), (0, PAGE - 8), (2 * PAGE, 3 * PAGE)] {
            let mut guests = Guests::start(layout);
            let bad = &mut guests.bad;
            let ram = bad.ram().clone();
            ram.write(GuestAddress(LOST + readable), b"hello");
            let readable = Buf::readable(GuestAddress(LOST + readable), 16);
            bad.ring(0).add(&[readable, Buf::writable(GuestAddress(LOST + writable), 16)]);
            truncate(&ram, 1);
            bad.kick(0);
            eventually("the request is answered", || bad.interrupts(0) > 1);
            guests.check_and_recover();
        }
    }
}

/// Rings, too: whatever the lane reads from them then is void.
#[test]
fn policy_6_rings_in_a_truncated_file_fail_their_device_only() {
    for layout in RingLayout::ALL {
        let mut guests = Guests::start(layout);
        let bad = &mut guests.bad;
        bad.stop().unwrap();
        let ram = bad.ram().clone();
        let user = |page| ram.user_addr(GuestAddress(LOST + page * PAGE));
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let endpoint = bad.endpoint();
        let addr = vhost_user::VringAddr {
            index: 0,
            flags: 0,
            desc: user(0),
            used: user(1),
            avail: user(2),
            log: 0,
        };
        endpoint.set_vring_addr(&addr).unwrap();
        endpoint.set_vring_base(0, if layout == RingLayout::Packed { 0x8000_8000 } else { 0 }).unwrap();
        endpoint.set_vring_kick(0, Some(kick.as_fd())).unwrap();
        endpoint.set_vring_enable(0, true).unwrap();
        truncate(&ram, 0);
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        guests.check_and_recover();
    }
}

/// The front-end truncates everything and goes away: what ends the connection touches the rings once more.
#[test]
fn policy_6_a_front_end_that_truncates_everything_and_vanishes_ends_nobody() {
    for layout in RingLayout::ALL {
        let mut guests = Guests::start(layout);
        submit(&mut guests.bad, 0, &[echo::ask::HOLD]);
        let ram = guests.bad.ram().clone();
        // No access of the test's own to that memory from here on.
        rustix::fs::ftruncate(ram.fd(), 0).unwrap();
        guests.bad.endpoint().stream().shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(ask(&mut guests.good, 0, b"still"), b"still");
        let socket = guests.dir.path().join("s0");
        let mut next = VhostUserDriver::connect(socket, options(layout)).unwrap();
        assert_eq!(ask(&mut next, 0, b"new"), b"new");
        assert!(guests.process.is_running(), "the daemon lives");
    }
}

/// A signal that was sent is about nobody's memory.
#[test]
fn policy_6_a_sigbus_that_is_not_ours_ends_the_process() {
    let mut guests = Guests::start(RingLayout::Split);
    guests.process.signal(rustix::process::Signal::BUS);
    let ended = guests.process.ended();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended), Some(libc::SIGBUS));
}
