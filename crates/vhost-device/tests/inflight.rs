//! In-flight tracking over the socket: a daemon that is killed with requests outstanding, and one that is started in its
//! place and is handed the buffer. The daemon is a process of its own, the driver a front-end that outlives it.
mod support;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::Signal;
use support::process::{Process, ready};
use support::*;
use vhost_user::{Error, InflightArea, ProtocolFeatures};
use virtio_testkit::{Buf, RingLayout, VhostUserDriver, VhostUserOptions};
use vm_virtio::{Features, InflightRegion, Status};

/// What QEMU's block device wants.
fn tracked(layout: RingLayout, with: Features) -> VhostUserOptions {
    let options = options(layout);
    VhostUserOptions { protocol: options.protocol | ProtocolFeatures::INFLIGHT_SHMFD, with, ..options }
}

/// A daemon that can be killed, and the driver that stays.
struct World {
    process: Process,
    _dir: TempDir,
    socket: PathBuf,
    driver: VhostUserDriver,
    next: u32,
    /// By id: the request, and its chain.
    out: HashMap<u16, (Vec<u8>, [Buf; 2])>,
    answered: Vec<u32>,
}

fn number(request: &[u8]) -> u32 {
    std::str::from_utf8(&request[1..]).unwrap().parse().unwrap()
}

impl World {
    fn start(layout: RingLayout, with: Features) -> World {
        let dir = TempDir::new();
        let socket = dir.path().join("s");
        let process = ready(&["-s", socket.to_str().unwrap()]);
        let driver = VhostUserDriver::connect(&socket, tracked(layout, with)).unwrap();
        assert!(driver.protocol_features().contains(ProtocolFeatures::INFLIGHT_SHMFD));
        World { process, _dir: dir, socket, driver, next: 0, out: HashMap::new(), answered: Vec::new() }
    }

    /// A request that starts with this letter, if there is room.
    fn submit(&mut self, letter: char) {
        if self.driver.ring(0).free_slots() < 2 {
            return;
        }
        let request = format!("{letter}{}", self.next).into_bytes();
        self.next += 1;
        let chain = [self.driver.ram().readable(&request), self.driver.ram().writable(64)];
        let id = self.driver.ring(0).add(&chain);
        assert!(self.out.insert(id, (request, chain)).is_none());
        self.driver.kick(0);
    }

    /// Takes what is used; the test kit looks whether it was out. How many.
    fn collect(&mut self) -> usize {
        let used = self.driver.ring(0).drain();
        for used in &used {
            let (request, chain) = self.out.remove(&used.id).expect("one that is out");
            if used.len > 0 {
                let mut data = self.driver.ram().written(&chain);
                data.truncate(used.len as usize);
                // What the device keeps until the ring is stopped it answers otherwise.
                let expected: &[u8] = if request[0] == b'H' { b"held" } else { &request };
                assert_eq!(data, expected);
            }
            self.answered.push(number(&request));
        }
        used.len()
    }

    /// How many the device keeps until the ring is stopped.
    fn held(&self) -> usize {
        self.out.values().filter(|(request, _)| request[0] == b'H').count()
    }

    fn kill(&mut self) {
        self.process.signal(Signal::KILL);
        self.process.ended();
    }

    fn restart(&mut self) {
        self.process = ready(&["-s", self.socket.to_str().unwrap()]);
        self.driver.reconnect(&self.socket).unwrap();
    }

    fn wait_for(&mut self, out: usize) {
        let deadline = Instant::now() + SOON;
        while self.out.len() > out {
            assert!(Instant::now() < deadline, "unanswered: {:?}", self.out);
            self.collect();
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The ring stops in order, and every request was answered once.
    fn finish(mut self) {
        // Nothing tells when the daemon has taken what it keeps; what is not taken when the ring stops stays in it.
        let deadline = Instant::now() + SOON;
        loop {
            self.driver.stop().unwrap();
            self.collect();
            if self.out.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "lost: {:?}", self.out);
            self.driver.start_ring(0).unwrap();
            self.driver.endpoint().set_vring_enable(0, true).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        self.answered.sort_unstable();
        assert!(self.answered.iter().copied().eq(0..self.next), "{:?}", self.answered);
        self.driver.ring(0).check_untouched().unwrap();
    }
}

fn all() -> impl Iterator<Item = (RingLayout, Features)> {
    RingLayout::ALL
        .into_iter()
        .flat_map(|layout| [Features::empty(), Features::IN_ORDER].map(|features| (layout, features)))
}

/// Some requests are answered behind others that the device has for long: what an index alone cannot tell.
#[test]
fn policy_inflight_requests_outlive_a_daemon_that_is_killed_with_them_outstanding() {
    for (layout, features) in all() {
        let mut world = World::start(layout, features);
        for _ in 0..3 {
            // The device keeps those until the ring is stopped.
            world.submit('H');
            world.submit('e');
        }
        if features.is_empty() {
            world.wait_for(3);
        } else {
            std::thread::sleep(NEVER);
        }
        for _ in 0..3 {
            world.kill();
            // The guest does not notice.
            world.submit('e');
            world.submit('H');
            world.restart();
            if features.is_empty() {
                world.wait_for(world.held());
            }
        }
        world.finish();
    }
}

/// Whatever the daemon is doing. The driver fills the ring all the time.
#[test]
fn policy_inflight_a_busy_daemon_is_killed_at_any_moment() {
    for (layout, features) in all() {
        let mut world = World::start(layout, features);
        for round in 0..8u64 {
            let until = Instant::now() + Duration::from_micros(500 + 700 * round);
            while Instant::now() < until {
                world.submit('e');
                if round % 2 == 0 {
                    world.collect();
                }
            }
            world.kill();
            world.restart();
        }
        world.wait_for(0);
        world.submit('e');
        world.wait_for(0);
        world.finish();
    }
}

/// Connection and daemon may end independently: here the daemon lives.
#[test]
fn a_front_end_that_comes_back_hands_over_the_same_buffer() {
    for (layout, features) in all() {
        let mut world = World::start(layout, features);
        for _ in 0..3 {
            world.submit('H');
            world.submit('e');
            world.driver.reconnect(&world.socket).unwrap();
            // The former connection has ended with an answer for all that it took, the new one takes the rest.
            if features.is_empty() {
                world.wait_for(world.held());
            }
        }
        world.finish();
    }
}

#[test]
fn nothing_is_in_flight_after_a_reset() {
    for layout in RingLayout::ALL {
        let mut world = World::start(layout, Features::empty());
        let submitted = |world: &mut World| {
            world.submit('H');
            world.submit('e');
            world.wait_for(1);
        };
        submitted(&mut world);
        world.kill();
        world.restart();
        let kept = world.driver.inflight().take();
        world.driver.reset().unwrap();
        world.out.clear();
        // Also if the front-end keeps the buffer, which QEMU does not.
        *world.driver.inflight() = kept;
        world.driver.start().unwrap();
        let first = world.next;
        submitted(&mut world);
        world.driver.stop().unwrap();
        world.collect();
        assert!(world.out.is_empty());
        assert_eq!(world.answered.iter().filter(|number| **number >= first).count(), 2);
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: Result<T, Error>) {
    assert!(matches!(outcome, Err(Error::Refused { .. })), "{outcome:?}");
}

#[test]
fn buffers_that_do_not_fit_are_refused_and_the_connection_goes_on() {
    let daemon = TestDaemon::start();
    let options = tracked(RingLayout::Split, Features::empty());
    let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
    let endpoint = driver.endpoint();
    for (queues, size) in [(0, 16), (1, 0), (2, 16), (1, 257), (u16::MAX, u16::MAX)] {
        refused(endpoint.get_inflight_fd(queues, size));
    }
    let (area, file) = endpoint.get_inflight_fd(1, 256).unwrap();
    for wrong in [
        InflightArea { mmap_size: area.mmap_size - 1, ..area },
        InflightArea { num_queues: 0, ..area },
        InflightArea { num_queues: 2, ..area },
        InflightArea { queue_size: 257, ..area },
        InflightArea { mmap_offset: 8, ..area },
        InflightArea { mmap_offset: 4, ..area },
        InflightArea { mmap_offset: 1 << 62, ..area },
        InflightArea { mmap_offset: u64::MAX - 7, mmap_size: u64::MAX, ..area },
    ] {
        refused(endpoint.set_inflight_fd(wrong, file.as_fd()));
    }
    let read_only =
        std::fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
    refused(endpoint.set_inflight_fd(area, read_only.as_fd()));
    refused(endpoint.set_inflight_fd(area, std::io::stdin().as_fd()));
    endpoint.set_inflight_fd(area, file.as_fd()).unwrap();
    assert_eq!(ask(&mut driver, 0, b"well"), b"well");
}

/// A buffer of our own, with these words.
fn buffer(words: impl IntoIterator<Item = u64>) -> (InflightArea, OwnedFd) {
    let size = InflightRegion::bytes_for(16) as u64;
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).take(size as usize).collect();
    rustix::io::pwrite(&file, &bytes, 0).unwrap();
    (InflightArea { mmap_size: size, mmap_offset: 0, num_queues: 1, queue_size: 16 }, file)
}

/// What is in the buffer is a front-end's word: a ring that cannot go on with it is broken, the daemon and everybody
/// else are not.
#[test]
fn policy_1_a_buffer_of_noise_breaks_its_ring_and_nothing_else() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut other = daemon.driver(1, RingLayout::Split);
    let mut x = 0x2545_f491_4f6c_dd1du64;
    let mut noise = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    for round in 0..40 {
        let layout = RingLayout::ALL[round % 2];
        let endpoint = vhost_user::FrontendEndpoint::connect(daemon.socket(0)).unwrap();
        let mut driver = VhostUserDriver::attach(endpoint, tracked(layout, Features::empty())).unwrap();
        let head = if round < 20 { noise() } else { 1 | 16 << 16 };
        let mask = if round % 4 < 2 { u64::MAX } else { 0x000f_000f_000f_0001 };
        let words: Vec<u64> = [0, head].into_iter().chain((0..70).map(|_| noise() & mask)).collect();
        *driver.inflight() = Some(buffer(words));
        // With noise the ring does not start, or has a fault, or the noise was good enough.
        let started = driver.start().is_ok();
        if started && !driver.ring_failed(0) {
            driver.kick_anyway(0);
        }
        assert_eq!(ask(&mut other, 0, b"still here"), b"still here");
        if driver.reset().is_ok() {
            driver.start().unwrap();
            assert_eq!(ask(&mut driver, 0, b"again"), b"again", "round {round}");
        }
    }
}

/// The front-end's own file, without a seal.
#[test]
fn policy_6_a_buffer_that_is_truncated_fails_its_device_and_nothing_else() {
    for layout in RingLayout::ALL {
        let dir = TempDir::new();
        let base = dir.path().join("s");
        let mut process = ready(&["-s", base.to_str().unwrap(), "-c", "2"]);
        let socket = |i: u32| dir.path().join(format!("s{i}"));
        let mut other = VhostUserDriver::connect(socket(1), options(layout)).unwrap();
        let endpoint = vhost_user::FrontendEndpoint::connect(socket(0)).unwrap();
        let mut driver = VhostUserDriver::attach(endpoint, tracked(layout, Features::empty())).unwrap();
        *driver.inflight() = Some(buffer([]));
        driver.start().unwrap();
        assert_eq!(ask(&mut driver, 0, b"one"), b"one");
        let (_, file) = driver.inflight().as_ref().unwrap();
        ftruncate(file, 0).unwrap();
        submit(&mut driver, 0, b"two");
        eventually("a device that needs its reset", || {
            driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET)
        });
        assert_eq!(ask(&mut other, 0, b"still here"), b"still here");
        driver.reset().unwrap();
        driver.start().unwrap();
        assert_eq!(ask(&mut driver, 0, b"three"), b"three");
        assert!(process.is_running(), "the daemon lives");
    }
}
