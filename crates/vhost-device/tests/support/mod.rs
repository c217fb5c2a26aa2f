//! A daemon in the test's own process, and requests to its echo device.
#![allow(unreachable_pub, dead_code, reason = "shared by test crates, none of which uses all")]
pub mod echo;
pub mod process;

use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost_device::{Daemon, DaemonError, DaemonOptions, Endpoint, Stopper};
use virtio_testkit::{RingLayout, TestRam, VhostUserDriver, VhostUserOptions};

pub use echo::Echo;
pub use virtio_testkit::daemon::TempDir;

/// For whatever should happen soon; long, because test machines are slow.
pub const SOON: Duration = Duration::from_secs(60);
/// For whatever should not happen at all.
pub const NEVER: Duration = Duration::from_millis(100);

/// A daemon on a thread of its own.
pub struct TestDaemon {
    dir: TempDir,
    stopper: Stopper,
    thread: Option<JoinHandle<Result<(), DaemonError>>>,
}

impl TestDaemon {
    /// One guest, an echo device with 8 bytes of configuration space.
    pub fn start() -> TestDaemon {
        TestDaemon::with(1, || Echo::new(8))
    }

    pub fn with(guests: usize, make: impl Fn() -> Echo + Send + 'static) -> TestDaemon {
        TestDaemon::with_options(guests, DaemonOptions::default(), make)
    }

    pub fn with_options(
        guests: usize,
        options: DaemonOptions,
        make: impl Fn() -> Echo + Send + 'static,
    ) -> TestDaemon {
        let dir = TempDir::new();
        let endpoints = (0..guests).map(|i| Endpoint::Path(dir.path().join(format!("s{i}")))).collect();
        let (sender, receiver) = channel();
        let thread = std::thread::spawn(move || {
            let daemon = Daemon::new(endpoints, options, |_| Ok(make()))?;
            sender.send(daemon.stopper()).unwrap();
            daemon.serve()
        });
        let stopper = receiver.recv().expect("the daemon starts");
        TestDaemon { dir, stopper, thread: Some(thread) }
    }

    pub fn socket(&self, guest: usize) -> PathBuf {
        self.dir.path().join(format!("s{guest}"))
    }

    /// A driver that took everything QEMU takes, running.
    pub fn driver(&self, guest: usize, layout: RingLayout) -> VhostUserDriver {
        VhostUserDriver::connect(self.socket(guest), options(layout)).unwrap()
    }

    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Ends the daemon and returns how it ended.
    pub fn stop(mut self) -> Result<(), DaemonError> {
        self.stopper.stop();
        self.thread.take().unwrap().join().expect("the daemon does not panic")
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.stopper.stop();
        let ended = thread.join().expect("the daemon does not panic");
        if !std::thread::panicking() {
            ended.expect("the daemon ends in order");
        }
    }
}

/// Small memory, small rings.
pub fn options(layout: RingLayout) -> VhostUserOptions {
    VhostUserOptions { queue_size: 16, ram: TestRam::spread(2, 1 << 20), ..VhostUserOptions::new(layout) }
}

/// Makes a request available and kicks.
pub fn submit(driver: &mut VhostUserDriver, queue: usize, request: &[u8]) -> u16 {
    let chain = [driver.ram().readable(request), driver.ram().writable(64)];
    let id = driver.ring(queue).add(&chain);
    driver.kick(queue);
    id
}

/// The bytes of the next answer.
#[track_caller]
pub fn answer(driver: &mut VhostUserDriver, queue: usize) -> u32 {
    driver.wait_used(queue, SOON).expect("an answer").len
}

/// Sends a request and returns the answer.
#[track_caller]
pub fn ask(driver: &mut VhostUserDriver, queue: usize, request: &[u8]) -> Vec<u8> {
    let chain = [driver.ram().readable(request), driver.ram().writable(64)];
    let id = driver.ring(queue).add(&chain);
    driver.kick(queue);
    let used = driver.wait_used(queue, SOON).expect("an answer");
    assert_eq!(used.id, id);
    let mut data = driver.ram().written(&chain);
    data.truncate(used.len as usize);
    data
}

/// Waits until something holds.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
