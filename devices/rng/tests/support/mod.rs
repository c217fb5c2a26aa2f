//! Runs the daemon for wire tests: a directory of its own, readiness, signals, the end.
#![allow(dead_code, reason = "each test binary uses what it needs")]
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};

/// Longer than anything takes.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// A directory that ends with the test.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Directory {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("rng-wire-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a new directory");
        Directory(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("the directory");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-rng");

/// Runs the daemon to its end, which has to come by itself.
pub(crate) fn run(args: &[&str]) -> Output {
    Command::new(DAEMON).args(args).stdin(Stdio::null()).output().expect("the daemon starts")
}

/// A running daemon.
pub(crate) struct Daemon(Child);

impl Daemon {
    /// Starts it on a socket and waits for its word that it is ready. The shell makes descriptor 3 of our pipe: its
    /// number is certain, and no other child of this process gets it.
    pub(crate) fn start(socket: &Path, args: &[&str]) -> Daemon {
        let socket = socket.to_str().expect("a path in UTF-8");
        let script = r#"exec "$0" --ready-fd 3 --log-level warn "$@" 3>&1 >&2"#;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, DAEMON, "--socket-path", socket]).args(args);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the daemon starts");
        let mut word = [0; 7];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut word).expect("it gets ready");
        assert_eq!(&word, b"READY=1");
        Daemon(child)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("our child").is_none()
    }

    pub(crate) fn kill(mut self) {
        self.0.kill().expect("our child");
        self.0.wait().expect("our child");
    }

    pub(crate) fn terminate(mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.0), Signal::TERM).expect("our child");
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.0.try_wait().expect("our child") {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A driver with everything that the daemon offers.
pub(crate) fn connect(socket: &Path, layout: RingLayout) -> VhostUserDriver {
    connect_with(socket, VhostUserOptions::new(layout))
}

/// A driver that wants something else.
pub(crate) fn connect_with(socket: &Path, options: VhostUserOptions) -> VhostUserDriver {
    VhostUserDriver::connect(socket, options).expect("a device that works")
}

/// One request and its answer.
pub(crate) fn ask(driver: &mut VhostUserDriver, len: u32) -> Vec<u8> {
    let buf = driver.ram().writable(len);
    let id = driver.ring(0).add(&[buf]);
    driver.kick(0);
    let used = driver.wait_used(0, SOON).expect("an answer");
    assert_eq!(used.id, id);
    let mut bytes = driver.ram().contents(&buf);
    assert!(used.len >= 1 && used.len <= len);
    bytes.truncate(used.len as usize);
    driver.ram().free(buf.addr);
    bytes
}
